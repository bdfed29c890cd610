"""My method: what it does for a user, in one sentence.

    sum_v T_v (log T_v - log S_v)                                                 arXiv 0000.00000

T and S are the distributions of teacher and student after the same tokens, over the whole
vocabulary; the mean is over the tokens of the answers of the step. With z the student's logits, the
slope is S_v - T_v. Say what every symbol means, which paper it is from (title, arXiv id), and where
this differs from the paper and why.

Shapes: U rows, K = 1 branch, T answer tokens; C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from truing.core.logprob import Rows, statistic
from truing.core.objective import Loss, Measurements, objective


@statistic
def my_method_divergence(rows: Rows, grad: bool) -> tuple[Tensor, Tensor | None]:
    """Divergence and its slope by the student's logits; extras: "teacher_logp" [C, V]."""
    logp_t_CV = rows.extras["teacher_logp"]
    p_t_CV = logp_t_CV.exp()
    value_C = (p_t_CV * (logp_t_CV - rows.logp_CV)).sum(1)
    return value_C, rows.logp_CV.exp() - p_t_CV if grad else None


@objective(
    paper="my-method",
    unit="token",
    needs=("my_method_divergence",),
    rows="example",
    teachers={"teacher": "full"},
)
def my_method(m: Measurements) -> Loss:
    """My method: what it does for a user, in one sentence."""
    need = "my_method_divergence"
    return Loss(m[need], m.mask_UKT, {"divergence": m.mean(need)[:, 0].detach()})
