"""Environments of a user's own: what they raise, or return in another form, is told with its place.

Those of the package are asked as they are, which costs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

from truing.components import is_own, told
from truing.context import Json
from truing.errors import InputError

if TYPE_CHECKING:
    from truing.core.rollout import Environment, Make, Observation, Step
    from truing.tables import Row

METHODS = ("reset", "step", "snapshot", "restore")
SHOW = "Return Observation(text, role) of truing.core.rollout"
GYM = (
    "Return Step(observation, reward, done, info) of truing.core.rollout; done is Gym's terminated "
    "or truncated"
)


def called(make: Make, what: str, call: Callable[[], object], where: str) -> object:
    """What a part of the environment returns; what a user's own raises as an InputError.

    Args:
        make: what makes it.
        what: of it is called.
        where: what errors name.
    """
    with told(make, f"{name_of(make)}: {what}", where):
        return call()


def name_of(make: Make) -> str:
    """How errors call an environment."""
    function = getattr(make, "func", make)
    return f"environment {getattr(function, '__name__', 'of your own')!r}"


def made(make: Make, where: str) -> Environment:
    """A fresh environment, which has all methods of one."""
    found = cast("Environment", called(make, "it", make, where))
    lacks = [n for n in METHODS if not callable(getattr(found, n, None))]
    if lacks and not is_own(make):
        raise InputError(
            f"{name_of(make)} has no method {lacks[0]!r}",
            where=where,
            seen=type(found).__name__,
            fix="Return an object with reset(seed, task), step(action), snapshot() and "
            "restore(snapshot), as truing.core.rollout says",
        )
    return found


def began(make: Make, environment: Environment, seed: int, task: Row, where: str) -> Observation:
    """What is observed first."""
    found = called(make, "reset", lambda: environment.reset(seed, task), where)
    return found if is_own(make) else _shown(make, "reset", found, where)  # type: ignore[return-value]


def stepped(make: Make, environment: Environment, action: Json, where: str) -> Step:
    """What an action led to; a plain tuple of the same is one, too."""
    from truing.core.rollout import Step

    found = called(make, "step", lambda: environment.step(action), where)
    if is_own(make):
        return cast(Step, found)
    if isinstance(found, tuple) and len(cast("tuple[object, ...]", found)) in (3, 4):
        found = Step(*cast("tuple[Observation, float, bool]", found))
    if not isinstance(found, Step):
        raise InputError(
            f"{name_of(make)}: step must return an observation, a reward, whether it is done, and "
            "what else there is to record",
            where=where,
            seen=found,
            fix=GYM,
        )
    _shown(make, "step", found.observation, where)
    if not isinstance(found.info, Mapping):
        raise InputError(
            f"{name_of(make)}: what else there is to record must be a dict",
            where=where,
            seen=found.info,
            fix=GYM,
        )
    return found._replace(done=bool(found.done))


def _shown(make: Make, what: str, found: object, where: str) -> Observation:
    from truing.core.rollout import Observation

    if not isinstance(found, Observation):
        raise InputError(
            f"{name_of(make)}: {what} must give an Observation", where=where, seen=found, fix=SHOW
        )
    return found


def plain(value: object, what: str) -> Json:
    """`value` as JSON would give it back, so that resumed and uninterrupted runs hold the same."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{what} must be plain data: {error}",
            where="rollout",
            fix="Give numbers, texts, lists and dicts with texts as keys",
        ) from None
