"""Weights of 4 bits under an adapter."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from truing.changes import Adapter
from truing.context import Context, use
from truing.core.generate import generate
from truing.core.modelfiles import bases, choices, loaded, lora, nf4
from truing.core.passes import memory
from truing.core.passes.fused import _shaped  # pyright: ignore[reportPrivateUsage]
from truing.core.training import TextTraining
from truing.core.trunk import blocks_of
from truing.errors import InputError, MissingExtra
from truing.method import methods
from truing.models import Model
from truing.tables import Table

IDS = torch.tensor([[5, 6, 7, 8, 9, 100, 101, 30]])
NAME = "model.layers.1.mlp.up_proj"
PAIRS = Table(
    "pair",
    [{"prompt": f"Say {w}.", "chosen": f"{w}!", "rejected": f"not {w}"} for w in ("yes", "no")],
)


@pytest.fixture(scope="module")
def plain(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


@pytest.fixture
def model(tiny_path: Path) -> Model:
    pytest.importorskip("bitsandbytes")
    return Model.open(f"{tiny_path}?bits=4")


def logits(model: Model, **how: bool) -> torch.Tensor:
    with torch.no_grad():
        return model.load_module("float32", "cpu", **how).module(input_ids=IDS).logits


def trained(model: Model, folder: Path, **settings: Any) -> tuple[Model, list[float]]:
    with use(Context(folder=folder)) as context:
        made = methods["dpo"](model, PAIRS, lr=1e-2, dtype="float32", **settings)
    assert isinstance(made, Model)
    return made, [cast(float, m["loss"]) for m in context.metrics if "grad_norm" in m]


def test_a_packed_layer_is_the_product_with_what_it_unpacks(model: Model, plain: Model) -> None:
    source = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        weight_OI = torch.randn(96, 128, generator=source).to(dtype)
        bias_O = nn.Parameter(torch.randn(96, generator=source).to(dtype))
        layer = nf4.Linear4(weight_OI, bias_O, dtype, "cpu")
        # Of normal numbers, what NF4 leaves out is a tenth of them.
        assert 0.05 < float((layer.weight - weight_OI).abs().mean() / weight_OI.abs().mean()) < 0.12
        x_NI = torch.randn(5, 128, generator=source).to(dtype).requires_grad_()
        out_NO = layer(x_NI)
        assert torch.equal(out_NO, nn.functional.linear(x_NI, layer.weight, bias_O))
        up_NO = torch.randn(5, 96, generator=source).to(dtype)
        (d_x,) = torch.autograd.grad(out_NO, x_NI, up_NO)
        assert torch.allclose(d_x, up_NO @ layer.weight, rtol=1e-2 if dtype.itemsize == 2 else 1e-5)
        assert list(layer.parameters()) == [bias_O] and layer.packed.nbytes == 96 * 128 // 2
        assert layer.to(torch.bfloat16).weight.dtype == dtype
        state = layer.state
        held = state.absmax.nbytes + state.state2.absmax.nbytes  # whose last group is not full
        assert held == 96 * 128 // 64 + 4 * math.ceil(96 * 128 / 64 / 256)


def test_blocks_are_of_the_flat_matrix_whatever_its_width(model: Model) -> None:
    """Of each 64 numbers in a row of memory the largest comes back, also across rows."""
    weight_OI = torch.randn(96, 80, generator=torch.Generator().manual_seed(1))
    made = nf4.unpacked(*nf4.packed(weight_OI), weight_OI.shape).flatten().view(-1, nf4.BLOCK)
    own = weight_OI.flatten().view(-1, nf4.BLOCK)
    at = own.abs().argmax(1, keepdim=True)
    assert torch.allclose(made.gather(1, at), own.gather(1, at), rtol=0.02)


def test_trained_weights_are_not_taken_for_packed_ones(plain: Model, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    made, _ = trained(plain, tmp_path / "run", rank=0, steps=1)
    with pytest.raises(InputError, match="trained or merged"):
        made.quantised()
    out = Model.open(f"{made.export(tmp_path / 'out')}?bits=4")
    assert len(nf4.packed_in(out.load_module("float32", "cpu").module)) == 21


def test_a_base_is_kept_once_whatever_its_bits(model: Model, plain: Model) -> None:
    with bases.kept(model.local) as one:
        pass
    with bases.kept(plain.local) as other:
        assert one == other


def test_an_adapter_that_cannot_stand_beside_is_read_twice_and_fresh_when_asked(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {
        f"base_model.model.model.embed_tokens.lora_{n}.weight": torch.randn(*shape) * 1e-3
        for n, shape in (("A", (2, 128)), ("B", (259, 2)))
    }
    lora.write(tmp_path / "low", tensors, 2, 4.0, ["model.embed_tokens"], {})
    made = model.adding(Adapter(tmp_path / "low"))
    built, build = [], loaded._build  # pyright: ignore[reportPrivateUsage]

    def counted(*args: Any, **kwargs: Any) -> Any:
        built.append(args[1])
        return build(*args, **kwargs)

    monkeypatch.setattr(loaded, "_build", counted)
    first = made.load_module(device="cpu").module
    assert len(built) == 2 and len(nf4.packed_in(first)) == 21
    fresh = made.load_module(device="cpu", fresh=True, packed=True).module
    assert fresh is not first and len(built) == 3


def test_only_the_linear_layers_of_blocks_are_packed(model: Model, plain: Model) -> None:
    module = model.load_module("float32", "cpu").module
    linears = {n for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    packed = {n for n, m in module.named_modules() if isinstance(m, nf4.Linear4)}
    assert len(packed) == 21 and linears - packed == {"lm_head"}
    stored = load_file(plain.folder / "model.safetensors")
    for name, parameter in module.named_parameters():
        if name != "lm_head.weight":
            assert torch.equal(parameter, stored[name])
    assert not any(_shaped(block) for block in blocks_of(module))  # none is computed by hand


def test_packed_dense_and_exported_weights_are_the_same(
    model: Model, plain: Model, tmp_path: Path
) -> None:
    packed, dense = logits(model), logits(model, fresh=True)
    assert torch.equal(packed, dense) and not torch.allclose(packed, logits(plain), atol=0.1)
    again = Model.load(model.save(tmp_path / "saved"))
    loaded.forget()
    assert again.key == model.key and torch.equal(logits(again), packed)
    out = Model.open(model.export(tmp_path / "out"))
    assert out.local.bits == 0 and torch.equal(logits(out), packed)


def test_the_key_says_four_bits(model: Model, plain: Model, tiny_path: Path) -> None:
    assert model.key != plain.key and model.quantised(0).key == plain.key
    both = Model.open(f"{tiny_path}?thinking=false&bits=4")
    assert (both.local.bits, both.local.thinking) == (4, False)
    assert len({both.key, model.key, model.thinking(False).key}) == 2


def test_an_adapter_learns_on_them(model: Model, plain: Model, tmp_path: Path) -> None:
    made, losses = trained(model, tmp_path / "run", rank=4, steps=5)
    assert losses[0] == pytest.approx(
        math.log(2), abs=1e-5
    )  # the reference is the same, adapter off
    assert losses[-1] < 0.5 * losses[0]
    assert made.local.bits == 4 and len(made.changes) == 1
    beside = made.load_module("float32", "cpu").module
    assert isinstance(beside.get_submodule(NAME), nf4.Linear4)
    # Folded into the unpacked weights, it gives the same to rounding.
    packed, dense = logits(made), logits(made, fresh=True)
    assert torch.allclose(packed, dense, atol=1e-4) and not torch.allclose(packed, logits(model))
    again = Model.load(made.save(tmp_path / "saved"))
    loaded.forget()
    assert torch.equal(logits(again), packed)
    out = Model.open(made.export(tmp_path / "out"))
    assert torch.allclose(logits(out), packed, atol=1e-4)
    # As an adapter of PEFT, whose base a user opens in 4 bits again.
    opened = Model.open(f"{made.export_adapter(tmp_path / 'adapter')}?bits=4")
    assert opened.local.bits == 4 and torch.allclose(logits(opened), packed, atol=1e-4)
    more, losses = trained(made, tmp_path / "more", rank=4, steps=2)
    assert losses[-1] < losses[0] and len(more.changes) == 2


def test_gradients_are_those_over_the_unpacked_weights(model: Model) -> None:
    found: list[list[torch.Tensor]] = []
    for packed in (True, False):
        module = model.load_module("float32", "cpu", fresh=True, packed=packed).module
        made = lora.attach(module, 4, 8.0, seed=3)
        with torch.no_grad():
            for i, one in enumerate(made.adapters.values()):
                one.b_OR.normal_(0.0, 1e-2, generator=torch.Generator().manual_seed(i))
        loss = module(input_ids=IDS).logits.log_softmax(-1)[0, :-1].gather(-1, IDS[0, 1:, None])
        found.append(list(torch.autograd.grad(-loss.mean(), list(made.parameters()))))
    for a, b in zip(*found):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))


def test_it_generates(model: Model, tmp_path: Path) -> None:
    drawn = [
        [tuple(c.ids) for (c,) in generate(m, ["Say yes.", "No."], max_tokens=6, greedy=True)]
        for m in (model, Model.open(model.export(tmp_path / "out")))
    ]
    assert drawn[0] == drawn[1] and all(drawn[0])


def test_memory_is_counted_in_four_bits(
    model: Model, plain: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = load_file(plain.folder / "model.safetensors")
    blocks = sum(t.numel() for n, t in stored.items() if "proj" in n)
    others = sum(t.numel() for n, t in stored.items() if "proj" not in n)
    size = loaded.bytes_of(model, "bfloat16", packed=True)
    assert size == pytest.approx(blocks * (0.5 + 1 / 64 + 1 / 4096) + 2 * others, abs=64)
    module = model.load_module("float32", "cpu").module
    held = blocks // 2 + 4 * others
    assert sum(t.nbytes for t in [*module.parameters(), *module.buffers()]) < held + 1024
    settings = TextTraining(rank=4)
    small, large = (
        memory.forecast(m.load_module("float32", "cpu").module, settings, memory.Beside(frozen=1))
        for m in (model, plain)
    )
    assert small.copies == held < large.copies / 3
    # No merged weights beside the layers: one that is unpacked.
    assert large.state - small.state == 4 * (blocks - 384 * 128)
    free = 2 * size / 2**30
    monkeypatch.setattr("truing.doctor.memory_gib", lambda: (1.0, free))
    loaded.check_memory(model, "bfloat16", packed=True)
    with pytest.raises(InputError, match="the weights need about"):
        loaded.check_memory(plain, "bfloat16")


def test_weights_of_four_bits_are_not_trained(model: Model, tmp_path: Path) -> None:
    for settings in ({"rank": 0}, {"rank": 0, "layers": 1}):
        with pytest.raises(InputError, match=r"setting 'rank' is 0.*Train an adapter"):
            trained(model, tmp_path, steps=1, **settings)


def test_blocks_without_linear_layers_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)).save_pretrained(
        tmp_path
    )
    with pytest.raises(InputError, match=r"only linear layers are.*c_attn.*without"):
        Model.open(f"{tmp_path}?bits=4").load_module("float32", "cpu")


def test_without_the_package(plain: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"bitsandbytes.*pip install 'truing\[quant\]'"):
        plain.quantised()


@pytest.mark.parametrize("bits", ["8", "four"])
def test_other_numbers_of_bits(bits: str, plain: Model) -> None:
    with pytest.raises(InputError, match=r"'bits' is 4.*\?bits=4"):
        choices.read(f"?bits={bits}")
    with pytest.raises(InputError, match=r"packed into 4 bits.*\?bits=4"):
        plain.quantised(8)
