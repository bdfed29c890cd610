"""DARE: drop most of what each expert learnt by chance, rescale the rest, then add or elect.

Of each task vector tau_i = theta_i - theta_0 an entry is kept with probability k and divided by it,
so that the expectation stays: tau'_i = m_i tau_i / k with m_i ~ Bernoulli(k). Then

    dare_linear:  theta = theta_0 + lambda sum_i w_i tau'_i
    dare_ties:    theta = theta_0 + lambda sum_i w_i tau'_i [sign(tau'_i) = s],
                  s = sign(sum_i w_i tau'_i), where 0 counts as +

Experts that were tuned from one base change many weights a little and few of them are needed; with
fewer of each, they get less into one another's way. Language Models are Super Mario, arXiv
2311.03099; signs as in TIES-Merging, arXiv 2306.01708 (merge/ties), without its trimming, which
dropping takes the place of. Norms and biases, whatever is not a matrix, are kept whole and summed
without election, as merge/task_arithmetic has them (merge/ties takes their mean); the matrices of a
layer's experts that files keep in one tensor are not. Draws come from the step's seed, one stream
for each model and tensor. Differences and sums are in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from truing.context import current
from truing.core.modelfiles.merging import factors, merged, with_base
from truing.merge.task_arithmetic import added
from truing.merge.ties import elect, is_matrix
from truing.method import method
from truing.models import Model

Rule = Callable[[Sequence[Tensor], Sequence[float]], list[Tensor]]


def dropped(tau: Tensor, density: float, source: torch.Generator) -> Tensor:
    """tau' of one task vector: each entry with probability `density`, divided by it, else 0."""
    kept = torch.rand(tau.shape, generator=source) < density
    return torch.where(kept, tau / density, 0.0)


def all_of(taus: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    """Task vectors as they are."""
    return list(taus)


def elected(taus: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    """Task vectors without the entries that have not the elected sign."""
    sign = elect(taus, weights)
    return [torch.where(tau.sign() == sign, tau, 0.0) for tau in taus]


def _dare(
    name: str,
    base: Model,
    models: dict[str, Model],
    density: float,
    scale: float,
    weights: dict[str, float] | None,
    keep: str,
    rule: Rule,
) -> Model:
    where = f"merge/{name}"
    everyone = with_base(base, models, where)
    w = factors(weights, list(models), where)
    context = current()

    def combine(tensor: str, theta: Sequence[Tensor]) -> Tensor:
        origin, *experts = theta
        taus = [e.float() - origin.float() for e in experts]
        if not is_matrix(origin):
            return added(origin, taus, w, scale)
        for i, role in enumerate(models):
            source = torch.Generator().manual_seed(context.stream(f"dare/{role}/{tensor}"))
            taus[i] = dropped(taus[i], density, source)
        return added(origin, rule(taus, w), w, scale)

    facts = [w, density, scale, list(models), context.stream("dare")]
    return merged(everyone, combine, keep=keep, where=where, facts=facts)


@method(
    paper="three-h-merging",
    needs=("weights",),
    within={"density": "(0, 1]", "scale": "(-inf, inf)"},  # below 0: what experts learnt is taken
)
def dare_linear(
    base: Model,
    models: dict[str, Model],
    *,
    density: float = 0.5,
    scale: float = 1.0,
    weights: dict[str, float] | None = None,
    keep: str = "",
) -> Model:
    """DARE, linear: drop most of what each expert learnt by chance, rescale the rest, add it up.

    Args:
        base: the model that all experts were tuned from; where it has no chat template, the result
            has theirs.
        models: the experts, of the base's architecture and tokenizer.
        density: k, the share of each task vector that is kept.
        scale: lambda, by which the sum of task vectors is multiplied; negative takes away.
        weights: one number for each expert, taken as they are; None is 1 for each.
        keep: role whose run-time changes the result carries, where they differ ("base" too).
    """
    return _dare("dare_linear", base, models, density, scale, weights, keep, all_of)


@method(
    paper="three-h-merging",
    needs=("weights",),
    within={"density": "(0, 1]", "scale": "(-inf, inf)"},  # below 0: what experts learnt is taken
)
def dare_ties(
    base: Model,
    models: dict[str, Model],
    *,
    density: float = 0.5,
    scale: float = 1.0,
    weights: dict[str, float] | None = None,
    keep: str = "",
) -> Model:
    """DARE with elected signs: drop, rescale, then add up what agrees with each weight's sign.

    Args:
        base: the model that all experts were tuned from; where it has no chat template, the result
            has theirs.
        models: the experts, of the base's architecture and tokenizer.
        density: k, the share of each task vector that is kept.
        scale: lambda, by which the sum of task vectors is multiplied; negative takes away.
        weights: one number for each expert, taken as they are; None is 1 for each.
        keep: role whose run-time changes the result carries, where they differ ("base" too).
    """
    return _dare("dare_ties", base, models, density, scale, weights, keep, elected)
