"""Group sequence policy optimisation: the ratio is that of the whole answer, per token.

    s_i = exp(mean_t log(pi(y_t) / pi_old(y_t)))                                  arXiv 2507.18071
    loss = mean over answers of -min(s_i A_i, clip(s_i, 1 - e_lo, 1 + e_hi) A_i)

A_i as in GRPO. Since s_i is a mean over many tokens it moves little, and the clipping is three
orders of magnitude narrower than GRPO's. Where all answers have one token it is GRPO.

Shapes: U groups, K answers, T tokens.
"""

from __future__ import annotations

from truing.core.advantages import group_advantage
from truing.core.objective import Loss, Measurements
from truing.core.online import (
    Update,
    by_answer,
    clip_fraction,
    clipped,
    kl_loss,
    online,
    watched,
    weighed,
)


@online(paper="preference-losses", needs=("ref_logp",), least=2)
def gspo(
    r: Measurements, *, beta: float = 0.0, clip_low: float = 3e-4, clip_high: float = 4e-4
) -> Update:
    """Group sequence policy optimisation: one ratio for each answer.

    Args:
        beta: strength of the pull towards the reference (k3, in the loss); 0 does without one.
        clip_low: how far below 1 the answer's ratio counts.
        clip_high: how far above 1.
    """

    def loss(m: Measurements) -> Loss:
        per_UKT = clipped(m, clip_low, clip_high, level="sequence")
        if beta:
            per_UKT = per_UKT + beta * kl_loss(m)
        fraction_UK = clip_fraction(m, clip_low, clip_high, "sequence")
        return watched(by_answer(per_UKT, m), clip_fraction=fraction_UK)

    return weighed(group_advantage(r["reward"], r.there_UK), loss, beta=beta)
