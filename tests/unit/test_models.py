"""`Model`: changes and their keys, saving whole, licences, faults told once."""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import threading
import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from truing import models
from truing.core import files, opening
from truing.core.chat import prompt_ids
from truing.core.identity.hashes import file_hash
from truing.core.modelfiles import adapters, bases, loaded, lora, stock
from truing.core.modelfiles.licences import short, sort_of, strictest
from truing.core.tiny import tiny_folder, tiny_model
from truing.core.trainer import distributed
from truing.errors import InputError
from truing.models import Adapter, Decoder, Edits, Model, Prefix, Rewriter, Weights, run_time_of
from truing.store import Store
from truing.tables import Table

IDS = torch.tensor([[5, 60, 70, 80, 90]])


@pytest.fixture
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter with noise in it, written by peft itself."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules="all-linear",
        use_rslora=True,
        alpha_pattern={"q_proj": 3},
    )
    with warnings.catch_warnings():  # peft's own calls, not ours
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = get_peft_model(tiny_model()[0], config)
    source = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=source)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    torch.save(wrapped.eval()(IDS).logits.detach(), folder / "logits.pt")
    return folder


def _logits(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return model.load_module().module(input_ids=IDS).logits


def test_opened_folder_is_the_model(model: Model) -> None:
    reference = tiny_model()[0]
    module = model.load_module().module
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name])
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert not module.training
    assert model.can == {"generate", "logprob", "hidden", "weights"}


def test_key_is_content_not_place(model: Model, tmp_path: Path) -> None:
    other = Model.open(shutil.copytree(model.folder, tmp_path / "copy"))
    (tmp_path / "copy" / "optimizer.log").write_text("no part of the model")
    assert other.key == model.key and other.name != model.name
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    assert Model.open(tmp_path / "copy").key != model.key


def test_adapter_folds_as_peft_does(model: Model, adapter: Path) -> None:
    changed = model.adding(Adapter(adapter))
    expected = torch.load(adapter / "logits.pt", weights_only=True)
    assert (_logits(changed) - expected).abs().max() < 2e-5
    assert (expected - _logits(model)).abs().max() > 0.1
    module = changed.load_module().module
    assert module.lm_head.weight is module.model.embed_tokens.weight
    embedding = tiny_model()[0].model.embed_tokens.weight
    assert torch.equal(module.model.embed_tokens.weight, embedding)


@pytest.mark.filterwarnings(  # peft's
    "ignore::FutureWarning",
    "ignore:PiSSA changes:UserWarning",
    "ignore:Could not find a config file:UserWarning",  # which 0.18 looks for on the hub
)
def test_a_converted_pissa_adapter_folds_as_peft_does(model: Model, tmp_path: Path) -> None:
    """As the error for an unconverted one says to convert it."""
    from peft import LoraConfig, get_peft_model

    module = tiny_model()[0]
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    wrapped = get_peft_model(module, config)
    begun, plain, done = (str(tmp_path / n) for n in ("begun", "plain", "done"))
    wrapped.save_pretrained(begun)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=source)
    wrapped.save_pretrained(plain)
    with pytest.raises(InputError, match="init_lora_weights 'pissa'"):
        model.adding(Adapter(Path(plain))).folded()
    wrapped.save_pretrained(done, path_initial_model_for_weight_conversion=begun)
    expected = wrapped.merge_and_unload().state_dict()
    found = model.adding(Adapter(Path(done))).folded()
    assert all(torch.allclose(found[n], expected[n], atol=1e-4) for n in found)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (found[name] - model.folded()[name]).abs().max() > 0.01


