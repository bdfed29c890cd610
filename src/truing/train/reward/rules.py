"""Rewards that a rule decides: a number that must be right, a length, words from a set.

Each takes rows with "prompt" and "completion" and what the data's own row holds, and returns one
float a row. Checks of principles (`specify.checks`) and `decode/rewards` serve as rewards too.
"""

from __future__ import annotations

from fractions import Fraction

from truing.core.bounds import check_bounds
from truing.core.judging.numerals import final_number, marked
from truing.errors import InputError
from truing.method import component
from truing.own_checks import checks
from truing.specify.texts import text_of, words
from truing.tables import Row

MARKER = "\n\n# Answer\n\n"  # parts a solution from its answer


def gold_number(row: Row, column: str, where: str) -> Fraction:
    """The number of a gold answer; an InputError where it is not one."""
    gold = row.get(column)
    plain = isinstance(gold, (str, int, float)) and not isinstance(gold, bool)
    part = marked(str(gold)) if plain else None
    value = final_number(str(gold)) if plain else None
    if value is None:
        what = "holds no number" if part is None else f"marks '{part}', which is not one number"
        raise InputError(
            f"column {column!r} {what}",
            where=where,
            seen=gold,
            fix="Name the column of the gold answers, {use: numeric_answer, column: ...}, and "
            "leave rows out whose answers are no numbers",
        )
    return value


def _check_gold(rows: list[Row], *, column: str = "answer") -> None:
    """What `core.rl.gold` asks before anything is drawn."""
    for i, row in enumerate(rows, 1):
        gold_number(row, column, f"reward numeric_answer row {i}")


@component("reward")
@checks(rows=_check_gold)
def numeric_answer(
    rows: list[Row], *, column: str = "answer", tolerance: float = 0.0
) -> list[float]:
    """1 where the answer's final number is that of the row's gold answer, else 0.

    Fractions count by their value. Where an answer is marked, by GSM8K's "####" or a LaTeX box,
    what is marked must be one number, with its unit at most.

    Args:
        column: of the gold answer: a number, or a text whose final number counts.
        tolerance: largest difference, relative to the gold number.
    """
    check_bounds({"tolerance": tolerance}, {"tolerance": "[0, inf)"}, "reward numeric_answer")
    values: list[float] = []
    for i, row in enumerate(rows, 1):
        gold = gold_number(row, column, f"reward numeric_answer row {i}")
        said = final_number(text_of(row))
        near = said is not None and abs(said - gold) <= abs(gold) * Fraction(str(tolerance))
        values.append(float(near))
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


def unformatted(text: str, marker: str = MARKER) -> float:
    """How badly a solution is laid out: 0, 0.5, 0.75 or 1; see `format_penalty`."""
    solution, _, answer = text.partition(marker)
    answer = answer.strip()
    if not answer:
        return 1.0
    if f"\\boxed{{{answer}}}" in solution:
        return 0.0
    last = solution.rpartition("\n\n")[2]
    if f"${answer}$" in last or f"${answer}.$" in last:
        return 0.5
    return 0.75 if answer in last else 1.0


@component("reward")
def format_penalty(rows: list[Row], *, marker: str = MARKER) -> list[float]:
    """0 for a solution in which its final answer stands in a box, down to -1 where it is missing.

    The first marker parts solution and answer. -1 without it or without an answer; 0 where the
    solution holds the answer in a LaTeX box; else, by the solution's last paragraph, -0.5 where it
    has the answer between dollar signs, -0.75 where it has it as plain text, -1 where it has not.
    The layout asked for in "Easy-to-Hard Generalization", arXiv 2403.09472.

    Args:
        marker: what parts a solution from its answer.
    """
    if not marker:
        raise InputError("must not be empty", where="reward format_penalty setting 'marker'")
    return [-unformatted(text_of(row), marker) for row in rows]
