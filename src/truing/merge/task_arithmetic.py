"""Task arithmetic: add to a base what its fine-tuned models learnt, or take it away.

With task vectors tau_i = theta_i - theta_0 of models tuned from one base theta_0,

    theta = theta_0 + lambda sum_i w_i tau_i

Experts' weights of 1 add up what they learnt; a negative one, or a negative lambda, makes the base
forget it. Editing Models with Task Arithmetic, arXiv 2212.04089, where lambda is searched for on
held-out rows. All tensors are treated alike. Differences and sums are in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from truing.core.modelfiles.merging import factors, merged, with_base
from truing.method import method
from truing.models import Model


def added(base: Tensor, taus: Sequence[Tensor], weights: Sequence[float], scale: float) -> Tensor:
    """theta_0 + lambda sum_i w_i tau_i for one tensor, in the base's dtype."""
    total = torch.zeros_like(base, dtype=torch.float32)
    for w, tau in zip(weights, taus, strict=True):
        total += w * tau
    return (base.float() + scale * total).to(base.dtype)


@method(
    paper="three-h-merging",
    needs=("weights",),
    within={"scale": "(-inf, inf)"},  # below 0 it takes away what experts learnt
)
def task_arithmetic(
    base: Model,
    models: dict[str, Model],
    *,
    scale: float = 1.0,
    weights: dict[str, float] | None = None,
    keep: str = "",
) -> Model:
    """Task arithmetic: add to a base what its fine-tuned models learnt, or take it away.

    Args:
        base: the model that all experts were tuned from; where it has no chat template, the result
            has theirs.
        models: the experts, of the base's architecture and tokenizer.
        scale: lambda, by which the sum of task vectors is multiplied; negative takes away.
        weights: one number for each expert, taken as they are; None is 1 for each.
        keep: role whose run-time changes the result carries, where they differ ("base" too).
    """
    where = "merge/task_arithmetic"
    everyone = with_base(base, models, where)
    w = factors(weights, list(models), where)

    def combine(_: str, theta: Sequence[Tensor]) -> Tensor:
        origin, *experts = theta
        return added(origin, [e.float() - origin.float() for e in experts], w, scale)

    return merged(everyone, combine, keep=keep, where=where, facts=[w, scale])
