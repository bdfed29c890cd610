"""Weighted average of models' weights: model soups and rewarded soups.

theta = sum_i w_i theta_i with sum_i w_i = 1 (weights are divided by their sum). Equal weights give
the plain average (Model soups, arXiv 2203.05482); preference weights over experts tuned for single
aims give a rewarded soup (arXiv 2306.04488). A negative weight subtracts: weights 1, 1, -1 over a
fine-tuned, an aligned and its un-aligned model re-align the first (RESTA, arXiv 2402.11746).

Computed as theta_1 + sum_i w_i (theta_i - theta_1) in float32, which is the same sum and returns
equal inputs bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from truing.core.modelfiles.merging import factors, merged
from truing.errors import InputError
from truing.method import method
from truing.models import Model


def average(theta: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i theta_i of tensors of one shape, in the first one's dtype; weights sum to 1."""
    first = theta[0]
    if not first.is_floating_point():
        return first
    total = torch.zeros_like(first, dtype=torch.float32)
    for w, other in zip(weights[1:], theta[1:], strict=True):
        total += w * (other.float() - first.float())
    return (first.float() + total).to(first.dtype)


def shares(weights: Mapping[str, float] | None, roles: Sequence[str], where: str) -> list[float]:
    """Weights in the order of `roles`, divided by their sum; equal ones for None."""
    given = factors(weights, roles, where)
    total = sum(given)
    if abs(total) < 1e-6:
        raise InputError(
            "the weights sum to zero", where=f"{where} setting 'weights'", seen=weights
        )
    return [w / total for w in given]


@method(paper="three-h-merging", needs=("weights",))
def linear(
    models: dict[str, Model], *, weights: dict[str, float] | None = None, keep: str = ""
) -> Model:
    """Weighted average of models' weights: model soups and rewarded soups.

    Args:
        models: of one architecture and tokenizer; the first gives the name. What was
            trained is averaged and kept in float32, all else in its files' type.
        weights: one number for each role; divided by their sum. None weighs all alike.
        keep: role whose run-time changes the result carries, where they differ.
    """
    where = "merge/linear"
    if not models:
        raise InputError("needs at least one model", where=where)
    w = shares(weights, list(models), where)
    return merged(models, lambda _, theta: average(theta, w), keep=keep, where=where, facts=[w])
