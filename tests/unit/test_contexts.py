"""Models of a shorter context than the policy's: what is trained on fits into all of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from truing.context import Context, use
from truing.core import hooks
from truing.core.generate import generate
from truing.core.judging.rewards import score_model
from truing.core.modelfiles.reach import context_of
from truing.core.modelfiles.stock import quiet
from truing.core.passes.scoring import ScoreHead, step_scores
from truing.core.tiny import tiny_config, tiny_tokenizer
from truing.core.trunk import Trunk
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.tables import Row, Table

SHORT = 48
PAIRS = [{"prompt": "say a", "chosen": "a " * n, "rejected": "b"} for n in (1, 30)]
ONCE = {"steps": 1, "batch": 2, "lr": 1e-3}
DRAWN = {**ONCE, "answers": 2, "max_tokens": 4}  # of three bytes each, where they are no letters
RULE = {"letters": {"use": "share_of", "letters": "abcdefgh"}}
ANSWER: Row = {"prompt": "p", "completion": "b"}
PROMPTS = [{"prompt": "say a"}, {"prompt": "say a " * 6}]


@pytest.fixture(scope="module")
def short(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(tiny_path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = SHORT
    (folder / "config.json").write_text(json.dumps(config))
    return Model.open(folder)


def trained(
    name: str, model: Path, rows: list[Row], folder: Path, **more: object
) -> Mapping[str, object]:
    """All that a run says of itself."""
    kind = "pair" if "chosen" in rows[0] else "prompt"
    with use(Context(folder=folder, seed=1)) as context:
        methods[name](Model.open(model), Table(kind, rows), **more)
    return {n: v for metric in context.metrics for n, v in metric.items()}


@pytest.mark.parametrize(("name", "role"), [("dpo", "reference"), ("dckd", "teacher")])
def test_rows_are_cut_to_the_shortest_context(
    name: str,
    role: str,
    short: Model,
    tiny_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = trained(name, tiny_path, PAIRS, tmp_path, **{role: short}, **ONCE)
    assert told["limit"] == SHORT and told["limit_of"] == role and told["cut"] == 1
    assert f"{name}: the {role} reads at most {SHORT} tokens" in capsys.readouterr().err


def test_answers_leave_room_in_the_contexts_of_critic_and_reward_model(
    short: Model, tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = trained("ppo", tiny_path, PROMPTS, tmp_path, critic=short, rewards=RULE, **DRAWN)
    assert told["limit_of"] == "critic" and told["left_out_long"] == 1
    judge = ScoreHead(128).added_to(short, tmp_path / "head")
    told = trained("rloo", tiny_path, PROMPTS, tmp_path / "2", reward_model=judge, **DRAWN)
    assert told["limit_of"] == "reward model" and told["left_out_long"] == 1
    assert f"the reward model reads at most {SHORT} tokens" in capsys.readouterr().err


def test_a_row_that_is_too_long_to_be_scored_is_named(short: Model, tmp_path: Path) -> None:
    reward, text = ScoreHead(128).added_to(short, tmp_path / "head"), "a" * SHORT
    rows: list[Row] = [{"prompt": "p", "completion": "b"}, {"prompt": "p", "completion": text}]
    with pytest.raises(InputError, match=f"does not fit into the model's context of {SHORT}") as e:
        score_model(reward, rows)
    assert e.value.where == f"{reward.name} row 2" and e.value.fix
    steps: list[Row] = [{"prompt": "p", "steps": ["b"]}, {"prompt": "p", "steps": [text]}]
    with pytest.raises(InputError, match=f"does not fit into the model's context of {SHORT}") as e:
        step_scores(reward, steps, "\n")
    assert e.value.where == f"{reward.name} row 2"


def test_tokens_beyond_the_embeddings_are_told(tiny_path: Path, tmp_path: Path) -> None:
    """Those that were added without resizing ended in an IndexError, on a GPU in an assertion."""
    folder = shutil.copytree(tiny_path, tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|more|>")
    tokenizer.save_pretrained(folder)
    model = Model.open(folder)
    pairs, ids = Table("pair", PAIRS), [[5, 259]]
    calls: list[Callable[[], object]] = [
        lambda: generate(model, ["q"], max_tokens=1),
        lambda: methods["preference"](model, pairs),
        lambda: score_model(ScoreHead(128).added_to(model, tmp_path / "head"), [ANSWER]),
        lambda: hooks.capture(model.load_module().module, ["embedding"], ids),
        lambda: Trunk(model.load_module().module, 1).states(ids),
    ]
    for call in calls:
        with pytest.raises(InputError, match="with 259, does not have") as caught:
            call()
        assert caught.value.seen == 259 and caught.value.fix


def test_longer_contexts_are_not_told(tiny_path: Path, tmp_path: Path) -> None:
    told = trained("dpo", tiny_path, PAIRS, tmp_path, reference=Model.open(tiny_path), **ONCE)
    assert "limit" not in told and "cut" not in told


ENCODER = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": SHORT, "num_labels": 1,
}  # fmt: skip


def classifier(kind: str, folder: Path) -> Model:
    """A reward model of transformers' own kind with a short context."""
    torch.manual_seed(0)
    if kind == "llama":
        config = tiny_config()
        config.num_labels, config.max_position_embeddings = 1, SHORT
        config.num_hidden_layers = 1
        module = LlamaForSequenceClassification(config)
    elif kind == "bert":
        module = BertForSequenceClassification(BertConfig(**ENCODER, pad_token_id=2))
    else:
        module = RobertaForSequenceClassification(RobertaConfig(**ENCODER, pad_token_id=2))
    with quiet():
        module.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Model.open(folder)


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
def test_a_classifier_scores_what_fits_and_names_what_does_not(kind: str, tmp_path: Path) -> None:
    reward = classifier(kind, tmp_path / kind)
    head = len(tiny_tokenizer().apply_chat_template(
        [{"role": "user", "content": ""}], add_generation_prompt=True
    )["input_ids"])  # fmt: skip
    room = SHORT - (3 if kind == "roberta" else 0)  # its positions begin behind padding's
    assert context_of(reward.load_module().module) == room
    fits: Row = {"prompt": "a" * (room - head - 2), "completion": "b"}  # with the token of its end
    long: Row = {**fits, "completion": "bc"}
    assert len(score_model(reward, [fits])) == 1
    with pytest.raises(InputError, match=f"a row of {room + 1} tokens.*context of {room}") as error:
        score_model(reward, [fits, long])
    assert error.value.where.endswith("row 2") and reward.name in error.value.where
    assert error.value.fix
