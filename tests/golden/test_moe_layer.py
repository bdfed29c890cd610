"""The layer of `core.moe`: what must hold of its gates, and each of them by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from truing.core.moe import FIXED, RENORMALISED, Gate, Layer, gated, scores_of
from truing.errors import InputError

N, D, E, OUT = 12, 8, 5, 3
GATES = get_args(Gate)
TRAINED = [gate for gate in GATES if gate not in FIXED]
WHOLE = ("expert_choice", "soft")  # those that look at all items of a call


def experts(count: int = E) -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [nn.Sequential(nn.Linear(D, 6), nn.GELU(), nn.Linear(6, OUT)) for _ in range(count)]


def layer(gate: str, some: Sequence[nn.Module] | None = None, **settings: object) -> Layer:
    """Of the same weights for the same gate."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Layer(gate, experts() if some is None else some, D, **settings)  # type: ignore[arg-type]


def items(n: int = N) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(2))


def number(value: Tensor) -> float:
    return float(value.detach())


def mixture(made: Layer, weight_NE: Tensor, x: Tensor) -> Tensor:
    """Outputs of all experts, so weighed."""
    every = torch.stack([expert(x) for expert in made.experts], 1)
    return (weight_NE.reshape(*weight_NE.shape, *[1] * (every.dim() - 2)) * every).sum(1)


@pytest.mark.parametrize("gate", RENORMALISED)
def test_all_experts_kept_are_the_dense_mixture(gate: str) -> None:
    made, x = layer(gate, k=E).eval(), items()
    z = made.scores(x)
    s = z.sigmoid() if gate == "sigmoid" else z.exp()
    out, mixed = made(x)
    assert torch.allclose(out, mixture(made, s / s.sum(-1, keepdim=True), x), atol=1e-5)
    assert mixed.kept_NE.all() and torch.equal(mixed.logits_NS, z)


def test_scores_by_hand() -> None:
    f = torch.tensor([[3.0, 4.0]])
    for gate, want in (
        ("cosine", [0.6 / 0.07, 0.8 / 0.07]),
        ("gaussian", [-10.0, -6.5]),
        ("laplace", [-math.sqrt(20), -math.sqrt(13)]),
    ):
        scores = scores_of(gate, 2, 2)
        with torch.no_grad():
            scores.centre_ED.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        assert scores(f)[0].tolist() == pytest.approx(want, rel=1e-5), gate


@pytest.mark.parametrize("gate", [*RENORMALISED, *FIXED, "smear"])
def test_of_identical_experts_the_gate_has_no_say(gate: str) -> None:
    (one,) = experts(1)
    assert torch.allclose(layer(gate, [one] * E)(items())[0], one(items()), atol=1e-5)


@pytest.mark.parametrize("gate", RENORMALISED)
def test_copies_reproduce_the_dense_layer_until_training_parts_them(gate: str) -> None:
    (dense,), x = experts(1), items()
    for k in (2, 3):
        made = layer(gate, [copy.deepcopy(dense) for _ in range(E)], k=k)
        out, _ = made(x)
        assert torch.allclose(out, dense(x), atol=1e-5)
    out.square().sum().backward()
    slopes = [e[0].weight.grad for e in made.experts]
    there = [s for s in slopes if s is not None]
    assert len(there) > 1 and not all(torch.equal(s, there[0]) for s in there)


@pytest.mark.parametrize("k", [2, 3, E])
@pytest.mark.parametrize("gate", RENORMALISED)
def test_kept_weights_sum_to_one(gate: str, k: int) -> None:
    _, mixed = layer(gate, k=k)(items())
    assert torch.allclose(mixed.weight_NE.sum(1), torch.ones(N))
    assert mixed.chosen_NE.sum(1).tolist() == [k] * N
    assert torch.equal(mixed.weight_NE > 0, mixed.chosen_NE)


def test_a_switch_weighs_by_the_probability_itself() -> None:
    (one,), x = experts(1), items()
    made = layer("switch", [one] * E)
    largest = made.scores(x).softmax(-1).max(-1, keepdim=True).values
    assert torch.allclose(made(x)[0], largest * one(x), atol=1e-5)


