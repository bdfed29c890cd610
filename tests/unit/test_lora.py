"""Adapters: PEFT reads ours and we read PEFT's, with the same logits and the same gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from truing.core.modelfiles import lora, unmerged
from truing.core.sampling import SamplingSettings, sample
from truing.core.tiny import tiny_folder, tiny_model
from truing.core.weights import Folded, open_weights
from truing.errors import InputError
from truing.method import methods
from truing.models import Adapter, Model
from truing.tables import Table

# PEFT asks transformers by a name that is going out of use.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
IDS = torch.tensor([[5, 77, 130, 9, 201, 33, 4]])


def logits(module: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return module(IDS).logits[0]


def stir(parameters: object, seed: int = 1) -> None:
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:  # type: ignore[attr-defined]
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))


def test_peft_reads_ours(tmp_path: Path) -> None:
    module = tiny_model()[0]
    adapters = lora.attach(module, 4, 12.0)
    stir(adapters.parameters())
    mine, plain = logits(module), logits(tiny_model()[0])
    adapters.save(tmp_path, base="tiny")
    theirs = PeftModel.from_pretrained(tiny_model()[0], tmp_path)
    assert (mine - plain).abs().max() > 0.1
    assert torch.allclose(logits(theirs), mine, atol=1e-4)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "up_proj"]])
def test_we_read_theirs(targets: str | list[str], tmp_path: Path, tiny_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM")
    theirs = get_peft_model(tiny_model()[0], config)
    stir(p for n, p in theirs.named_parameters() if "lora_" in n)
    theirs.eval().save_pretrained(tmp_path, save_embedding_layers=False)
    want = logits(theirs)
    folded = Model.open(tiny_path).adding(Adapter(tmp_path)).load_module().module
    assert torch.allclose(logits(folded), want, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's
@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_modules_that_peft_saves_whole(saved: list[str], tmp_path: Path, tiny_path: Path) -> None:
    """Of tied embeddings PEFT trains a copy on either side, and so does whoever reads it."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved)
    theirs = get_peft_model(tiny_model()[0], config).eval()
    stir(p for n, p in theirs.named_parameters() if "lora_" in n or "modules_to_save" in n)
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    want = logits(theirs)
    made = Model.open(tiny_path).adding(Adapter(tmp_path / "a"))
    assert made.folded().untied and not made.folded().extra
    assert torch.allclose(logits(made.load_module().module), want, atol=1e-4)
    made.export(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.allclose(logits(plain), want, atol=1e-4)
    # Beside weights of half precision there is no place for whole tensors.
    assert not unmerged.put(tiny_model()[0], [Adapter(tmp_path / "a")])


def test_a_head_that_has_no_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    name = "base_model.model.lm_head.weight"
    save_file({name: torch.ones(4, 2)}, tmp_path / "a" / "adapter_model.safetensors")
    save_file({"wte.weight": torch.ones(4, 2)}, tmp_path / "base.safetensors")
    with pytest.raises(InputError, match=r"touches 'lm_head.weight'.*cannot be changed apart"):
        Folded(open_weights(tmp_path / "base.safetensors"), [Adapter(tmp_path / "a")])


def test_values_and_gradients_are_pefts() -> None:
    module = tiny_model()[0]
    adapters = lora.attach(module, 4, 12.0)
    stir(adapters.parameters())
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(tiny_model()[0], config).eval()
    named = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if p.requires_grad}
    mine = dict(adapters.named_parameters())
    assert set(named) == set(mine)
    with torch.no_grad():
        for name, parameter in mine.items():
            named[name].copy_(parameter)
    weight = torch.linspace(-1, 1, 7 * 259).view(7, 259)
    for one in (module, theirs):
        (one(IDS).logits[0].log_softmax(-1) * weight).sum().backward()
    for name, parameter in mine.items():
        want = named[name].grad
        assert parameter.grad is not None and want is not None
        assert torch.allclose(parameter.grad, want, atol=2e-5 * float(want.abs().max())), name


def test_an_adapter_begins_as_nothing_and_draws_as_peft_does() -> None:
    module = tiny_model()[0]
    plain = logits(module)
    adapters = lora.attach(module, 16, 32.0, seed=5)
    assert torch.allclose(logits(module), plain, atol=1e-6)
    assert all(not p.requires_grad for p in module.parameters())
    for adapter in adapters.adapters.values():
        bound = adapter.linear.in_features**-0.5
        assert 0.95 * bound < float(adapter.a_RI.detach().abs().max()) <= bound
        assert not adapter.b_OR.detach().any()
    again = lora.attach(tiny_model()[0], 16, 32.0, seed=5)
    other = lora.attach(tiny_model()[0], 16, 32.0, seed=6)
    first, same, moved = (next(a.parameters()).detach() for a in (adapters, again, other))
    assert torch.equal(first, same) and not torch.equal(first, moved)


