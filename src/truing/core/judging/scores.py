"""Scores of rewards and checks by name: one number a row, or several named ones.

Each may be a `core.placed.Placed`, which is the sum of numbers that fall inside of the answer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import cast

from truing import catalogue
from truing.components import asked, is_own
from truing.core.placed import Placed
from truing.errors import InputError, unknown
from truing.method import finite, one_a_row
from truing.own_checks import check_of
from truing.tables import Row


def kind_of(ref: Mapping[str, object]) -> str:
    """ "reward", or "check" where only a check has that name: a check is a reward in [0, 1]."""
    name = str(ref.get("use")).replace("-", "_")
    rewards = catalogue.components("reward")
    return "check" if name not in rewards and name in catalogue.components("check") else "reward"


def check_reward(ref: Mapping[str, object], *, where: str = "") -> None:
    """Raise InputError for a reference to a reward or check that would go wrong later.

    What only the component knows of its settings, such as whether its model can reward, its own
    check says (`truing.own_checks`); without one, what it does with no rows.
    """
    function, settings = asked(kind_of(ref), ref, where=where)
    if check_of(function) is None and is_own(function):  # a user's may not bear that there are none
        function([], **settings)


def weight_of(name: str, weights: Mapping[str, float]) -> float:
    """Weight of a term: its own, for `term/value` else that of the term, 1 where none is given."""
    return weights.get(name, weights.get(name.partition("/")[0], 1.0))


def check_named(weights: Mapping[str, float], found: Collection[str], where: str) -> None:
    """Raise an InputError for a weight of a value, `term/value`, that its term does not name."""
    for name in weights:
        if "/" in name and name not in found:
            known = [n for n in found if n.partition("/")[0] == name.partition("/")[0]]
            raise unknown("value of a reward", name, known, where=f"{where} setting 'weights'")


def total_scores(ref: Mapping[str, object], rows: Sequence[Row], *, where: str = "") -> list[float]:
    """One number a row: what a reward or check says of it, the sum where it names several."""
    parts = named_scores(str(ref.get("use")), ref, rows, where=where).values()
    return [math.fsum(p[i] for p in parts) for i in range(len(rows))]


def named_scores(
    name: str, ref: Mapping[str, object], rows: Sequence[Row], *, where: str = ""
) -> dict[str, list[float]]:
    """What a reward says of each row, by name.

    Args:
        name: of the term; a reward of several values makes `name/value` of each.
        ref: `{use: ..., **settings}`.
        rows: with "prompt", "completion", "finished" and what the data's rows hold.
        where: what errors name.
    Raises:
        InputError: another number of scores than rows, rows with different names, or a score that
            is not a finite number.
    """
    kind = kind_of(ref)
    made = one_a_row(kind, ref, rows, where=where, name=name)

    def number(value: object, row: int) -> float:
        found = finite(value, what=f"{kind} {name!r}", where=f"{where} row {row}".strip())
        return value if isinstance(value, Placed) else found

    if not made or not isinstance(made[0], Mapping):
        return {name: [number(v, i) for i, v in enumerate(made, 1)]}
    items = cast("list[Mapping[str, object]]", made)
    parts = list(items[0])
    for i, item in enumerate(items, 1):
        if not isinstance(item, Mapping) or set(item) != set(parts):
            raise InputError(
                f"{kind} {name!r} must name the same values for every row",
                where=f"{where} row {i}".strip(),
                seen=item,
            )
    return {f"{name}/{p}": [number(item[p], i) for i, item in enumerate(items, 1)] for p in parts}
