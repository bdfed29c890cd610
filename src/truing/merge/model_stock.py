"""Model Stock: average experts and pull the average towards their base, by how far they agree.

Task vectors tau_i = theta_i - theta_0 of k experts tuned from one base theta_0, for each tensor:

    c     = mean cosine of the pairs tau_i, tau_j (i < j)
    t     = k c / (1 + (k - 1) c)
    theta = theta_0 + t mean_i tau_i

Experts that learnt the same (c = 1) give their average, unrelated ones (c = 0) the base: what they
share lies near the centre of the experts' weights, what only one of them has is noise around it.
Nothing is to be tuned. Products and sums are taken in float32.
Sources: Model Stock, arXiv 2403.19522; it merges the domains' best checkpoints in the "Baichuan
Alignment Technical Report", arXiv 2410.14940. Differences: a negative c counts as 0, since t would
lead away from all experts; an expert that did not change a tensor is left out of its mean and of k;
one expert alone comes back as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from truing.core.modelfiles.merging import merged, with_base
from truing.method import method
from truing.models import Model


def mean_cosine(taus: Sequence[Tensor]) -> float:
    """Mean cosine over all pairs, none of them zero; 1 for a single vector."""
    if len(taus) == 1:
        return 1.0
    tau_KN = torch.stack([tau.flatten().float() for tau in taus])
    unit_KN = tau_KN / tau_KN.norm(dim=1, keepdim=True)
    gram_KK = unit_KN @ unit_KN.T
    k = len(taus)
    return float((gram_KK.sum() - gram_KK.diagonal().sum()) / (k * (k - 1)))


def ratio(cosine: float, k: int) -> float:
    """t, the share of the experts' average in the result."""
    c = min(max(cosine, 0.0), 1.0)
    return k * c / (1 + (k - 1) * c)


def merge(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """theta_0 + t mean_i tau_i for one tensor, in the dtype that the base is given in."""
    if not base.is_floating_point():
        return base
    taus = [tau for e in experts if bool((tau := e.float() - base.float()).any())]
    if not taus:
        return base
    t = ratio(mean_cosine(taus), len(taus))
    return (base.float() + t * torch.stack(taus).mean(0)).to(base.dtype)


@method(paper="baichuan-alignment", needs=("weights",))
def model_stock(base: Model, models: dict[str, Model], *, keep: str = "") -> Model:
    """Model Stock: average experts and pull the average towards their base, by how far they agree.

    Args:
        base: the model that all experts were tuned from; where it has no chat template, the result
            has theirs.
        models: the experts, of the base's architecture and tokenizer.
        keep: role whose run-time changes the result carries, where they differ ("base" too).
    """
    where = "merge/model_stock"
    everyone = with_base(base, models, where)

    def combine(_: str, theta: Sequence[Tensor]) -> Tensor:
        origin, *experts = theta
        return merge(origin, experts)

    return merged(everyone, combine, keep=keep, where=where, facts=[])
