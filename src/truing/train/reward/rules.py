"""Rewards that a rule decides: a number that must be right, a length, words from a set.

Each takes rows with "prompt" and "completion" and what the data's own row holds, and returns one
float a row. Checks of principles (`specify.checks`) and `decode/rewards` serve as rewards too.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from truing.errors import InputError
from truing.method import component
from truing.specify.checks import text_of, words
from truing.tables import Row

_NUMBER = re.compile(r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+\u2212]?\.\d+")
# Where an answer is marked as such, it is looked for there: GSM8K's "####", LaTeX's box.
_MARKED = re.compile(r"####\s*([^\n]+)|\\boxed\{([^{}]*)\}")


def numbers(text: str) -> list[Decimal]:
    """All numbers of a text, thousands commas allowed."""
    found: list[Decimal] = []
    for match in _NUMBER.findall(text):
        try:
            found.append(Decimal(match.replace(",", "").replace("\u2212", "-")))
        except InvalidOperation:  # digits of other scripts that Python's \d takes
            continue
    return found


def final_number(text: str) -> Decimal | None:
    """The last number of the last marked answer, else of the whole text; None without any."""
    marked = [a or b for a, b in _MARKED.findall(text)]
    found = numbers(marked[-1]) if marked else numbers(text)
    return found[-1] if found else None


@component("reward")
def numeric_answer(
    rows: list[Row], *, column: str = "answer", tolerance: float = 0.0
) -> list[float]:
    """1 where the answer's final number is that of the row's gold answer, else 0.

    Args:
        column: of the gold answer: a number, or a text whose final number counts.
        tolerance: largest difference, relative to the gold number.
    """
    values: list[float] = []
    for i, row in enumerate(rows, 1):
        gold = final_number(str(row.get(column, "")))
        if gold is None:
            raise InputError(
                f"column {column!r} holds no number",
                where=f"reward numeric_answer row {i}",
                seen=row.get(column),
                fix="Name the column of the gold answers: {use: numeric_answer, column: ...}",
            )
        said = final_number(text_of(row))
        off = abs(said - gold) if said is not None else None
        values.append(float(off is not None and off <= abs(gold) * Decimal(str(tolerance))))
    return values


@component("reward")
def length_near(rows: list[Row], *, n: int) -> list[float]:
    """How near the answer comes to `n` words: 1 at n, falling in a straight line to 0.

    Args:
        n: words wanted; an empty answer and one of twice as many words get 0.
    """
    if n < 1:
        raise InputError("must be at least 1", where="reward length_near setting 'n'", seen=n)
    return [max(0.0, 1.0 - abs(len(words(text_of(row))) - n) / n) for row in rows]


@component("reward")
def share_of(
    rows: list[Row], *, words_from: list[str] | None = None, letters: str = ""
) -> list[float]:
    """Share of the answer's words, or of its characters, that are from a set; 0 for no answer.

    Args:
        words_from: words that count, in any case.
        letters: characters that count; instead of words.
    """
    if bool(words_from) == bool(letters):
        raise InputError("give either words_from or letters", where="reward share_of")
    wanted = {w.lower() for w in words_from or []} or set(letters)
    values: list[float] = []
    for row in rows:
        text = text_of(row)
        parts = list(text) if letters else [w.lower() for w in words(text)]
        values.append(sum(p in wanted for p in parts) / len(parts) if parts else 0.0)
    return values
