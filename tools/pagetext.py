"""Markdown from plain text: what the generated pages are written with."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable
from typing import cast

NOTE = (
    "<!-- Made by `python tools/docs.py --write` from the code: edit the docstring instead. -->\n"
)


def escape(text: str) -> str:
    """Plain text as Markdown that reads the same; what stands in back-quotes is left alone."""
    parts = re.split(r"(`[^`\n]*`)", text)
    return "".join(
        p if p.startswith("`") and len(p) > 1 else re.sub(r"([_*<|])", r"\\\1", p) for p in parts
    )


def cell(text: str) -> str:
    """Text inside a table."""
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split()))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [[*head], ["---"] * len([*head]), *([*map(cell, row)] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def prose(doc: str) -> str:
    """A docstring as Markdown: indented paragraphs are equations, kept as they stand."""
    parts: list[str] = []
    equations: list[str] = []

    def close() -> None:
        if equations:
            parts.append("```text\n" + textwrap.dedent("\n\n".join(equations)) + "\n```")
            equations.clear()

    for paragraph in re.split(r"\n\s*\n", doc.strip("\n")):
        lines = paragraph.splitlines()
        if all(line.startswith("    ") for line in lines):
            equations.append(paragraph)
            continue
        close()
        if any(line.startswith("  ") for line in lines):  # a list or table laid out by hand
            parts.append("```text\n" + textwrap.dedent(paragraph) + "\n```")
        else:
            parts.append(escape(paragraph))
    close()
    return "\n\n".join(parts)


def command_name(name: str) -> str:
    """A name as the command line has it."""
    return name.replace("_", "-")


class _Bare(str):
    """An annotation as it is written, which a signature would put into quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def signature(function: object, *, bound: bool = False) -> str:
    """A function's signature as it is written; defaults keep their quotes.

    Args:
        bound: leave out the first parameter, the object that a method is called on.
    """
    found = inspect.signature(cast("type", function))

    def bare(annotation: object) -> object:
        return _Bare(annotation) if isinstance(annotation, str) else annotation

    written = [p.replace(annotation=bare(p.annotation)) for p in found.parameters.values()]
    written = written[1:] if bound else written
    return str(found.replace(parameters=written, return_annotation=bare(found.return_annotation)))
