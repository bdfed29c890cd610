"""Model folders that are damaged, or of an architecture that is not computed: one clear error."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from truing.core.batch.same_tokenizer import same_tokens
from truing.core.modelfiles import lora
from truing.core.modelfiles.stock import quiet
from truing.errors import InputError
from truing.models import Adapter, Model, Weights
from truing.sources import known_abilities


@pytest.fixture
def folder(tiny_path: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return shutil.copytree(tiny_path, tmp_path / "tiny")


def change(path: Path, **facts: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def load(folder: Path) -> str:
    """What is said of a model that does not load."""
    with pytest.raises(InputError) as caught:
        Model.open(folder).load_module(fresh=True)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_attn_implementation", "flash_attention_2"),  # whose package is not installed
        ("attn_implementation", "kernels-community/flash-attn2"),  # would be fetched
        ("experts_implementation", "kernels-community/experts"),
    ],
)
def test_kernels_are_not_the_files_choice(folder: Path, name: str, value: str) -> None:
    ids = torch.tensor([[5, 9, 77, 130]])
    want = Model.open(folder).load_module(fresh=True).module(ids).logits
    change(folder / "config.json", **{name: value})
    assert torch.equal(Model.open(folder).load_module(fresh=True).module(ids).logits, want)


@pytest.mark.parametrize("text", ["{", "[]", '{"max_length": 1, "transformers_version"', "\xff"])
def test_settings_of_generation(folder: Path, text: str) -> None:
    path = folder / "generation_config.json"
    path.write_bytes(text.encode("latin1"))
    said = load(folder)
    assert str(path) in said and "settings of generation cannot be read" in said


@pytest.mark.parametrize(
    ("facts", "parts"),
    [
        ({"hidden_size": "wide"}, ["configuration cannot be read", "hidden_size", "config.json"]),
        ({"num_hidden_layers": [6]}, ["configuration cannot be read", "num_hidden_layers"]),
        ({"num_attention_heads": 0}, ["config.json"]),
        ({"architectures": 5}, ["'architectures' must be a list", "5"]),
        ({"hidden_act": "nothing"}, ["cannot be made", "nothing", "LlamaForCausalLM"]),
        ({"vocab_size": 300}, ["another size", "embed_tokens", "(259, 128)", "(300, 128)"]),
    ],
)
def test_configurations_of_wrong_types(
    folder: Path, facts: dict[str, object], parts: list[str]
) -> None:
    change(folder / "config.json", **facts)
    with pytest.raises(InputError) as caught:
        model = Model.open(folder)
        _ = model.can
        model.load_module(fresh=True)
    said = str(caught.value)
    assert [p for p in parts if p not in said] == [], said


def test_files_that_hold_no_object(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")
    assert "config.json: must hold a JSON object (seen: [1, 2])" in load(folder)
    (folder / "config.json").unlink()
    path = folder / "builder.json"
    for text, said in (
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"schema_version": 1, "builder": 3}', "'builder' must be {use: name, ...} (seen: 3)"),
        ('{"schema_version": 1}', "'builder' must be {use: name, ...}"),
    ):
        path.write_text(text)
        found = load(folder)
        assert said in found and "builder.json" in found


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_cannot_be_read(folder: Path, name: str) -> None:
    (folder / name).write_text('{"model": 3')
    with pytest.raises(InputError, match="tokenizer cannot be read"):
        _ = Model.open(folder).load_module().tokenizer


def test_a_tokenizer_of_a_newer_version(folder: Path) -> None:
    """The library that reads it raises a bare Exception."""
    change(folder / "tokenizer.json", pre_tokenizer={"type": "Newer"})
    with pytest.raises(InputError, match=r"tokenizer cannot be read.*pip install -U tokenizers"):
        _ = Model.open(folder).load_module().tokenizer


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="reads it")
def test_a_tokenizer_that_packages_are_missing_for(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    change(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    with pytest.raises(InputError, match="pip install sentencepiece protobuf") as caught:
        _ = Model.open(folder).load_module().tokenizer
    assert "tiktoken" not in str(caught.value)


@pytest.mark.parametrize("inner", [False, True])
def test_quantised_weights_are_refused_by_name(folder: Path, inner: bool) -> None:
    facts = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    change(folder / "config.json", **({"text_config": facts} if inner else facts))
    with pytest.raises(InputError, match=r"quantised.*bitsandbytes.*bfloat16 or float32"):
        Model.open(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizers(folder: Path, tiny_path: Path, name: str) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / name).write_text("{")
    with pytest.raises(InputError, match=rf"{name}: not valid JSON"):
        same_tokens({"a": Model.open(tiny_path), "b": Model.open(folder)})


def test_adapters(tiny_path: Path, tmp_path: Path) -> None:
    model, folder = Model.open(tiny_path), tmp_path / "a"
    made = lora.attach(model.load_module("float32", "cpu", fresh=True).module, 2)
    made.save(folder, base=str(tiny_path))
    path = folder / "adapter_config.json"
    good = path.read_text()
    assert Model.open(folder).changes == (Adapter(folder),)
    for text, said in (("{", "not valid JSON"), ("[]", "must hold a JSON object")):
        path.write_text(text)
        with pytest.raises(InputError, match=said):
            Model.open(folder)
        with pytest.raises(InputError, match=f"not a readable adapter: {said}"):
            model.adding(Adapter(folder)).folded()
    for facts, said in (
        ({"base_model_name_or_path": 7}, "does not name its base model"),
        ({"base_model_name_or_path": str(folder)}, "does not name its base model"),
        ({"lora_alpha": "much"}, "'lora_alpha' must be a number"),
        ({"alpha_pattern": [1]}, "'alpha_pattern' must be a mapping"),
        ({"alpha_pattern": {"q_proj": "much"}}, "'lora_alpha' must be a number"),
    ):
        path.write_text(json.dumps(json.loads(good) | facts))
        with pytest.raises(InputError, match=said) as caught:
            Model.open(folder)
        assert str(path) in str(caught.value)


def test_changes_of_another_size(tiny_path: Path, tmp_path: Path) -> None:
    """PEFT saves embeddings whole where tokens were added; they took the place of others."""
    model, name = Model.open(tiny_path), "model.embed_tokens.weight"
    made = lora.attach(model.load_module("float32", "cpu", fresh=True).module, 2)
    made.save(tmp_path / "a", base=str(tiny_path))
    file = tmp_path / "a" / "adapter_model.safetensors"
    more = {f"base_model.model.{name}": torch.zeros(261, 128)}
    save_file(load_file(file) | more, file)
    with pytest.raises(InputError, match=r"adapter does not fit.*\(261, 128\).*merge it in PEFT"):
        Model.open(tmp_path / "a")
    save_file({name: torch.zeros(261, 128)}, tmp_path / "w.safetensors")
    for delta in (False, True):
        with pytest.raises(InputError, match=r"change does not fit.*\(261, 128\) on \(259, 128"):
            model.adding(Weights(tmp_path / "w.safetensors", delta)).folded()


def test_an_adapter_beside_a_configuration(tiny_path: Path, tmp_path: Path) -> None:
    """Trainers write the base's beside it; with weights it could be either."""
    model, folder = Model.open(tiny_path), tmp_path / "a"
    made = lora.attach(model.load_module("float32", "cpu", fresh=True).module, 2)
    made.save(folder, base=str(tiny_path))
    shutil.copy(tiny_path / "config.json", folder)
    assert Model.open(folder).changes == (Adapter(folder),)
    shutil.copy(tiny_path / "model.safetensors", folder)
    with pytest.raises(InputError, match=r"an adapter and a whole model.*a folder of their own"):
        Model.open(folder)


