"""GRPO's settings by hand: averages over tokens, a KL that an older policy drew, masked answers."""

from __future__ import annotations

import math

import pytest
import torch
from online_numbers import (
    ANSWERS,
    NEW,
    OLD,
    REF,
    REWARD,
    A,
    gradient,
    k3,
    loss_of,
    mean,
    ratio,
    rollout,
    std,
    surrogate,
    tokens,
    total,
)

from truing.core.objective import Measurements
from truing.core.online import Aggregation, kl_loss
from truing.core.rl.advantages import kl_tokens
from truing.train.rl.grpo import dapo, dr_grpo, gdpo, grpo
from truing.train.rl.gspo import gspo


def test_aggregations_by_hand() -> None:
    r, beta = rollout(), 0.3
    per = [
        [surrogate(ratio(u, k, t), A[u][k], 0.2, 0.2) + beta * k3(u, k, t) for t in tokens(u, k)]
        for u, k in ANSWERS
    ]
    wanted: dict[Aggregation, float] = {
        "grpo": mean([mean(p) for p in per]),
        "bnpo": sum(map(sum, per)) / 10,  # answers of 3, 2, 1 and 4 tokens
        "luspo": sum(map(sum, per)) / 4,
    }
    for kind, value in wanted.items():
        loss = loss_of(grpo(r, beta=beta, aggregate=kind), r)
        assert total(loss) == pytest.approx(value, rel=1e-5)


def test_aggregations_of_other_methods() -> None:
    """DAPO's average is bnpo, Dr. GRPO's is luspo over the longest answer."""
    r = rollout()
    a = loss_of(grpo(r, aggregate="bnpo"), r)
    b = loss_of(dapo(r, clip_high=0.2, punish=0.0), r)
    assert torch.allclose(gradient(a), gradient(b), atol=1e-7)
    a = loss_of(grpo(r, scale="none", aggregate="luspo"), r)
    b = loss_of(dr_grpo(r, max_tokens=8), r)
    assert torch.allclose(gradient(a) / 8, gradient(b), atol=1e-7)


def test_k3_times_ratio_by_hand() -> None:
    r, beta = rollout(), 0.3
    update = grpo(r, beta=beta, kl="k3_ratio")
    per = [
        mean(
            [
                surrogate(ratio(u, k, t), A[u][k], 0.2, 0.2) + beta * ratio(u, k, t) * k3(u, k, t)
                for t in tokens(u, k)
            ]
        )
        for u, k in ANSWERS
    ]
    assert total(loss_of(update, r)) == pytest.approx(mean(per), rel=1e-5)
    # At ratio 1 the value is k3's; the slope is (1 - exp(-l)) + k3 = l, l = log pi / pi_ref.
    one, other = (loss_of(grpo(r, beta=beta, kl=kind), r, now=OLD) for kind in ("k3_ratio", "k3"))
    assert total(one) == pytest.approx(total(other), abs=1e-6)
    got = gradient(one)
    for u, k in ANSWERS:
        n = len(OLD[u][k])
        gaps = [OLD[u][k][t] - REF[u][k][t] for t in tokens(u, k)]
        wanted = [(-A[u][k] + beta * g) / n / 4 for g in gaps]
        assert got[u, k, :n].tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_k3_times_ratio_is_unbiased_under_an_older_policy() -> None:
    """Its mean under the policy that drew is the KL of the policy that learns; so is its slope."""
    source = torch.Generator().manual_seed(3)
    old_V, ref_V = (torch.randn(6, generator=source).log_softmax(0) for _ in range(2))
    logits_V = torch.randn(6, generator=source).requires_grad_()
    logp_V = logits_V.log_softmax(0)
    shape = (6, 1, 1)
    m = Measurements(
        torch.ones(shape),
        {
            "logp": logp_V.reshape(shape),
            "old_logp": old_V.reshape(shape),
            "ref_logp": ref_V.reshape(shape),
        },
    )
    guess = (old_V.exp() * kl_loss(m, "k3_ratio").flatten()).sum()
    exact = (logp_V.exp() * (logp_V - ref_V)).sum()
    assert float(guess.detach()) == pytest.approx(float(exact.detach()), rel=1e-5)
    a, b = (torch.autograd.grad(x, logits_V, retain_graph=True)[0] for x in (guess, exact))
    assert torch.allclose(a, b, atol=1e-6)


# Only the first and the last answer have negative advantages; of these the first lost probability.
DRIFTED = [([-0.75, -1.5, -2.0], [-1.75, -1.5]), ([-2.5], [-0.5, -0.25, -1.125, -2.0])]


def test_masked_answers_keep_their_kl_and_their_place() -> None:
    """Lost 1/6 and 1/2 a token: the first is pushed down, and masked; the second is pushed up."""
    r, beta = rollout(), 0.3
    drift = [[mean(o) - mean(n) for o, n in zip(*g, strict=True)] for g in zip(OLD, DRIFTED)]
    assert [round(x, 4) for row in drift for x in row] == [0.1667, 0.5, -0.5, -0.0938]
    for opsm, masked in ((0.15, True), (0.2, False), (0.0, False)):
        terms: list[float] = []
        for u, k in ANSWERS:
            gaps = [n - o for n, o in zip(DRIFTED[u][k], OLD[u][k], strict=True)]
            own = [surrogate(math.exp(g), A[u][k], 0.2, 0.2) for g in gaps]
            own = [0.0 for _ in own] if masked and (u, k) == (0, 0) else own
            terms.append(mean(own) + beta * mean([k3(u, k, t, DRIFTED) for t in tokens(u, k)]))
        loss = loss_of(grpo(r, beta=beta, opsm=opsm), r, now=DRIFTED)
        assert total(loss) == pytest.approx(mean(terms), rel=1e-5)
        if opsm:
            assert loss.metrics["masked"].tolist() == [[float(masked), 0.0], [0.0, 0.0]]


