"""An environment of sums: numbers are added one at a time, a calculator may be asked.

Small enough for a model of 135 million parameters to do something of, and with the parts of a real
task: several turns, feedback on mistakes, a tool whose answer comes as an observation, a reward for
every right answer.
"""

from __future__ import annotations

import random
import re
from typing import cast

from truing.context import Json
from truing.core.rollout import Observation, Step
from truing.errors import InputError
from truing.method import component
from truing.tables import Row

_CALC = re.compile(r"\bcalc\s*[: ]\s*(-?\d{1,9})\s*([-+*])\s*(-?\d{1,9})", re.I)
_NUMBER = re.compile(r"-?\d+")
_SIGNS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


class RunningSum:
    """See the module's docstring."""

    def __init__(self, terms: int, most: int, tries: int, tool: bool) -> None:
        self.terms, self.most, self.tries, self.tool = terms, most, tries, tool
        self.numbers: list[int] = []
        self.at, self.tried = 1, 0

    def reset(self, seed: int, task: Row) -> Observation:
        """Numbers from the task's column `numbers`, else drawn."""
        given = task.get("numbers")
        if given is None:
            source = random.Random(seed)
            given = [source.randint(1, self.most) for _ in range(self.terms + 1)]
        numbers = cast("list[object]", given if isinstance(given, list) else [])
        if len(numbers) < 2 or not all(type(v) is int for v in numbers):
            raise InputError(
                "field 'numbers' must be a list of two or more whole numbers",
                where=f"running_sum task {task.get('id', '')}".strip(),
                seen=given,
            )
        self.numbers, self.at, self.tried = cast("list[int]", numbers), 1, 0
        text = "Keep a running sum. I start and you reply with the sum alone."
        if self.tool:
            text += " To use the calculator, reply: calc 1 + 2"
        return Observation(f"{text} {self._question()}")

    def _question(self) -> str:
        return f"The sum is {sum(self.numbers[: self.at])}. Add {self.numbers[self.at]}."

    def step(self, action: Json) -> Step:
        """Judge the last number of the answer, or compute."""
        right = sum(self.numbers[: self.at + 1])
        asked = _CALC.search(str(action)) if self.tool else None
        found = _NUMBER.findall(str(action)[:2000])
        # A number longer than this is no answer, and slow to read.
        correct = not asked and bool(found) and len(found[-1]) < 20 and int(found[-1]) == right
        self.tried += 1
        over = correct or self.tried >= self.tries
        if asked:
            text = f"calc: {_SIGNS[asked[2]](int(asked[1]), int(asked[3]))}."
        elif correct:
            text = "Right."
        else:
            text = "No." if found else "Reply with a number."
        if over:
            text += "" if correct else f" The sum was {right}."
            self.at, self.tried = self.at + 1, 0
        done = self.at >= len(self.numbers)
        text += "" if done else f" {self._question()}"
        reward = 1.0 / (len(self.numbers) - 1) if correct else 0.0
        return Step(Observation(text), reward, done, {"right": correct, "tool": bool(asked)})

    def snapshot(self) -> Json:
        """Numbers and place."""
        return {"numbers": list(self.numbers), "at": self.at, "tried": self.tried}

    def restore(self, snapshot: Json) -> None:
        """Take both back."""
        state = cast("dict[str, object]", snapshot)
        self.numbers = list(cast("list[int]", state["numbers"]))
        self.at, self.tried = cast(int, state["at"]), cast(int, state["tried"])


@component("environment")
def running_sum(*, terms: int = 3, most: int = 20, tries: int = 2, tool: bool = True) -> RunningSum:
    """Sums over several turns, with feedback and a calculator.

    Args:
        terms: numbers to add, when the task does not give them.
        most: the largest number drawn.
        tries: answers or calculations for each sum.
        tool: whether there is a calculator.
    """
    if min(terms, most, tries) < 1:
        raise InputError(
            "terms, most and tries must be at least 1",
            where="running_sum",
            seen=[terms, most, tries],
        )
    return RunningSum(terms, most, tries, tool)
