"""Mixtures of tables: counts worked out by hand, and what is drawn, repeated and refused."""

from __future__ import annotations

from collections import Counter

import pytest

from truing.context import Context, use
from truing.errors import InputError
from truing.select.mixture import apportioned, fractions, mixture
from truing.tables import Table


def table(name: str, n: int, kind: str = "example") -> Table:
    rows = [{"prompt": f"{name} {i}", "completion": "a", "id": f"{name}{i}"} for i in range(n)]
    return Table(kind, rows)


def mixed(
    sizes: dict[str, int],
    shares: dict[str, float] | None = None,
    rows: int = 0,
    stop: str = "first_exhausted",
    *,
    seed: int = 0,
    shuffle: bool = True,
) -> list[str]:
    """Ids of the rows of a mixture of tables of these sizes."""
    tables = {name: table(name, n) for name, n in sizes.items()}
    with use(Context(seed)):
        made = mixture(tables, shares=shares, rows=rows, stop=stop, shuffle=shuffle)  # type: ignore[arg-type]
    return [str(r["id"]) for r in made]


def counted(ids: list[str]) -> dict[str, int]:
    return dict(Counter(one[0] for one in ids))


@pytest.mark.parametrize(
    ("sizes", "shares", "rows", "stop", "wanted"),
    [
        # a is used whole: N = 30 / 0.3 = 100
        ({"a": 30, "b": 1000}, {"a": 0.3, "b": 0.7}, 0, "first_exhausted", {"a": 30, "b": 70}),
        # N = 100 / 0.3 = 333.3, of which 0.7 are 233.3; any sum of the shares will do
        ({"a": 100, "b": 1000}, {"a": 3, "b": 7}, 0, "first_exhausted", {"a": 100, "b": 233}),
        # b is the last: N = 70 / 0.7 = 100, and a's 10 rows come three times
        ({"a": 10, "b": 70}, {"a": 0.3, "b": 0.7}, 0, "all_exhausted", {"a": 30, "b": 70}),
        # halves go to the even number: N = 5 / 0.4 = 12.5, of which 0.2 are 2.5
        (
            {"a": 5, "b": 9, "c": 9},
            {"a": 0.4, "b": 0.4, "c": 0.2},
            0,
            "first_exhausted",
            {"a": 5, "b": 5, "c": 2},
        ),
        # 10 / 3 = 3.33 each, and the first of equal remainders gets the tenth
        ({"a": 9, "b": 9, "c": 9}, {"a": 1, "b": 1, "c": 1}, 10, "first_exhausted",
         {"a": 4, "b": 3, "c": 3}),
        # 7 x (0.5, 0.3, 0.2) = 3.5, 2.1, 1.4
        ({"a": 9, "b": 9, "c": 9}, {"a": 0.5, "b": 0.3, "c": 0.2}, 7, "first_exhausted",
         {"a": 4, "b": 2, "c": 1}),
        ({"a": 2, "b": 50}, {"a": 0.5, "b": 0.5}, 20, "all_exhausted", {"a": 10, "b": 10}),
        ({"a": 3, "b": 12}, None, 0, "first_exhausted", {"a": 3, "b": 12}),
        ({"a": 3, "b": 12}, None, 0, "all_exhausted", {"a": 3, "b": 12}),
        ({"a": 3, "b": 12}, None, 5, "first_exhausted", {"a": 1, "b": 4}),
    ],
)  # fmt: skip
def test_counts_by_hand(
    sizes: dict[str, int],
    shares: dict[str, float] | None,
    rows: int,
    stop: str,
    wanted: dict[str, int],
) -> None:
    assert counted(mixed(sizes, shares, rows, stop)) == wanted


def test_shares_are_decimals_and_not_what_floats_make_of_them() -> None:
    share = fractions({"a": 1, "b": 1, "c": 1}, {"a": 0.1, "b": 0.2, "c": 0.7})
    assert apportioned(10, share) == {"a": 1, "b": 2, "c": 7}
    assert sum(share.values()) == 1


@pytest.mark.parametrize("n", [1, 2, 3, 10, 99, 1000])
def test_any_number_of_rows_is_met_within_a_row_of_each_share(n: int) -> None:
    shares = {"a": 0.05, "b": 0.38, "c": 0.57}
    made = apportioned(n, fractions({"a": 1, "b": 1, "c": 1}, shares))
    assert sum(made.values()) == n
    assert all(abs(made[name] - n * share) < 1 for name, share in shares.items())


def test_rows_are_repeated_evenly_and_drawn_only_once_where_there_are_enough() -> None:
    times = Counter(mixed({"a": 4, "b": 40}, {"a": 1, "b": 1}, 20, "all_exhausted"))
    assert sorted(n for name, n in times.items() if name[0] == "a") == [2, 2, 3, 3]
    assert {n for name, n in times.items() if name[0] == "b"} == {1}


def test_the_seed_decides_what_is_drawn_and_in_which_order() -> None:
    shares, sizes = {"a": 1.0, "b": 1.0}, {"a": 40, "b": 10}
    one, same, other = (mixed(sizes, shares, seed=s) for s in (0, 0, 1))
    assert one == same and set(one) != set(other)
    assert [i[0] for i in one] != sorted(i[0] for i in one)  # the tables lie mixed
    # More of a table are those that there were, and others.
    more = mixed(sizes, {"a": 3.0, "b": 1.0})
    assert {i for i in one if i[0] == "a"} < set(more)
    alone = mixed({"b": 10, "a": 40}, shares)  # the order of the tables decides nothing
    assert alone == one


def test_in_order_a_table_stands_after_the_other() -> None:
    found = mixed({"a": 9, "b": 3}, {"a": 2, "b": 1}, shuffle=False)
    assert [i[0] for i in found] == ["a"] * 6 + ["b"] * 3
    assert found[:6] == sorted(found[:6]) and found[6:] == ["b0", "b1", "b2"]
    again = mixed({"a": 2, "b": 4}, {"a": 1, "b": 1}, stop="all_exhausted", shuffle=False)
    assert again == ["a0", "a1", "a0", "a1", "b0", "b1", "b2", "b3"]


@pytest.mark.parametrize(
    ("shares", "rows", "told"),
    [
        ({"a": 1, "c": 1}, 0, "must have one number for each table .*'c'.* The tables are: a, b"),
        ({"a": 1}, 0, "must have one number for each table"),
        ({"a": 1, "b": 0}, 0, "setting 'shares' must be above 0 .* Leave 'b' out of shares"),
        ({"a": 1, "b": -1}, 0, "setting 'shares' must be above 0"),
        ({"a": 1, "b": 1}, 60, "the share of 'a' is more than the rows .*30.* Set rows to 20 or"),
        ({"a": 1, "b": 99}, 10, "that of 'a' is less than a row .* Raise its share or rows"),
    ],
)
def test_mistakes(shares: dict[str, float], rows: int, told: str) -> None:
    with pytest.raises(InputError, match=told):
        mixed({"a": 10, "b": 50}, shares, rows)


def test_nothing_to_mix() -> None:
    with pytest.raises(InputError, match=r"there is no table. Give \{NAME: TABLE, ...\}"):
        mixed({})
