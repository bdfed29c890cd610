"""The function that a training objective is called by: its inputs and settings, what they mean.

An objective declares a pure loss (`core.objective`). What a user calls takes models and tables, the
loss's settings, those of its hook, and those that the engine adds to every objective.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields

from truing.core.held_out import ABOUT, INPUT, Watch
from truing.core.training import HOOKS, TextTraining
from truing.declared import declare
from truing.errors import InputError
from truing.models import Model
from truing.own_checks import BEFORE, refuse_unasked
from truing.signature import argument_docs, class_docs
from truing.tables import Table

if typing.TYPE_CHECKING:
    from truing.core.objective import Objective

Function = Callable[..., object]
F = typing.TypeVar("F", bound=Function)
Mix = dict[str, float | dict[str, object]]
MIX = (
    "other objectives that are added on the same rows, by weight: {sft: 0.5} or {ipo: {weight: "
    "0.2, beta: 0.05}}; the method's own loss weighs 1 unless it is named, too."
)
GLOSSARY = {
    "beta": "strength of the pull towards the reference.",
    "label_smoothing": "share of the labels that may be wrong, 0 to 0.5.",
}


def entry_of(spec: Objective) -> Function:
    """The function that trains with `spec`: its settings, its hook's and the engine's."""

    def train(
        model: Model, data: Table, reference: Model | None = None, **settings: object
    ) -> Model:
        from truing.core.trainer.train_text import train_model

        teachers = {
            role: typing.cast(Model, settings.pop(role))
            for role in spec.teachers
            if role in settings
        }
        held = typing.cast("Table | None", settings.pop(INPUT, None))
        return train_model(spec, model, data, reference, settings, teachers, held)

    kind = inspect.Parameter.KEYWORD_ONLY
    hints = typing.get_type_hints(spec.loss, include_extras=True)
    shared = typing.get_type_hints(TextTraining) | typing.get_type_hints(Watch)
    own = {n: p.replace(annotation=hints.get(n, str)) for n, p in spec.settings.items()}
    if spec.hook:
        own |= {
            n: p.replace(annotation=typing.get_type_hints(HOOKS[spec.hook].__init__)[n])
            for n, p in inspect.signature(HOOKS[spec.hook]).parameters.items()
            if p.kind is kind
        }
    engine = {
        f.name: inspect.Parameter(f.name, kind, default=f.default, annotation=shared[f.name])
        for f in (*fields(TextTraining), *fields(Watch))
    }
    engine["mix"] = inspect.Parameter("mix", kind, default=None, annotation=Mix | None)
    if clash := set(own) & set(engine):
        raise InputError(
            f"setting {sorted(clash)[0]!r} is the engine's",
            where=spec.name,
            fix="Give the parameter another name",
        )
    nouns = list(inspect.signature(train, eval_str=True).parameters.values())[:-1]
    if not spec.takes_reference:
        nouns = nouns[:2]
    nouns[2:2] = [inspect.Parameter(r, kind, annotation=Model) for r in spec.teachers]
    nouns.append(inspect.Parameter(INPUT, kind, default=None, annotation=Table | None))
    said = argument_docs(inspect.getdoc(spec.loss) or "")
    docs = {n: d for n, d in GLOSSARY.items() if n in own and n not in said}
    docs |= class_docs(HOOKS[spec.hook]) if spec.hook else {}
    docs |= class_docs(TextTraining) | class_docs(Watch) | {"mix": MIX, INPUT: ABOUT}
    return finished(train, spec.loss, spec.name, [*nouns, *own.values(), *engine.values()], docs)


def finished(
    train: Function,
    written: Function,
    name: str,
    parameters: Iterable[inspect.Parameter],
    docs: Mapping[str, str],
) -> Function:
    """`train` with the signature and docstring that a method is read from.

    Args:
        train: takes settings as keywords; it is changed.
        written: what its author wrote, in whose module it is to stand.
        name: of the method.
        parameters: inputs and settings.
        docs: what they mean.
    """
    takes = sorted(parameters, key=lambda p: p.kind)
    train.__name__ = train.__qualname__ = name
    train.__module__ = written.__module__
    lines = [f"    {n}: {d}" for n, d in docs.items()]
    train.__doc__ = "\n".join(["Train with this method.", "", "Args:", *lines])
    train.__annotations__ = {p.name: p.annotation for p in takes} | {"return": Model}
    train.__dict__["__signature__"] = inspect.Signature(takes, return_annotation=Model)
    return train


def registered(
    function: F,
    kind: str,
    spec: object,
    entry: Function,
    check: Function,
    facts: Mapping[str, object],
    told: Mapping[str, object],
) -> F:
    """`function`, now the method `train/<name>` in this process; it stays callable as it is.

    Args:
        kind: name of its decorator, under which `spec` is found.
        entry: what is called to train.
        check: what is asked of settings and tables before.
        facts: arguments of the decorator; told: further ones, which the catalogue alone reads.
    """
    said = {**facts, "needs": ("weights",)}
    if not hasattr(function, "__truing_entry__"):  # it may be registered again
        refuse_unasked(function, kind)
    function.__dict__.update(
        {"__truing__": said, f"__{kind}__": spec, "__truing_entry__": entry, BEFORE: check}
    )
    declare(function, kind, {**said, **told}, verb="train")
    return function
