"""The hand-written block against stock transformers: values, gradients, when it stands aside."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from truing.core.batch.layout import Layout
from truing.core.hooks import Edit, edit
from truing.core.logprob import measure
from truing.core.modelfiles import lora
from truing.core.passes import block
from truing.core.passes.attention import tree_attention
from truing.core.passes.fused import fused
from truing.core.tree import Packed, group_tree, pack
from truing.errors import InputError

SIZES: dict[str, object] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


def made(cls: type[PreTrainedModel], config: object) -> PreTrainedModel:
    torch.manual_seed(3)
    module = cls(config)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:  # biases and norms must show
                parameter.add_(0.2 * torch.randn(parameter.shape))
            elif "embed" not in name:
                parameter.mul_(4)
    return module.eval()


def llama(heads: int = 2, **more: object) -> PreTrainedModel:
    return made(LlamaForCausalLM, LlamaConfig(**{**SIZES, "num_key_value_heads": heads, **more}))


def biased() -> PreTrainedModel:
    return llama(attention_bias=True, mlp_bias=True)


def wide_heads() -> PreTrainedModel:
    return llama(head_dim=16)


def qwen2() -> PreTrainedModel:
    return made(Qwen2ForCausalLM, Qwen2Config(**{**SIZES, "num_key_value_heads": 2}))


def qwen3() -> PreTrainedModel:
    return made(Qwen3ForCausalLM, Qwen3Config(**{**SIZES, "num_key_value_heads": 2}))


def mistral(window: int | None = None) -> PreTrainedModel:
    config = MistralConfig(**{**SIZES, "num_key_value_heads": 2, "sliding_window": window})
    return made(MistralForCausalLM, config)


def granite() -> PreTrainedModel:
    config = GraniteConfig(**{**SIZES, "num_key_value_heads": 2, "residual_multiplier": 0.7})
    return made(GraniteForCausalLM, config)


PROMPT = [5, 9, 33, 2, 7, 11, 40]
ANSWERS = [[3, 8, 1, 50, 12], [60, 4, 4], [9]]


def tree() -> Packed:
    other = group_tree([1, 2, 3], [[4, 5, 6, 7], [8]])
    return pack([group_tree(PROMPT, ANSWERS), other], 1000)[0]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[nn.Module]]:
    """Blocks that were computed by hand."""
    seen: list[nn.Module] = []
    real: Callable[..., Tensor] = block.run

    def watched(of: nn.Module, *rest: object) -> Tensor:
        seen.append(of)
        return real(of, *rest)

    monkeypatch.setattr("truing.core.passes.fused.run", watched)
    yield seen


def first_use(module: nn.Module, seen: list[nn.Module]) -> None:
    """Have each block tried against the stock one, and forget that."""
    measure(module, tree(), grad=False)
    seen.clear()


def rows(module: nn.Module) -> list[Tensor]:
    """log p of each answer's tokens, one row at a time and by transformers alone."""
    found: list[Tensor] = []
    for prompt, answers in ((PROMPT, ANSWERS), ([1, 2, 3], [[4, 5, 6, 7], [8]])):
        for answer in answers:
            logp = module(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            at = torch.tensor(answer)[:, None]
            found.append(logp.log_softmax(-1).gather(1, at)[:, 0])
    return found


def weighed(parts: list[Tensor]) -> Tensor:
    """A loss in which every token counts differently."""
    flat = torch.cat(parts)
    return (flat * torch.linspace(-1.0, 2.0, len(flat))).sum()


def trees(module: nn.Module) -> list[Tensor]:
    found = measure(module, tree())
    sizes = [(0, 0, 5), (0, 1, 3), (0, 2, 1), (1, 0, 4), (1, 1, 1)]
    return [found["logp"][u, k, :t] for u, k, t in sizes]


def close(a: Tensor, b: Tensor, name: str = "") -> None:
    a, b = a.detach(), b.detach()
    bound = 1e-5 * max(1.0, float(b.abs().max()))
    assert float((a - b).abs().max()) <= bound, (name, float((a - b).abs().max()), bound)


MODELS = [llama, lambda: llama(4), lambda: llama(1), biased, wide_heads, qwen2, mistral]


@pytest.mark.parametrize("make", MODELS)
def test_values_and_gradients_of_a_full_fine_tune(
    make: Callable[[], PreTrainedModel], runs: list[nn.Module]
) -> None:
    module = make()
    first_use(module, runs)
    mine = trees(module)
    weighed(mine).backward()
    assert len(runs) == 2
    got = {n: p.grad for n, p in module.named_parameters()}
    module.zero_grad()
    plain = rows(module)
    weighed(plain).backward()
    for a, b in zip(mine, plain, strict=True):
        close(a, b)
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and got[name] is not None, name
        close(got[name], parameter.grad, name)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj")])
def test_values_and_gradients_of_adapters(
    make: Callable[[], PreTrainedModel], targets: str, runs: list[nn.Module]
) -> None:
    module = make()
    first_use(module, runs)
    adapters = lora.attach(module, 3, 6.0, targets)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    mine = trees(module)
    weighed(mine).backward()
    assert len(runs) == 2 and all(p.grad is None for p in module.parameters())
    got = {n: p.grad for n, p in adapters.named_parameters()}
    # Plain: W + s B A written out, gradients by autograd.
    adapters.detach()
    for name, adapter in adapters.adapters.items():
        linear = module.get_submodule(name)
        whole = linear.weight.detach() + adapter.scale * adapter.b_OR @ adapter.a_RI
        bias = linear.bias
        linear.forward = lambda x, whole=whole, bias=bias: nn.functional.linear(x, whole, bias)
    for parameter in adapters.parameters():
        parameter.grad = None
    plain = rows(module)
    weighed(plain).backward()
    for a, b in zip(mine, plain, strict=True):
        close(a, b)
    for name, parameter in adapters.named_parameters():
        assert parameter.grad is not None and got[name] is not None, name
        close(got[name], parameter.grad, name)


def test_only_what_is_trained_gets_a_gradient(runs: list[nn.Module]) -> None:
    module = biased()
    first_use(module, runs)
    module.requires_grad_(False)
    wanted = {
        "model.layers.0.self_attn.k_proj.bias",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.mlp.gate_proj.weight",
    }
    for name in wanted:
        module.get_parameter(name).requires_grad_()
    weighed(trees(module)).backward()
    assert len(runs) == 2
    assert {n for n, p in module.named_parameters() if p.grad is not None} == wanted
    got = {n: module.get_parameter(n).grad for n in wanted}
    module.zero_grad()
    weighed(rows(module)).backward()
    for name in wanted:
        close(got[name], module.get_parameter(name).grad, name)


def test_nothing_is_kept_without_gradients(runs: list[nn.Module]) -> None:
    module = llama()
    with torch.no_grad():
        found = measure(module, tree(), grad=False)["logp"]
    assert not found.requires_grad
    with torch.inference_mode():
        again = measure(module, tree(), grad=False)["logp"]
    assert torch.equal(found, again)
    # What was tried in inference mode must still train.
    fresh = llama()
    with torch.inference_mode():
        measure(fresh, tree(), grad=False)
    weighed(trees(fresh)).backward()


def test_adapter_off_is_the_model_itself(runs: list[nn.Module]) -> None:
    module = llama()
    before = measure(module, tree(), grad=False)["logp"]
    adapters = lora.attach(module, 3, 6.0)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.1)
    runs.clear()
    with adapters.off():
        off = measure(module, tree(), grad=False)["logp"]
    on = measure(module, tree(), grad=False)["logp"]
    assert len(runs) == 4  # by hand both times
    assert torch.equal(off, before) and (on - before).abs().max() > 1e-3
    adapters.detach()
    assert torch.equal(measure(module, tree(), grad=False)["logp"], before)


