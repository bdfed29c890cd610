"""`Entry`: one registered function, as far as its source text tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One registered function, as far as its source text tells.

    `verb` is the folder, `group` the sub-folder, `kind` "method", "objective", "online" or
    "component" (then `component` is the sort: "check", "reward", ...). `module` and `attr` say
    where to import it. `names` are components that an online method names itself.
    """

    name: str
    kind: str
    verb: str
    group: str
    module: str
    attr: str
    summary: str
    path: str = ""
    line: int = 0
    field: str = "text"
    paper: str = ""
    needs: tuple[str, ...] = ()
    unit: str = ""
    rows: str = ""
    component: str = ""
    names: tuple[str, ...] = ()
    package: str = "truing"

    @property
    def id(self) -> str:
        """`verb/name` of a method, `kind:name` of a component."""
        if self.kind == "component":
            return f"{self.component}:{self.name}"
        return f"{self.verb}/{self.name}"


def said(entry: Entry, facts: Mapping[str, object]) -> Entry:
    """The entry with what its decorator's arguments say."""
    needs, rows = facts.get("needs", ()), facts.get("rows", "")
    return replace(
        entry,
        name=str(facts.get("name") or entry.name),
        group=str(facts.get("group") or entry.group),
        field=str(facts.get("field", "text")),
        paper=str(facts.get("paper", "")),
        needs=tuple(str(n) for n in needs) if isinstance(needs, (tuple, list)) else (),
        unit=str(facts.get("unit", "")),
        rows=rows if isinstance(rows, str) else "",
        component=str(facts.get("component", "")),
        names=tuple(str(facts[n]) for n in ("follows", "pools") if facts.get(n)),
    )


def plainly(facts: Mapping[str, Any]) -> Entry:
    """The entry whose fields these were, once they have been JSON."""
    several: dict[str, Any] = {n: tuple(facts[n]) for n in ("needs", "names")}
    return Entry(**{**facts, **several})


def place_of(entry: Entry) -> str:
    """Where an entry's function stands, for people."""
    name = f"{entry.module}.{entry.attr}"
    return name if entry.package == "truing" or not entry.path else f"{entry.path} {entry.attr}"
