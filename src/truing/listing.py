"""What `truing list` and `truing show` say of methods and components; nothing is imported to list.

Components are what settings refer to as `{use: name, ...}`: checks, scorers, rewards, decoders.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from truing import catalogue
from truing.catalogue import VERBS, Entry
from truing.core.private import without_login
from truing.errors import InputError, unknown

if TYPE_CHECKING:
    from truing.plan import Plan

COLUMNS = ("name", "verb", "group", "field", "paper", "summary")
Say = Callable[[str], None] | None
Facts = dict[str, object]


def rows(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """The columns of `truing list --json`."""
    return [{k: getattr(e, k) for k in COLUMNS} for e in entries]


def _lines(entries: Sequence[Entry], head: Callable[[Entry], str], say: Say) -> None:
    last = ""
    for e in entries:
        if say is None:
            return
        if head(e) != last:
            last = head(e)
            say(f"\n{last}")
        say(f"  {e.name:<22} {e.summary}")


def methods(verb: str = "", field: str = "", *, say: Say = None) -> list[dict[str, str]]:
    """All methods in the order of the verbs, or those of one verb or field.

    Args:
        verb: one of the eleven, or "" for all.
        field: "text", "image", ..., or "" for all.
        say: called with each line for people.
    Raises:
        InputError: no such verb, or no method for that field.
    """
    known = list(catalogue.methods().values())
    known.sort(key=lambda e: (VERBS.index(e.verb), e.group, e.name))
    fields = {e.field for e in known}
    for what, value, choices in (("verb", verb, VERBS), ("field", field, fields)):
        if value and value not in choices:
            raise unknown(what, value, choices, where="truing list")
    found = [e for e in known if verb in ("", e.verb) and field in ("", e.field)]
    _lines(found, lambda e: (verb and e.group) or e.verb, say)
    return rows(found)


def components(*, say: Say = None) -> list[dict[str, str]]:
    """All components by kind: name, kind, summary."""
    found = sorted(catalogue.components().values(), key=lambda e: (e.component, e.name))
    _lines(found, lambda e: e.component, say)
    return [{"name": e.name, "kind": e.component, "summary": e.summary} for e in found]


def one(name: str) -> Facts:
    """All there is to know of a method ("dpo", "train/dpo") or component ("check:max_words")."""
    if name in VERBS:
        raise InputError(
            f"{name!r} is a verb, and `show` tells of one method",
            where="truing show",
            fix=f"`truing {name} --help` lists its methods",
        )
    return _component(name) if ":" in name else _method(name)


def _method(name: str) -> Facts:
    from truing.inputs import holds
    from truing.method import methods
    from truing.signature import type_name

    found = methods[name]
    settings = {
        s.name: {
            "type": type_name(s.type),
            "default": None if s.required else s.default,
            "required": s.required,
            "doc": s.doc,
        }
        for s in found.settings.values()
    }
    return {
        "name": found.id,
        "returns": found.returns,
        "summary": found.summary,
        "doc": found.doc,
        "field": found.field,
        "paper": found.paper,
        "inputs": {
            n: i.noun + (" (optional)" if i.optional else "") for n, i in found.inputs.items()
        },
        "input_docs": {n: holds(found, i) for n, i in found.inputs.items()},
        "settings": settings,
    }


def _component(name: str) -> Facts:
    from truing.method import Method

    known = catalogue.components()
    entry = known.get(name.replace("-", "_"))
    if entry is None:
        raise unknown("component", name, known, where="truing show")
    found = Method(entry)
    return {
        "name": entry.id,
        "summary": entry.summary,
        "doc": inspect.getdoc(found.declared) or entry.summary,
        "usage": usage(entry),
    }


def steps(plan: Plan, *, say: Say = None) -> Facts:
    """What a plan would run, checked as far as no model is needed; told line by line with `say`."""
    from truing.sources import check
    from truing.summary import rows_text

    found: list[Facts] = []
    for one in check(plan):
        given = sorted({without_login(source.text) for _, _, source in one.given()})
        found.append({"name": one.name, "do": one.method.id, "from": given})
    if say is not None:
        lines = [
            (str(f["name"]), str(f["do"]), ", ".join(cast("list[str]", f["from"]))) for f in found
        ]
        say(rows_text([("step", "method", "from"), *lines]))
    return {"job": plan.name, "steps": found}


def usage(entry: Entry) -> str:
    """How a component is written: `{use: max_words, n: ...}`, with its defaults."""
    from truing.method import Method

    found = Method(entry)
    parts = [f"use: {entry.name}"]
    for parameter in inspect.signature(found.declared).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        empty = parameter.default is inspect.Parameter.empty
        shown = "..." if empty else json.dumps(parameter.default, default=str, ensure_ascii=False)
        parts.append(f"{parameter.name}: {shown}")
    return "{" + ", ".join(parts) + "}"


def text(facts: Facts) -> str:
    """What `one` found, for people."""
    if "usage" in facts:
        return f"{facts['name']}\n\n{facts['doc']}\n\nWritten as: {facts['usage']}"
    lines = [f"{facts['name']} -> {facts['returns']}", "", str(facts["doc"]), "", "Inputs:"]
    inputs = cast("dict[str, str]", facts["inputs"])
    docs = cast("dict[str, str]", facts["input_docs"])
    for name, noun in inputs.items():
        lines.append(f"  --{name.replace('_', '-'):<20} {noun}")
        lines += [f"      {docs[name]}"] if docs[name] else []
    lines += ["", "Settings:"]
    for name, s in cast("dict[str, Facts]", facts["settings"]).items():
        default = "required" if s["required"] else repr(s["default"])
        lines.append(f"  --{name.replace('_', '-'):<20} {s['type']}, {default}")
        lines += [f"      {s['doc']}"] if s["doc"] else []
    return "\n".join(lines)
