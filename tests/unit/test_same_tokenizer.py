"""Tokenizers in the forms that libraries have saved them in: the same, and not the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from truing.core.batch import same_tokenizer
from truing.core.batch.same_tokenizer import same_tokens
from truing.core.modelfiles import loaded, lora
from truing.errors import InputError
from truing.merge.linear import linear
from truing.merge.mixture_of_experts import mixture_of_experts
from truing.merge.model_stock import model_stock
from truing.merge.ties import ties
from truing.models import Model

MERGES = [["t", "h"], ["th", "e"]]


@pytest.fixture
def written(tiny_path: Path, tmp_path: Path) -> Path:
    """The tiny model with two merges, as this version of the libraries writes it."""
    folder = shutil.copytree(tiny_path, tmp_path / "written")
    data = json.loads((folder / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    # In place of two letters, so that the ids stay those of the embeddings.
    for old, new in zip(sorted(vocab, key=vocab.get)[-2:], ("th", "the"), strict=True):
        vocab[new] = vocab.pop(old)
    data["model"]["merges"] = MERGES
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


def other_form(folder: Path, to: Path, **template: Any) -> Path:
    """A copy as older libraries wrote it: merges as texts, later settings left out."""
    shutil.copytree(folder, to)
    data = json.loads((to / "tokenizer.json").read_text())
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    data["model"].pop("ignore_merges", None)
    data["model"].pop("byte_fallback", None)
    data["added_tokens"][0]["special"] = False  # whether it is shown, not what it means
    (to / "tokenizer.json").write_text(json.dumps(data))
    path = to / "chat_template.jinja"
    text = path.read_text()
    path.unlink()
    config = json.loads((to / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": text}]
    config["chat_template"] = named if template.get("named") else text
    (to / "tokenizer_config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize("named", [False, True])
def test_two_forms_of_one_tokenizer(written: Path, tmp_path: Path, named: bool) -> None:
    old = Model.open(other_form(written, tmp_path / "old", named=named))
    new = Model.open(written)
    assert loaded.load_tokenizer(old).encode("the then") == loaded.load_tokenizer(new).encode(
        "the then"
    )
    same_tokens({"a": new, "b": old})
    same_tokens({"a": old, "b": new})
    merged = linear({"a": old, "b": new})
    assert merged.name == old.name


def test_equal_files_are_not_loaded(written: Path, tmp_path: Path, monkeypatch: Any) -> None:
    pair = Model.open(written), Model.open(shutil.copytree(written, tmp_path / "copy"))
    monkeypatch.setattr(loaded, "load_tokenizer", lambda model: pytest.fail("loaded"))
    monkeypatch.setattr(same_tokenizer, "facts_of", lambda model: pytest.fail("read"))
    same_tokens({"a": pair[0], "b": pair[1]})


def test_what_means_something_else_is_refused(written: Path, tmp_path: Path) -> None:
    model = Model.open(written)
    for i, change in enumerate(("merges", "vocab", "added", "split")):
        folder = other_form(written, tmp_path / str(i))
        path = folder / "tokenizer.json"
        data = json.loads(path.read_text())
        if change == "merges":
            data["model"]["merges"] = ["h e", "t he"]
            data["model"]["vocab"] = {
                {"th": "he"}.get(t, t): n for t, n in data["model"]["vocab"].items()
            }
        elif change == "vocab":
            vocab = data["model"]["vocab"]
            vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        elif change == "added":
            data["added_tokens"][1]["lstrip"] = True
        else:
            data["pre_tokenizer"]["add_prefix_space"] = True
        path.write_text(json.dumps(data))
        with pytest.raises(InputError, match=r"'a' and 'b' differ in tokenizer .*the tokenizer"):
            same_tokens({"a": model, "b": Model.open(folder)}, bare=True)


def test_templates(written: Path, tmp_path: Path) -> None:
    model = Model.open(written)
    other = shutil.copytree(written, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages }}")
    plain = shutil.copytree(written, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    trio = {"base": Model.open(plain), "a": model, "b": Model.open(other)}
    with pytest.raises(InputError, match=r"'a' and 'b' differ in .*the chat template"):
        same_tokens(trio, bare=True)
    with pytest.raises(InputError, match=r"'base' and 'a' differ in .*the chat template"):
        same_tokens({"base": trio["base"], "a": model})
    same_tokens({"base": trio["base"], "a": model}, bare=True)


def test_what_a_template_is_told_of_thinking(written: Path, tmp_path: Path) -> None:
    plain = Model.open(written)
    thinks = plain.thinking(True)
    for other in (plain, plain.thinking(False)):
        with pytest.raises(InputError, match=r"'a' and 'b' differ in .*\?thinking=true"):
            same_tokens({"a": thinks, "b": other})
    same_tokens({"a": thinks, "b": Model.open(f"{written}?thinking=true")})
    thinks.export(tmp_path / "exported")  # has it in its template
    same_tokens({"a": thinks, "b": Model.open(tmp_path / "exported")})
    (written / "chat_template.jinja").unlink()
    bare = Model.open(written)
    same_tokens({"base": bare, "a": thinks, "b": bare.thinking(True)}, bare=True)


def test_a_base_without_a_template_takes_the_experts(written: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(written, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    base, expert = Model.open(plain), Model.open(written)
    assert not loaded.load_tokenizer(base).chat_template
    both = {"base": base, "a": expert}
    made = [ties(base, {"a": expert}), model_stock(base, {"a": expert}), linear(both)]
    assert {merged.name for merged in made} == {"plain"}
    for merged in (*made, mixture_of_experts(both)):
        template = loaded.load_tokenizer(merged).chat_template
        assert template == loaded.load_tokenizer(expert).chat_template != ""


def test_what_lies_beside_an_adapter_is_taken(
    written: Path, tiny_path: Path, tmp_path: Path
) -> None:
    """It was trained in that format and on those tokens, and the base's were taken for it."""
    base, folder = Model.open(written), tmp_path / "a"
    lora.attach(base.load_module("float32", "cpu", fresh=True).module, 2).save(
        folder, base=str(written)
    )
    assert Model.open(folder).base_key == base.base_key
    (folder / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}:")
    told, other = Model.open(folder), shutil.copytree(folder, tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_path / name, other)  # which has no merges
    own = Model.open(other)
    assert len({base.key, Model.open(written).adding(*own.changes).key, told.key, own.key}) == 4
    assert own.thinking(True).local.words == other
    for model, ids in ((told, 1), (own, 3)):
        saved = Model.open(model.save(tmp_path / f"saved{ids}"))
        assert saved.key == model.key
        merged = mixture_of_experts({"a": model, "b": model})
        for one in (model, saved, Model.open(model.export(tmp_path / f"plain{ids}")), merged):
            tokenizer = loaded.load_tokenizer(one)
            assert tokenizer.chat_template == "{{ messages[-1]['content'] }}:"
            assert len(tokenizer.encode("the")) == ids
        with pytest.raises(InputError, match="differ in tokenizer or chat template"):
            same_tokens({"a": model, "b": base})
    same_tokens({"a": own, "b": Model.open(tmp_path / "saved3")})


def test_weights_are_merged_as_ever(written: Path, tmp_path: Path) -> None:
    """The folder that brings the template is not the first model's, the weights are of both."""
    plain = shutil.copytree(written, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    stored = load_file(plain / "model.safetensors")
    moved = {name: tensor + 0.25 for name, tensor in stored.items()}
    save_file(moved, plain / "model.safetensors", metadata={"format": "pt"})
    merged = linear({"base": Model.open(plain), "a": Model.open(written)}).folded()
    for name, tensor in stored.items():
        assert torch.allclose(merged[name], tensor + 0.125, atol=1e-6)


def test_folders_without_a_tokenizer(tiny_path: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(tiny_path, tmp_path / "bare")
    for path in [*bare.glob("*token*"), bare / "chat_template.jinja"]:
        path.unlink()
    model = Model.open(bare)
    same_tokens({"a": model, "b": Model.open(shutil.copytree(bare, tmp_path / "copy"))})
    with pytest.raises(InputError, match="the tokenizer"):
        same_tokens({"a": model, "b": Model.open(tiny_path)})
