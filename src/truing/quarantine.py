"""Quarantine: models that an attack made, and what was made of them since.

An attack tests a model's owner's own model, and leaves one that does what it should not. The mark
is part of the model's record (`Model.quarantine`: which attacks), lies beside it wherever it is
saved or exported, and goes on to whatever is trained, merged, steered or decoded from it or with
it. A method of the verb recover takes it off the model that it repairs, where that comes back with
other weights. Until then the model can be measured and worked with, but is neither served nor
exported unless that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from truing.errors import InputError
from truing.models import Model, held, named

if TYPE_CHECKING:
    from truing.method import Method

REPAIRED = "model"  # the input of the verb recover that is healed; all others are trusted


def marked(
    made: object, method: Method, inputs: Mapping[str, object], settings: Mapping[str, object]
) -> object:
    """What a method made; a model with the marks of all models that it was made from.

    Args:
        made: any noun; what is no model comes back as it is.
        inputs: the method's, by name; those that take several, by role.
        settings: whose keys of held models count, too.
    """
    if not isinstance(made, Model):
        return made
    broken = inputs.get(REPAIRED) if method.verb == "recover" else None
    repairs = isinstance(broken, Model) and made.weights_key != broken.weights_key
    given = [v for n, v in inputs.items() if not (repairs and n == REPAIRED)]
    nested = (v.values() if isinstance(v, Mapping) else [v] for v in given)
    nouns = [n for some in nested for n in cast("Iterable[object]", some)]
    nouns += [held(key) for key in named(settings)]
    marks = [] if repairs else marks_of(made)
    marks += [mark for n in nouns if isinstance(n, Model) for mark in marks_of(n)]
    marks += [method.id] if method.verb == "attack" else []
    mark = ", ".join(dict.fromkeys(marks))
    return made if mark == made.quarantine else replace(made, quarantine=mark)


def marks_of(model: Model) -> list[str]:
    """The attacks that made a model, or what it was made from."""
    return model.quarantine.split(", ") if model.quarantine else []


def refuse(model: Model, what: str, *, asked: bool, fix: str) -> None:
    """Raise InputError for a model in quarantine, unless it was `asked` for.

    Args:
        what: is not done with it, such as "served".
        fix: how to ask for it.
    """
    if model.quarantine and not asked:
        raise InputError(
            f"the model is in quarantine, by {model.quarantine}, and is not {what}",
            where=model.name,
            fix=f"Recover it first (truing list --verb recover); to study it as it is, {fix}",
        )
