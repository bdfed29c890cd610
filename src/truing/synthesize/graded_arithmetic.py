"""Arithmetic problems of graded difficulty with worked solutions: a problem's level is its steps.

    prompt       Work out 7 + 5 - 3 step by step.
    completion   7 + 5 = 12 | 12 - 3 = \\boxed{9} | # Answer | 9      (each | is a blank line)

Level L is a chain of L additions and subtractions of numbers from 1 to `largest` whose running
values never fall below 0. Levels share no problem, so that nothing of the hard ones is in the easy
ones; problems of one table are all different, and the same whatever is told of them: solution and
answer, the answer alone, to grade others' solutions, or nothing, since hard problems may be asked
in reinforcement learning but their answers not be used. The layout is the one that `format_penalty`
wants. Generated in place of MATH, which is graded by people, after
the small-scale form of "Easy-to-Hard Generalization", arXiv 2403.09472.
"""

from __future__ import annotations

import random
from typing import Literal

from truing.context import current
from truing.errors import InputError
from truing.method import method
from truing.tables import Row, Table

TRIES = 50  # for each problem, before there are too few different ones
ASK = "Work out {chain} step by step."
Told = Literal["solution", "answer", "nothing"]
TOLD: dict[Told, tuple[str, ...]] = {
    "solution": ("completion", "answer"),
    "answer": ("answer",),
    "nothing": (),
}


def chain(source: random.Random, steps: int, largest: int) -> tuple[int, list[tuple[str, int]]]:
    """A first number and the signed numbers that follow it."""
    first = value = source.randint(1, largest)
    parts: list[tuple[str, int]] = []
    for _ in range(steps):
        sign = source.choice("+-") if value else "+"
        number = source.randint(1, largest if sign == "+" else min(largest, value))
        value += number if sign == "+" else -number
        parts.append((sign, number))
    return first, parts


def problem(first: int, parts: list[tuple[str, int]]) -> Row:
    """{"prompt", "completion", "answer", "level"} of a chain."""
    asked, value = [str(first)], first
    steps: list[str] = []
    for place, (sign, number) in enumerate(parts, 1):
        asked.append(f"{sign} {number}")
        after = value + number if sign == "+" else value - number
        result = f"\\boxed{{{after}}}" if place == len(parts) else str(after)
        steps.append(f"{value} {sign} {number} = {result}")
        value = after
    return {
        "prompt": ASK.format(chain=" ".join(asked)),
        "completion": "\n\n".join([*steps, "# Answer", str(value)]),
        "answer": str(value),
        "level": str(len(parts)),
    }


@method(
    paper="easy-to-hard",
    within={"n": (1, None), "largest": (1, None)},
    makes={"example": {"tell": "solution"}, "prompt": {}},
)
def graded_arithmetic(
    *, n: int = 600, levels: list[int] | None = None, largest: int = 20, tell: Told = "solution"
) -> Table:
    """Arithmetic problems of graded difficulty with worked solutions.

    Args:
        n: problems, as many of each level as of the others, or one more.
        levels: steps that problems take; None for 1, 2 and 3.
        largest: number that is added or taken away.
        tell: solution and answer, the answer alone, or nothing but the problem.
    """
    wanted = [1, 2, 3] if levels is None else levels
    if not wanted or min(wanted) < 1:
        raise InputError("setting 'levels' must list numbers of steps from 1", seen=levels)
    source = random.Random(current().stream("arithmetic"))
    made: dict[str, Row] = {}
    for _ in range(TRIES * n):
        if len(made) == n:
            break
        # The level changes with what was found, so that the levels stay equal in number.
        row = problem(*chain(source, wanted[len(made) % len(wanted)], largest))
        made.setdefault(str(row["prompt"]), row)
    if len(made) < n:
        raise InputError(
            "setting 'n': there are not so many different problems of these levels",
            seen=n,
            fix="Raise largest, give longer levels, or ask for fewer",
        )
    kept = ("prompt", "level", *TOLD[tell])
    lineage = {"generator": "synthesize/graded_arithmetic"}
    rows: list[Row] = [{**{c: r[c] for c in kept}, "lineage": lineage} for r in made.values()]
    return Table("example" if tell == "solution" else "prompt", rows, where="graded arithmetic")
