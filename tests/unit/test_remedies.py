"""What users of training methods meet most: the error says what to do, in names they can type."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from truing.context import Context, use
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.tables import Row, Table

PAIR: Row = {"prompt": "p", "chosen": "yes", "rejected": "no"}
GROUP: Row = {"prompt": "p", "completions": ["yes", "no"], "scores": [1.0, 0.0]}
LONG = "very " * 900


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


def refused(name: str, folder: Path, *inputs: Any, **settings: Any) -> InputError:
    """The error of a method that is called so."""
    with use(Context(folder=folder)), pytest.raises(InputError) as caught:
        methods[name](*inputs, steps=1, **settings)
    return caught.value


@pytest.mark.parametrize(
    ("name", "row", "columns"),
    [
        ("train/dpo", {"prompt": "p", "completion": "yes"}, ["chosen", "rejected"]),
        ("train/kto", {"prompt": "p", "completion": "yes"}, ["label"]),
        ("train/rrhf", {"prompt": "p", "completion": "yes"}, ["completions", "scores"]),
        ("train/process_reward", {"prompt": "p", "completion": "yes"}, ["steps", "labels"]),
    ],
)
def test_wrong_rows_are_told_which_columns_to_have(
    name: str, row: Row, columns: list[str], model: Model, tmp_path: Path
) -> None:
    error = refused(name, tmp_path, model, Table("", [row] * 2))
    assert [c for c in columns if c not in error.fix] == [], str(error)


def test_a_column_that_is_missing_is_asked_for(model: Model, tmp_path: Path) -> None:
    error = refused("train/tpo", tmp_path, model, Table("pair", [PAIR] * 2))
    assert "needs the column 'gold'" in error.message
    assert error.fix == "Add it to each row"
    near = Table("pair", [{**PAIR, "golds": "yes"}] * 2)
    error = refused("train/tpo", tmp_path, model, near)
    assert error.fix == "Did you mean 'gold' by 'golds'?"
    some = Table("pair", [{**PAIR, "gold": "yes"}, PAIR])
    error = refused("train/tpo", tmp_path, model, some)
    assert "row 2" in error.where and error.fix == "Give every row a text there"


def test_no_reward_is_told_the_ways_to_give_one(model: Model, tmp_path: Path) -> None:
    error = refused("train/grpo", tmp_path, model, Table("prompt", [{"prompt": "p"}]))
    assert [w for w in ("principles", "reward_model", "rewards: {") if w not in error.fix] == []


def test_a_teacher_of_another_tokenizer(model: Model, tiny_path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_path, other)
    data = json.loads((other / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(data))
    rows = Table("example", [{"prompt": "p", "completion": "yes"}])
    error = refused("train/gkd", tmp_path, model, rows, teacher=Model.open(other))
    assert "differ in tokenizer" in error.message
    assert "one tokenizer and template" in error.fix and "one family" in error.fix


@pytest.mark.parametrize(
    ("name", "kind", "row", "fix"),
    [
        ("train/dpo", "pair", {**PAIR, "rejected": "yes"}, "Give pairs whose answers differ"),
        ("train/dpo", "pair", {**PAIR, "chosen": " "}, "Give answers with text"),
        ("train/dpo", "pair", {**PAIR, "prompt": LONG}, "Raise max_length"),
        ("train/rrhf", "group", {**GROUP, "scores": [1, 1]}, "Give scores that differ"),
        (
            "train/rrhf",
            "group",
            {**GROUP, "completions": ["yes"], "scores": [1]},
            "Give two answers or more",
        ),
        (
            "train/sft",
            "unpaired",
            {"prompt": "p", "completion": "no", "label": False},
            "Give some that are labelled as good",
        ),
    ],
)
def test_nothing_left_to_train_on(
    name: str, kind: str, row: Row, fix: str, model: Model, tmp_path: Path
) -> None:
    error = refused(name, tmp_path, model, Table(kind, [row] * 2), max_length=200)
    assert "no row can be trained on of the 2" in error.message
    assert error.fix.startswith(fix), str(error)


def test_nothing_left_for_two_reasons(model: Model, tmp_path: Path) -> None:
    rows: list[Row] = [{**PAIR, "rejected": "yes"}, {**PAIR, "rejected": ""}]
    error = refused("train/dpo", tmp_path, model, Table("pair", rows))
    assert error.fix == "Give pairs whose answers differ. Give answers with text"


def test_answers_as_long_as_the_whole_row(model: Model, tmp_path: Path) -> None:
    data = Table("prompt", [{"prompt": "p"}])
    rewards = {"short": {"use": "max_words", "n": 4}}
    error = refused(
        "train/grpo", tmp_path, model, data, rewards=rewards, max_tokens=64, max_length=64
    )
    assert error.fix == "Raise max_length, or lower max_tokens"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"trainable_token_indices": [1]}, "embeddings of some tokens"),
        ({"alora_invocation_tokens": [1, 2]}, r"some tokens alone \(aLoRA\)"),
        ({}, "brings 'model.embed_tokens.token_adapter.trainable_tokens_delta'"),
    ],
)
def test_an_adapter_of_another_kind_says_how_to_use_it(
    change: dict[str, object], said: str, tiny_path: Path, tmp_path: Path
) -> None:
    config = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": str(tiny_path)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    save_file({name: torch.zeros(2, 128)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=said) as caught:
        Model.open(tmp_path)
    way = "trained without" if "aLoRA" in said else "merge_and_unload().save_pretrained("
    assert way in caught.value.fix


def test_a_plain_folder_is_no_saved_model(tiny_path: Path) -> None:
    with pytest.raises(InputError, match="not a saved model") as caught:
        Model.load(tiny_path)
    assert "Model.open" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("train/dpo", PAIR),
        ("train/sft", {"prompt": "p", "completion": "yes"}),
        ("train/grpo", {"prompt": "p"}),
    ],
)
def test_an_empty_prompt_of_a_model_without_template(
    name: str, row: Row, tiny_path: Path, tmp_path: Path
) -> None:
    plain = Path(shutil.copytree(tiny_path, tmp_path / "plain"))
    (plain / "chat_template.jinja").unlink()
    rewards = {"rewards": {"short": {"use": "max_words", "n": 4}}} if "grpo" in name else {}
    data = Table("", [row, row, {**row, "prompt": ""}])
    error = refused(name, tmp_path, Model.open(plain), data, **rewards)
    assert "the prompt is empty" in error.message and "row 3" in error.where
    assert "NAME?template=FILE" in error.fix


def test_a_model_that_is_nowhere_is_told_what_names_one() -> None:
    with pytest.raises(InputError, match="unknown model") as caught:
        Model.open("smollm2-135m-instuct")
    assert "Give a folder, owner/name" in caught.value.fix
    assert caught.value.fix.endswith("Did you mean 'smollm2-135m-instruct'?")