def test_off_detach_and_merge() -> None:
    module = tiny_model()[0]
    plain = logits(module)
    adapters = lora.attach(module, 4, 12.0)
    stir(adapters.parameters())
    on = logits(module)
    with adapters.off():
        assert torch.equal(logits(module), plain)
        with adapters.off():
            pass
        assert torch.equal(logits(module), plain)  # the inner block does not switch them on
    assert torch.equal(logits(module), on)
    with pytest.raises(ZeroDivisionError), adapters.off():
        _ = 1 / 0
    assert torch.equal(logits(module), on)
    adapters.detach()
    assert torch.equal(logits(module), plain)
    assert not any("forward" in vars(m) for m in module.modules())


def test_the_merged_weight_follows_every_write() -> None:
    module = tiny_model()[0]
    adapters = lora.attach(module, 4, 12.0)
    stir(adapters.parameters())
    before = logits(module)
    layer = module.model.layers[2].mlp.up_proj
    adapter = adapters.adapters["model.layers.2.mlp.up_proj"]
    for tensor in (adapter.a_RI, adapter.b_OR, layer.weight):
        with torch.no_grad():
            tensor.mul_(1.5)
        after = logits(module)
        assert (after - before).abs().max() > 1e-4
        before = after


def test_sampling_between_updates_does_not_stop_training() -> None:
    """Weights that were merged while sampling (without gradients at all) must still train."""
    module = tiny_model()[0]
    adapters = lora.attach(module, 4, 12.0)
    optimizer = torch.optim.SGD(list(adapters.parameters()), lr=0.1)
    for _ in range(2):
        sample(module, [[5, 6, 7]], SamplingSettings(max_tokens=2))
        module(IDS).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_layers_of_lower_precision() -> None:
    module = tiny_model()[0].to(torch.bfloat16)
    plain = logits(module).float()
    adapters = lora.attach(module, 4, 12.0)
    assert all(p.dtype == torch.float32 for p in adapters.parameters())
    stir(adapters.parameters())
    exact = tiny_model()[0]
    wide = lora.attach(exact, 4, 12.0)
    with torch.no_grad():
        for a, b in zip(wide.parameters(), adapters.parameters(), strict=True):
            a.copy_(b)
    want = logits(exact)
    assert (logits(module).float() - want).abs().mean() < 0.1 * (want - plain).abs().mean()
    module(IDS).logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in adapters.parameters())


def test_mistakes_are_named() -> None:
    module = tiny_model()[0]
    with pytest.raises(InputError, match="at least 1"):
        lora.attach(module, 0)
    with pytest.raises(InputError, match="Did you mean 'q_proj'"):
        lora.attach(module, 4, targets=["q_porj"])
    lora.attach(module, 4)
    with pytest.raises(InputError, match="already has an adapter"):
        lora.attach(module, 4)


# GPT-2, whose linear layers are Conv1D


def gpt2(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    end = tiny_model()[0].config.eos_token_id
    config = GPT2Config(
        vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=end
    )
    return GPT2LMHeadModel(config).eval()


def test_peft_reads_gpt2s_adapter_and_trains_alike(tmp_path: Path) -> None:
    module, plain = gpt2(), logits(gpt2())
    adapters = lora.attach(module, 4, 12.0)
    assert len(adapters.adapters) == 8 and torch.allclose(logits(module), plain, atol=1e-6)
    stir(adapters.parameters())
    mine = logits(module)
    adapters.save(tmp_path, base="gpt2")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    theirs = PeftModel.from_pretrained(gpt2(), tmp_path, is_trainable=True).eval()
    assert (mine - plain).abs().max() > 0.1 and torch.allclose(logits(theirs), mine, atol=1e-4)
    weight = torch.linspace(-1, 1, 7 * 259).view(7, 259)
    for one in (module, theirs):
        (one(IDS).logits[0].log_softmax(-1) * weight).sum().backward()
    named = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in adapters.named_parameters():
        want = named[name].grad
        assert parameter.grad is not None and want is not None
        assert torch.allclose(parameter.grad, want, atol=2e-5 * float(want.abs().max())), name
    with adapters.off():
        assert torch.equal(logits(module), plain)
    adapters.detach()
    assert "forward" not in vars(module.transformer.h[0].attn.c_attn)


def test_gpt2_is_trained_by_an_adapter_and_read_again(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "tiny")
    gpt2().save_pretrained(folder)
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    model = Model.open(folder)
    made = methods["dpo"](
        model, Table("pair", [pair] * 2), steps=2, batch=2, lr=0.05, max_length=48
    )
    (change,) = made.changes
    theirs = PeftModel.from_pretrained(gpt2(), change.path).eval()
    read = made.load_module().module
    assert torch.allclose(logits(read), logits(theirs), atol=1e-4)
    assert (logits(read) - logits(gpt2())).abs().max() > 1e-3
    half = gpt2().bfloat16()
    assert unmerged.put(half, [change])
    off, base = logits(theirs), logits(gpt2().bfloat16()).float()
    put = logits(half).float()
    assert torch.allclose(put, off, atol=0.1) and 5 * (put - off).norm() < (put - base).norm()