@pytest.mark.parametrize("make", [qwen3, granite])
def test_other_architectures_run_as_they_are(
    make: Callable[[], PreTrainedModel], runs: list[nn.Module]
) -> None:
    """Qwen3 has norms of queries and keys; Granite's blocks only differ in what they compute."""
    module = make()
    first_use(module, runs)
    for a, b in zip(trees(module), rows(module), strict=True):
        close(a, b)
    assert not runs


def test_windows_shorter_than_a_row_are_computed_by_the_stock_block(runs: list[nn.Module]) -> None:
    assert first_use(mistral(64), runs) is None
    runs.clear()
    measure(mistral(11), tree())
    assert not runs


@pytest.mark.parametrize("site", ["layers.0.mlp", "layers.0.attn", "layers.0.head.1"])
def test_edits_inside_a_block_are_never_passed_over(site: str, runs: list[nn.Module]) -> None:
    module = llama()
    first_use(module, runs)
    size = 8 if "head" in site else 32
    change = Edit(site, torch.linspace(-1, 1, size), strength=2.0)
    with edit(module, [change]):
        with torch.no_grad():
            plain = rows(module)
        mine = trees(module)
    assert [m is module.model.layers[1] for m in runs] == [True]
    assert not any("forward" in vars(m) for m in module.modules())
    for a, b, c in zip(mine, plain, rows(module), strict=True):
        close(a, b)
        assert (b - c).abs().max() > 1e-3


