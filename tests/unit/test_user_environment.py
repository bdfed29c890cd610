"""An environment of a user's own: what it does wrong is one message with its place."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from truing.core.rollout import Episode, Observation, Scripted, Step, rollout
from truing.errors import InputError
from truing.tables import Row

TASKS: list[Row] = [{"id": "a", "prompt": "p"}]


class Own:
    """Ends after one turn; each part may be replaced."""

    def __init__(self, **parts: Callable[..., object]) -> None:
        self.__dict__.update(parts)

    def reset(self, seed: int, task: Row) -> object:
        return Observation("first")

    def step(self, action: object) -> object:
        return Step(Observation("then"), 0.5, True)

    def snapshot(self) -> object:
        return {}

    def restore(self, snapshot: object) -> None: ...


def played(**parts: Callable[..., object]) -> Row:
    """One task in an environment with these parts."""
    agent = Scripted(lambda asked: "act", "key")
    (row,) = rollout(lambda: Own(**parts), TASKS, {"policy": agent}).rows
    return row


def broken(*_: object) -> object:
    raise KeyError("hidden")


@pytest.mark.parametrize(
    ("parts", "told", "fix"),
    [
        ({"reset": broken}, "task a: environment '.*': reset raised KeyError: 'h", "See .*line"),
        ({"step": broken}, "task a turn 1: .*step raised KeyError: 'hidden'", "See .*line"),
        ({"snapshot": None}, "task a: .* has no method 'snapshot'", "Return an object with reset"),
        ({"reset": lambda *_: "hello"}, "reset must give an Observation", "Observation.text"),
        ({"reset": lambda *_: ("hello", {})}, "reset must give an Observation", "Observation"),
        ({"step": lambda _: "hello"}, "turn 1: .*step must return an observation", "Step"),
        ({"step": lambda _: ("o", 1.0, True, False, {})}, "step must return", "Gym's terminated"),
        ({"step": lambda _: ("o", 1.0, True)}, "step must give an Observation", "Observation"),
        ({"step": lambda _: Step(Observation("o"), 10**400, True)}, "no.* finite number", "Give"),
        ({"step": lambda _: Step(Observation("o"), 1.0, True, None)}, "must be a dict", "Step"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(parts: dict[str, object], told: str, fix: str) -> None:
    with pytest.raises(InputError, match=told) as error:
        played(**parts)  # type: ignore[arg-type]
    assert re.search(fix, error.value.fix)


def test_snapshots_that_raise() -> None:
    one = Episode(lambda: Own(snapshot=broken, restore=broken), TASKS[0], 0)
    with pytest.raises(InputError, match="snapshot raised KeyError"):
        one.snapshot()
    with pytest.raises(InputError, match="restore raised KeyError"):
        one.restore({"turns": [], "waiting": {"content": "x"}, "done": False, "environment": {}})


def test_a_plain_tuple_is_a_step_and_numbers_of_numpy_are_rewards() -> None:
    row = played(step=lambda _: (Observation("then"), np.float32(0.5), np.bool_(True)))
    assert row["rewards"] == {"policy": 0.5} and row["done"] is True
