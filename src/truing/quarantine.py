"""Quarantine: models that an attack made, and what was made of them since.

An attack tests a model's owner's own model, and leaves one that does what it should not. The mark
is part of the model's record (`Model.quarantine`: which attacks), lies beside it wherever it is
saved or exported, and goes on to whatever is trained, merged, steered or decoded from it or with
it. A method of the verb recover takes it off the model that it repairs, where that comes back with
other weights. Until then the model can be measured and worked with, but is neither served nor
exported unless that is asked for. A plan that would serve it is refused before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from truing.errors import InputError
from truing.models import Model, held, named

if TYPE_CHECKING:
    from truing.method import Method
    from truing.plan import Checked
    from truing.store import Noun

ASK = "say --quarantined (quarantined: true)"  # how a step asks for it
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
    found: list[tuple[str, object]] = [] if repairs else [("", made)]
    for name, value in inputs.items():
        nested = cast("Mapping[str, object]", value) if isinstance(value, Mapping) else {"": value}
        found += [(name, noun) for noun in nested.values()]
    found += [("", held(key)) for key in named(settings)]
    given = [(name, noun.quarantine) for name, noun in found if isinstance(noun, Model)]
    mark = _carried(method, given, repairs=repairs)
    return made if mark == made.quarantine else replace(made, quarantine=mark)


def _carried(method: Method, given: Iterable[tuple[str, str]], *, repairs: bool) -> str:
    """The mark of what a method makes, from those of what it is `given`, each with its input."""
    marks = [m for name, mark in given if not (repairs and name == REPAIRED) for m in _split(mark)]
    marks += [method.id] if method.verb == "attack" else []
    return ", ".join(dict.fromkeys(marks))


def _split(mark: str) -> list[str]:
    return mark.split(", ") if mark else []


def refuse(model: Model, what: str, *, asked: bool, fix: str) -> None:
    """Raise InputError for a model in quarantine, unless it was `asked` for.

    Args:
        what: is not done with it, such as "served".
        fix: how to ask for it.
    """
    if not asked:
        _refuse(model.quarantine, what, model.name, fix)


def _refuse(mark: str, what: str, where: str, fix: str) -> None:
    if mark:
        raise InputError(
            f"the model is in quarantine, by {mark}, and is not {what}",
            where=where,
            fix=f"Recover it first (truing list --verb recover); to study it as it is, {fix}",
        )


def check_served(
    checked: Sequence[Checked], opened: Mapping[tuple[str, str], Noun] | None = None
) -> None:
    """Raise before anything runs when a step would serve a model that is in quarantine then.

    A step of the verb recover is taken to repair. Where it does not, `refuse` has the last word.

    Args:
        checked: the steps in order.
        opened: models by noun and text, whose own marks count, too; None where none is opened yet.
    """
    made: dict[str, str] = {}
    for one in checked:
        given: list[tuple[str, str]] = []
        for name, noun, source in one.given():
            model = None if source.is_step else (opened or {}).get((noun, source.text))
            own = model.quarantine if isinstance(model, Model) else ""
            given.append((name, made.get(source.text, "") if source.is_step else own))
        if one.method.verb == "serve" and not one.settings.get("quarantined"):
            for name, mark in given:
                _refuse(mark, "served", one.step.at(name), ASK)
        if one.method.returns == "Model":
            made[one.name] = _carried(one.method, given, repairs=one.method.verb == "recover")
