"""TIES merging: trim small changes, elect a sign for each weight, average what agrees with it.

Task vectors tau_i = theta_i - theta_0 of experts tuned from one base theta_0, for each tensor:
1. trim: keep the int(k n) entries of tau_i that are largest in size, set the others to 0;
2. elect: s = sign(sum_i w_i tau_i), where 0 counts as +;
3. disjoint mean: m = sum_i w_i tau_i [sign(tau_i) = s] / sum_i w_i [sign(tau_i) = s], 0 where none
   agrees;
and theta = theta_0 + lambda m. Norms and biases, whatever is not a matrix, get the plain weighted
mean of tau. TIES-Merging, arXiv 2306.01708 (k = 0.2, lambda = 1). Subtractions are in float32.

Difference: the paper trims over the whole model, this as its libraries do tensor by tensor, so that
no more than one tensor of each model is in memory. Where files keep the matrices of a layer's
experts in one tensor, that is trimmed as one, as mergekit does it; files that keep them one by one
have each trimmed for itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from truing.core.modelfiles.merging import factors, merged, with_base
from truing.errors import InputError
from truing.merge.linear import shares
from truing.method import method
from truing.models import Model

SHORT = 16  # a side of a convolution's kernel is shorter, those of experts' matrices are not


def is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor is a matrix, or several in one: those of a layer's experts, [E, O, I]."""
    return tensor.dim() == 2 or (tensor.dim() == 3 and min(tensor.shape[1:]) >= SHORT)


def trim(tau: Tensor, density: float) -> Tensor:
    """`tau` with all but its int(density n) largest entries set to 0; first places win ties."""
    keep = int(density * tau.numel())
    if keep >= tau.numel():
        return tau
    if keep == 0:
        return torch.zeros_like(tau)
    size_N = tau.abs().flatten()
    cut = size_N.kthvalue(size_N.numel() - keep + 1).values
    mask_N = size_N > cut
    ties = (size_N == cut).nonzero()[: keep - int(mask_N.sum()), 0]
    mask_N[ties] = True
    return tau * mask_N.view_as(tau)


def elect(taus: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The sign, +1 or -1, that the weighted sum has at each place; 0 counts as +."""
    total = torch.zeros_like(taus[0])
    for w, tau in zip(weights, taus, strict=True):
        total += w * tau
    return torch.where(total >= 0, 1.0, -1.0)


def disjoint_mean(taus: Sequence[Tensor], weights: Sequence[float], sign: Tensor) -> Tensor:
    """Weighted mean over the experts whose entry has the elected sign; 0 where none has."""
    total, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for w, tau in zip(weights, taus, strict=True):
        agrees = tau.sign() == sign
        total += w * tau * agrees
        divisor += w * agrees
    return total / torch.where(divisor == 0, 1.0, divisor)


def merge(
    base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], density: float, scale: float
) -> Tensor:
    """theta_0 + lambda m for one tensor, in the dtype that the base is given in."""
    if not base.is_floating_point():
        return base
    taus = [e.float() - base.float() for e in experts]
    if is_matrix(base):
        taus = [trim(tau, density) for tau in taus]
        mean = disjoint_mean(taus, weights, elect(taus, weights))
    else:
        parts = [w * tau for w, tau in zip(weights, taus, strict=True)]
        mean = torch.stack(parts).sum(0) / math.fsum(weights)
    return (base.float() + scale * mean).to(base.dtype)


@method(
    paper="three-h-merging",
    needs=("weights",),
    within={
        "density": "(0, 1]",
        "scale": "(-inf, inf)",
    },  # below 0 it takes away what experts learnt
)
def ties(
    base: Model,
    models: dict[str, Model],
    *,
    density: float = 0.2,
    scale: float = 1.0,
    weights: dict[str, float] | None = None,
    keep: str = "",
) -> Model:
    """TIES merging: trim small changes, elect a sign for each weight, average what agrees with it.

    Args:
        base: the model that all experts were tuned from; where it has no chat template, the result
            has theirs.
        models: the experts, of the base's architecture and tokenizer.
        density: share k of each task vector that is kept, in (0, 1].
        scale: lambda, by which the merged task vector is multiplied.
        weights: one positive number for each expert; None weighs all alike.
        keep: role whose run-time changes the result carries, where they differ ("base" too).
    """
    where = "merge/ties"
    everyone = with_base(base, models, where)
    if min(factors(weights, list(models), where)) <= 0:  # as given: -1 and -1 are halves of -2
        raise InputError(
            "weights must be positive", where=f"{where} setting 'weights'", seen=weights
        )
    w = shares(weights, list(models), where)

    def combine(_: str, theta: Sequence[Tensor]) -> Tensor:
        origin, *experts = theta
        return merge(origin, experts, w, density, scale)

    return merged(everyone, combine, keep=keep, where=where, facts=[w, density, scale])
