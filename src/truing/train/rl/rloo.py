"""REINFORCE leave-one-out: an answer's baseline is the mean reward of the other answers.

    R'_i = R_i - beta sum_t (log pi(y_t) - log pi_ref(y_t))                       arXiv 2402.14740
    A_i = R'_i - mean of R'_j over j != i = G / (G - 1) (R'_i - mean)
    ratio_i = exp(sum_t log(pi(y_t) / pi_old(y_t)))
    loss = mean over answers of -min(ratio_i A_i, clip(ratio_i, 1 - e, 1 + e) A_i)

The ratio is that of the whole answer; the paper, with one update a rollout, has none, which is what
it comes to while the two policies are one. Beyond exp(20) it goes on along its tangent, since over
a long answer exp of the sum would be infinite. `normalise` divides by the batch's standard
deviation. Four answers by default, where the libraries draw two: their mean is a poor baseline.

Shapes: U groups, K answers, T tokens.
"""

from __future__ import annotations

from truing.core.objective import Loss, Measurements
from truing.core.online import Update, log_ratio, online, weighed
from truing.core.passes.exponentials import exp_onwards
from truing.core.rl.advantages import leave_one_out, normalised
from truing.train.rl.grpo import penalised


@online(paper="preference-losses", needs=("ref_logp",), least=2)
def rloo(
    r: Measurements,
    *,
    beta: float = 0.05,
    clip_ratio: float = 0.2,
    normalise: bool = False,
    answers: int = 4,
) -> Update:
    """REINFORCE leave-one-out: an answer's baseline is the mean reward of the others.

    Args:
        beta: strength of the pull towards the reference, in the reward.
        clip_ratio: how far from 1 the answer's ratio counts.
        normalise: centre and scale advantages over the batch.
    """

    def loss(m: Measurements) -> Loss:
        # Beyond the bound its tangent there goes on: finite, and an answer that has become far
        # likelier is still pushed down where it is bad.
        ratio_UK = exp_onwards(log_ratio(m).sum(-1))
        held_UK = ratio_UK.clamp(1 - clip_ratio, 1 + clip_ratio)
        a_UK = m["advantage"]
        out_UK = ((ratio_UK > held_UK) & (a_UK > 0)) | ((ratio_UK < held_UK) & (a_UK < 0))
        seen = {"clip_fraction": out_UK.float().detach()}
        return Loss(-(ratio_UK * a_UK).minimum(held_UK * a_UK), m.there_UK, seen)

    advantage_UK = leave_one_out(penalised(r, beta, "k1"), r.there_UK)
    if normalise:
        advantage_UK = normalised(advantage_UK, r.there_UK)
    return weighed(advantage_UK, loss)