@pytest.mark.parametrize(
    "begun", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga"]
)
def test_adapters_of_changed_base_weights(tiny_path: Path, tmp_path: Path, begun: str) -> None:
    """PEFT takes what such an adapter begins with out of the base; on the whole it doubles."""
    model, folder = Model.open(tiny_path), tmp_path / "a"
    made = lora.attach(model.load_module("float32", "cpu", fresh=True).module, 2)
    made.save(folder, base=str(tiny_path))
    path = folder / "adapter_config.json"
    good = json.loads(path.read_text())
    for plain in (True, False, None, "gaussian", "eva", "orthogonal", "mica"):
        path.write_text(json.dumps(good | {"init_lora_weights": plain}))
        assert Model.open(folder).changes == (Adapter(folder),)
    path.write_text(json.dumps(good | {"init_lora_weights": begun}))
    for opened in (lambda: Model.open(folder), lambda: model.adding(Adapter(folder)).folded()):
        with pytest.raises(InputError, match="path_initial_model_for_weight_conversion") as caught:
            opened()
        assert str(path) in str(caught.value) and repr(begun) in str(caught.value.seen)


def test_a_model_without_linear_layers_takes_no_adapter() -> None:
    """An optimizer was made of no parameters."""
    module = nn.Sequential(nn.Embedding(11, 8))
    with pytest.raises(InputError, match="no linear layers that adapters could go on") as caught:
        lora.attach(module, 4)
    assert "Sequential" in str(caught.value) and "rank 0" in str(caught.value)
    assert all(p.requires_grad for p in module.parameters())  # as it was


def test_encoder_decoder_models_are_refused_by_name(tmp_path: Path, tiny_path: Path) -> None:
    folder = tmp_path / "t5"
    config = T5Config(
        vocab_size=259, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    with quiet():
        T5ForConditionalGeneration(config).save_pretrained(folder)
    for path in tiny_path.glob("*token*"):
        shutil.copy(path, folder / path.name)
    assert Model.open(folder).can == known_abilities(str(folder)) == {"weights"}
    said = load(folder)
    assert "encoder-decoder" in said and "T5ForConditionalGeneration" in said
    assert "ForCausalLM" in said