def test_a_number_of_experts_that_varies() -> None:
    z = torch.tensor([[0.2, 0.5, 0.3], [0.98, 0.01, 0.01]]).log()
    for top_p, want in (
        (0.45, [[0, 0.5, 0], [0.98, 0, 0]]),
        (0.7, [[0, 0.5, 0.3], [0.98, 0, 0]]),
        (1.0, [[0.2, 0.5, 0.3], [0.98, 0.01, 0.01]]),
    ):
        weight, chosen = gated("top_p", z, top_p=top_p)
        assert torch.allclose(weight, torch.tensor(want), atol=1e-6), top_p
        assert torch.equal(chosen, torch.tensor(want) > 0)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_experts_that_choose_have_equal_loads(k: int) -> None:
    made, x = layer("expert_choice", k=k), items()
    out, mixed = made(x)
    assert mixed.kept_NE.sum(0).tolist() == [math.ceil(N * k / E)] * E
    assert torch.allclose(out, mixture(made, mixed.weight_NE, x), atol=1e-5)


def test_experts_choose_by_hand() -> None:
    """One item each: the first item gets no expert, the second two."""
    p = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.15], [0.8, 0.1, 0.1]])
    weight, chosen = gated("expert_choice", p.log(), 1)
    p = p / p.sum(1, keepdim=True)
    assert chosen.tolist() == [[False, False, False], [False, True, True], [True, False, False]]
    assert torch.allclose(weight, p * chosen)


@pytest.mark.parametrize("gate", ["softmax", "switch", "top_p", "expert_choice", "smear", "soft"])
def test_balance_at_even_routing_and_at_collapse(gate: str) -> None:
    scores = nn.Linear(D, E)
    nn.init.zeros_(scores.weight)
    for bias, balance, importance in ((0.0, 1.0, 0.0), (60.0, E, E - 1)):
        with torch.no_grad():
            scores.bias.fill_(-bias)[0] = bias
        for name, want in (
            ("balance", balance),
            ("importance", importance),
            ("z", number(scores.bias.logsumexp(0)) ** 2),
        ):
            made = layer(gate, losses={name: 0.01}, scores=scores)
            found = number(made.loss(made(items())[1]))
            assert found == pytest.approx(0.01 * want, rel=1e-5, abs=1e-8), (name, bias)


@pytest.mark.parametrize("gate", TRAINED)
def test_z_is_never_negative(gate: str) -> None:
    made = layer(gate, losses={"z": 1.0})
    for scale in (0.01, 1.0, 30.0):
        _, mixed = made(scale * items())
        want = mixed.logits_NS.double().logsumexp(-1).square().mean()
        assert 0 <= number(made.loss(mixed)) == pytest.approx(number(want), rel=1e-4)


def test_losses_are_those_of_the_whole_step() -> None:
    made, x = layer("softmax", losses={"balance": 1.0, "importance": 2.0, "z": 0.5}), items()
    whole = number(made.loss(made(x)[1]))
    parts = [made(some)[1] for some in (x[:5], x[5:])]
    assert number(made.loss(*parts)) == pytest.approx(whole, rel=1e-5)
    apart = (5 * number(made.loss(parts[0])) + 7 * number(made.loss(parts[1]))) / N
    assert abs(apart - whole) > 1e-3
    assert number(layer("softmax").loss(parts[0])) == 0.0


@pytest.mark.parametrize("gate", [*RENORMALISED, "switch", "top_p", "hash", "random"])
def test_room_without_end_drops_nothing(gate: str) -> None:
    found = []
    for capacity in (0.0, math.inf):
        made = layer(gate, capacity=capacity)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            found.append(made(items()))
    (free, _), (out, mixed) = found
    assert torch.equal(out, free) and torch.equal(mixed.kept_NE, mixed.chosen_NE)


@pytest.mark.parametrize("capacity", [1e-12, 0.6, 1.2])
@pytest.mark.parametrize("gate", ["softmax", "switch", "top_p"])
def test_what_finds_no_room_adds_nothing(gate: str, capacity: float) -> None:
    x, free = items(20), layer(gate)(items(20))[1]
    chosen = free.chosen_NE.tolist()
    room = max(1, math.ceil(round(capacity * sum(map(sum, chosen)) / E, 9)))
    queue, kept = [0] * E, []
    for row in chosen:  # in their order
        kept.append([c and queue[e] < room for e, c in enumerate(row)])
        queue = [q + c for q, c in zip(queue, row, strict=True)]
    made = layer(gate, capacity=capacity)
    out, mixed = made(x)
    assert mixed.kept_NE.tolist() == kept and (kept != chosen or capacity > 1)
    weight = free.weight_NE * torch.tensor(kept)  # those of the other choices are as they were
    assert torch.equal(mixed.weight_NE, weight)
    assert torch.allclose(out, mixture(made, weight, x), atol=1e-5)


