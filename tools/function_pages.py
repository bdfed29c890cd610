"""docs/functions.md: the pure functions that methods are made of, by the names that reach them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import cast

from pagetext import NOTE, escape, signature

from truing import catalogue
from truing.method import Method

# What a pure function does not take: these read files, hold weights or know of a run.
IMPURE = re.compile(r"\b(Model|Loaded|Module|Path|PreTrained\w*|Context|Journal|Principles)\b")


def _is_pure(function: object) -> bool:
    found = inspect.signature(cast("type", function)).parameters
    said = " ".join(str(p.annotation) for p in found.values())
    return bool(found) and not IMPURE.search(said)


def _reference(method: Method) -> str:
    unique = [e for e in catalogue.methods().values() if e.name == method.name]
    return f'truing.methods["{method.name if len(unique) == 1 else method.id}"]'


def _function_line(reference: str, name: str, function: object) -> str:
    first = (inspect.getdoc(function) or "").split("\n\n", 1)[0]
    return f"- `{reference}.{name}{signature(function)}`<br>{escape(' '.join(first.split()))}\n"


def functions_of(method: Method) -> list[str]:
    """One line for each pure function that `truing.methods[...]` reaches through this method."""
    reference = _reference(method)
    lines: list[str] = []
    if method.entry.kind != "method":
        lines.append(_function_line(reference, "loss", method.declared))
    registered = {e.module for e in catalogue.entries()} - {method.entry.module}
    for name, function in inspect.getmembers(method.module, inspect.isfunction):
        home = function.__module__
        # Its own functions, and those of helper modules beside it that hold no method themselves.
        near = home == method.entry.module or (
            home.startswith(f"truing.{method.verb}.") and home not in registered
        )
        if name[0] != "_" and near and not hasattr(function, "__truing__") and _is_pure(function):
            lines.append(_function_line(reference, name, function))
    return lines


def functions_page(found: Mapping[str, Sequence[Method]]) -> str:
    """The page, from the methods of each verb."""
    parts = [
        NOTE + "# Pure functions\n",
        "The mathematics of every method is a function on tensors or rows: no files, no devices, "
        "no seeds.\nAll are reached by the method's name, from Python:\n",
        "```python\nimport truing\n\n"
        'truing.methods["dpo"].loss  # the objective itself\n'
        'truing.methods["dpo"].difference  # what it is made of\n```\n',
        "Tensor names end in their shape; the legend is in the method's page.\n",
    ]
    for of_verb in found.values():
        seen: set[str] = set()
        for method in of_verb:
            lines = [line for line in functions_of(method) if line.split(".", 1)[1] not in seen]
            seen |= {line.split(".", 1)[1] for line in lines}
            if lines:
                title = f"[{method.id}](methods/{method.id}.md)"
                parts.append(f"## {title}\n\n" + "".join(lines))
    return "\n".join(parts)
