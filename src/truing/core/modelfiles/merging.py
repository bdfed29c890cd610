"""What mergers have in common: models of one architecture, combined tensor by tensor into one.

A merger says how tensors of one name become one; what is here is the rest: tokens that must agree,
run-time changes, licences, the folder of the result.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from truing.context import current
from truing.core.batch.same_tokenizer import same_tokens, templated
from truing.core.weights import Folded, aligned, replaced
from truing.errors import InputError
from truing.models import Model, run_time_of
from truing.tables import content_hash

# The name of a tensor and what each model has of that name, in order: what the result has.
Combine = Callable[[str, Sequence[Tensor]], Tensor]


def with_base(base: Model, models: Mapping[str, Model], where: str) -> dict[str, Model]:
    """Base and experts by role; an InputError where there is no expert, or one called "base"."""
    if not models or "base" in models:
        raise InputError(
            "needs experts, none of them called 'base'",
            where=where,
            seen=[*models],
            fix="Give one or more as input 'models', each under a name of its own",
        )
    return {"base": base, **models}


def factors(weights: Mapping[str, float] | None, roles: Sequence[str], where: str) -> list[float]:
    """Weights in the order of `roles`, as they are; 1 for each where none are given."""
    given = dict.fromkeys(roles, 1.0) if weights is None else dict(weights)
    if set(given) != set(roles):
        raise InputError(
            "there must be one weight for each model",
            where=f"{where} setting 'weights'",
            seen=sorted(given),
            fix=f"The models are: {', '.join(roles)}",
        )
    return [float(given[role]) for role in roles]


def without_critics(models: Mapping[str, Model], where: str) -> dict[str, Folded]:
    """Weights by role; the critics among them, which only training goes on from, are left out."""
    from truing.core.modelfiles.classifier import CRITIC

    folded = {role: m.folded() for role, m in models.items()}
    for role, one in folded.items():
        critics = [n for n in one.extra if n.startswith(CRITIC)]
        for name in critics:
            del one.extra[name]
        if critics:
            told = f"{where}: the critic of {role!r}, which only training goes on from, is left out"
            print(told, file=sys.stderr)
    return folded


def merged(
    models: Mapping[str, Model],
    combine: Combine,
    *,
    keep: str,
    where: str,
    facts: Sequence[object],
) -> Model:
    """One model of several, named as the first.

    Args:
        models: by role, of one architecture and tokenizer.
        combine: of floating-point tensors; any others are the first model's.
        keep: role whose run-time changes the result carries, where they differ.
        where: the method.
        facts: settings and seeds that decide the result, beside the models.
    Raises:
        InputError: the models do not fit together.
    """
    same_tokens(models, where=where, bare=True)
    kept = run_time_of(models, keep, where=where)
    folded = without_critics(models, where)
    first = next(iter(models))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for i, (name, theta) in enumerate(aligned(folded, where=where), 1):
            current().progress(i, len(folded[first]), "merging tensors")
            each = list(theta.values())
            yield name, combine(name, each) if each[0].is_floating_point() else each[0]

    key = content_hash([where, *facts, [m.weights_key for m in models.values()]], 8)
    folder = current().folder / f"{where.partition('/')[2]}-{key}"
    bare = templated(models)
    bare = bare.with_changes(bare.run_time_changes)  # its critic stays out of the result
    result = replaced(bare, tensors(), folder)
    made = result.with_changes([*result.weight_changes, *kept]).called(models[first].name)
    return made.with_licences([m.licence for m in models.values()])
