"""The function that a training objective is called by: its inputs and settings, what they mean.

An objective declares a pure loss (`core.objective`). What a user calls takes models and tables, the
loss's settings, those of its hook, and those that the engine adds to every objective.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import fields

from truing.core.held_out import ABOUT, INPUT, Watch
from truing.core.training import HOOKS, TextTraining
from truing.errors import InputError
from truing.models import Model
from truing.signature import argument_docs
from truing.tables import Table

if typing.TYPE_CHECKING:
    from truing.core.objective import Objective

Function = Callable[..., object]
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
    parameters = sorted([*nouns, *own.values(), *engine.values()], key=lambda p: p.kind)
    train.__name__ = train.__qualname__ = spec.name
    train.__module__ = spec.loss.__module__
    kinds = reversed(HOOKS[spec.hook].__mro__) if spec.hook else ()
    hook_docs = {n: d for kind in kinds for n, d in argument_docs(kind.__doc__ or "").items()}
    said = argument_docs(inspect.getdoc(spec.loss) or "")
    docs = {n: d for n, d in GLOSSARY.items() if n in own and n not in said} | hook_docs
    docs |= argument_docs(TextTraining.__doc__ or "") | argument_docs(Watch.__doc__ or "")
    docs |= {"mix": MIX, INPUT: ABOUT}
    lines = [f"    {n}: {d}" for n, d in docs.items()]
    train.__doc__ = "\n".join(["Train with this objective.", "", "Args:", *lines])
    train.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": Model}
    train.__dict__["__signature__"] = inspect.Signature(parameters, return_annotation=Model)
    return train
