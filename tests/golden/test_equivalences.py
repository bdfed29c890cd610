"""Equivalences between methods as properties: what one is in the limit of another, on any input."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import CodeType, FunctionType
from typing import cast

import pytest
import teaching
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_adpa import teachers
from torch import Tensor

from truing.core.objective import Loss, Measurements, objective_of
from truing.core.online import Online, Update, advantages, clipped, online_of
from truing.method import methods
from truing.train.distill.adpa import teacher_advantage
from truing.train.preference.aot import aot, aot_unpaired
from truing.train.preference.apo import apo_down, apo_zero
from truing.train.preference.bco import bco, bco_pair
from truing.train.preference.d2o import d2o_pair
from truing.train.preference.discopop import discopop
from truing.train.preference.dpo import cdpo, dpo, dpo_norm, hinge, robust_dpo
from truing.train.preference.exo import exo
from truing.train.preference.f_dpo import f_dpo
from truing.train.preference.ipo import ipo
from truing.train.preference.kto import apo_zero_unpaired, kto
from truing.train.preference.ld_dpo import ld_dpo
from truing.train.preference.mah_dpo import mah_dpo
from truing.train.preference.nca import nca
from truing.train.preference.pro import pro
from truing.train.preference.rpo import mpo, rpo
from truing.train.preference.simpo import alphapo, simpo
from truing.train.preference.sppo import sppo
from truing.train.reward.process_reward import min_rewards, prod_rewards
from truing.train.rl.easy_to_hard_ppo import FIXED
from truing.train.rl.grao import grao
from truing.train.rl.salmon_ppo import salmon_ppo
from truing.train.supervised.sft import sft

Objective = Callable[..., Loss]

few = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def answers_of(source: torch.Generator, units: int, answers: int, longest: int) -> Tensor:
    """The mask of answers of one to `longest` tokens, [U, K, T]."""
    length_UK = torch.randint(1, longest + 1, (units, answers), generator=source)
    return (torch.arange(longest) < length_UK[..., None]).float()


def drawn(seed: int, units: int = 6, longest: int = 7, answers: int = 2) -> Measurements:
    """Rows of some answers each, pairs where nothing else is asked for."""
    source = torch.Generator().manual_seed(seed)
    mask = answers_of(source, units, answers, longest)
    names = ("logp", "ref_logp")
    tensors = {n: -3 * torch.rand(mask.shape, generator=source) * mask for n in names}
    ones = torch.ones(units)
    columns = {"win_chosen": ones, "win_rejected": 0 * ones, "objective": 0 * ones}
    return Measurements(mask, tensors, columns)


SEEDS = st.integers(0, 2**31 - 1)
PAIRS = st.builds(drawn, SEEDS, st.integers(1, 6), st.integers(1, 9))
SINGLE = st.builds(drawn, SEEDS, st.just(1), st.integers(1, 9))
BETAS = st.floats(0.05, 3)


def found(objective: Objective, m: Measurements) -> tuple[Tensor, Tensor]:
    """Loss of the step and its gradient in the log-probabilities."""
    leaf = m.logp_UKT.detach().clone().requires_grad_()
    total = objective(m.having(logp=leaf)).total()
    (slope,) = torch.autograd.grad(total, leaf)
    return total.detach(), slope


def same(one: Objective, other: Objective, m: Measurements) -> bool:
    """Whether two losses have one value and one gradient."""
    both = zip(found(one, m), found(other, m), strict=True)
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in both)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(partial(cdpo, label_smoothing=0.0), dpo, id="cdpo"),
        pytest.param(partial(robust_dpo, label_smoothing=0.0), dpo, id="robust_dpo"),
        pytest.param(partial(ld_dpo, alpha=1.0), dpo, id="ld_dpo"),
        pytest.param(partial(f_dpo, divergence="reverse_kl"), dpo, id="f_dpo"),
        pytest.param(partial(mah_dpo, objectives=1), dpo, id="mah_dpo"),
        pytest.param(lambda m, beta: d2o_pair(m, beta=beta, alpha=beta), dpo, id="d2o_pair"),
        pytest.param(partial(rpo, alpha=0.0), dpo, id="rpo"),
        pytest.param(partial(mpo, preference=1.0, quality=0.0, generation=0.0), dpo, id="mpo"),
        pytest.param(partial(alphapo, alpha=0.0), simpo, id="alphapo"),
    ],
)
@few
@given(m=PAIRS, beta=BETAS)
def test_one_is_the_other(one: Objective, other: Objective, m: Measurements, beta: float) -> None:
    assert same(partial(one, beta=beta), partial(other, beta=beta), m)


@pytest.mark.parametrize("loss", [aot, aot_unpaired])
@few
@given(m=SINGLE, beta=BETAS)
def test_sorting_one_pair_changes_nothing(loss: Objective, m: Measurements, beta: float) -> None:
    assert same(partial(loss, beta=beta), partial(dpo, beta=beta), m)


@few
@given(seed=SEEDS, chosen=st.permutations(range(6)), rejected=st.permutations(range(6)))
def test_aot_unpaired_sees_two_lists(seed: int, chosen: list[int], rejected: list[int]) -> None:
    """Each may stand in an order of its own."""

    def turned(t: Tensor) -> Tensor:
        return torch.stack([t[chosen, 0], t[rejected, 1]], 1)

    m = drawn(seed)
    other = Measurements(turned(m.mask_UKT), {n: turned(t) for n, t in m.tensors.items()})
    (value, slope), (again, elsewhere) = (found(aot_unpaired, x) for x in (m, other))
    assert torch.allclose(value, again, atol=1e-5)
    assert torch.allclose(turned(slope), elsewhere, atol=1e-5)


# What a common shift of both answers does


def shifted(m: Measurements) -> Measurements:
    """The same with both answers of a pair likelier by one factor, another one for each pair."""
    shift = torch.zeros_like(m.logp_UKT)
    shift[:, :, 0] = torch.linspace(-2.0, 3.0, len(shift))[:, None]
    return m.having(logp=m.logp_UKT + shift)


@pytest.mark.parametrize(
    "loss", [dpo, cdpo, robust_dpo, hinge, exo, discopop, aot, partial(ipo, length_normalise=False)]
)
@few
@given(m=PAIRS)
def test_only_the_difference_of_both_answers_counts(loss: Objective, m: Measurements) -> None:
    for a, b in zip(found(loss, m), found(loss, shifted(m)), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def as_rows(m: Measurements, others: Measurements) -> Measurements:
    """Both answers of each pair as rows with a label, a mismatched answer of `others` beside."""

    def beside(own: Tensor, other: Tensor) -> Tensor:
        return torch.stack([own.flatten(0, 1), other.flatten(0, 1)], 1)

    tensors = {n: beside(t, others[n]) for n, t in m.tensors.items()}
    label = torch.tensor([1.0, 0.0]).repeat(len(m.mask_UKT))
    columns = {"label": label, "prompt_is_good": torch.full_like(label, 0.5)}
    return Measurements(beside(m.mask_UKT, others.mask_UKT), tensors, columns)


@pytest.mark.parametrize(
    "loss", [nca, bco_pair, apo_zero, apo_down, sppo, dpo_norm, kto, bco, apo_zero_unpaired]
)
@few
@given(seed=SEEDS)
def test_a_shift_of_both_answers_counts(loss: Objective, seed: int) -> None:
    both = [drawn(seed), shifted(drawn(seed))]
    if objective_of(loss).rows == "unpaired":
        both = [as_rows(m, drawn(seed + 1)) for m in both]
    here, there = (loss(m, beta=0.5).per_unit for m in both)
    assert (here - there).abs().max() > 1e-2


@few
@given(seed=SEEDS, scores=st.lists(st.integers(0, 3), min_size=2, max_size=4), gaps=st.booleans())
@example(seed=0, scores=[1, 0, 2], gaps=True)
@example(seed=0, scores=[1, 0, 2], gaps=False)
@example(seed=0, scores=[0, 2, 0], gaps=True)
def test_pro_sees_a_shift_where_its_temperatures_differ(
    seed: int, scores: list[int], gaps: bool
) -> None:
    """All answers of a group made as much likelier for each token."""
    m = drawn(seed, 1, 7, len(scores))
    m = Measurements(m.mask_UKT, m.tensors, {"scores": torch.tensor([scores]).float()})
    moved = m.having(logp=m.logp_UKT + 0.5 * m.mask_UKT)
    here, there = (float(pro(x, sft_weight=0.0, gaps=gaps).total()) for x in (m, moved))
    if gaps and len(set(scores)) > 2:  # the best one is ahead of the others by different gaps
        assert there < here - 1e-3
    else:
        assert there == pytest.approx(here, abs=1e-4)


@few
@given(m=PAIRS, beta=BETAS, by_length=st.booleans(), off=st.sampled_from([0.0, 0.5, -0.5]))
def test_ipo_rests_where_the_margin_is_its_target(
    m: Measurements, beta: float, by_length: bool, off: float
) -> None:
    """At d = 1 / (2 beta) nothing moves; beyond it the pair is brought together again."""
    length_UK = m.length_UK if by_length else torch.ones_like(m.length_UK)
    r_UK = m.ratio() / length_UK
    logp = m.logp_UKT.clone()
    logp[:, 0, 0] += (1 / (2 * beta) + off - r_UK[:, 0] + r_UK[:, 1]) * length_UK[:, 0]
    _, slope = found(partial(ipo, beta=beta, length_normalise=by_length), m.having(logp=logp))
    share = m.mask_UKT / length_UK[..., None] * torch.tensor([1.0, -1.0])[:, None]
    assert torch.allclose(slope, 2 * off / len(logp) * share, atol=1e-4)


# Policy gradients


def rollout(seed: int, groups: int = 2, answers: int = 3, longest: int = 5) -> Measurements:
    """Groups of answers with all that a method may ask for; rewards differ."""
    source = torch.Generator().manual_seed(seed)
    mask = answers_of(source, groups, answers, longest)
    tensors = {
        n: -3 * torch.rand(mask.shape, generator=source) * mask
        for n in ("logp", "ref_logp", "values")
    }
    a, b = (torch.randn(groups, answers, generator=source) for _ in range(2))
    ones = torch.ones(groups, answers)
    columns = {"reward": a + b, "reward/a": a, "reward/b": b, "own": ones, "finished": ones}
    columns |= {"sort": 0 * ones, "unread": 0 * ones}
    columns["greedy"] = torch.randn(groups, generator=source)
    return Measurements(mask, tensors, columns)


ROLLOUTS = st.builds(rollout, SEEDS, st.integers(1, 4), st.integers(3, 5), st.integers(1, 6))


def with_given(r: Measurements, **columns: Tensor) -> Measurements:
    """The last answer of each group is the row's own."""
    own = r["own"].clone()
    own[:, -1] = 0.0
    return Measurements(r.mask_UKT, r.tensors, {**r.columns, "own": own, **columns})


