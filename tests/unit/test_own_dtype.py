"""The type that models are computed in where they are not trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from truing.context import Context, use
from truing.core.generate import generate
from truing.core.generation.options import option_logps
from truing.core.modelfiles import loaded, lora, unmerged
from truing.core.passes import precision
from truing.core.passes.memory import saved_bytes
from truing.core.passes.scoring import answer_logps
from truing.core.tiny import tiny_folder
from truing.core.trainer.start import begin
from truing.core.trainer.teacher import Teachers
from truing.core.training import TextTraining
from truing.errors import InputError
from truing.evaluate.ability import text_losses
from truing.method import methods
from truing.models import Adapter, Change, Model, Weights
from truing.tables import Row, Table

LAYER = "model.layers.1.mlp.up_proj"
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def stored(folder: Path, dtype: torch.dtype) -> Model:
    """The tiny model with its weights in another type."""
    tiny_folder(folder)
    tensors = {n: t.to(dtype) for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Model.open(folder)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return stored(tmp_path_factory.mktemp("short"), torch.bfloat16)


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done on a GPU, done on this CPU."""
    own = precision.own
    monkeypatch.setattr(precision, "own", lambda model, device: own(model, "cuda"))


def adapter(model: Model, folder: Path, seed: int, rank: int = 4) -> Adapter:
    """An adapter of which each layer's output shows some steps of bfloat16."""
    made = lora.attach(model.load_module("float32", "cpu", fresh=True).module, rank, 8.0, seed=seed)
    with torch.no_grad():
        for one in made.adapters.values():
            one.b_OR.normal_(0.0, 1e-2, generator=torch.Generator().manual_seed(seed))
    made.save(folder)
    return Adapter(folder)


def weights(folder: Path, name: str, tensor: Tensor, **how: bool) -> Weights:
    folder.mkdir()
    save_file({name: tensor}, folder / "model.safetensors")
    return Weights(folder, **how)


def test_a_gpu_computes_in_the_type_of_the_files(short: Model, tmp_path: Path) -> None:
    assert precision.own(short, "cuda") == precision.own(short, "cuda:1") == "bfloat16"
    assert precision.own(short, "cpu") == "float32"
    assert precision.own(stored(tmp_path / "f16", torch.float16), "cuda") == "float16"
    assert precision.own(stored(tmp_path / "f32", torch.float32), "cuda") == "float32"
    # Few numbers of another type, such as a router's, do not decide.
    path = tmp_path / "f16" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, path, metadata={"format": "pt"})
    assert precision.own(Model.open(tmp_path / "f16"), "cuda") == "float16"


def test_what_was_trained_in_float32_is_computed_in_it(short: Model, tmp_path: Path) -> None:
    name = f"{LAYER}.weight"
    whole = short.load_module("float32", "cpu").module.get_parameter(name).detach()
    trained = weights(tmp_path / "a", name, whole * 1.001)
    rounded = weights(tmp_path / "b", name, whole.bfloat16())
    head = weights(tmp_path / "c", "reward_head.weight", torch.ones(1, 128))
    delta = weights(tmp_path / "d", name, whole.bfloat16() * 0.01, delta=True)
    low = adapter(short, tmp_path / "low", 1)

    def own(*changes: Change) -> str:
        return precision.own(short.with_changes(changes), "cuda")

    assert own(trained) == own(delta) == own(low, trained) == "float32"
    assert own(rounded) == own(low) == own(head) == own(rounded, low, head) == "bfloat16"
    assert own(low, rounded) == "float32"  # what replaces comes after what would stand beside


@pytest.mark.usefixtures("halved")
def test_adapters_stand_beside_weights_of_half_precision(short: Model, tmp_path: Path) -> None:
    laid = [adapter(short, tmp_path / "a", 1), adapter(short, tmp_path / "b", 2, rank=2)]
    model = short.with_changes(laid)
    base, made = short.load_module(device="cpu"), model.load_module(device="cpu")
    assert next(made.module.parameters()).dtype == torch.bfloat16
    weight = base.module.get_parameter(f"{LAYER}.weight")
    assert torch.equal(made.module.get_parameter(f"{LAYER}.weight"), weight)

    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    low = torch.zeros(3, 384)
    for change in laid:
        tensors = load_file(change.path / "adapter_model.safetensors")
        a, b = (tensors[f"base_model.model.{LAYER}.lora_{p}.weight"] for p in "AB")
        low += 8.0 / len(a) * ((x.float() @ a.T) @ b.T)
    want = (x @ weight.T) + low.bfloat16()
    assert float((want != x @ weight.T).float().mean()) > 0.5
    layer = made.module.get_submodule(LAYER)
    assert isinstance(layer, torch.nn.Linear)
    assert torch.allclose(layer(x).float(), want.float(), atol=1e-6, rtol=2**-7)

    # Asked for by its name, the type means the same; folded into float32 they are another module.
    assert model.load_module("bfloat16", "cpu").module is made.module
    assert model.load_module("float32", "cpu").module is not made.module
    assert model.load_module(device="cpu").module is made.module
    with torch.no_grad():
        exact, kept = (
            one.load_module("float32", "cpu").module(IDS).logits for one in (model, short)
        )
        near = made.module(IDS).logits.float()
    assert float((near - exact).abs().mean()) < 0.25 * float((kept - exact).abs().mean())