@pytest.mark.parametrize("site", ["embedding", "layers.0.residual"])
def test_edits_around_a_block_act_on_it(site: str, runs: list[nn.Module]) -> None:
    module = llama()
    with edit(module, [Edit(site, torch.linspace(-1, 1, 32), strength=2.0)]):
        first_use(module, runs)  # tried while the edit is there
        mine, plain = trees(module), rows(module)
    assert len(runs) == 2
    for a, b in zip(mine, plain, strict=True):
        close(a, b)


def test_foreign_forwards_and_layers_run_as_they_are(runs: list[nn.Module]) -> None:
    module = llama()
    first_use(module, runs)
    gate = module.model.layers[0].mlp.gate_proj
    stock = gate.forward
    gate.forward = lambda x: 2 * stock(x)
    for a, b in zip(trees(module), rows(module), strict=True):
        close(a, b)
    assert [m is module.model.layers[1] for m in runs] == [True]

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    del gate.forward
    runs.clear()
    gate.__class__ = Doubled
    for a, b in zip(trees(module), rows(module), strict=True):
        close(a, b)
    assert [m is module.model.layers[1] for m in runs] == [True]


def test_dropout_inside_the_attention_is_refused_while_training() -> None:
    module = llama(attention_dropout=0.5)
    measure(module, tree(), grad=False)
    with pytest.raises(InputError, match="exactly"):
        measure(module.train(), tree())


def test_a_weight_written_to_between_the_passes_is_an_error() -> None:
    module = llama()
    loss = weighed(trees(module))
    with torch.no_grad():
        module.model.layers[0].mlp.up_proj.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_two_threads_on_one_module() -> None:
    module = llama()
    packs = [tree(), pack([group_tree([7, 7], [[1, 2, 3], [9, 8]])])[0]]
    alone = [measure(module, p, grad=False)["logp"] for p in packs]
    wrong: list[str] = []

    def work(which: int) -> None:
        for _ in range(20):
            if not torch.equal(measure(module, packs[which], grad=False)["logp"], alone[which]):
                wrong.append(f"thread {which}")

    before = module.config._attn_implementation
    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert module.config._attn_implementation == before
    assert not any("forward" in vars(m) for m in module.modules())


def test_forward_passes_are_given_back_after_an_error() -> None:
    module = llama()
    module.model.norm.register_forward_hook(lambda *_: 1 / 0)
    layout = Layout(tree().segments)
    with pytest.raises(ZeroDivisionError), tree_attention(module), fused(module, layout.longest):
        assert "forward" in vars(module.model.layers[0])
        module.base_model(input_ids=tree().ids_N[None], use_cache=False, tree=layout)
    assert not any("forward" in vars(m) for m in module.modules())
