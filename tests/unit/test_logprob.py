"""Measurements on packed trees against the plain, padded computation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from truing.core import logprob
from truing.core.logprob import Rows, measure
from truing.core.tiny import tiny_model
from truing.core.tree import Node, example_tree, group_tree, pack
from truing.errors import InputError

MODULE = tiny_model()[0]


def padded(module: nn.Module, rows: list[tuple[int, ...]]) -> Tensor:
    """log p over the vocabulary [B, T, V] of a padded batch, by transformers alone."""
    width = max(map(len, rows))
    ids = torch.tensor([[*r, *[0] * (width - len(r))] for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    return module(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)


def by_rows(
    trees: list[Node], logp_BTV: Tensor, value: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """`value(logp_TV, target_T)` at the loss tokens of each branch."""
    rows = [r for t in trees for r in t.rows()]
    found: list[Tensor] = []
    for (ids, loss), logp_TV in zip(rows, logp_BTV, strict=True):
        at = torch.tensor([i for i, mark in enumerate(loss) if mark and i], dtype=torch.long)
        found.append(value(logp_TV[at - 1], torch.tensor(ids, dtype=torch.long)[at]))
    return found


def flat(trees: list[Node], name: str, budget: int, **more: object) -> list[Tensor]:
    found: list[Tensor] = []
    left = iter(trees)
    for packed in pack(trees, budget):
        made = measure(MODULE, packed, (name,), **more)  # type: ignore[arg-type]
        for u in range(len(packed)):
            for k, _ in enumerate(next(left).rows()):
                found.append(made[name][u, k, : int(made["mask"][u, k].sum())])
    return found


VALUES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "logp": lambda logp, at: logp.gather(1, at[:, None])[:, 0],
    "entropy": lambda logp, at: -(logp.exp() * logp).sum(1),
    "sum_p2": lambda logp, at: (2 * logp).exp().sum(1),
}
tokens = st.lists(st.integers(0, 258), min_size=1, max_size=7)
groups = st.tuples(tokens, st.lists(tokens, min_size=1, max_size=3)).map(lambda m: group_tree(*m))
dialogues = st.lists(st.tuples(st.integers(0, 258), st.booleans()), min_size=2, max_size=9).map(
    lambda m: example_tree([i for i, _ in m], [b for _, b in m])
)


@settings(derandomize=True, database=None, max_examples=25, deadline=None)
@given(st.lists(groups | dialogues, min_size=1, max_size=4), st.integers(1, 80))
def test_exact_against_the_padded_computation(trees: list[Node], budget: int) -> None:
    with torch.no_grad():
        logp_BTV = padded(MODULE, [ids for t in trees for ids, _ in t.rows()])
        for name, value in VALUES.items():
            want = by_rows(trees, logp_BTV, value)
            for a, b in zip(flat(trees, name, budget, grad=False), want, strict=True):
                assert a.shape == b.shape
                # In absolute terms, and in relative ones where a value is below 1.
                assert torch.all((a - b).abs() <= 1e-5 * b.abs().clamp(max=1)), (name, a, b)


@pytest.mark.parametrize("name", list(VALUES))
@pytest.mark.parametrize("head", [True, False])
def test_gradients_of_every_measurement(
    name: str, head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprob, "CHUNK", 259 * 3)  # three rows of logits at a time
    module = tiny_model()[0]
    module.get_output_embeddings().weight.requires_grad_(head)
    trees = [group_tree([3, 4, 5], [[6, 7, 8, 9], [10, 11]]), group_tree([1, 2], [[3], [5, 4]])]

    def loss(parts: list[Tensor]) -> Tensor:
        whole = torch.cat(parts)
        return (whole * torch.linspace(-1, 1, len(whole))).sum()

    (packed,) = pack(trees)
    made = measure(module, packed, (name,))
    loss([made[name][u, k][made["mask"][u, k] > 0] for u in (0, 1) for k in (0, 1)]).backward()
    got = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    rows = [ids for t in trees for ids, _ in t.rows()]
    loss(by_rows(trees, padded(module, rows), VALUES[name])).backward()
    want = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    assert set(got) == set(want) and ("model.embed_tokens.weight" in got) == head
    for key, grad in want.items():
        assert torch.allclose(got[key], grad, atol=2e-5 * float(grad.abs().max())), key


@pytest.mark.parametrize("name", ["logp", "entropy", "sum_p2", "kl_vocab"])
def test_slopes_are_the_derivatives(name: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    other = torch.randn(4, 6, dtype=torch.float64).log_softmax(1)
    extras = {"other_logp": other}
    target = torch.tensor([5, 0, 2, 2])
    value = logprob.STATISTICS[name](Rows(logits.log_softmax(1), target, extras), False)[0]
    (want,) = torch.autograd.grad(value.sum(), logits)
    rows = Rows(logits.detach().log_softmax(1), target, extras)
    again, slope = logprob.STATISTICS[name](rows, True)
    assert slope is not None and torch.allclose(again, value.detach())
    assert torch.allclose(slope, want, atol=1e-6)


def test_several_measurements_share_one_pass() -> None:
    (packed,) = pack([group_tree([3, 4, 5], [[6, 7, 8, 9], [10, 11]])])
    both = measure(MODULE, packed, ("logp", "entropy"))
    for name in ("logp", "entropy"):
        assert torch.equal(both[name], measure(MODULE, packed, (name,))[name])


def test_divergence_from_the_model_itself_is_zero() -> None:
    (packed,) = pack([group_tree([3, 4, 5], [[6, 7, 8, 9], [10, 11]])])
    states = logprob.states(MODULE, packed)[packed.source_M]
    own = MODULE.get_output_embeddings()(states).log_softmax(-1).detach()
    for extra in (own, lambda part: own[part]):
        kl = measure(MODULE, packed, ("kl_vocab",), extras={"other_logp": extra})["kl_vocab"]
        assert kl.detach().abs().max() < 1e-5


# The name that transformers 5.17 has, too
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_what_trees_do_not_compute_is_refused() -> None:
    (packed,) = pack([group_tree([3, 4, 5], [[6, 7]])])
    with pytest.raises(InputError, match="Did you mean 'logp'"):
        measure(MODULE, packed, ("logpp",))
    (long,) = pack([group_tree([3] * 2048, [[6, 7]])], 10**6)
    with pytest.raises(InputError, match="does not fit into the model's context of 2048"):
        measure(MODULE, long)
    module = tiny_model()[0]
    module.gradient_checkpointing_enable()
    with pytest.raises(InputError, match="gradient checkpointing"):
        measure(module, packed)
    with pytest.raises(InputError, match="not a causal language model"):
        measure(nn.Linear(2, 2), packed)
    small = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1}
    with pytest.raises(InputError, match="attention"):
        measure(MambaForCausalLM(MambaConfig(**small, state_size=4)), packed)


def test_an_architecture_without_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 has learnt positions, biases and its own layers: trees compute it all the same."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    module = GPT2LMHeadModel(config).eval()
    trees = [group_tree([3, 4, 5], [[6, 7, 8], [9]]), group_tree([1, 2], [[3, 4]])]
    (packed,) = pack(trees)
    made = measure(module, packed, grad=False)
    want = by_rows(trees, padded(module, [i for t in trees for i, _ in t.rows()]), VALUES["logp"])
    got = [made["logp"][u, k, : len(w)] for (u, k), w in zip([(0, 0), (0, 1), (1, 0)], want)]
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("train_head", [True, False])
def test_given_answers_are_at_temperature_1_beside_drawn_ones(train_head: bool) -> None:
    """Also at a token that a given answer shares with a drawn one; the head has a bias."""
    module = copy.deepcopy(MODULE)
    weight = module.get_input_embeddings().weight  # tied
    assert isinstance(weight, Tensor)
    bias = torch.randn(len(weight), generator=torch.Generator().manual_seed(1))
    head = nn.Linear(weight.shape[1], len(weight))
    module.set_output_embeddings(head)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    head.requires_grad_(train_head)
    alike = list(range(40, 52))
    trees = [group_tree([5, 6, 7], [[*alike, 9], [*alike, 10, 11]]), group_tree([8, 3], [[4, 9]])]
    given_UK = torch.tensor([[False, True], [False, False]])
    (packed,) = pack(trees, 100, share=True)
    assert len(packed.target_M) == 12 + 1 + 2 + 2  # what is alike has one place
    made = measure(module, packed, ("logp", "entropy"), temperature=0.5, given_UK=given_UK)
    scale_UKT = torch.rand(made["logp"].shape, generator=torch.Generator().manual_seed(2))
    (made["logp"] * scale_UKT).sum().backward()
    found = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    total = torch.zeros(())
    for u, tree in enumerate(trees):
        for k, (ids, loss) in enumerate(tree.rows()):
            logits_TV = module(input_ids=torch.tensor([ids])).logits[0, :-1]
            heat = 1.0 if given_UK[u, k] else 0.5
            logp_T = (logits_TV / heat).log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0]
            logp_T = logp_T[torch.tensor(loss[1:])]
            assert torch.allclose(made["logp"][u, k, : len(logp_T)], logp_T, atol=1e-5)
            assert not made["logp"][u, k, len(logp_T) :].any()
            total = total + (logp_T * scale_UKT[u, k, : len(logp_T)]).sum()
    total.backward()
    want = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    assert set(found) == set(want) and (len(want) > 5)
    for name, grad in want.items():
        assert torch.allclose(found[name], grad, atol=1e-4 * float(grad.abs().max())), name
    # Whatever else is measured stays at the temperature of drawing; at 1 nothing changes.
    plain = measure(module, packed, ("entropy",), temperature=0.5)["entropy"]
    assert torch.equal(made["entropy"], plain)
    same = [measure(module, packed, given_UK=g, grad=False)["logp"] for g in (given_UK, None)]
    assert torch.equal(*same)
