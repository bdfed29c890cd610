"""What a function must be to be an objective's loss: said when it is declared, or before it trains.

A loss of a user's own is called by the engine with tensors that nobody has written down; what it
raises or returns wrongly is told with its name, in place of an error from inside of the engine.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch

from truing.errors import InputError, unknown
from truing.kinds import KINDS

if TYPE_CHECKING:
    from truing.core.objective import Loss

T = TypeVar("T")
RETURN = "Return Loss(value_U) of truing.core.objective, with one value for each unit"
UPDATE = "Return Update(tensors, loss), or weighed(advantage_UK, loss), of truing.core.online"
DIMENSIONS = (
    "Sum or average over answers and tokens alone, as m.seq() and m.mean() do, and leave the first "
    "dimension as it is"
)


class NoLoss(InputError):
    """The function returns something else than it must."""


def returned(found: object, kind: type[T], where: str, fix: str) -> T:
    """What a function returned, which must be of this kind."""
    if isinstance(found, kind):
        return found
    noun = f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"
    raise NoLoss(f"must return {noun}", where=where, seen=type(found).__name__, fix=fix)


def check_declared(name: str, loss: Callable[..., object], rows: str) -> None:
    """Raise an InputError for rows of no kind, and settings that nobody could give."""
    if rows not in KINDS:
        raise unknown("kind of rows", rows, KINDS, where=name)
    found = list(inspect.signature(loss).parameters.values())
    for parameter in found[1:]:
        plain = parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        if plain and parameter.name != "state":
            raise InputError(
                f"parameter {parameter.name!r} is no setting: those stand behind a *",
                where=name,
                fix=f"Write def {loss.__name__}({found[0].name}, *, {parameter.name}=...)",
            )


def check_needs(name: str, needs: Iterable[str], known: Iterable[str]) -> None:
    """Raise an InputError for what cannot be measured."""
    known = set(known)
    for need in needs:
        if need not in known:
            raise unknown("measurement", need, known, where=f"{name} needs")


def check_made(name: str, found: Loss, units: int) -> None:
    """Raise an InputError for a loss that cannot train.

    Args:
        found: what the function makes of measurements that carry gradients.
        units: how many it was shown.
    """
    for one in _terms(found):
        value, weight = one.per_unit, one.weight
        if not isinstance(value, torch.Tensor) or not value.dim() or len(value) != units:
            raise InputError(
                "the loss must have one value for each unit, or one for each of its answers or "
                "tokens",
                where=name,
                seen=tuple(value.shape) if isinstance(value, torch.Tensor) else value,
                fix=f"{DIMENSIONS}: it was shown {units} units",
            )
        if weight is not None and (
            not isinstance(weight, torch.Tensor) or weight.shape != value.shape
        ):
            raise InputError(
                "the weight of a loss must be of its values' shape",
                where=name,
                seen=tuple(weight.shape) if isinstance(weight, torch.Tensor) else weight,
                fix=f"Expand it to {tuple(value.shape)}, or leave it out",
            )
    if not any(one.per_unit.requires_grad for one in _terms(found)):
        raise InputError(
            "the loss does not depend on what is measured of the model, so that nothing is learnt",
            where=name,
            fix="Leave out detach(), item() and torch.no_grad(), and use m['logp'] or another need",
        )


def _terms(loss: Loss) -> Iterator[Loss]:
    yield loss
    for other in loss.others:
        yield from _terms(other)
