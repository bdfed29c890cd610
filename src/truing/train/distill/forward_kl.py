"""Distil a teacher's whole next-token distributions into a student, on given answers.

    forward_kl   KL(T || S) = sum_v T_v (log T_v - log S_v)    covers all that the teacher might say
    reverse_kl   KL(S || T) = sum_v S_v (log S_v - log T_v)    keeps to what the teacher would say
    on_policy_kd reverse_kl on answers that the student draws anew at each step   arXiv 2306.08543

T and S are the distributions of teacher and student after the same tokens, over the whole
vocabulary; the mean is over the tokens of the answers of the step. Sums over the vocabulary and
their gradients are formed a few rows at a time:

    d KL(T || S) / dz_v = S_v - T_v
    d KL(S || T) / dz_v = S_v (log S_v - log T_v - KL(S || T))

Sources: knowledge distillation arXiv 1503.02531; on-policy arXiv 2306.13649. The teacher has the
student's tokens and may be of another size. The gradient of on_policy_kd is that of the
divergence at the drawn answers; that the student chose them carries none, as in GKD.

Shapes: U rows, K = 1 branch (on_policy_kd: one for each sample); C rows, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from truing.core.logprob import Rows, statistic
from truing.core.objective import Loss, Measurements, objective


@statistic
def teacher_forward_kl(rows: Rows, grad: bool) -> tuple[Tensor, Tensor | None]:
    """KL(teacher || student); extras: "teacher_logp" [C, V]."""
    logp_t_CV = rows.extras["teacher_logp"]
    p_t_CV = logp_t_CV.exp()
    value_C = (p_t_CV * (logp_t_CV - rows.logp_CV)).sum(1)
    return value_C, rows.logp_CV.exp().sub_(p_t_CV) if grad else None


@statistic
def teacher_reverse_kl(rows: Rows, grad: bool) -> tuple[Tensor, Tensor | None]:
    """KL(student || teacher); extras: "teacher_logp" [C, V]."""
    p_CV = rows.logp_CV.exp()
    ratio_CV = rows.logp_CV - rows.extras["teacher_logp"]
    value_C = (p_CV * ratio_CV).sum(1)
    return value_C, p_CV.mul_(ratio_CV - value_C[:, None]) if grad else None


def divergence(m: Measurements, need: str, shown: str = "kl") -> Loss:
    """Mean over the step's tokens of the measured divergence `need`, recorded as `shown`."""
    return Loss(m[need], m.mask_UKT, {shown: m.mean(need).detach()})


@objective(
    paper="preference-losses",
    unit="token",
    needs=("teacher_forward_kl",),
    rows="example",
    teachers={"teacher": "full"},
)
def forward_kl(m: Measurements) -> Loss:
    """Distil a teacher's whole next-token distributions into a student, on given answers."""
    return divergence(m, "teacher_forward_kl")


@objective(
    paper="preference-losses",
    unit="token",
    needs=("teacher_reverse_kl",),
    rows="example",
    teachers={"teacher": "full"},
)
def reverse_kl(m: Measurements) -> Loss:
    """Distil a teacher by reverse KL: the student keeps to what the teacher would say."""
    return divergence(m, "teacher_reverse_kl")


@objective(
    paper="preference-losses",
    unit="token",
    needs=("teacher_reverse_kl",),
    rows="prompt",
    teachers={"teacher": "full"},
    hook="fresh_samples",
)
def on_policy_kd(m: Measurements) -> Loss:
    """Distil a teacher on answers that the student draws itself, anew at each step."""
    return reverse_kl(m)
