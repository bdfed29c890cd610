"""Align a small model by the advantage of a large teacher after DPO over the same before it.

    A(s_t, v) = log T_v(s_t) - log R_v(s_t)      v among the 50 likeliest tokens of T, else 0
    L = sft_weight NLL(y_w | x) - gamma mean_t sum_v S_v(s_t) A(s_t, v)

T is the teacher after DPO, R the same before (its reference), S the student; the states s_t are
those of answers that the student drew itself, before training or, so that they do not grow stale,
every `refresh` updates anew. As DPO's optimum is R exp((Q - V) /
beta), A is the advantage of v up to the factor beta, and the second term is the policy gradient
with all actions of a state counted, none drawn. Its gradient goes through S alone:

    d / dz_v = -gamma S_v (A_v - sum_u S_u A_u),   unchanged by a constant added to A in a state

Source: "Advantage-Guided Distillation for Preference Alignment in Small Language Models", arXiv
2502.17927, and its code for the floors: probabilities of either model are raised to 1e-7; a token
that R does not keep has there max(T's smallest kept probability, 1e-7). The weights are 1, which
the paper leaves open. The reference teacher is used as in the paper (the code's example takes the
student's path there). ADPA+ is `dckd`, then this on its result. Left out: the importance weight and
the KL penalty of the code, which are off there.

Shapes: U rows, K = 1 + samples branches: the chosen answer, the student's own; C rows, k kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from truing.core.logprob import Rows, statistic
from truing.core.objective import Loss, Measurements, objective
from truing.train.supervised.sft import nll

FLOOR = math.log(1e-7)


def advantages(ids_Ck: Tensor, logp_Ck: Tensor, ref_ids_Ck: Tensor, ref_logp_Ck: Tensor) -> Tensor:
    """A of the tokens that the teacher kept, [C, k]; the floors are those of the module's text."""
    logp_Ck, ref_logp_Ck = logp_Ck.clamp(min=FLOOR), ref_logp_Ck.clamp(min=FLOOR)
    same_Ckj = ids_Ck[:, :, None] == ref_ids_Ck[:, None, :]
    there_Ck = same_Ckj.any(-1)
    found_Ck = ref_logp_Ck.gather(1, same_Ckj.byte().argmax(-1))
    smallest_C1 = logp_Ck.min(1, keepdim=True).values
    return logp_Ck - torch.where(there_Ck, found_Ck, smallest_C1)


@statistic
def teacher_advantage(rows: Rows, grad: bool) -> tuple[Tensor, Tensor | None]:
    """sum_v S_v A_v; extras: ids and logp [C, k] of "teacher" and "teacher_reference"."""
    names = ("teacher_ids", "teacher_logp", "teacher_reference_ids", "teacher_reference_logp")
    ids_Ck = rows.extras["teacher_ids"]
    a_Ck = advantages(*(rows.extras[n] for n in names))
    p_Ck = rows.logp_CV.gather(1, ids_Ck).exp()
    value_C = (p_Ck * a_Ck).sum(1)
    if not grad:
        return value_C, None
    slope_CV = rows.logp_CV.exp().mul_(-value_C[:, None])
    return value_C, slope_CV.scatter_add_(1, ids_Ck, p_Ck * a_Ck)


@objective(
    paper="adpa",
    unit="token",
    needs=("logp", "teacher_advantage"),
    rows="example",
    teachers={"teacher": "top", "teacher_reference": "top"},
    hook="own_samples",
    within={"top_k": (1, None), "gamma": (0, None)},
)
def adpa(m: Measurements, *, top_k: int = 50, gamma: float = 1.0, sft_weight: float = 1.0) -> Loss:
    """Align a small model by the advantage of a large teacher after DPO over the same before it.

    Args:
        top_k: likeliest tokens of either teacher that are kept.
        gamma: weight of the expected advantage.
        sft_weight: of the chosen answer's likelihood.
    """
    own = m.mask_UKT[:, 1:]
    expected_UKT = m["teacher_advantage"][:, 1:]
    mean_U = (expected_UKT * own).sum((1, 2)) / own.sum((1, 2)).clamp(min=1)
    term = Loss(-expected_UKT, own, {"advantage": mean_U.detach()})
    return gamma * term + sft_weight * nll(m)