def test_merged_linear_experts_are_the_mixture_of_their_outputs() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = layer("smear", [nn.Linear(D, OUT) for _ in range(E)])
    x = items()
    assert torch.allclose(made(x)[0], mixture(made, made.scores(x).softmax(-1), x), atol=1e-5)


def test_merged_experts_are_one_of_the_mean_parameters() -> None:
    made, x = layer("smear"), items()
    out, mixed = made(x)
    each, merged = [e.state_dict() for e in made.experts], experts(1)[0]
    for n in (0, 7):
        p = mixed.p_NE[n].tolist()
        merged.load_state_dict(
            {k: sum(w * one[k] for w, one in zip(p, each, strict=True)) for k in each[0]}
        )
        assert torch.allclose(out[n], merged(x[n]), atol=1e-5)
    assert not torch.allclose(out, mixture(made, mixed.p_NE, x), atol=1e-3)


def test_slots_by_hand() -> None:
    scores = nn.Linear(D, 4, bias=False)
    twice = nn.Linear(D, D, bias=False)
    with torch.no_grad():
        twice.weight.copy_(2 * torch.eye(D))
    out, mixed = layer("soft", [nn.Identity(), twice], k=2, scores=scores)(items())
    z = scores(items()).exp()
    slots = (z / z.sum(0)).T @ items()  # [4, D], two of each expert
    back = z / z.sum(1, keepdim=True)
    assert torch.allclose(out, back[:, :2] @ slots[:2] + back[:, 2:] @ (2 * slots[2:]), atol=1e-5)
    assert torch.allclose(mixed.p_NE, back.view(N, 2, 2).sum(-1), atol=1e-6)


def test_gates_that_are_not_trained() -> None:
    x = items()
    made = layer("uniform")
    assert torch.allclose(made(x)[0], mixture(made, torch.full((N, E), 1 / E), x), atol=1e-5)
    keys = torch.tensor([0, 3, 7, 3, 0, 0])
    _, hashed = layer("hash", k=2)(nn.functional.one_hot(keys, D).float())
    assert hashed.weight_NE.sort(1).values.tolist() == [[0, 0, 0, 0.5, 0.5]] * 6
    table = [tuple(row) for row in hashed.chosen_NE.tolist()]
    assert len({*zip(keys.tolist(), table, strict=True)}) == 3  # a key has its experts
    made = layer("random", k=2)
    first, second = (made(items(100))[1].chosen_NE for _ in range(2))
    assert first.sum(1).tolist() == [2] * 100 and not torch.equal(first, second)
    assert int(first.sum(0).min()) > 20
    for gate in FIXED:
        assert not any(p.requires_grad for p in layer(gate).scores.parameters())


@pytest.mark.parametrize("gate", TRAINED)
def test_the_task_teaches_every_other_gate(gate: str) -> None:
    made = layer(gate)
    made(items())[0].square().sum().backward()
    parts = [made.scores, *([made.noise] if made.noise is not None else [])]
    slopes = [p.grad for part in parts for p in part.parameters()]
    assert all(s is not None and float(s.abs().sum()) > 0 for s in slopes)


def test_noise_is_of_training_alone() -> None:
    made, x = layer("noisy"), items()
    first, second = made(x)[1], made(x)[1]
    assert not torch.equal(first.weight_NE, second.weight_NE)
    assert torch.equal(first.logits_NS, second.logits_NS)
    made.eval()
    want, chosen = gated("softmax", made.scores(x), 2)
    assert torch.equal(made(x)[1].weight_NE, want) and torch.equal(made(x)[1].chosen_NE, chosen)


@pytest.mark.parametrize("gate", [gate for gate in GATES if gate != "random"])
def test_experts_may_stand_in_any_order(gate: str) -> None:
    k = {"soft": 2, "hash": 2}.get(gate, 0)
    made, x = layer(gate, k=k).eval(), items()
    turned = torch.tensor([3, 0, 4, 1, 2])
    other = copy.deepcopy(made)
    other.experts = nn.ModuleList([made.experts[i] for i in turned.tolist()])
    for t in other.scores.state_dict().values():  # rows of experts, or k rows of each
        if t.dim() and len(t) in (E, 2 * E):
            t.copy_(t.view(E, -1)[turned].view(t.shape).clone())
    (out, mixed), (same, there) = made(x), other(x)
    assert torch.allclose(same, out, atol=1e-5)
    assert torch.allclose(there.p_NE, mixed.p_NE[:, turned], atol=1e-6)
    if gate not in ("uniform", "soft", "smear"):
        assert torch.equal(there.kept_NE, mixed.kept_NE[:, turned])