def seen(update: Update, r: Measurements) -> Measurements:
    """What the loss is called with before the policy has moved: all ratios are 1."""
    fixed = {n: t for n, t in update.tensors.items() if t.dim() == 3}
    numbers = {n: t for n, t in update.tensors.items() if t.dim() < 3}
    fixed |= {"old_logp": r["logp"], "old_values": r["values"]}
    return Measurements(r.mask_UKT, {**r.tensors, **fixed}, {**r.columns, **numbers})


def slope_of(update: Update, r: Measurements) -> Tensor:
    return found(update.loss, seen(update, r))[1]


def trained_by(name: str) -> tuple[Online, dict[str, object]]:
    """An online method and its settings without a pull; easy_to_hard_ppo is one of salmon_ppo's."""
    method = methods[name]
    spec = online_of(method.declared if method.entry.kind == "online" else salmon_ppo)
    values = {n: p.default for n, p in spec.settings.items()} | {"beta": 0.0, "critic_rollouts": 0}
    values |= {"clip_ratio": 0.2} if "clip_ratio" in values else {}
    return spec, values if method.entry.kind == "online" else values | FIXED


def functions_of(start: FunctionType) -> set[FunctionType]:
    """The function, and all of the package that its code or that of such a one names."""
    known, ahead = {start}, [start]
    while ahead:
        one = ahead.pop()
        codes = [one.__code__]
        for code in codes:
            codes += [c for c in code.co_consts if isinstance(c, CodeType)]
        for name in {n for code in codes for n in code.co_names}:
            named = one.__globals__.get(name)
            if isinstance(named, FunctionType) and named.__module__.startswith("truing."):
                ahead += [named] if named not in known else []
                known.add(named)
    return known


