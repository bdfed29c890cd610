"""Advantages of policy-gradient methods: from rewards of finished answers to one number a token.

    group          A = (R - mean_g) / (std_g + 1e-4), std with n - 1           arXiv 2402.03300
    leave one out  A = R - mean of the group's other answers                   arXiv 2402.14740
    GAE            delta_t = r_t + gamma V_{t+1} - V_t
                   A_t = delta_t + gamma lambda A_{t+1}                        arXiv 1506.02438
    KL             k1 = l,  k2 = l^2 / 2,  k3 = exp(-l) + l - 1 >= 0,  l = logp - ref_logp
                   (three estimators of KL(policy || reference) on the policy's own tokens)
                   k3_ratio = k3 pi / pi_old: k3 on tokens that an older policy drew

Answers that were cut off at the length limit can be kept out of a loss: their rewards still count
in their group. The share that is left out is recorded as "dropped"; a rollout of which all are
teaches nothing, which is said once (`online_record`).

Shapes: U groups, K answers of a group, T tokens of an answer; tokens stand on the left, padding is
masked. Branches that do not exist have no token and count for nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from truing.core.passes.exponentials import FARTHEST, parted
from truing.errors import InputError

if TYPE_CHECKING:
    from truing.core.objective import Measurements

Scale = Literal["group", "batch", "none"]
Estimator = Literal["k1", "k2", "k3", "k3_ratio"]
OLD_ENTROPY = "old_entropy"  # of the distribution that each token was drawn from
DROPPED = "dropped"
EPS = 1e-4  # added to standard deviations of rewards
ROUNDING = 1e-5  # nats by which entropies of one distribution may differ, computed differently


def centred(reward_UK: Tensor, there_UK: Tensor) -> Tensor:
    """Rewards minus the mean of their group; 0 where a branch does not exist."""
    mean_U1 = (reward_UK * there_UK).sum(1, keepdim=True) / there_UK.sum(1, keepdim=True)
    return (reward_UK - mean_U1) * there_UK


def deviation(reward_UK: Tensor, there_UK: Tensor) -> Tensor:
    """Standard deviation of each group, [U, 1]: n - 1 in the denominator."""
    count_U1 = there_UK.sum(1, keepdim=True)
    square_U1 = (centred(reward_UK, there_UK) ** 2).sum(1, keepdim=True)
    return (square_U1 / (count_U1 - 1).clamp(min=1)).sqrt()


def group_advantage(reward_UK: Tensor, there_UK: Tensor, scale: Scale = "group") -> Tensor:
    """Rewards relative to their group, [U, K].

    Args:
        reward_UK: rewards.
        there_UK: 1.0 for branches that exist.
        scale: "group" divides by the group's standard deviation, "batch" by that of all rewards,
            "none" by nothing. A group of equal rewards gives exactly 0.
    """
    made_UK = centred(reward_UK, there_UK)
    spread_UK = reward_UK.masked_fill(there_UK == 0, torch.nan)
    equal_U1 = spread_UK.nan_to_num(torch.inf).amin(1) == spread_UK.nan_to_num(-torch.inf).amax(1)
    # Rounding of the mean must not be blown up into an advantage.
    made_UK = made_UK.masked_fill(equal_U1[:, None], 0.0)
    if scale == "group":
        return made_UK / (deviation(reward_UK, there_UK) + EPS)
    if scale == "batch":
        every = reward_UK[there_UK > 0]
        return made_UK / ((every.std() if len(every) > 1 else every.new_zeros(())) + EPS)
    return made_UK


def leave_one_out(reward_UK: Tensor, there_UK: Tensor) -> Tensor:
    """Rewards minus the mean of the group's other answers: G / (G - 1) (R - mean), [U, K]."""
    count_U1 = there_UK.sum(1, keepdim=True)
    return group_advantage(reward_UK, there_UK, "none") * count_U1 / (count_U1 - 1).clamp(min=1)


def all_equal(value: Tensor, mask: Tensor) -> bool:
    """Whether what counts is one number: the rounding of its mean must not be blown up then."""
    known = value[mask > 0]
    return not len(known) or bool((known == known[0]).all())


