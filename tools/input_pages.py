"""What a method's page says of its inputs: nouns, kinds of rows, and the columns that it reads."""

from __future__ import annotations

from pagetext import escape, table

from truing.inputs import holds, noun_of
from truing.method import Method


def inputs_table(method: Method) -> str:
    """The table of a method's inputs; "" where it has none."""
    rows = [
        [
            f"`{i.name}`",
            noun_of(i),
            "optional" if i.optional else "required",
            escape(holds(method, i)),
        ]
        for i in method.inputs.values()
    ]
    if not rows:
        return ""
    told = any(row[-1] for row in rows)
    head = ("input", "noun", "", "what it holds")
    return table(head, rows) if told else table(head[:3], (row[:3] for row in rows))
