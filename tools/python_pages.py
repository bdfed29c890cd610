"""docs/python.md: what a Python user holds in hand, from signatures and docstrings."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import cast

from pagetext import NOTE, escape, prose, signature, table

import truing

# What is told under which heading. A name with dots is none of `truing`'s own: what a call of the
# others gives back or hands on, whose making is told only where users make it.
SECTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "The four nouns": (
        "Artefacts that methods take and return. Each has a `key`, the hash of its content, and is "
        "written into a folder by `save` and read from it by `load`.",
        (
            "Model",
            "truing.core.modelfiles.loaded.Loaded",
            "Table",
            "Principles",
            "Principle",
            "Report",
            "Measure",
        ),
    ),
    "Methods": (
        "What each of them takes is told on [its page](methods/README.md).",
        ("methods", "truing.method.Method", "generate", "truing.core.drawing.Completion"),
    ),
    "Recipes, comparisons, claims": (
        "These keep their steps in the store, so that the same call goes on where it was stopped "
        "([calls in Python](errors-and-resume.md#calls-in-python)). The file format: "
        "[recipes](recipes.md).",
        ("run", "truing.pipeline.Result", "Plan", "compare", "truing.compare.Comparison", "claim"),
    ),
    "Functions of your own": (
        "Where each may stand: [plugins](plugins.md) and [your own "
        "objective](tutorials/your-own-objective.md).",
        (
            "component",
            "checks",
            "get_component",
            "method",
            "objective",
            "truing.core.objective.Measurements",
            "truing.core.objective.Loss",
            "online",
            "truing.core.online.Update",
        ),
    ),
    "Errors": (
        "All that are raised on purpose; what they say: [errors](errors-and-resume.md).",
        ("TruingError", "InputError", "Stopped"),
    ),
}
MADE = ("Loss", "Update")  # not exported, and yet made by who writes an objective
WIDTH = 96
NAME = r"\*{0,2}\w+"


def told(doc: str) -> dict[str, list[str]]:
    """The lines of a docstring: under "" its prose, under "Args" and "Raises" what these hold."""
    parts: dict[str, list[str]] = {"": [], "Args": [], "Raises": []}
    at = ""
    for line in doc.splitlines():
        head = re.fullmatch(r"(Args|Raises)( \(.*\))?:", line)
        if head:
            at = head[1]
            continue
        at = "" if line[:1].strip() else at
        parts[at].append(line)
    return parts


def named(lines: Sequence[str]) -> list[tuple[str, str]]:
    """(name, what is said of it) of the lines of a section; "lo, hi" is one name."""
    found: list[tuple[str, str]] = []
    for line in lines:
        head = re.match(rf"    ({NAME}(?:, {NAME})*): (.*)$", line)
        if head:
            found.append((head[1], head[2]))
        elif line.strip():
            name, text = found[-1]
            found[-1] = name, f"{text} {line.strip()}"
    return found


def _raised(lines: Sequence[str]) -> Iterator[str]:
    return (f"raises `{error}`: {escape(text)}" for error, text in named(lines))


def _call(name: str, function: object) -> str:
    """The call as Python has it, an argument a line where it is long."""
    text = name + signature(function)
    if inspect.isclass(function):
        text = re.sub(r" -> None$", "", text).replace("<factory>", "...")
    if len(text) <= WIDTH:
        return text
    inside, _, returned = text[len(name) + 1 :].rpartition(")")
    given = re.split(r", (?=\*|\*?\w+(?::|=|, ))", inside)
    return f"{name}(\n" + "".join(f"    {one},\n" for one in given) + f"){returned}"


def _function(name: str, function: object) -> str:
    """A heading, the signature, what it does, its arguments and errors."""
    parts = told(inspect.getdoc(function) or "")
    text = f"### {name}\n\n```python\n{_call(name, function)}\n```\n\n"
    text += prose("\n".join(parts[""])) + "\n"
    if given := named(parts["Args"]):
        rows = [[f"`{n}`", escape(said)] for n, said in given]
        text += "\n" + table(("argument", "meaning"), rows)
    return text + "".join(f"\n{one[0].upper()}{one[1:]}\n" for one in _raised(parts["Raises"]))


def _line(lines: Sequence[str]) -> str:
    return escape(" ".join(" ".join(lines).split()))


def _member(owner: type, name: str, value: object) -> str:
    """One line for an attribute or method, with what is said of arguments and errors under it."""
    if not isinstance(value, (property, staticmethod, classmethod)) and hasattr(value, "func"):
        value = property(cast("property", value).func)  # pyright: ignore
    if isinstance(value, property):
        doc, got = inspect.getdoc(value.fget), inspect.signature(cast("type", value.fget))
        written = f"{owner.__name__.lower()}.{name}: {got.return_annotation}"
    else:
        own = isinstance(value, (staticmethod, classmethod))
        function = cast("staticmethod[..., object]", value).__func__ if own else value
        doc, on = inspect.getdoc(function), owner.__name__ if own else owner.__name__.lower()
        bound = not isinstance(value, staticmethod)
        called = on if name == "__call__" else f"{on}.{name}"
        written = called + signature(function, bound=bound)
    parts = told(doc or "")
    lines = [f"- `{written}`<br>{_line(parts[''])}\n"]
    lines += [f"  - `{n}`: {escape(said)}\n" for n, said in named(parts["Args"])]
    return "".join([*lines, *(f"  - {one}\n" for one in _raised(parts["Raises"]))])


def _members(owner: type) -> Iterator[tuple[str, object]]:
    """Public properties and methods that the class itself has, in the order of its file."""
    for name, value in vars(owner).items():
        kinds = (property, staticmethod, classmethod)
        is_method = inspect.isfunction(value) or isinstance(value, kinds) or hasattr(value, "func")
        if is_method and (name[0] != "_" or name == "__call__"):
            yield name, value


def _fields(owner: type) -> Iterator[str]:
    """One line for each field of a class that users are given and do not make."""
    said = dict(named(told(inspect.getdoc(owner) or "")["Args"]))
    for name, kind in inspect.get_annotations(owner).items():
        about = f"<br>{escape(said[name])}" if name in said else ""
        yield f"- `{owner.__name__.lower()}.{name}: {kind}`{about}\n"


def _class(name: str, owner: type, *, given: bool) -> str:
    lines = [_member(owner, member, value) for member, value in _members(owner)]
    if issubclass(owner, truing.TruingError):
        lines.append(f"- `exit_code = {owner.exit_code}`<br>What a command ends with.\n")
    if given:
        about = prose("\n".join(told(inspect.getdoc(owner) or "")[""]))
        return f"### {name}\n\n{about}\n\n" + "".join([*_fields(owner), *lines])
    return _function(name, owner) + ("\n" + "".join(lines) if lines else "")


def _thing(name: str) -> str:
    """The part of the page for one exported name, or for a class by its full name."""
    module, _, attr = name.rpartition(".")
    found: object = getattr(importlib.import_module(module or "truing"), attr)
    shown = name if attr in MADE else attr if module else f"truing.{attr}"
    if inspect.isclass(found):
        return _class(shown, found, given=bool(module) and attr not in MADE)
    if inspect.isfunction(found):
        return _function(shown, found)
    return f"### {shown}\n\n{prose(inspect.getdoc(type(found)) or '')}\n"


def python_page() -> str:
    """The page; it ends with an error where a public name of `truing` has no place on it."""
    placed = {name for _, names in SECTIONS.values() for name in names}
    if left := {n for n in truing.__all__ if n[0] != "_"} - placed:
        raise SystemExit(f"tools/python_pages.py: no section for {', '.join(sorted(left))}")
    parts = [
        NOTE + "# Python\n",
        "All that `import truing` gives, on one page. How it is used: [one page of "
        "Python](../README.md#one-page-of-python).\nThe import costs milliseconds; PyTorch is "
        "loaded by the first call that needs it. `truing.__version__` is the version.\n",
    ]
    for title, (about, names) in SECTIONS.items():
        parts += [f"## {title}\n", about + "\n", *map(_thing, names)]
    return "\n".join(parts)