def test_masked_answers_of_gspo() -> None:
    r = rollout()
    free, held = (loss_of(gspo(r, opsm=opsm), r, now=DRIFTED) for opsm in (0.0, 0.15))
    assert held.per_unit[0, 0] == 0 and free.per_unit[0, 0] != 0
    assert torch.equal(held.per_unit.flatten()[1:], free.per_unit.flatten()[1:])
    assert gradient(held)[0, 0].abs().sum() == 0


def test_nothing_is_masked_before_the_policy_has_moved() -> None:
    r = rollout()
    free, held = (loss_of(grpo(r, opsm=opsm), r, now=OLD) for opsm in (0.0, 1e-6))
    assert torch.equal(free.per_unit, held.per_unit)
    assert torch.equal(gradient(free), gradient(held))


def test_k3_goes_on_beyond_its_bound_in_a_straight_line() -> None:
    """exp(-l) + l - 1 up to 20 nats, then along the tangent there: the pull keeps its direction."""
    gaps = [0.0, 0.5, -1e-4, -19.0, -25.0, -1000.0]
    logp = torch.tensor(gaps, dtype=torch.float64).requires_grad_()
    found = kl_tokens(logp, torch.zeros_like(logp))
    slope, top = math.expm1(20), math.expm1(20) - 20
    wanted = [math.exp(-g) + g - 1 for g in gaps[:4]] + [top + slope * (-g - 20) for g in gaps[4:]]
    assert found.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-15)
    found.sum().backward()
    assert logp.grad is not None
    steep = [1 - math.exp(-g) for g in gaps[:4]] + [-slope, -slope]
    assert logp.grad.tolist() == pytest.approx(steep, rel=1e-9)
    far = kl_tokens(torch.tensor([-25.0]), torch.zeros(1))
    assert float(far) == pytest.approx(6 * slope - 21 + 1, rel=1e-6)


@pytest.mark.parametrize("aggregate", ["grpo", "bnpo", "luspo"])
def test_unfinished_answers_are_in_no_average(aggregate: Aggregation) -> None:
    """The first answer of the second group was cut: its reward counts, its tokens do not."""
    r, beta = rollout(), 0.3
    some = [x for x in ANSWERS if x != (1, 0)]
    per = {
        (u, k): [
            surrogate(ratio(u, k, t), A[u][k], 0.2, 0.2) + beta * k3(u, k, t) for t in tokens(u, k)
        ]
        for u, k in some
    }
    whole = [x for every in per.values() for x in every]
    means, sums = ([f(v) for v in per.values()] for f in (mean, sum))
    wanted = {"grpo": mean(means), "bnpo": mean(whole), "luspo": mean(sums)}[aggregate]
    update = grpo(r, beta=beta, aggregate=aggregate, drop_unfinished=True)
    assert total(loss := loss_of(update, r)) == pytest.approx(wanted, rel=1e-5)
    assert gradient(loss)[1, 0].abs().sum() == 0
    if aggregate == "grpo":
        by_hand = [
            (REWARD[u][k] - REWARD[u][1 - k]) / 2 for u, k in some
        ]  # the mean of two lies in the middle
        each = [
            sum(surrogate(ratio(u, k, t), a, 0.2, 0.2) for t in tokens(u, k)) / 64
            for (u, k), a in zip(some, by_hand, strict=True)
        ]
        found = loss_of(dr_grpo(r, drop_unfinished=True), r)
        assert total(found) == pytest.approx(mean(each), rel=1e-5)
        now = {x: sum(NEW[x[0]][x[1]]) - sum(OLD[x[0]][x[1]]) for x in some}
        each = [
            surrogate(math.exp(now[u, k] / len(OLD[u][k])), A[u][k], 3e-4, 4e-4) for u, k in some
        ]
        found = loss_of(gspo(r, drop_unfinished=True), r)
        assert total(found) == pytest.approx(mean(each), rel=1e-5)


def test_unfinished_answers_count_in_gdpos_advantages_alone() -> None:
    """Of a single reward A is centred already, and its deviation over all four divides once more.

    The answer that was cut off stays in both; the mean of the loss is over the other three.
    """
    r = rollout(**{"reward/one": REWARD})
    scale = 1 / (std([a for group in A for a in group]) + 1e-4)
    each = [
        mean([surrogate(ratio(u, k, t), A[u][k] * scale, 0.2, 0.2) for t in tokens(u, k)])
        for u, k in ANSWERS
        if (u, k) != (1, 0)
    ]
    update = gdpo(r, drop_unfinished=True)
    assert update.metrics["dropped"].tolist() == [0.0, 0.0, 1.0, 0.0]
    assert total(loss := loss_of(update, r)) == pytest.approx(mean(each), rel=1e-4)
    assert gradient(loss)[1, 0].abs().sum() == 0
