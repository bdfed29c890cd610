"""ReMax by hand: the greedy answer's reward is the baseline, and that answer is not trained on."""

from __future__ import annotations

import pytest
import torch
from online_numbers import (
    ANSWERS,
    NEW,
    OLD,
    REF,
    REWARD,
    gradient,
    loss_of,
    mean,
    ratio,
    rollout,
    surrogate,
    tensor,
    tokens,
    total,
)

from truing.core.online import Aggregation
from truing.train.rl.remax import remax
from truing.train.rl.rloo import rloo

GREEDY = [0.5, 2.0]
GAIN = [[0.5, 2.5], [-1.5, -3.0]]  # reward less that of the group's greedy answer


def test_by_hand() -> None:
    r = rollout(greedy=GREEDY)
    update = remax(r)
    assert update.tensors["advantage"].tolist() == GAIN
    assert update.metrics["reward_greedy"].tolist() == GREEDY
    per = {
        x: [surrogate(ratio(*x, t), GAIN[x[0]][x[1]], 0.2, 0.2) for t in tokens(*x)]
        for x in ANSWERS
    }
    wanted: dict[Aggregation, float] = {
        "luspo": mean([sum(p) for p in per.values()]),
        "grpo": mean([mean(p) for p in per.values()]),
        "bnpo": sum(map(sum, per.values())) / 10,
    }
    for kind, value in wanted.items():
        loss = loss_of(remax(r, aggregate=kind), r)
        assert total(loss) == pytest.approx(value, rel=1e-5)
    assert total(loss_of(update, r)) == pytest.approx(wanted["luspo"], rel=1e-5)


def test_at_ratio_one_the_gradient_is_reinforce() -> None:
    """That of -(r - r_greedy) log pi(y), averaged over answers, as autograd takes it."""
    r = rollout(greedy=GREEDY)
    got = gradient(loss_of(remax(r), r, now=OLD))
    logp = tensor(OLD, fill=0.0).requires_grad_()
    gain = torch.tensor(REWARD) - torch.tensor(GREEDY)[:, None]
    (-(gain * logp.sum(-1)).mean()).backward()
    assert logp.grad is not None
    assert torch.allclose(got, logp.grad * r.mask_UKT, atol=1e-7)
    assert got[0, 1, 0] == pytest.approx(-(3.0 - 0.5) / 4)


def test_the_divergence_in_the_reward_by_hand() -> None:
    """Off the drawn answers' rewards, not off the greedy one's."""
    update = remax(rollout(greedy=GREEDY), beta=0.3)
    for u, k in ANSWERS:
        gap = sum(OLD[u][k]) - sum(REF[u][k])
        wanted = REWARD[u][k] - 0.3 * gap - GREEDY[u]
        assert float(update.tensors["advantage"][u, k]) == pytest.approx(wanted, rel=1e-5)


def test_as_good_as_the_greedy_answer_teaches_nothing() -> None:
    """Equal rewards are no reason: what counts is the distance from the greedy answer."""
    r = rollout(greedy=[0.1, 0.5], reward=[[0.1, 0.1], [1.0, 1.0]])
    update = remax(r)
    assert update.active_U is not None and update.active_U.tolist() == [False, True]
    got = gradient(loss_of(update, r))
    assert got[0].abs().sum() == 0 and got[1].abs().sum() > 0
    assert rloo(r, beta=0.0).tensors["advantage"].abs().sum() == 0  # its own group teaches none


def test_clipping_stops_what_has_moved() -> None:
    """Positive gain and a ratio beyond 1.2, or a negative one and a ratio under 0.8."""
    r = rollout(greedy=GREEDY)
    loss = loss_of(remax(r), r)
    out = {
        (u, k): mean(
            [
                float(x > 1.2) if GAIN[u][k] > 0 else float(x < 0.8)
                for x in (ratio(u, k, t) for t in tokens(u, k))
            ]
        )
        for u, k in ANSWERS
    }
    assert loss.metrics["clip_fraction"].flatten().tolist() == pytest.approx(
        [out[x] for x in ANSWERS]
    )
    assert NEW != OLD and max(out.values()) > 0
