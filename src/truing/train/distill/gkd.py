"""Generalised knowledge distillation: between forward and reverse KL by a Jensen-Shannon mixture.

    M = beta T + (1 - beta) S
    JSD_beta = beta KL(T || M) + (1 - beta) KL(S || M)          0 < beta < 1
    beta = 0 is KL(T || S), beta = 1 is KL(S || T)              arXiv 2306.13649

T and S are the distributions of teacher and student after the same tokens. The mean is over the
tokens of the step. The limits are those of the common libraries: JSD_beta itself goes to 0 there.
With s_v = log S_v - log M_v the gradient with respect to the student's logits is

    d JSD / dz_v = (1 - beta) S_v (s_v - sum_u S_u s_u)

`gkd` trains on the answers of the rows, `gkd_on_policy` on answers that the student draws anew at
each step. The paper tosses a coin between the two with probability lambda for each batch: here
gkd_on_policy's `on_policy` weighs the student's own answers against the row's in every step, which
has the same expected gradient when both are of the same length, and less noise. Answers are drawn
at temperature 1, those of the student as it is; the libraries' 0.9 is `temperature=0.9`.

Shapes: U rows, K = 1 branch, or the row's and then the student's; C rows, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from truing.core.logprob import Rows, statistic
from truing.core.objective import Loss, Measurements, objective
from truing.errors import InputError
from truing.train.distill.forward_kl import divergence, teacher_forward_kl, teacher_reverse_kl


@statistic
def teacher_jsd(rows: Rows, grad: bool) -> tuple[Tensor, Tensor | None]:
    """JSD_beta of teacher and student; extras: "teacher_logp" [C, V], "beta"."""
    beta = float(rows.extras["beta"])
    if not 0 < beta < 1:
        return (teacher_reverse_kl if beta == 1 else teacher_forward_kl)(rows, grad)
    logp_t_CV, logp_CV = rows.extras["teacher_logp"], rows.logp_CV
    logp_m_CV = torch.logaddexp(logp_t_CV + math.log(beta), logp_CV + math.log1p(-beta))
    p_CV, s_CV = logp_CV.exp(), logp_CV - logp_m_CV
    kl_s_C = (p_CV * s_CV).sum(1)
    kl_t_C = (logp_t_CV.exp() * (logp_t_CV - logp_m_CV)).sum(1)
    value_C = beta * kl_t_C + (1 - beta) * kl_s_C
    return value_C, p_CV.mul_(s_CV - kl_s_C[:, None]).mul_(1 - beta) if grad else None


def _checked(beta: float) -> None:
    if not 0 <= beta <= 1:
        raise InputError("setting 'beta' must be in [0, 1]", seen=beta)


@objective(
    paper="preference-losses",
    unit="token",
    needs=("teacher_jsd",),
    rows="example",
    teachers={"teacher": "full"},
)
def gkd(m: Measurements, *, beta: float = 0.5) -> Loss:
    """Generalised knowledge distillation: between forward and reverse KL.

    Args:
        beta: 0 is forward KL, 1 reverse KL.
    """
    _checked(beta)
    return divergence(m, "teacher_jsd", "jsd")


@objective(
    paper="preference-losses",
    unit="token",
    needs=("teacher_jsd",),
    rows="example",
    teachers={"teacher": "full"},
    hook="fresh_samples",
)
def gkd_on_policy(m: Measurements, *, beta: float = 0.5, on_policy: float = 0.5) -> Loss:
    """Generalised knowledge distillation, partly on answers that the student draws itself.

    Args:
        beta: 0 is forward KL, 1 reverse KL.
        on_policy: lambda, the share of the student's own answers.
    """
    _checked(beta)
    if not 0 <= on_policy <= 1:
        raise InputError("setting 'on_policy' must be in [0, 1]", seen=on_policy)
    given = divergence(m.branches(0), "teacher_jsd", "jsd")
    own = divergence(m.branches(*range(1, m.mask_UKT.shape[1])), "teacher_jsd", "jsd_own")
    return (1 - on_policy) * given + on_policy * own
