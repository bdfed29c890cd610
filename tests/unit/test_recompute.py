"""Gradient checkpointing: the same values and gradients from less memory, whatever hangs inside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from truing.context import Context, use
from truing.core.logprob import measure
from truing.core.modelfiles import lora
from truing.core.passes import block, recompute, routers
from truing.core.tree import Packed, group_tree, pack
from truing.merge.mixture_of_experts import mixture_of_experts
from truing.method import methods
from truing.models import Model
from truing.tables import Table

SIZES: dict[str, object] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
PROMPT = [5, 9, 33, 2, 7, 11, 40]
ANSWERS = [[3, 8, 1, 50, 12], [60, 4, 4], [9]]


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES))  # type: ignore[arg-type]


def qwen3() -> PreTrainedModel:  # whose blocks are not computed by hand
    return Qwen3ForCausalLM(Qwen3Config(**SIZES))  # type: ignore[arg-type]


def mixtral() -> PreTrainedModel:
    sizes = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes))  # type: ignore[arg-type]


def made(make: Callable[[], PreTrainedModel], rank: int, *, on: bool) -> PreTrainedModel:
    """A module whose weights differ from its first ones, with adapters that do something."""
    torch.manual_seed(3)
    module = make().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2).add_(0.05 * torch.randn(parameter.shape))
    if rank:
        adapters = lora.attach(module, rank, 2.0 * rank)
        with torch.no_grad():
            for adapter in adapters.adapters.values():
                adapter.b_OR.normal_(0.0, 0.1)
        module.truing_test_adapters = adapters  # type: ignore[assignment]
    if on:
        recompute.switch_on(module)
    return module


def packed(answers: int = 3) -> Packed:
    other = group_tree([1, 2, 3], [[4, 5, 6, 7], [8]])
    return pack([group_tree(PROMPT, ANSWERS[:answers]), other], 10_000)[0]


def weighed(flat: Tensor) -> Tensor:
    return (flat * torch.linspace(-1.0, 2.0, len(flat))).sum()


def trained(module: PreTrainedModel) -> dict[str, nn.Parameter]:
    held = getattr(module, "truing_test_adapters", None)
    named = held.named_parameters() if held is not None else module.named_parameters()
    return {n: p for n, p in named if p.requires_grad}


def gradients(module: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    named = trained(module)
    found = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, found, strict=True))


def by_trees(module: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    found = measure(module, packed())
    loss = weighed(found["logp"][found["mask"].bool()])
    return loss.detach(), gradients(module, loss)


def by_rows(module: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """The same without trees: one row at a time, by transformers alone."""
    parts: list[Tensor] = []
    for prompt, answers in ((PROMPT, ANSWERS), ([1, 2, 3], [[4, 5, 6, 7], [8]])):
        for answer in answers:
            logits = module(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            logp = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
            parts.append(logp[:, 0])
    loss = weighed(torch.cat(parts))
    return loss.detach(), gradients(module, loss)


def near(one: dict[str, Tensor], two: dict[str, Tensor], bound: float) -> None:
    assert one.keys() == two.keys()
    for name, a in one.items():
        scale = max(1.0, float(two[name].abs().max()))
        assert float((a - two[name]).abs().max()) <= bound * scale, name


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("make", [llama, qwen3, mixtral])
def test_values_and_gradients_are_the_same(
    make: Callable[[], PreTrainedModel], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = made(make, rank, on=False)
    by_trees(module)  # blocks are tried once
    plain, plain_grads = by_trees(module)
    wanted, wanted_grads = by_rows(module)
    recompute.switch_on(module)
    seen: list[int] = []
    inside = block._inside

    def watched(*args: object) -> tuple[Tensor, ...]:
        seen.append(1)
        return inside(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(block, "_inside", watched)
    value, grads = by_trees(module)
    assert len(seen) == (8 if make is llama else 0)  # by hand: forward, and in the backward pass
    assert float((value - plain).abs()) <= 1e-6 * float(plain.abs())
    near(grads, plain_grads, 1e-6)
    assert float((value - wanted).abs()) <= 1e-5 * float(wanted.abs())
    near(grads, wanted_grads, 5e-5)  # trees and rows add in other orders, through four blocks
    assert all("forward" not in vars(b) for b in module.model.layers)  # type: ignore[union-attr]


def test_bfloat16_under_adapters_is_the_same() -> None:
    def half() -> PreTrainedModel:
        return llama().to(torch.bfloat16)

    value, grads = by_trees(made(half, 3, on=False))
    again, same = by_trees(made(half, 3, on=True))
    assert torch.equal(value, again) and all(torch.equal(grads[n], same[n]) for n in grads)
    assert all(g.dtype == torch.float32 for g in grads.values())


def test_passes_without_gradients_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    module = made(qwen3, 0, on=True)

    def fail(*_: object) -> None:
        raise AssertionError("wrapped")

    monkeypatch.setattr(recompute, "wrapped", fail)
    found = measure(module, packed(), grad=False)
    assert not found["logp"].requires_grad
    with pytest.raises(AssertionError, match="wrapped"):
        measure(module, packed())


def test_hooks_inside_act_again_as_they_did_and_speak_once() -> None:
    """Noise on the routers and experts without room: removed before the backward pass."""
    found: list[tuple[float, dict[str, Tensor]]] = []
    for on in (False, True):
        module = made(mixtral, 0, on=on)
        measure(module, packed(), grad=False)  # the architecture is tried once, without the hooks
        torch.manual_seed(5)
        with routers.decided(module, noise=2.0, capacity=0.6) as seen:
            out = measure(module, packed())
        assert any(not r.kept_Nk.all() for r in seen)
        # A loss of what the hooks told has its gradient through blocks that are computed again.
        told = torch.stack([routers.z_value(r.logits_NE).mean() for r in seen]).mean()
        loss = weighed(out["logp"][out["mask"].bool()]) + told
        assert len(seen) == 4 and not any(r._forward_hooks for r in routers.routers(module))
        other = module.model.layers[1].self_attn  # type: ignore[union-attr]
        handle = other.register_forward_hook(lambda *_: pytest.fail("was not there in the pass"))
        before = torch.get_rng_state()
        found.append((float(loss.detach()), gradients(module, loss)))
        assert torch.equal(before, torch.get_rng_state())
        assert len(seen) == 4 and not recompute.under_way() and len(other._forward_hooks) == 1
        handle.remove()
        assert not other._forward_hooks
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    near(found[0][1], found[1][1], 1e-6)
    quiet = made(mixtral, 0, on=True)
    still = measure(quiet, packed())
    near_quiet = weighed(still["logp"][still["mask"].bool()])
    assert abs(float(near_quiet.detach()) - found[0][0]) > 0.1  # the hooks do change the values


# Memory


def left_and_peak(module: PreTrainedModel, tokens: Packed) -> tuple[int, int]:
    """Bytes that a forward pass left allocated, and the most at a time until its gradients."""
    from torch.profiler import ProfilerActivity, profile

    named = list(trained(module).values())
    measure(module, packed())["logp"].sum().backward()
    # Events are kept, as torch 2.11 warns of those that it would clear.
    cpu = [ProfilerActivity.CPU]
    recorded = partial(profile, activities=cpu, profile_memory=True, acc_events=True)
    with recorded() as forward:
        loss = measure(module, tokens)["logp"].sum()
    with recorded() as backward:
        held = torch.autograd.grad(loss, named)
    del held

    def changes(made: profile) -> list[int]:
        events = made.profiler.kineto_results.events()  # type: ignore[union-attr]
        return [e.nbytes() for e in events if e.name() == "[memory]"]

    left = sum(changes(forward))
    now = peak = left
    for change in changes(backward):
        now += change
        peak = max(peak, now)
    return left, peak


@pytest.mark.parametrize("make", [llama, qwen3])
def test_less_memory_is_held(make: Callable[[], PreTrainedModel]) -> None:
    answers = [[(7 * i + j) % 61 for i in range(80)] for j in range(4)]
    tokens = pack([group_tree(PROMPT, answers)], 10_000)[0]
    plain_left, plain_peak = left_and_peak(made(make, 2, on=False), tokens)
    left, peak = left_and_peak(made(make, 2, on=True), tokens)
    count, width, layers = len(tokens.ids_N), 32, 4
    inputs = count * width * 4 * layers
    assert inputs <= left < 0.5 * plain_left, (left, plain_left)
    assert peak < 0.7 * plain_peak, (peak, plain_peak)
    one = plain_left / layers  # with the backward pass of one block at a time
    assert left - inputs < one and peak < left + 3 * one


# Through whole trainings

ROWS = [
    {"prompt": f"what is {i}?", "chosen": f"it is {i}.", "rejected": f"no {i * 7} idea {i}"}
    for i in range(6)
]
PAIRS = Table("pair", ROWS)  # type: ignore[arg-type]
SHORT = {"short": {"use": "max_words", "n": 2}}


def train(name: str, model: Model, data: Table, folder: Path, **settings: object) -> Context:
    with use(Context(seed=4, folder=folder)) as context:
        methods[name](model, data, **{"steps": 2, "batch": 3, "lr": 1e-3, **settings})
    return context


def updates(context: Context) -> list[dict[str, object]]:
    rows = [{n: v for n, v in m.items() if n != "seconds"} for m in context.metrics]
    return [r for r in rows if "grad_norm" in r]


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


RUNS: dict[str, tuple[str, dict[str, object]]] = {
    "adapter": ("dpo", {"rank": 2, "budget": 64}),
    "all weights": ("sft", {"rank": 0}),
    "top blocks": ("sft", {"rank": 2, "layers": 2}),
    "noise": ("neftune", {"rank": 2}),
    "whole batch": ("bco", {"rank": 2, "budget": 100}),
    "moving reference": ("tr_dpo", {"rank": 2, "every": 1}),
    "value head": ("bradley_terry", {"rank": 2}),
    "online": ("grpo", {"rank": 2, "answers": 3, "max_tokens": 6, "rewards": SHORT}),
    "online, all weights": (
        "ppo_max",
        {
            "rank": 0,
            "answers": 2,
            "max_tokens": 6,
            "rewards": SHORT,
            "critic_rollouts": 0,
            "minibatches": 1,
        },
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_training_gives_the_same(name: str, model: Model, tmp_path: Path) -> None:
    method, settings = RUNS[name]
    found = {
        mode: train(method, model, PAIRS, tmp_path / mode, gradient_checkpointing=mode, **settings)
        for mode in ("never", "always")
    }
    assert updates(found["always"]) == updates(found["never"])  # on a CPU to the same bits
    assert len(updates(found["never"])) >= 2
    said = [any(m.get("gradient_checkpointing") for m in c.metrics) for c in found.values()]
    assert said == [False, True]


def test_several_heads_and_balanced_experts(model: Model, tmp_path: Path) -> None:
    headed = Table("pair", [{**r, "objective": i % 2} for i, r in enumerate(ROWS)])  # type: ignore[misc]
    examples = Table("example", [{"prompt": r["prompt"], "completion": r["chosen"]} for r in ROWS])
    sparse = mixture_of_experts({"base": model}, experts=4, top_k=2)
    routed = {"noise": 0.5, "capacity": 1.0, "rank": 0}
    for method, base, data, settings in (
        ("mah_dpo", model, headed, {"objectives": 2, "rank": 2}),
        ("balanced_experts", sparse, examples, routed),
    ):
        runs = [
            train(
                method, base, data, tmp_path / f"{method}-{m}", gradient_checkpointing=m, **settings
            )
            for m in ("never", "always")
        ]
        assert updates(runs[0]) == updates(runs[1]), method


def test_a_critic_with_a_trunk_of_its_own(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked: list[nn.Module] = []
    switch_on = recompute.switch_on

    def watched(module: nn.Module) -> None:
        marked.append(module)
        switch_on(module)

    monkeypatch.setattr(recompute, "switch_on", watched)
    settings: dict[str, object] = {"answers": 2, "max_tokens": 6, "rewards": SHORT, "rank": 2}
    never, always = (
        train("ppo", model, PAIRS, tmp_path / m, gradient_checkpointing=m, critic=model, **settings)
        for m in ("never", "always")
    )
    assert len(marked) == 2 and marked[0] is not marked[1]
    assert updates(never) == updates(always)