RL = [n for n in methods if methods[n].group == "rl"]
WRITTEN = {n: cast(FunctionType, methods[n].declared) for n in RL}
SURROGATES = [n for n, function in WRITTEN.items() if clipped in functions_of(function)]


def test_the_surrogates_are_found() -> None:
    names = {methods[n].name for n in SURROGATES}
    assert names >= set(
        "grpo dr_grpo dapo gdpo gspo grpo_top_kl grao urpo remax reinforce_plus_plus ppo ppo_max"
        " salmon_ppo easy_to_hard_ppo".split()
    )
    assert not names & {"gmpo", "rloo", "cispo", "online_dpo"}  # which have others, or none


@pytest.mark.parametrize("name", SURROGATES)
@few
@given(r=ROLLOUTS)
def test_at_ratio_one_the_gradient_is_reinforce(name: str, r: Measurements) -> None:
    """The clipped surrogate against -A log pi with the same advantages and the same averages."""
    spec, values = trained_by(name)
    r = with_given(r) if spec.given else r
    surrogate = slope_of(spec(r, values), r)
    calls: list[Measurements] = []

    def plain(m: Measurements, *_: object, **__: object) -> Tensor:
        calls.append(m)
        return -advantages(m) * m.logp_UKT

    with pytest.MonkeyPatch.context() as patch:
        for module in {methods[n].module for n in RL}:
            if getattr(module, "clipped", None) is clipped:
                patch.setattr(module, "clipped", plain)
        reinforce = slope_of(spec(r, values), r)
    assert calls and surrogate.abs().sum() > 0
    assert torch.allclose(surrogate, reinforce, atol=1e-6)