def test_adapter_key_ignores_what_else_lies_there(adapter: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(adapter, tmp_path / "a")
    (copy / "README.md").write_text("card")
    assert Adapter(copy).key == Adapter(adapter).key


def test_weight_changes_apply_in_order(model: Model, tmp_path: Path) -> None:
    name = "model.norm.weight"
    save_file({name: torch.full((128,), 3.0)}, tmp_path / "whole.safetensors")
    save_file({name: torch.full((128,), 0.5)}, tmp_path / "delta.safetensors")
    places, values = torch.tensor([1, 7]), torch.tensor([9.0, 8.0])
    save_file({f"{name}.at": places, f"{name}.to": values}, tmp_path / "few.safetensors")
    whole = Weights(tmp_path / "whole.safetensors")
    delta = Weights(tmp_path / "delta.safetensors", delta=True)
    few = Weights(tmp_path / "few.safetensors", sparse=True)
    first = model.adding(whole).adding(delta).adding(few).folded()[name]
    assert first[0] == 3.5 and first[1] == 9.0 and first[7] == 8.0
    assert model.adding(delta).adding(whole).folded()[name][0] == 3.0
    assert model.adding(delta).adding(whole).key != model.adding(whole).adding(delta).key
    assert model.folded()[name][0] == 1.0


def test_head_becomes_extra(model: Model, tmp_path: Path) -> None:
    save_file({"score.weight": torch.ones(1, 128)}, tmp_path / "head.safetensors")
    loaded_model = model.adding(Weights(tmp_path / "head.safetensors")).load_module()
    assert loaded_model.extra["score.weight"].shape == (1, 128)


def test_foreign_change_is_refused(model: Model, tmp_path: Path) -> None:
    save_file({"nowhere.weight": torch.ones(2)}, tmp_path / "d.safetensors")
    with pytest.raises(InputError, match=r"nowhere\.weight"):
        model.adding(Weights(tmp_path / "d.safetensors", delta=True)).folded()


def test_run_time_changes_stand_in_their_order(model: Model, tmp_path: Path) -> None:
    (tmp_path / "edit.bin").write_bytes(b"x")
    changes = [
        Decoder("best_of_n", {"n": 4}),
        Rewriter("polite"),
        Prefix([{"role": "system", "content": "Be brief."}]),
        Edits(tmp_path / "edit.bin", 2.0),
    ]
    laid = model
    for change in changes:
        laid = laid.adding(change)
    assert [c.kind for c in laid.run_time_changes] == ["edits", "prefix", "rewriter", "decoder"]
    assert laid.weights_key == model.weights_key and laid.key != model.key
    assert Edits(tmp_path / "edit.bin", 1.0).key != Edits(tmp_path / "edit.bin", 2.0).key


def test_saved_whole_and_loaded(model: Model, adapter: Path, tmp_path: Path) -> None:
    judge = model.called("judge").adding(Prefix([{"role": "system", "content": "Judge."}]))
    change = Decoder("best_of_n", {"n": 4}, {"reward": models.hold(judge)})
    laid = model.adding(Adapter(adapter), licence="cc-by-nc-4.0").adding(change)
    laid.save(tmp_path / "saved")
    moved = (tmp_path / "saved").rename(tmp_path / "elsewhere")
    models._held.clear()
    back = Model.load(moved)
    assert back.key == laid.key and back.name == laid.name and back.changes[0] != laid.changes[0]
    assert back.licence == "cc-by-nc-4.0"
    assert torch.equal(_logits(back), _logits(laid))
    kept = back.run_time_changes[0]
    assert isinstance(kept, Decoder)
    assert models.held(kept.holds["reward"]).key == judge.key
    assert Model.open(moved).key == laid.key


@pytest.mark.parametrize("key", ["../../out", "/tmp/out", "a/../../../out", "0" * 31, "G" * 32, ""])
def test_what_is_held_stays_in_the_folder(model: Model, tmp_path: Path, key: str) -> None:
    """`held` of a saved model named places outside, which were written when it was saved again."""
    change = Decoder("best_of_n", {"n": 4}, {"reward": models.hold(model)})
    saved = model.adding(change).save(tmp_path / "deep" / "saved")
    card = saved / "model.json"
    data = json.loads(card.read_text())
    data["held"] = {key: "Model"}
    card.write_text(json.dumps(data))
    for read in (Model.open, opening.check_held):
        with pytest.raises(InputError, match="by its key, of 32 hex digits") as caught:
            read(saved)
        assert caught.value.where == str(card)
    wild = model.adding(Decoder("best_of_n", {"n": 4}, {"reward": key}))
    with pytest.raises(InputError, match="by its key, of 32 hex digits"):
        wild.save(tmp_path / "deep" / "again")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.name in ("out", "again")) == []


