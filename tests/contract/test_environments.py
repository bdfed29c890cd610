"""Every registered environment: seeded, restorable, plain data, whatever the actions are."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import pytest

from truing import catalogue
from truing.core.rollout import Environment, Observation, Step, maker
from truing.tables import Row

NAMES = sorted(catalogue.components("environment"))
TASK: Row = {"id": "t", "prompt": "How are you?", "lineage": {}}
ACTIONS = ["", "7", "calc 3 * 4", "no idea at all", "12 or 13", "\x00�", "9" * 50] * 3


def told(step: Step) -> tuple[Observation, object, bool, object]:
    return step.observation, step.reward, step.done, json.loads(json.dumps(dict(step.info)))


def played(one: Environment, actions: list[str]) -> list[tuple[Observation, object, bool, object]]:
    made: list[tuple[Observation, object, bool, object]] = []
    for action in actions:
        made.append(told(one.step(action)))
        if made[-1][2]:
            break
    return made


def test_there_are_environments() -> None:
    assert NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides(name: str) -> None:
    make = maker(name)
    one, other = make(), make()
    assert one.reset(11, dict(TASK)) == other.reset(11, dict(TASK))
    assert played(one, ACTIONS) == played(other, ACTIONS)
    # A used instance begins anew.
    assert one.reset(11, dict(TASK)) == make().reset(11, dict(TASK))
    assert played(one, ACTIONS) == played(_begun(name), ACTIONS)


def _begun(name: str) -> Environment:
    one = maker(name)()
    one.reset(11, dict(TASK))
    return one


@pytest.mark.parametrize("name", NAMES)
def test_it_ends_and_rewards_are_finite(name: str) -> None:
    steps = played(_begun(name), ACTIONS * 20)
    assert steps[-1][2], "it never ends"
    for _, reward, _, _ in steps:
        values = reward.values() if isinstance(reward, Mapping) else [reward]
        assert all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)


@pytest.mark.parametrize("name", NAMES)
def test_restored_at_any_turn_it_goes_on_alike(name: str) -> None:
    whole = played(_begun(name), ACTIONS)
    one = _begun(name)
    for at in range(len(whole)):
        kept = json.loads(json.dumps(one.snapshot()))
        fresh = maker(name)()
        fresh.reset(99, dict(TASK))
        fresh.restore(kept)
        assert played(fresh, ACTIONS[at:]) == whole[at:]
        assert one.snapshot() == kept  # neither the copy nor the snapshot is tied to it
        one.step(ACTIONS[at])
