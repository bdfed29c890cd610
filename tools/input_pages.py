"""What a method's page says of its inputs: nouns, kinds of rows, and the columns that it reads."""

from __future__ import annotations

import inspect
from math import inf
from typing import cast

from pagetext import escape, table

from truing.core import held_out, online_entry, online_mix
from truing.core.objective import Objective, objective_of
from truing.core.online import Online, online_of
from truing.core.row_kinds import is_taken, takes_texts
from truing.method import Kinds, Method
from truing.signature import Input, argument_docs
from truing.tables import KINDS

HELD = held_out.INPUT
# Inputs that all methods of a sort have.
SHARED = {
    "objective": {HELD: held_out.ABOUT},
    "online": {online_mix.INPUT: online_mix.ROWS, HELD: online_entry.WATCHED[HELD]},
}


def _spec(method: Method) -> Objective | Online | None:
    """What a training method declares; None for one that is a function of its inputs."""
    if method.entry.kind == "objective":
        return objective_of(method.declared)
    return online_of(method.declared) if method.entry.kind == "online" else None


def kinds_of(method: Method) -> Kinds:
    """Kinds of rows that its tables may be of, by input."""
    spec = _spec(method)
    if spec is not None:
        return {"data": (spec.rows,)}
    facts = cast("dict[str, Kinds]", getattr(method.declared, "__truing__", {}))
    return facts.get("rows", {})


def _either(names: list[str]) -> str:
    *first, last = (f"`{n}`" for n in names)
    return f"{', '.join(first)} or {last}" if first else last


def _converted(spec: Objective | Online) -> str:
    """The kinds that its rows are made from, or that it reads as well."""
    texts = isinstance(spec, Objective) and takes_texts(spec)
    others = [one for one in KINDS if one != spec.rows and is_taken(one, spec.rows, texts)]
    return f", made from {_either(others)} too" if others else ""


def _columns(spec: Objective | Online) -> list[str]:
    """Columns that it reads besides those of its kind, with what stands for a missing one."""
    own = {column for choice in KINDS[spec.rows] for column in choice}
    if isinstance(spec, Online):
        if not spec.given or spec.given in own:
            return []
        when = ", where `ptx` is above 0" if "ptx" in spec.settings else ""
        return [f"`{spec.given}` (text{when})"]
    numbers = [
        f"`{name}` (number{_missing(default)})"
        for name, default in spec.columns.items()
        if name not in own
    ]
    texts = [
        f"`{name}` (text{'' if other is None else f'; `{other}` where missing'})"
        for name, other in spec.texts.items()
    ]
    return numbers + texts


def _missing(default: float | None) -> str:
    """What stands for a number that a row does not give."""
    if default is None:
        return ""
    return f"; {default:g} where missing" if default > -inf else "; none where missing"


def _holds(method: Method, given: Input) -> str:
    """What an input holds, as far as the code tells."""
    spec, kinds = _spec(method), kinds_of(method).get(given.name, ())
    said: list[str] = []
    if kinds:
        said.append(f"rows of kind {_either(list(kinds))}{_converted(spec) if spec else ''}")
        columns = _columns(spec) if spec else []
        said += [f"columns besides: {', '.join(columns)}"] if columns else []
    shared = SHARED.get(method.entry.kind, {})
    if given.name in shared:
        return escape(shared[given.name].removesuffix("."))
    docs = argument_docs(method.doc) | argument_docs(inspect.getdoc(method.declared) or "")
    said += [escape(docs[given.name])] if given.name in docs else []
    said += [f"without one, the data set `{given.default}`"] if given.default else []
    return "; ".join(text.removesuffix(".") for text in said)


def inputs_table(method: Method) -> str:
    """The table of a method's inputs; "" where it has none."""
    rows = [
        [
            f"`{i.name}`",
            i.noun.replace("|", " or ") + (", several by role" if i.many else ""),
            "optional" if i.optional else "required",
            _holds(method, i),
        ]
        for i in method.inputs.values()
    ]
    if not rows:
        return ""
    told = any(row[-1] for row in rows)
    head = ("input", "noun", "", "what it holds")
    return table(head, rows) if told else table(head[:3], (row[:3] for row in rows))
