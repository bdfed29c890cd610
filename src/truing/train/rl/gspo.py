"""Group sequence policy optimisation: the ratio is that of the whole answer, per token.

    l_t = log(pi(y_t) / pi_old(y_t))
    gspo   s_i = exp(mean_t l_t)                                                  arXiv 2507.18071
           loss = mean over answers of -min(s_i A_i, clip(s_i, 1 - e_lo, 1 + e_hi) A_i)
    gmpo   s_i = exp(mean_t c_t),  c_t = min(l_t, e) for A_i >= 0, max(l_t, -e) for A_i < 0
           loss = mean over answers of -s_i A_i

A_i as in GRPO. Since gspo's s_i is a mean over many tokens it moves little, and its clipping is
three orders of magnitude narrower than GRPO's. gmpo, the geometric mean, holds each token by itself
and on one side only, so that one far token takes no more than its share. Where all answers have one
token, gspo is GRPO, and so is gmpo with GRPO clipped at exp(-e) and exp(e).

gspo's `aggregate`, `opsm` and `drop_unfinished` are those of `grpo`: with luspo the loss is the
mean of length_i times the term, so that a token of a long answer weighs as much as one of a short.

gmpo's clipping and mean are the paper's; the average over answers is gspo's here.

Shapes: U groups, K answers, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from truing.core.objective import Loss, Measurements
from truing.core.online import (
    Aggregation,
    Update,
    advantages,
    aggregated,
    by_answer,
    clip_fraction,
    clipped,
    kl_loss,
    log_ratio,
    on_policy,
    online,
    watched,
    weighed,
)
from truing.core.rl.advantages import dropped, ended, group_advantage


@online(paper="preference-losses", needs=("ref_logp",), least=2)
def gspo(
    r: Measurements,
    *,
    beta: float = 0.0,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    aggregate: Aggregation = "grpo",
    opsm: float = 0.0,
    drop_unfinished: bool = False,
) -> Update:
    """Group sequence policy optimisation: one ratio for each answer.

    Args:
        beta: strength of the pull towards the reference (k3, in the loss); 0 does without one.
        clip_low: how far below 1 the answer's ratio counts.
        clip_high: how far above 1.
        opsm: nats a token by which an answer may have lost probability since it was drawn; beyond,
            it is not pushed down further. 0 for any.
        drop_unfinished: keep answers without a stop token out of the loss.
    """

    def loss(m: Measurements) -> Loss:
        near_UK1, seen = on_policy(m, opsm)
        per_UKT = clipped(m, clip_low, clip_high, level="sequence") * near_UK1
        if beta:
            per_UKT = per_UKT + beta * kl_loss(m)
        fraction_UK = clip_fraction(m, clip_low, clip_high, "sequence")
        made = aggregated(per_UKT, m, aggregate, ended(m, drop_unfinished))
        return watched(made, clip_fraction=fraction_UK, **seen)

    cut = dropped(r, drop_unfinished)
    return weighed(group_advantage(r["reward"], r.there_UK), loss, beta=beta, **cut)


def geometric(m: Measurements, clip: float) -> tuple[Tensor, Tensor]:
    """-s A of each token, and which tokens' log-ratios are held; both [U, K, T]."""
    l_UKT, a_UKT = log_ratio(m), advantages(m)
    held_UKT = torch.where(a_UKT < 0, l_UKT.clamp(min=-clip), l_UKT.clamp(max=clip))
    mean_UK = held_UKT.sum(-1) / m.length_UK.clamp(min=1)
    return -mean_UK.exp()[..., None] * a_UKT, (held_UKT != l_UKT) & (a_UKT != 0)


@online(paper="preference-losses", needs=("ref_logp",), least=2)
def gmpo(r: Measurements, *, beta: float = 0.0, clip_log: float = 0.4) -> Update:
    """Geometric-mean policy optimisation: one ratio for each answer, its tokens held one by one.

    Args:
        beta: strength of the pull towards the reference (k3, in the loss); 0 does without one.
        clip_log: how far a token's log-ratio counts in the direction that its advantage pushes.
    """

    def loss(m: Measurements) -> Loss:
        per_UKT, out_UKT = geometric(m, clip_log)
        if beta:
            per_UKT = per_UKT + beta * kl_loss(m)
        fraction_UK = out_UKT.float().sum(-1) / m.length_UK.clamp(min=1)
        return watched(by_answer(per_UKT, m), clip_fraction=fraction_UK)

    return weighed(group_advantage(r["reward"], r.there_UK), loss, beta=beta)