@pytest.mark.parametrize("gate", [gate for gate in GATES if gate != "random"])
def test_which_gates_look_at_the_whole_call(gate: str) -> None:
    made, x = layer(gate).eval(), items()
    whole, alone = made(x)[0][:1], made(x[:1])[0]
    assert torch.allclose(whole, alone, atol=1e-5) is (gate not in WHOLE)
    if gate == "softmax":  # earlier ones go first
        capped = layer(gate, capacity=1.0)
        assert torch.allclose(capped(x)[0][:1], alone, atol=1e-5)


def test_a_bias_moves_by_the_loads_and_has_a_say_in_the_choice_alone() -> None:
    made, x = layer("softmax", bias_step=0.125), items()
    parts = [made(some)[1] for some in (x[:4], x[4:])]
    load = sum(m.chosen_NE.sum(0) for m in parts).tolist()
    made.move_bias(*parts)
    mean = 2 * N / E
    assert made.bias_E is not None and made.state_dict()["bias_E"] is not None
    assert made.bias_E.tolist() == [0.125 if n < mean else -0.125 for n in load]
    made.bias_E.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0, 9.0]))
    out, mixed = made(x)
    p = made.scores(x).softmax(-1)
    want = torch.zeros(N, E)
    want[:, [0, 4]] = p[:, [0, 4]] / p[:, [0, 4]].sum(1, keepdim=True)
    assert torch.allclose(mixed.weight_NE, want, atol=1e-6)
    assert torch.allclose(out, mixture(made, want, x), atol=1e-5)
    plain = layer("softmax")
    plain.move_bias(plain(x)[1])
    assert "bias_E" not in plain.state_dict()


def test_items_and_experts_of_any_sort() -> None:
    """Images; experts of several sizes, and one that copies; one that all images have."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        images, f = torch.randn(N, 2, 4, 4), items()
        small = [nn.Conv2d(2, 2, 3, padding=1) for _ in range(4)]
        deep = nn.Sequential(nn.Conv2d(2, 6, 1), nn.GELU(), nn.Conv2d(6, 2, 1))
    made = layer("softmax", [small[0], deep, nn.Identity()], shared=[small[1]], capacity=1.0)
    out, mixed = made(images, f)
    want = mixture(made, mixed.weight_NE, images) + small[1](images)
    assert torch.allclose(out, want, atol=1e-5) and not mixed.kept_NE[:, 2].all()
    merged = layer("smear", small)  # a convolution is linear in its weights
    out, mixed = merged(images, f)
    assert torch.allclose(out, mixture(merged, mixed.p_NE, images), atol=1e-5)
    slots = layer("soft", [small[0], deep], k=3)(images, f)[0]
    assert slots.shape == images.shape and slots.isfinite().all()
    half = layer("softmax").bfloat16()
    out, mixed = half(items().bfloat16())
    assert out.dtype == torch.bfloat16 and mixed.weight_NE.dtype == torch.float32


def test_mistakes() -> None:
    for gate, settings, told in (
        ("softmx", {}, "unknown gate 'softmx'"),
        ("softmax", {"losses": {"balanced": 1.0}}, "unknown loss 'balanced'"),
        ("softmax", {"losses": {"z": -1.0}}, "'z' must be at least 0"),
        ("softmax", {"capacity": math.nan}, "'capacity' must be at least 0"),
        ("top_p", {"top_p": 0.0}, "'top_p' must be"),
        ("softmax", {"k": 1}, "from 2 where weights"),
        ("softmax", {"k": E + 1}, "from 2 where weights"),
        ("switch", {"k": 2}, "1 for a switch"),
        ("soft", {"k": -1}, "needs two experts, and k"),
        ("top_p", {"k": 2}, "'k' counts for nothing"),
        ("expert_choice", {"capacity": 1.0}, "'capacity' counts for nothing"),
        ("smear", {"bias_step": 0.1}, "'bias_step' counts for nothing"),
        ("hash", {"losses": {"z": 1.0}}, "'losses' counts for nothing"),
        ("uniform", {"scores": nn.Linear(D, E)}, "'scores' counts for nothing"),
        ("smear", {"some": [nn.Linear(D, 2), nn.Linear(D, 3)]}, "parameters must be alike"),
        ("softmax", {"some": [nn.Identity()]}, "needs two experts"),
    ):
        with pytest.raises(InputError, match=told):
            layer(gate, **settings)
    for x, f in ((items()[:, :3], None), (items()[:0], None), (items(), torch.ones(N, 3))):
        with pytest.raises(InputError, match="a vector of width `dim`"):
            layer("softmax")(x, f)