def test_training_goes_on_from_an_adapter_beside_half_precision(
    short: Model, tmp_path: Path
) -> None:
    """Folded into the weights, most of what the first has learnt would be gone from the second."""
    first = short.with_changes([adapter(short, tmp_path / "a", 1)])
    exact = first.load_module("float32", "cpu")
    pairs = [{"prompt": f"p{i}", "chosen": "a b", "rejected": "b a c"} for i in range(4)]
    with use(Context(folder=tmp_path / "run")) as context:
        made = methods["dpo"](first, Table("pair", pairs), steps=2, rank=2, lr=1e-2,
                              dtype="bfloat16", targets="up_proj")  # fmt: skip
    assert isinstance(made, Model) and len(made.weight_changes) == 2
    seen = [m for m in context.metrics if "loss" in m]
    # Before the first update the policy is its reference, bit for bit.
    assert seen[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert seen[0]["margin"] == 0.0 and float(str(seen[1]["loss"])) < math.log(2)

    start = first.load_module("bfloat16", "cpu", fresh=True)
    new = lora.attach(start.module, 2, targets="up_proj")
    with torch.no_grad():
        base = short.load_module("bfloat16", "cpu").module(IDS).logits
        want, got = exact.module(IDS).logits, start.module(IDS).logits.float()
        assert float((got - want).abs().mean()) < 0.25 * float((base.float() - want).abs().mean())
        next(iter(new.adapters.values())).b_OR.fill_(0.1)
        assert not torch.equal(start.module(IDS).logits.float(), got)
        with new.off():
            assert torch.equal(start.module(IDS).logits.float(), got)
    new.detach()
    with torch.no_grad():
        assert torch.equal(start.module(IDS).logits.float(), got)


def test_a_stored_adapter_is_nothing_that_a_pass_leaves_behind(
    short: Model, tmp_path: Path
) -> None:
    found = [
        saved_bytes(short.with_changes([adapter(short, tmp_path / str(r), 1, rank=r)])
                    .load_module("bfloat16", "cpu", fresh=True).module)
        for r in (2, 64)
    ]  # fmt: skip
    # What is kept of the low-rank products grows with the rank; A and B themselves would be more.
    assert found[1] - found[0] < 62 * 14 * 4 * 4


def test_weights_that_replace_others_keep_an_adapter_before_them_folded(
    short: Model, tmp_path: Path
) -> None:
    low = adapter(short, tmp_path / "low", 1)
    rounded = weights(tmp_path / "b", f"{LAYER}.weight", torch.ones(384, 128).bfloat16())
    head = weights(tmp_path / "c", "reward_head.weight", torch.ones(1, 128))
    assert unmerged.adapters_of(short.with_changes([low, rounded])) == []
    for changes in ([low, head], [rounded, low]):
        assert unmerged.adapters_of(short.with_changes(changes)) == [low]


@pytest.mark.usefixtures("halved")
def test_an_adapter_that_cannot_stand_beside_is_folded_in_float32(
    short: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.embed_tokens"
    low = adapter(short, tmp_path / "a", 1)
    path = low.path / "adapter_model.safetensors"
    a, b = torch.randn(2, 128) * 1e-3, torch.randn(259, 2) * 1e-3
    stem = f"base_model.model.{name}.lora_"
    save_file({f"{stem}A.weight": a, f"{stem}B.weight": b}, path)
    model = short.adding(Adapter(low.path))
    assert precision.own(model, "cuda") == "bfloat16"
    module = model.load_module(device="cpu").module
    old = short.load_module("float32", "cpu").module.get_parameter(f"{name}.weight")
    new = module.get_parameter(f"{name}.weight")
    assert new.dtype == torch.float32
    assert torch.allclose(new, old + 4.0 * (b @ a), atol=1e-7)  # alpha 8 by rank 2
    assert not torch.allclose(new, old, atol=1e-7)

    # That is found out once: after it, nothing is read again.
    built, build = [], loaded._build

    def counted(*args: Any, **kwargs: Any) -> Any:
        built.append(args[1])
        return build(*args, **kwargs)

    monkeypatch.setattr(loaded, "_build", counted)
    assert all(model.load_module(device="cpu").module is module for _ in range(3)) and not built
    loaded.forget()
    assert model.load_module(device="cpu").module is not module and built == ["float32"]


def test_files_are_opened_once_to_tell_the_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_own", {})
    model = stored(tmp_path / "one", torch.float16)
    assert precision.own(model, "cuda:1") == "float16"

    def closed(path: Path) -> None:
        del path
        raise AssertionError("opened again")

    monkeypatch.setattr(precision, "open_weights", closed)
    again = Model.open(tmp_path / "one")
    assert precision.own(model, "cuda") == precision.own(again, "cuda:0") == "float16"
    with pytest.raises(AssertionError, match="opened again"):  # other weights are another matter
        precision.own(stored(tmp_path / "two", torch.float32), "cuda")


@pytest.mark.usefixtures("halved")
def test_a_module_to_train_is_in_float32(short: Model) -> None:
    assert next(short.load_module(fresh=True).module.parameters()).dtype == torch.float32


ROWS: list[Row] = [
    {"prompt": "say a", "completion": "well, a"},
    {"prompt": "say b", "completion": "b"},
]
READS: list[Callable[[Model], list[float]]] = [
    lambda model: answer_logps(model.load_module(), ROWS, mean=True),
    lambda model: option_logps(model, ["say a"], ["yes", "no"])[0].tolist(),
    lambda model: [nats / n for nats, n in text_losses(model.load_module(), ["some words"], 0)],
    lambda model: [
        sum(c.logprobs) / len(c.ids)
        for (c,) in generate(model, ["say a"], max_tokens=1, greedy=True)
    ],
]


@pytest.mark.parametrize("read", READS)
def test_what_reads_a_model_does_so_in_half_precision(
    read: Callable[[Model], list[float]], short: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near the values of the same numbers in float32, and not the same: it did compute in it."""
    whole = read(short)
    own = precision.own
    monkeypatch.setattr(precision, "own", lambda model, device: own(model, "cuda"))
    half = read(short)
    assert half == pytest.approx(whole, rel=0.05, abs=0.1) and half != whole


def test_what_does_not_fit_is_told_what_helps() -> None:
    with pytest.raises(InputError, match="memory are free") as caught:
        loaded.make_place(11, lambda: 10, "cuda", "tiny")
    said = str(caught.value)
    assert "exported" in said and "bfloat16" not in said  # no command has a setting for it


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is quicker in bfloat16."""
    monkeypatch.setattr(precision, "probe", lambda *_: (1.0, 0.1))


@pytest.mark.usefixtures("quick")
def test_what_was_trained_in_float32_is_not_rounded_below_an_adapter(
    short: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{LAYER}.weight"
    whole = short.load_module("float32", "cpu").module.get_parameter(name).detach()
    trained = short.adding(weights(tmp_path / "a", name, whole * 1.001))
    rounded = short.adding(weights(tmp_path / "b", name, whole.bfloat16()))

    def types(model: Model, reference: Model | None = None, **how: Any) -> tuple[str, str]:
        with use(Context(folder=tmp_path)):
            made = begin(model, TextTraining(**how), "dpo", key="k", reference=reference)
        assert made.dtype == precision.type_of(made.loaded)
        return made.dtype, precision.type_of(made.frozen())

    assert precision.choose(rounded, TextTraining(), "cpu") == "bfloat16"
    assert precision.choose(trained, TextTraining(), "cpu") == "float32"
    assert types(rounded) == types(rounded, rounded) == ("bfloat16", "bfloat16")
    assert types(trained) == types(trained, trained) == ("float32", "float32")
    # Nor are those that it is compared with, or taught by.
    assert types(short, trained) == ("bfloat16", "float32")
    roles = Teachers(
        short.load_module(), {"a": trained, "b": rounded}, dict.fromkeys("ab", "full"),
        top_k=1, dtype="bfloat16", where="x",
    ).by_role  # fmt: skip
    assert {r: t.dtype for r, t in roles.items()} == {"a": "float32", "b": "bfloat16"}
    assert "rounds" not in capsys.readouterr().err
    assert types(trained, dtype="bfloat16") == ("bfloat16", "bfloat16")  # as was asked for
    assert "dtype bfloat16 rounds much of that away" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_an_adapter_that_cannot_stand_beside_is_not_rounded_below_another(
    short: Model, tmp_path: Path
) -> None:
    low = adapter(short, tmp_path / "a", 1)
    stem = "base_model.model.model.embed_tokens.lora_"
    parts = {f"{stem}A.weight": torch.ones(2, 128), f"{stem}B.weight": torch.ones(259, 2)}
    with use(Context(folder=tmp_path)):
        beside = begin(short.adding(low), TextTraining(), "dpo", key="k")
        save_file(parts, low.path / "adapter_model.safetensors")
        folded = begin(short.adding(Adapter(low.path)), TextTraining(), "dpo", key="k")
    assert (beside.dtype, folded.dtype) == ("bfloat16", "float32")
    assert precision.type_of(folded.loaded) == "float32"