def whiten(value: Tensor, mask: Tensor, *, unbiased: bool = True, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(var + eps) over unmasked entries, 0 elsewhere and where all are equal.

    Args:
        value: of any shape.
        mask: 1.0 where an entry counts.
        unbiased: n - 1 in the variance.
        eps: added to the variance.
    """
    n = mask.sum()
    mean = (value * mask).sum() / n.clamp(min=1)
    var = ((value - mean) ** 2 * mask).sum() / (n - (1 if unbiased else 0)).clamp(min=1)
    if all_equal(value, mask):
        return torch.zeros_like(value)
    return (value - mean) / (var + eps).sqrt() * mask


def normalised(value_UK: Tensor, there_UK: Tensor) -> Tensor:
    """(x - mean) / (std + 1e-4) over the batch, std with n - 1, of values centred in their groups.

    0 where all are equal, and in groups of zeros: the mean is 0 but for rounding.
    """
    n = there_UK.sum()
    mean = (value_UK * there_UK).sum() / n.clamp(min=1)
    std = (((value_UK - mean) ** 2 * there_UK).sum() / (n - 1).clamp(min=1)).sqrt()
    if all_equal(value_UK, there_UK):
        return torch.zeros_like(value_UK)
    some_U1 = (value_UK * there_UK).abs().amax(1, keepdim=True) > 0
    return (value_UK - mean) / (std + EPS) * there_UK * some_U1


def at_end(score_UK: Tensor, mask_UKT: Tensor) -> Tensor:
    """Scores put on the last token of each answer, [U, K, T]."""
    last_UK1 = (mask_UKT.sum(-1, keepdim=True) - 1).clamp(min=0).long()
    placed_UKT = torch.zeros_like(mask_UKT).scatter_(2, last_UK1, score_UK[..., None])
    return placed_UKT * mask_UKT


def gae(
    reward_UKT: Tensor, value_UKT: Tensor, mask_UKT: Tensor, *, gamma: float = 1.0, lam: float = 1.0
) -> Tensor:
    """Generalised advantage estimates, [U, K, T]; the value after the last token is 0.

    With lam = gamma = 1 it is the sum of what is still to come minus V_t, with lam = 0 the
    temporal difference. Zero values and lam = 1 give the return to go.
    """
    made_UKT = torch.zeros_like(reward_UKT)
    after_UK = torch.zeros_like(reward_UKT[..., 0])
    value_after_UK = torch.zeros_like(after_UK)
    for t in range(reward_UKT.shape[2] - 1, -1, -1):
        there_UK = mask_UKT[..., t]
        delta_UK = reward_UKT[..., t] + gamma * value_after_UK - value_UKT[..., t]
        after_UK = (delta_UK + gamma * lam * after_UK) * there_UK
        value_after_UK = value_UKT[..., t] * there_UK
        made_UKT[..., t] = after_UK
    return made_UKT


def top_entropy(entropy_UKT: Tensor, mask_UKT: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """1.0 at tokens of high entropy, [U, K, T], and the smallest entropy among them, [].

    High is at least the (1 - share) quantile of all unmasked tokens, interpolated linearly (the
    rule of arXiv 2506.01939 as TRL has it): floor(share (n - 1)) + 1 of n tokens whose entropies
    all differ. What is equal to the smallest but for rounding is kept with it: answers that begin
    alike have tokens of one entropy, and their order must not depend on how they were computed.

    Args:
        entropy_UKT: in nats.
        mask_UKT: 1.0 at the tokens that are compared; at least one.
        share: above 0, at most 1.
    """
    known_N = entropy_UKT[mask_UKT > 0].sort().values
    # 1e-6: a product such as 0.29 * 100 falls short of the whole number that is meant.
    kept = int(share * (len(known_N) - 1) + 1e-6) + 1
    least = known_N[len(known_N) - kept]
    return (entropy_UKT >= least - ROUNDING) * mask_UKT, least


def on_high_entropy(
    advantage_UK: Tensor, r: Measurements, share: float, among_UK: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Advantages on the tokens of high entropy alone, [U, K, T], and what to record of them.

    The other tokens have no policy gradient, yet stay in every denominator and keep their KL
    ("Beyond the 80/20 Rule", arXiv 2506.01939). Entropies are those that the answers were drawn
    with, and all tokens of the rollout are compared, so that neither the updates before nor the
    way an update is split change which tokens are trained on.

    Args:
        share: of the tokens that stay; see `top_entropy`. 1 leaves everything as it is.
        among_UK: 1.0 for answers whose tokens are compared; None for all.
    """
    mask_UKT = r.mask_UKT if among_UK is None else r.mask_UKT * among_UK[..., None]
    if share == 1 or not mask_UKT.any():
        return advantage_UK, {}
    high_UKT, least = top_entropy(r[OLD_ENTROPY], mask_UKT, share)
    seen = {"high_entropy": high_UKT[mask_UKT > 0], "high_entropy_from": least}
    return advantage_UK[..., None] * high_UKT, seen


def to_go(reward_UKT: Tensor, mask_UKT: Tensor) -> Tensor:
    """Sum of this token's reward and all later ones, [U, K, T]."""
    return gae(reward_UKT, torch.zeros_like(reward_UKT), mask_UKT)


def kl_tokens(logp_UKT: Tensor, ref_logp_UKT: Tensor, kind: Estimator = "k3") -> Tensor:
    """An estimate of KL(policy || reference) at each token; see the module's docstring.

    The tokens are the policy's own, whose ratio is 1: "k3_ratio" is k3 here, and gets its ratio in
    `core.online.kl_loss`.
    """
    l_UKT = logp_UKT - ref_logp_UKT
    if kind == "k1":
        return l_UKT
    if kind == "k2":
        return 0.5 * l_UKT**2
    # expm1 keeps small differences exact. Beyond the bound its tangent there goes on, so that the
    # loss is finite for a token that the policy has all but given up, and pulls the right way.
    near_UKT, beyond_UKT = parted(-l_UKT)
    return torch.expm1(near_UKT) - near_UKT + math.expm1(FARTHEST) * beyond_UKT


def overlong(length_UK: Tensor, longest: int, buffer: int) -> Tensor:
    """Soft punishment of long answers, in [-1, 0] (DAPO, arXiv 2503.14476), [U, K].

    0 up to `longest - buffer` tokens, then falling in a straight line to -1 at `longest`.
    """
    if not 0 < buffer <= longest:
        raise InputError("the buffer must be above 0 and at most the longest answer", seen=buffer)
    return ((longest - buffer - length_UK) / buffer).clamp(-1.0, 0.0)


def moments(state: dict[str, Tensor] | None, values: Tensor) -> dict[str, Tensor]:
    """Running count, mean and population variance with `values` merged in (Chan's formula).

    Starts at mean 0, variance 1 and a count of 1e-24, as PPO-max does (arXiv 2307.04964).
    """
    values = values.double().flatten()
    zero = torch.zeros((), dtype=torch.float64)
    seen = state or {"mean": zero, "var": zero + 1, "count": zero + 1e-24}
    n, total = values.numel(), seen["count"] + values.numel()
    gap = values.mean() - seen["mean"]
    mean = seen["mean"] + gap * n / total
    squares = seen["var"] * seen["count"] + values.var(correction=0) * n
    squares = squares + gap**2 * seen["count"] * n / total
    return {"mean": mean, "var": squares / total, "count": total}


def sigma(state: dict[str, Tensor]) -> Tensor:
    """Unbiased standard deviation of running moments: sqrt(var n / (n - 1))."""
    n = state["count"]
    return (state["var"] * n / (n - 1).clamp(min=1e-12)).sqrt() if n > 1.5 else state["var"].sqrt()


def ended(m: Measurements, drop: bool) -> Tensor | None:
    """1.0 for answers that came to their end, [U, K]; None where the others are not dropped."""
    return m["finished"] if drop else None


def dropped(r: Measurements, drop: bool) -> dict[str, Tensor]:
    """What to record of a rollout: 1.0 for each of its answers that is left out, 0.0 else."""
    return {DROPPED: 1 - r["finished"][r.there_UK > 0]} if drop else {}