def test_saved_model_survives_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    folder = tiny_folder(tmp_path / "mine", seed=5)
    model = Model.open(folder)
    key = model.key
    store = Store()
    store.put("1" * 32, model, {})
    store.put("2" * 32, model, {})
    weights = Path("base") / "model.safetensors"
    # Written once to the cache, then linked: two artefacts cost no second copy.
    (one,) = store.root.glob(f"artefacts/11/*/data/{weights}")
    assert one.stat().st_nlink == 3
    model.save(tmp_path / "mine too")
    assert (tmp_path / "mine too" / weights).stat().st_nlink == 1  # which its owner may edit
    (folder / "model.safetensors").write_bytes(b"overwritten in place by the next training run")
    assert store.load("1" * 32).key == Model.load(tmp_path / "mine too").key == key
    store.discard("1" * 32)
    store.discard("2" * 32)
    (files.home() / "bases" / f".{key}.abcdefgh").mkdir()  # left by a kill
    (files.home() / "bases" / f".{model.base_key}.gone" / "half").mkdir(parents=True)
    assert bases.sweep() == [model.base_key]
    assert not any(p.is_dir() for p in (files.home() / "bases").glob(".*"))


def test_a_folder_that_changes_while_a_run_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    folder = tiny_folder(tmp_path / "mine", seed=7)
    model, weights = Model.open(folder), folder / "model.safetensors"
    before, key = weights.read_bytes(), model.key
    tiny_folder(tmp_path / "next", seed=8)
    weights.write_bytes((tmp_path / "next" / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match="files have changed since it was opened"):
        model.load_module()
    with pytest.raises(InputError, match="files have changed since it was opened"):
        model.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    weights.write_bytes(before)
    model.save(tmp_path / "saved")  # under its key nothing else was kept
    assert Model.load(tmp_path / "saved").key == key and model.load_module()


def test_a_base_is_not_swept_while_it_is_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    model = Model.open(tiny_folder(tmp_path / "mine", seed=6))
    original, swept = files.place, []
    sweeper = threading.Thread(target=lambda: swept.extend(bases.sweep()))

    def place(source: Path, target: Path, *, link: bool) -> None:
        if link and not sweeper.ident:
            sweeper.start()  # another process collects garbage just now
            sweeper.join(0.2)
        original(source, target, link=link)

    monkeypatch.setattr(files, "place", place)
    saved = model.save(tmp_path / "home" / "saved")
    sweeper.join()
    assert swept == [] and Model.load(saved).key == model.key
    shutil.rmtree(saved)
    assert bases.sweep() == [model.base_key]


def test_changed_artefact_is_noticed(model: Model, adapter: Path, tmp_path: Path) -> None:
    model.adding(Adapter(adapter)).save(tmp_path / "s")
    file = next((tmp_path / "s" / "changes").rglob("adapter_model.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.unlink()
    file.write_bytes(raw)
    with pytest.raises(InputError, match="not those that were saved"):
        Model.load(tmp_path / "s")


def test_verify_reads_the_bytes_of_large_files(model: Model, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    tensors = {"model.norm.weight": torch.ones(128), "more": torch.zeros(1 << 19)}
    save_file(tensors, tmp_path / "large.safetensors")
    store.put("a" * 32, model.adding(Weights(tmp_path / "large.safetensors")), {})
    assert store.verify() == []
    (path,) = store.root.rglob("large.safetensors")
    before = path.stat()
    with path.open("r+b") as file:  # a bit that the disk lost: no time of change tells it
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [d["key"] for d in store.verify()] == ["a" * 32]


def test_newer_schema_is_refused_by_name(model: Model, tmp_path: Path) -> None:
    model.save(tmp_path / "s")
    card = json.loads((tmp_path / "s" / "model.json").read_text())
    (tmp_path / "s" / "model.json").write_text(json.dumps(card | {"schema_version": 99}))
    with pytest.raises(InputError, match="schema version 99"):
        Model.load(tmp_path / "s")


def test_path_cannot_leave_the_folder(model: Model, adapter: Path, tmp_path: Path) -> None:
    model.adding(Adapter(adapter)).save(tmp_path / "s")
    card = json.loads((tmp_path / "s" / "model.json").read_text())
    card["changes"][0]["path"] = "../../etc"
    (tmp_path / "s" / "model.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match="leaves the folder"):
        Model.load(tmp_path / "s")


def test_export_loads_in_transformers(model: Model, adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    changed = model.adding(Adapter(adapter), licence="cc-by-sa-4.0")
    changed.export(tmp_path / "out")
    with stock.quiet():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(plain(input_ids=IDS).logits, _logits(changed))
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokens.chat_template == changed.load_module().tokenizer.chat_template
    assert Model.open(tmp_path / "out").licence == "cc-by-sa-4.0"


def test_export_refuses_run_time_changes(model: Model, tmp_path: Path) -> None:
    laid = model.adding(Prefix([{"role": "system", "content": "x"}]))
    with pytest.raises(InputError, match="prefix"):
        laid.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    laid.export(tmp_path / "out", weights_only=True)


def _head(model: Model, folder: Path, name: str = "reward_head", bias: float = 0.0) -> Model:
    source = torch.Generator().manual_seed(3)
    weight = torch.randn(1, 128, generator=source)
    tensors = {f"{name}.weight": weight, f"{name}.bias": torch.full((1,), bias)}
    save_file(tensors, folder / "head.safetensors")
    return model.adding(Weights(folder / "head.safetensors"))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_reward_model_is_exported_as_sequence_classification(
    kind: str, model: Model, adapter: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from truing.core.judging.rewards import score_model

    if kind == "llama":
        reward = _head(model.adding(Adapter(adapter)), tmp_path, bias=1e-5)  # as training leaves it
    else:
        shutil.copytree(model.folder, tmp_path / "qwen")
        torch.manual_seed(0)
        config = _config("qwen2")
        config.hidden_size, config.eos_token_id, config.pad_token_id = 128, 2, 2  # type: ignore[attr-defined]
        with stock.quiet():
            from transformers import AutoModelForCausalLM

            AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "qwen")
        reward = _head(Model.open(tmp_path / "qwen"), tmp_path)
    rows = [{"prompt": f"What is {n}?", "completion": "It is so. " * n} for n in (1, 4, 2)]
    own = score_model(reward, rows)
    assert max(own) - min(own) > 0.1
    reward.export(tmp_path / "out")
    left_out = "1e-05" if kind == "llama" else "0"
    assert f"the constant {left_out} is left out" in (tmp_path / "out" / "README.md").read_text()
    with stock.quiet():
        module = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(module).__name__ == f"{kind.capitalize()}ForSequenceClassification"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [
        tokenizer.apply_chat_template(
            [
                {"role": "user", "content": r["prompt"]},
                {"role": "assistant", "content": r["completion"]},
            ],
            tokenize=False,
        ).rstrip("\n")
        for r in rows
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt")  # the answers' ends are not padding
    with torch.no_grad():
        theirs = module(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]
    assert theirs.tolist() == pytest.approx(own, rel=1e-5, abs=1e-4)
    assert score_model(Model.open(tmp_path / "out"), rows) == pytest.approx(own, rel=1e-5, abs=1e-4)


def test_a_head_that_a_plain_folder_cannot_keep_is_refused(model: Model, tmp_path: Path) -> None:
    shifted = _head(model, tmp_path, bias=0.5)
    with pytest.raises(InputError, match=r"a constant.*Save the model instead"):
        shifted.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shifted.export(tmp_path / "out", weights_only=True)
    assert Model.open(tmp_path / "out").folded().extra == {}
    with pytest.raises(InputError, match=r"further tensors: vocab_heads\.bias"):
        _head(model, tmp_path, "vocab_heads").export(tmp_path / "none")


def test_the_store_exports_heads_or_keeps_them(model: Model, tmp_path: Path) -> None:
    from truing.store import Store

    store = Store(tmp_path / "store")
    made = {
        "a" * 32: ("reward_head", 0.0),
        "b" * 32: ("reward_head", 1.0),
        "c" * 32: ("value_head", 1.0),
    }
    lines = {}
    for key, (name, bias) in made.items():
        (tmp_path / key).mkdir()
        store.put(key, _head(model, tmp_path / key, name, bias), {})
        lines[key[0]] = store.export(key, str(tmp_path / key[0]))
    assert json.loads((tmp_path / "a" / "config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]
    assert "reward_head.bias" in Model.load(tmp_path / "b").folded().extra
    assert "critic" in str(lines["c"]["left_out"]) and Model.open(tmp_path / "c").can == bases.ALL


def test_folders_of_others_are_not_replaced(model: Model, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for write in (model.save, model.export):
        with pytest.raises(InputError, match="holds other files"):
            write(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    for _ in range(2):
        model.save(tmp_path / "saved")
        model.export(tmp_path / "plain")
    assert Model.open(tmp_path / "plain").load_module()


@pytest.mark.parametrize("name", ["notes.txt", "base/notes.txt", "plots/loss.png", ".git/HEAD"])
def test_what_was_laid_beside_a_saved_model_is_not_lost(
    model: Model, tmp_path: Path, name: str
) -> None:
    for write in (model.save, model.export):
        folder = write(tmp_path / write.__name__)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
        with pytest.raises(InputError, match="holds other files") as error:
            write(folder)
        assert error.value.seen == [name] and (folder / name).read_text() == "mine"
        (folder / name).unlink()
        assert write(folder) == folder


def test_a_model_card_that_was_edited_is_not_replaced(model: Model, tmp_path: Path) -> None:
    folder = model.export(tmp_path / "out")
    card = folder / "README.md"
    written = card.read_text()
    assert model.export(folder) == folder and card.read_text() == written
    for text in (written + "\nMine.\n", ""):
        card.write_text(text)
        with pytest.raises(InputError, match="was changed after the export") as error:
            model.export(folder)
        assert error.value.where == str(card) and card.read_text() == text
    card.unlink()
    assert model.export(folder) == folder and card.read_text() == written


@pytest.mark.parametrize("text", ['{"model": "mine"}', "[1]", "not JSON"])
def test_files_of_other_programs_are_no_mark(model: Model, tmp_path: Path, text: str) -> None:
    for write, name in ((model.save, "model.json"), (model.export, "truing_export.json")):
        folder = tmp_path / write.__name__
        folder.mkdir()
        (folder / name).write_text(text)
        with pytest.raises(InputError, match="was not written by truing"):
            write(folder)
        assert (folder / name).read_text() == text


def _config(kind: str) -> object:
    import transformers

    small = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    if kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=259, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
        )
    if kind == "gemma3":
        return transformers.Gemma3TextConfig(**small, head_dim=16, sliding_window=16)
    return transformers.Qwen2Config(**small, tie_word_embeddings=False)


@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "qwen2"])
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(_config(kind)).eval()
    with stock.quiet():
        module.save_pretrained(tmp_path / "m")
    model = Model.open(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(_logits(model), module(input_ids=IDS).logits)
    config = LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=kind == "gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = get_peft_model(module, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    with torch.no_grad():
        expected = wrapped.eval()(input_ids=IDS).logits
    folded = _logits(model.adding(Adapter(tmp_path / "a")))
    assert (folded - expected).abs().max() < 1e-5
    assert (folded - _logits(model)).abs().max() > 0.05


def test_differing_run_time_changes_need_a_word(model: Model) -> None:
    brief = model.adding(Prefix([{"role": "system", "content": "Be brief."}]))
    assert run_time_of({"a": brief, "b": brief}) == brief.run_time_changes
    with pytest.raises(InputError, match="keep='b'"):
        run_time_of({"a": model, "b": brief}, where="merge/linear")
    assert run_time_of({"a": model, "b": brief}, "b") == brief.run_time_changes
    assert run_time_of({"a": model, "b": brief}, "a") == ()


def test_fresh_module_is_private(model: Model) -> None:
    own = model.load_module(fresh=True).module
    with torch.no_grad():
        own.model.norm.weight.fill_(7.0)
    shared = model.load_module()
    assert shared.module is model.load_module().module is not own
    assert shared.module.model.norm.weight[0] == 1.0
    assert load_file(model.folder / "model.safetensors")["model.norm.weight"][0] == 1.0


def test_truncated_weights(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    os.truncate(folder / "model.safetensors", 100_000)
    with pytest.raises(InputError, match="damaged or cut off") as caught:
        Model.open(folder)
    assert "model.safetensors" in str(caught.value) and caught.value.exit_code == 2


def test_missing_tensor(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.up_proj"):
        Model.open(folder).load_module()


def test_missing_tokenizer_and_template(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    (folder / "chat_template.jinja").unlink()
    tokenizer = Model.open(folder).load_module().tokenizer
    with pytest.raises(InputError, match="no chat template"):
        prompt_ids(tokenizer, [{"role": "user", "content": "x"}])
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        _ = Model.open(folder).load_module().tokenizer


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no such folder"):
        Model.open(tmp_path / "none")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mind.txt").touch()  # which is no folder
    with pytest.raises(InputError, match=r"no such folder\. Did you mean '.*/mine'"):
        Model.open(tmp_path / "mind")
    with pytest.raises(InputError, match=r"this is a file, and no folder\. Give the folder in"):
        Model.open(tmp_path / "mind.txt")
    (tmp_path / "m.gguf").touch()
    with monkeypatch.context() as patch, pytest.raises(InputError, match="GGUF is not opened"):
        patch.chdir(tmp_path.parent)
        Model.open(f"{tmp_path.name}/m.gguf")  # which might be a name of the hub
    with pytest.raises(InputError, match="Did you mean 'smollm2-135m-instruct'"):
        Model.open("smolm2-135m-instruct")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not a model's folder"):
        Model.open(tmp_path / "empty")


def test_served_model_can_less() -> None:
    served = Model.open("http://127.0.0.1:9/v1#tiny")
    assert served.is_served and served.can == {"generate"} and served.name == "tiny"
    assert served.adding(Prefix([{"role": "system", "content": "x"}])).key != served.key
    with pytest.raises(InputError, match="has no weights here"):
        _ = served.folder
    with pytest.raises(InputError, match="cannot take a change of kind 'adapter'"):
        served.adding(Adapter(Path("x")))
    with pytest.raises(InputError, match="which model"):
        Model.open("http://127.0.0.1:9/v1")


def test_served_model_saves(tmp_path: Path) -> None:
    served = Model.open("http://127.0.0.1:9/v1#tiny")
    served.save(tmp_path / "s")
    assert Model.load(tmp_path / "s").key == served.key


def test_adapter_folder_opens_on_its_base(model: Model, adapter: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(adapter, tmp_path / "a")
    config = json.loads((copy / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(model.folder)
    (copy / "adapter_config.json").write_text(json.dumps(config))
    opened = Model.open(copy)
    assert opened.base_key == model.base_key and opened.changes == (Adapter(copy),)


def _naming(folder: Path, **facts: str) -> Path:
    """An adapter's folder whose configuration says something else."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    return folder


def test_an_adapter_whose_base_was_moved_with_it(
    model: Model, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model.folder, tmp_path / "base")
    copy = Path(shutil.copytree(adapter, tmp_path / "runs" / "a"))
    monkeypatch.chdir(model.folder)
    for named in ("../../base", "../base", "base"):  # from where it lies, or from a folder above
        opened = Model.open(_naming(copy, base_model_name_or_path=named))
        assert opened.base_key == model.base_key
    with pytest.raises(InputError, match=r"no such folder") as error:
        Model.open(_naming(copy, base_model_name_or_path="../gone"))
    assert error.value.where == f"{copy / 'adapter_config.json'} base_model_name_or_path: ../gone"
    assert adapters._base(copy, "owner/name", "v1") == "owner/name@v1"
    assert adapters._base(copy, "owner/name", None) == "owner/name"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's
def test_all_adapters_of_a_model_leave_as_one(model: Model, adapter: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    module = model.load_module("float32", "cpu", fresh=True).module
    second = lora.attach(module, 2, targets="q_proj,down_proj")
    source = torch.Generator().manual_seed(2)
    for name, parameter in second.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=source)
    second.save(tmp_path / "second", base="tiny")
    first = model.adding(Adapter(adapter))
    made = first.adding(Adapter(tmp_path / "second"))
    assert (_logits(made) - _logits(first)).abs().max() > 0.1
    out = made.export_adapter(tmp_path / "one")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 6 and config["lora_alpha"] == 6.0
    with stock.quiet():
        base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    wrapped = PeftModel.from_pretrained(base, str(out))
    with torch.no_grad():
        assert (wrapped(input_ids=IDS).logits - _logits(made)).abs().max() < 2e-5
    assert (_logits(Model.open(out)) - _logits(made)).abs().max() < 2e-5
    assert not (out / "tokenizer.json").exists()
    # A critic's head is left out, a name of the hub is kept, and so is the mark of an attack.
    value = _head(replace(made, quarantine="attack/mine"), tmp_path, "value_head")
    value.called("owner/name@v1+dpo").thinking(False).export_adapter(out, quarantined=True)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "v1")
    again = Model.open(_naming(out, base_model_name_or_path=str(model.folder), revision=""))
    assert again.quarantine == "attack/mine" and again.changes == (Adapter(out),)
    assert "enable_thinking = false" in (out / "chat_template.jinja").read_text()


def test_what_is_no_adapter_is_not_left_out_of_one(
    model: Model, adapter: Path, tmp_path: Path
) -> None:
    made, store = model.adding(Adapter(adapter)), Store(tmp_path / "store")
    with pytest.raises(InputError, match=r"not all that changes.*weights [0-9a-f]{12}"):
        _head(made, tmp_path).export_adapter(tmp_path / "none")
    with pytest.raises(InputError, match="there is no adapter"):
        model.export_adapter(tmp_path / "none")
    store.put("a" * 32, made, {})
    store.put("b" * 32, Table("prompt", [{"prompt": "a"}]), {})
    with pytest.raises(InputError, match="a Table has no adapter"):
        store.export("bb", str(tmp_path / "none"), adapter=True)
    assert not (tmp_path / "none").exists()
    store.export("aa", str(tmp_path / "a"), adapter=True)
    assert (_logits(Model.open(tmp_path / "a")) - _logits(made)).abs().max() < 2e-5


def test_builder_makes_other_architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small() -> torch.nn.Module:
        return torch.nn.Linear(3, 2)

    monkeypatch.setattr(
        importlib.import_module("truing.method"), "get_component", lambda kind, ref: small
    )
    source = torch.nn.Linear(3, 2)
    made = opening.create(
        tmp_path / "net", {"use": "small"}, source.state_dict().items(), name="net"
    )
    assert made.can == {"hidden", "weights"} and made.builder == {"use": "small"}
    made.save(tmp_path / "saved")
    back = Model.load(tmp_path / "saved").load_module()
    assert torch.equal(back.module(torch.ones(3)), source(torch.ones(3)))
    with pytest.raises(InputError, match="no tokenizer"):
        _ = back.tokenizer


def test_reading_a_large_model_frees_those_under_dropped_adapters(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded, "LARGE", 0)
    old = model.load_module(fresh=True).module
    lora.attach(old, 2, 4.0)
    left = weakref.ref(old.get_submodule("model.layers.0.mlp.up_proj"))
    gc.disable()
    try:
        del old
        assert left() is not None  # the layer and its adapter refer to each other
        model.load_module(fresh=True)
        assert left() is None
    finally:
        gc.enable()


def test_memory_is_forecast(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("truing.doctor.memory_gib", lambda: (0.001, 0.001))
    with pytest.raises(InputError, match="GiB of memory are free"):
        model.load_module(fresh=True)


def test_processes_of_a_machine_have_its_memory_together(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 3 * loaded.bytes_of(model, "bfloat16") / 2**30  # its files are in float32
    monkeypatch.setattr("truing.doctor.memory_gib", lambda: (room, room))
    loaded.check_memory(model, "bfloat16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    loaded.check_memory(model, "bfloat16")
    monkeypatch.setattr(distributed, "_now", distributed.Processes(0, 4))
    loaded.check_memory(model, "float32")  # as they are: mapped, and there once
    with pytest.raises(InputError, match=r"each process makes .* for 4 of them"):
        loaded.check_memory(model, "bfloat16")


def test_hash_cache_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(b"a" * (2 << 20))
    first = file_hash(path)
    assert file_hash(path) == first
    path.write_bytes(b"b" * (2 << 20))
    assert file_hash(path) != first


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["mit", "apache-2.0"], "mit"),
        (["apache-2.0", "CC BY-NC 4.0"], "CC BY-NC 4.0"),
        (["apache-2.0", ""], "unknown"),
        (["", "cc-by-nc-sa-4.0"], "cc-by-nc-sa-4.0"),
        (["gemma", "cc-by-sa-4.0"], "gemma"),
        ([], "unknown"),
    ],
)
def test_strictest_licence(texts: list[str], expected: str) -> None:
    assert strictest(texts) == expected


def test_licence_words() -> None:
    assert sort_of("Permitted and limited use") == "unknown"  # "mit" within a word is no licence
    assert sort_of("MIT, Copyright (c) 2022") == "permissive"
    assert short("MIT (Anthropic). The helpful files come from elsewhere") == "MIT"
    assert short("Code: Apache-2.0; the prompts: CC BY-NC 4.0").startswith("non-commercial")
