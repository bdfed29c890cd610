"""My method: what it does for a user, in one sentence.

    theta = theta_1 + mean_i (theta_i - theta_1)

Say what every symbol means, which paper it is from (title, arXiv id), and where this differs from
the paper and why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from truing.context import current
from truing.core.batch.same_tokenizer import same_tokens
from truing.core.weights import aligned, replaced
from truing.errors import InputError
from truing.method import method
from truing.models import Model, run_time_of
from truing.tables import content_hash


def combine(theta: Sequence[Tensor]) -> Tensor:
    """One tensor from tensors of one shape; equal inputs must come back bit by bit."""
    first = theta[0].float()
    total = torch.zeros_like(first)
    for other in theta:
        total += other.float() - first
    return (first + total / len(theta)).to(theta[0].dtype)


@method(paper="my-method", needs=("weights",))
def my_method(models: dict[str, Model], *, keep: str = "") -> Model:
    """My method: what it does for a user, in one sentence.

    Args:
        models: of one architecture and tokenizer; the first gives name and dtype.
        keep: role whose run-time changes the result carries, where they differ.
    """
    where = "merge/my_method"
    if not models:
        raise InputError("needs at least one model", where=where)
    same_tokens(models, where=where)
    kept = run_time_of(models, keep, where=where)
    folded = {role: m.folded() for role, m in models.items()}
    first = next(iter(models))

    def merged() -> Iterator[tuple[str, Tensor]]:
        for i, (name, theta) in enumerate(aligned(folded, where=where), 1):
            current().progress(i, len(folded[first]), "merging tensors")
            yield name, combine(list(theta.values()))

    key = content_hash([where, [m.weights_key for m in models.values()]], 8)
    result = replaced(models[first], merged(), current().folder / f"my_method-{key}")
    licences = [m.licence for m in models.values()]
    return result.with_changes([*result.weight_changes, *kept]).with_licences(licences)
