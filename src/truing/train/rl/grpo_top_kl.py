"""GRPO whose divergence is summed over the reference's 500 likeliest tokens, not estimated.

    KL_t = sum_{v in K} p_v (log p_v - log q_v) >= 0        p, q made to sum to 1 over K
    R_i = r_i - beta sum_t KL_t;   A_i = (R_i - mean_g) / (std_g + 1e-4)
    loss = mean over answers of the mean of -min(ratio_t A_i, clip(ratio_t, 1 - e, 1 + e) A_i)
           + ptx mean_t KL_t(given answers)

K are the tokens that the reference q finds likeliest after the same words, p is the policy that
drew the answer. What GRPO's k1 or k3 reads off the one token that was drawn is here a sum, without
noise and never negative; all of the vocabulary (`top_k` at least its size) gives the divergence
itself. Tokens outside K have no gradient: probability that leaves K is not seen.

`ptx` holds the policy to the reference on answers that nobody drew (rows with the column
`completion`, such as those of supervised tuning), where fitting these answers by their likelihood
would undo what merging has made of the reference. Both are then compared at the temperature that
the policy's answers are drawn at, as in the reward.

Source: "Baichuan Alignment Technical Report", arXiv 2410.14940, its section on reinforcement
learning: groups of three, the divergence in the reward. Its beta and gamma (`ptx`) are not
published; 0.02 is ours, and 0.01 is a beginning for `ptx`. The report writes gamma's term with the
sign of a reward; it is a penalty here. The divergence of an answer's tokens is taken off the reward
of the answer, since GRPO has one advantage for all of them.

Shapes: U groups, K answers, T tokens; C rows, V vocabulary, k tokens of the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from truing.core.logprob import Rows, statistic
from truing.core.objective import Loss, Measurements
from truing.core.online import (
    Update,
    by_answer,
    by_token,
    clip_fraction,
    clipped,
    online,
    watched,
    weighed,
)
from truing.core.rl.advantages import group_advantage
from truing.errors import InputError


@statistic
def ref_top_kl(rows: Rows, grad: bool) -> tuple[Tensor, Tensor | None]:
    """KL(model || reference) within the reference's likeliest tokens.

    Extras: their "ref_ids" and "ref_top_logp", [C, k].
    """
    ids_Ck = rows.extras["ref_ids"]
    logp_Ck = rows.logp_CV.gather(1, ids_Ck).log_softmax(1)
    ratio_Ck = logp_Ck - rows.extras["ref_top_logp"].log_softmax(1)
    p_Ck = logp_Ck.exp()
    value_C = (p_Ck * ratio_Ck).sum(1)
    if not grad:
        return value_C, None
    slope_Ck = p_Ck * (ratio_Ck - value_C[:, None])
    return value_C, torch.zeros_like(rows.logp_CV).scatter_(1, ids_Ck, slope_Ck)


def penalised(r: Measurements, beta: float) -> Tensor:
    """Rewards less beta times the divergence summed over the answer, [U, K]."""
    return r["reward"] - beta * r.seq("ref_top_kl") if beta else r["reward"]


@online(paper="baichuan-alignment", needs=("ref_logp", "ref_top_kl"), least=2, given="completion")
def grpo_top_kl(
    r: Measurements,
    *,
    beta: float = 0.02,
    ptx: float = 0.0,
    top_k: int = 500,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    answers: int = 3,
) -> Update:
    """GRPO whose divergence is summed over the reference's likeliest tokens, not estimated.

    Args:
        beta: strength of the pull towards the reference, in the reward; 0 does without it.
        ptx: weight of the divergence on the rows' own answers; 0 does without them.
        top_k: likeliest tokens of the reference that the divergence is summed over.
    """
    if top_k < 2 or min(beta, ptx) < 0:
        raise InputError(
            "setting 'top_k' must be at least 2, 'beta' and 'ptx' not negative",
            seen={"top_k": top_k, "beta": beta, "ptx": ptx},
        )

    def loss(m: Measurements) -> Loss:
        made = by_answer(clipped(m, clip_low, clip_high), m, m["own"])
        made = watched(made, clip_fraction=clip_fraction(m, clip_low, clip_high)[m["own"] > 0])
        return made + ptx * by_token(m["ref_top_kl"], m, 1 - m["own"]) if ptx else made

    own_UK = r["own"] * r.there_UK
    seen = {"top_kl": r.mean("ref_top_kl")[own_UK > 0]} if beta else {}
    return weighed(group_advantage(penalised(r, beta), own_UK), loss, beta=ptx, **seen)
