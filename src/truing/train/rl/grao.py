"""Group relative alignment optimisation: imitate a reference answer, explore, and go beyond it.

    J = (1/G) sum_i A_i E(o_i) + beta A_y E(y) + lam (1/G) sum_i A_i (E(o_i) - E(y))
      = (1 + lam) (1/G) sum_i A_i E(o_i) + (beta A_y - lam mean_i A_i) E(y)       arXiv 2508.07750

o_1 .. o_G are the policy's answers, y the row's own, of a dialogue its last; E is the mean
log-probability of an answer's tokens, of o_i at the temperature that it was drawn at, of y at 1
(our choice); A = (R - mu) / (sigma + 1e-4), held constant, sigma with n. The loss is -J, averaged
over groups.

Where A is centred over the policy's answers mean_i A_i = 0, and the last term only rescales
exploration; with y among them mean_i A_i = -A_y / G, and it pulls towards y as well. A_y < 0, the
answers beating the reference, lowers the likelihood of y: the paper's "transcend".

mu and sigma are over the G answers as the paper prints them, or over G + 1 with y (the default).
Where all G answers score alike, the printed form divides R_y - mu by 1e-4: A_y is then bounded to
[-1, sqrt(G)] (our choice). In the G + 1 form it lies within +-sqrt(G) by itself; where nearly all
answers beat the reference, that pushes the likelihood of y down hard: the printed form, or
`clip_given_at_zero`, is gentler. The paper has no ratio;
`clip_ratio` adds PPO's for several passes over a rollout, whose gradient at ratio 1 is the same.

The paper's reward is a judge's comparison with the row's own answer, for which R(y) = 0:

    rewards: {judge: {use: judged_against, model: ..., criterion: helpful}}

Rules and other rewards do as well. RAS and NAG, by which the paper measures, are those of
evaluate/alignment_gain.

Shapes: U groups, K = G + 1 answers, the given one last, T tokens.
"""

from __future__ import annotations

import math

from torch import Tensor

from truing.core.objective import Loss, Measurements
from truing.core.online import Update, clipped, online
from truing.core.rl.advantages import EPS


def advantage(reward_UK: Tensor, with_given: bool = True) -> Tensor:
    """Advantages of all answers, the given one last, [U, K]."""
    own_UK = reward_UK if with_given else reward_UK[:, :-1]
    mu_U1, sigma_U1 = own_UK.mean(1, keepdim=True), own_UK.std(1, correction=0, keepdim=True)
    made_UK = (reward_UK - mu_U1) / (sigma_U1 + EPS)
    # Rounding of the mean must not be blown up where all rewards are equal.
    equal_U1 = reward_UK.amax(1, keepdim=True) == reward_UK.amin(1, keepdim=True)
    made_UK = made_UK.masked_fill(equal_U1, 0.0)
    if with_given:
        return made_UK
    flat_U1 = own_UK.amax(1, keepdim=True) == own_UK.amin(1, keepdim=True)
    made_UK = made_UK.clone()
    made_UK[:, :-1] = made_UK[:, :-1].masked_fill(flat_U1, 0.0)
    made_UK[:, -1] = made_UK[:, -1].clamp(-1.0, math.sqrt(own_UK.shape[1]))
    return made_UK


def components(a_UK: Tensor, explore_UK: Tensor, imitate_U: Tensor) -> tuple[Tensor, ...]:
    """Exploration, imitation over beta, and alignment over lambda of each group, [U].

    `explore_UK` is A_i E(o_i), `imitate_U` is E(y); A_y stands last in `a_UK`.
    """
    explore_U, mean_U = explore_UK.mean(1), a_UK[:, :-1].mean(1)
    return explore_U, a_UK[:, -1] * imitate_U, explore_U - mean_U * imitate_U


@online(paper="grao", rows="example", given="completion", least=2, within={"alignment": (0, None)})
def grao(
    r: Measurements,
    *,
    imitation: float = 0.5,
    alignment: float = 0.6,
    given_in_statistics: bool = True,
    clip_given_at_zero: bool = False,
    clip_ratio: float = 0.0,
    temperature: float = 0.7,
) -> Update:
    """Group relative alignment optimisation: imitate a reference answer, explore, go beyond it.

    Args:
        imitation: beta, weight of the given answer's advantage.
        alignment: lambda, weight of the answers' distance from the given one.
        given_in_statistics: mean and deviation over the given answer too.
        clip_given_at_zero: never lower the likelihood of the given answer by its advantage.
        clip_ratio: how far from 1 the ratio of new to old probability counts; 0 for no ratio.
    """
    a_UK = advantage(r["reward"], given_in_statistics)
    if clip_given_at_zero:
        a_UK[:, -1].clamp_(min=0.0)

    def loss(m: Measurements) -> Loss:
        mean_UK, a_UK = m.mean(), m["advantage"]
        explore_UK = a_UK[:, :-1] * mean_UK[:, :-1]
        if clip_ratio:
            per_UKT = -clipped(m, clip_ratio, clip_ratio)
            explore_UK = (per_UKT.sum(-1) / m.length_UK.clamp(min=1))[:, :-1]
        explore_U, imitate_U, align_U = components(a_UK, explore_UK, mean_UK[:, -1])
        parts = [explore_U, imitation * imitate_U, alignment * align_U]
        sizes = [p.detach().abs() for p in parts]
        whole_U = (sizes[0] + sizes[1] + sizes[2]).clamp(min=1e-12)
        names = ("share_exploration", "share_imitation", "share_alignment")
        seen = {n: s / whole_U for n, s in zip(names, sizes, strict=True)}
        return Loss(-(parts[0] + parts[1] + parts[2]), metrics=seen)

    return Update({"advantage": a_UK}, loss, active_U=a_UK.abs().amax(1) > 0)