def by_answer(r: Measurements) -> Tensor:
    return r.mask_UKT / r.length_UK[..., None] / r.there_UK.sum()


def by_token(r: Measurements) -> Tensor:
    return r.mask_UKT / r.mask_UKT.sum()


def by_sum(r: Measurements) -> Tensor:
    return r.mask_UKT / r.there_UK.sum()


AVERAGES = {
    by_answer: "grpo gdpo gspo gmpo sapo urpo grpo_top_kl",
    by_token: "dapo ppo ppo_max salmon_ppo reinforce_plus_plus cispo vespo",
    by_sum: "rloo remax",
}


@pytest.mark.parametrize(
    ("name", "weight"), [(n, w) for w, names in AVERAGES.items() for n in names.split()]
)
@few
@given(r=ROLLOUTS)
def test_the_gradient_is_the_advantage_times_the_weight_of_the_token(
    name: str, weight: Callable[[Measurements], Tensor], r: Measurements
) -> None:
    """-A w, whichever way the ratio comes in; w is the token's part in the method's average."""
    spec, values = trained_by(name)
    update = spec(r, values)
    a = update.tensors["advantage"]
    want = -(a if a.dim() == 3 else a[..., None]) * weight(r)
    assert want.abs().sum() > 0
    assert torch.allclose(slope_of(update, r), want, rtol=1e-4, atol=1e-6)


