"""Copy an aligned teacher's distributions on both the chosen and the rejected answer.

    L = sft_weight NLL(y_w) + chosen_weight FKL_w + rejected_weight FKL_l
    FKL_y = mean_t sum_o T_o (log T_o - log S_o)   over 51 outcomes o: the teacher's 50 likeliest
            tokens, and all others together (T_o, S_o: what remains of either's mass)

T and S are the distributions of teacher and student after the same tokens of the given answer y;
the means are over the tokens of the step. The student's probabilities are floored at 1e-7 before
the logarithm, below which there is no gradient. Dual-constrained knowledge distillation, from
"Advantage-Guided Distillation for Preference Alignment in Small Language Models", arXiv 2502.17927.
The weights of the terms are 1, which the paper leaves open. The teacher is one after DPO, of any
size, with the student's tokens.

Shapes: U pairs, K = 2 branches; C rows, k tokens kept of the teacher, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from truing.core.logprob import Rows, statistic
from truing.core.objective import Loss, Measurements, objective
from truing.train.supervised.sft import nll

FLOOR = 1e-7


@statistic
def teacher_top_kl(rows: Rows, grad: bool) -> tuple[Tensor, Tensor | None]:
    """KL(teacher || student) over kept tokens and the rest; "teacher_ids", "teacher_logp" [C, k].

    With r the rest, the gradient is that of -sum_o T_o log S_o: each outcome pulls its own tokens
    up in proportion to their share of it, and all tokens down in proportion to S.
    """
    ids_Ck, logp_t_Ck = rows.extras["teacher_ids"], rows.extras["teacher_logp"]
    logp_s_Ck = rows.logp_CV.gather(1, ids_Ck)
    p_t_Ck, p_s_Ck = logp_t_Ck.exp(), logp_s_Ck.exp()
    rest_t_C, rest_s_C = (1 - p_t_Ck.sum(1)).clamp(min=0), (1 - p_s_Ck.sum(1)).clamp(min=0)
    value_C = (p_t_Ck * (logp_t_Ck - logp_s_Ck.clamp(min=math.log(FLOOR)))).sum(1)
    value_C += torch.special.xlogy(rest_t_C, rest_t_C)
    value_C -= rest_t_C * rest_s_C.clamp(min=FLOOR).log()
    if not grad:
        return value_C, None
    pull_Ck = torch.where(p_s_Ck > FLOOR, p_t_Ck, 0.0)
    pull_C = torch.where(rest_s_C > FLOOR, rest_t_C, 0.0)
    whole_C = pull_Ck.sum(1) + pull_C
    slope_CV = rows.logp_CV.exp().mul_((whole_C - pull_C / rest_s_C.clamp(min=FLOOR))[:, None])
    slope_CV.scatter_(1, ids_Ck, p_s_Ck * whole_C[:, None] - pull_Ck)
    return value_C, slope_CV


@objective(
    paper="adpa",
    unit="token",
    needs=("logp", "teacher_top_kl"),
    rows="pair",
    teachers={"teacher": "top"},
    within={"top_k": (1, None), "chosen_weight": (0, None), "rejected_weight": (0, None)},
)
def dckd(
    m: Measurements,
    *,
    top_k: int = 50,
    sft_weight: float = 1.0,
    chosen_weight: float = 1.0,
    rejected_weight: float = 1.0,
) -> Loss:
    """Copy an aligned teacher's distributions on both the chosen and the rejected answer.

    Args:
        top_k: likeliest tokens of the teacher that are told apart.
        sft_weight: of the chosen answer's likelihood.
        chosen_weight: of the divergence on the chosen answer.
        rejected_weight: of the divergence on the rejected answer.
    """
    kl_UKT, mask_UKT, kl_UK = m["teacher_top_kl"], m.mask_UKT, m.mean("teacher_top_kl").detach()
    seen = {"kl_chosen": kl_UK[:, 0], "kl_rejected": kl_UK[:, 1]}
    chosen = Loss(kl_UKT[:, 0], mask_UKT[:, 0], seen)
    rejected = Loss(kl_UKT[:, 1], mask_UKT[:, 1])
    return sft_weight * nll(m) + chosen_weight * chosen + rejected_weight * rejected