# GRAO, ADPA, process rewards


@few
@given(r=ROLLOUTS, within=st.booleans(), beta=st.floats(0, 2), lam=st.floats(0, 2))
@example(r=rollout(3, 4, 3, 3), within=False, beta=0.0, lam=0.0)
def test_grao_is_its_collected_form(r: Measurements, within: bool, beta: float, lam: float) -> None:
    """J = (1 + lam) mean_i A_i E(o_i) + (beta A_y - lam mean_i A_i) E(y)."""
    # Rewards that are nearly equal leave float32 too few digits to be centred to 0 in.
    r = with_given(r, reward=r["reward"].double())
    update = grao(r, imitation=beta, alignment=lam, given_in_statistics=within)
    own, y = update.tensors["advantage"][:, :-1], update.tensors["advantage"][:, -1]
    # Centred over the answers' own rewards the last term only rescales; else it is -A_y / G.
    assert torch.allclose(own.mean(1), -y / own.shape[1] if within else 0 * y, atol=1e-5)

    def collected(m: Measurements) -> Loss:
        explore = (own * m.mean()[:, :-1]).mean(1)
        return Loss(-(1 + lam) * explore - (beta * y - lam * own.mean(1)) * m.mean()[:, -1])

    assert same(update.loss, collected, seen(update, r))


@few
@given(
    r=st.builds(rollout, SEEDS, st.just(1), st.integers(3, 9), st.integers(1, 6)),
    gain=st.floats(0.1, 5),
)
def test_grao_of_equal_answers_and_a_better_given_one_is_sft(r: Measurements, gain: float) -> None:
    """Only imitation is left; with y in the statistics the answers are pushed away as well."""
    reward = torch.ones_like(r["reward"])
    reward[:, -1] += gain
    r = with_given(r, reward=reward)
    g = reward.shape[1] - 1
    alone = slope_of(grao(r, imitation=0.5, given_in_statistics=False), r)
    _, imitated = found(sft, r.branches(g))
    assert torch.allclose(alone[:, -1:], 0.5 * math.sqrt(g) * imitated, rtol=1e-5)
    assert not alone[:, :-1].any() and alone[:, -1].any()
    both = slope_of(grao(r), r)
    assert (both[:, :-1] > 0).equal(r.mask_UKT[:, :-1] > 0)
    assert (both[:, -1] < 0).equal(r.mask_UKT[:, -1] > 0)


@few
@given(seed=SEEDS, constants=st.lists(st.floats(-3, 3), min_size=5, max_size=5))
def test_a_constant_of_the_state_changes_the_value_of_adpa_alone(
    seed: int, constants: list[float]
) -> None:
    student, one, other = (teaching.drawn(seed + i) for i in range(3))
    extras, c = teachers(one, other), torch.tensor(constants).double()
    value, slope = teaching.slopes(teacher_advantage, student, **extras)
    name = "teacher_reference_logp"
    extras = extras | {name: extras[name] - c[:, None]}
    again, unmoved = teaching.slopes(teacher_advantage, student, **extras)
    assert torch.allclose(again, value + c) and torch.allclose(unmoved, slope, atol=1e-9)


SHARES = st.floats(0, 1)


@few
@given(p=st.lists(SHARES, min_size=1, max_size=8), bound=SHARES, bonus=SHARES)
def test_process_rewards_telescope(p: list[float], bound: float, bonus: float) -> None:
    for rewards, end in ((min_rewards, min(p)), (prod_rewards, math.prod(p))):
        whole = min(end, bound) - bound + bonus
        assert sum(rewards(p, bound, bonus)) == pytest.approx(whole, abs=1e-9)
        # A perfect step changes only how the bonus is spread.
        further = [*rewards(p, bound, 0.0), 0.0]
        assert rewards([*p, 1.0], bound, 0.0) == pytest.approx(further, abs=1e-12)
