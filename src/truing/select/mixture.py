"""Mix several tables into one by shares, to train on several data sets in one run.

    n_t = round(N s_t),    N = min over t of m_t / s_t    (first_exhausted; all_exhausted: max)

with m_t rows of table t, its share s_t of all rows (as given, divided by their sum; without any by
m_t, so that n_t = m_t) and n_t rows drawn: the table that decides N is used whole. With `rows`, N
is that number, and N s_t is rounded so that all add up to it: down, and up for the largest
remainders. Shares are thus met to the row. Hugging Face's `interleave_datasets`, from which `stop`
has its two names, draws a table for each row, and so meets its probabilities on average.

Which rows are drawn is decided by the step's seed, the table's name and the rows' ids, not by their
place or by the other tables; where n_t is above m_t, none comes again before all came as often. The
first table's kind is that of all, or one that its rows read as (Alpaca's form beside ShareGPT's
become examples): others are read or converted as training does it, which is told and recorded. Ids
stay; where tables count alike, that of a later one gets the table's number.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal, cast

from truing.context import current
from truing.core.batch.row_kinds import alike, common_kind, is_taken
from truing.core.trainer.preflight import check_rows
from truing.errors import InputError
from truing.method import method
from truing.own_checks import checks
from truing.tables import Row, Table, content_hash

WHERE = "select/mixture"
FIRST = "first_exhausted"
MANY = 100  # times all rows that there are; nobody means to make more


def fractions(sizes: Mapping[str, int], shares: Mapping[str, float] | None) -> dict[str, Fraction]:
    """Each table's share of all rows, as given or by its size; they sum to 1 exactly."""
    given = sizes if shares is None else shares
    if set(given) != set(sizes):
        raise InputError(
            "setting 'shares' must have one number for each table",
            where=WHERE,
            seen=sorted(given),
            fix=f"The tables are: {', '.join(sizes)}",
        )
    exact = {name: Fraction(str(given[name])) for name in sizes}  # 0.1 is a tenth
    return {name: one / sum(exact.values()) for name, one in exact.items()}


def apportioned(rows: int, share: Mapping[str, Fraction]) -> dict[str, int]:
    """`rows` in whole numbers by shares: down, and up for the largest remainders."""
    made = {name: math.floor(rows * one) for name, one in share.items()}
    behind = sorted(share, key=lambda name: made[name] - rows * share[name])
    for name in behind[: rows - sum(made.values())]:
        made[name] += 1
    return made


def counts(
    sizes: Mapping[str, int], share: Mapping[str, Fraction], rows: int, stop: str
) -> dict[str, int]:
    """How many rows each table gives; see the equation above.

    Raises:
        InputError: a table would give more rows than it has, or none.
    """
    whole = {name: size / share[name] for name, size in sizes.items()}
    total = (min if stop == FIRST else max)(whole.values())
    if rows:
        made = apportioned(rows, share)
    else:
        made = {name: round(total * one) for name, one in share.items()}
    short = [name for name in sizes if made[name] > sizes[name]]
    if short and stop == FIRST:
        raise InputError(
            f"setting 'rows': the share of {short[0]!r} is more than the rows that it has",
            where=WHERE,
            seen={"share": made[short[0]], "has": sizes[short[0]]},
            fix=f"Set rows to {math.floor(total)} or less, or stop to all_exhausted, which repeats "
            "rows",
        )
    if not rows and sum(made.values()) > MANY * sum(sizes.values()):
        raise InputError(
            f"setting 'shares': to use each table whole, rows are repeated {MANY} times and more",
            where=WHERE,
            seen=made,
            fix="Set rows to how many there are to be, or stop to first_exhausted",
        )
    if none := [name for name in sizes if not made[name]]:
        raise InputError(
            f"setting 'shares': that of {none[0]!r} is less than a row",
            where=WHERE,
            seen=made,
            fix=f"Raise its share{' or rows' if rows else ''}, or leave the table out",
        )
    return made


def drawn(ids: list[str], n: int, seed: int) -> list[int]:
    """Places of `n` rows: all of them as often as they go into n, the rest by seed and id."""
    times, rest = divmod(n, len(ids))
    ranked = sorted(range(len(ids)), key=lambda i: content_hash([seed, ids[i]])) if rest else []
    return [*range(len(ids))] * times + sorted(ranked[:rest])


def shuffled(rows: list[Row], seed: int) -> list[int]:
    """Places of the rows in an order that their ids and the seed decide."""
    seen: Counter[object] = Counter()
    keys: list[str] = []
    for row in rows:
        keys.append(content_hash([seed, row["id"], seen[row["id"]]]))
        seen[row["id"]] += 1
    return sorted(range(len(rows)), key=keys.__getitem__)


def _check(settings: Mapping[str, object], tables: Mapping[str, Table]) -> None:
    """What is asked before anything runs, of the tables at hand or promised by a step."""
    shares = cast("Mapping[str, float] | None", settings["shares"])
    for name, share in (shares or {}).items():
        if share <= 0:
            fix = f"Leave {name!r} out of shares and data where it is to give no row"
            raise InputError("setting 'shares' must be above 0", where=WHERE, seen=shares, fix=fix)
    named = {name.partition(" ")[2]: table for name, table in tables.items()}
    if shares is not None and (named.keys() - shares.keys()):
        fractions(dict.fromkeys(named, 1), shares)  # says so
    kind = common_kind([*named.values()]) if named else ""
    for name, table in named.items():
        if table.kind != kind:
            try:
                check_rows(table, kind, f"{WHERE} {name}")
            except InputError as error:
                if is_taken(kind, table.kind):
                    error.fix = f"Give {name!r} first: others are read as rows of the first's kind"
                elif kind == "record":
                    error.fix = f"Rename columns of {next(iter(named))!r}: its rows are of no kind"
                raise


@method(within={"rows": (0, None)}, makes="data")
@checks(_check)
def mixture(
    data: dict[str, Table],
    *,
    shares: dict[str, float] | None = None,
    rows: int = 0,
    stop: Literal["first_exhausted", "all_exhausted"] = "first_exhausted",
    shuffle: bool = True,
) -> Table:
    """Mix several tables into one by shares, to train on several data sets in one run.

    Args:
        data: tables by name; rows of other kinds are read as the first one's, or all as examples.
        shares: of all rows that each table gives, such as {chat: 0.7, code: 0.3}; divided by their
            sum. None takes all rows of each, or with `rows` as many as its size says.
        rows: how many in all; 0 for as many as the shares allow.
        stop: "first_exhausted" ends with the first table that has no further rows; "all_exhausted"
            when each was used whole, and repeats rows of the others. With `rows`, whether rows may
            be repeated to make so many.
        shuffle: in one random order; else a table after the other, its rows in their order.
    """
    if not data:
        raise InputError("there is no table", where=WHERE, fix="Give {NAME: TABLE, ...}")
    _check({"shares": shares}, {f"data {name}": table for name, table in data.items()})
    kind, context = common_kind([*data.values()]), current()
    found = {name: alike(table, kind, f"{WHERE} {name}") for name, table in data.items()}
    sizes = {name: len(table) for name, (table, _) in found.items()}
    wanted = counts(sizes, fractions(sizes, shares), rows, stop)
    parts: list[Table] = []
    told: list[str] = []
    for name, (table, said) in found.items():
        ids = [str(row["id"]) for row in table]
        places = drawn(ids, wanted[name], context.stream(f"mixture {name}"))
        parts.append(table.take(places).with_lineage(filter=f"mixture {name}"))
        context.metric(table=name, rows=wanted[name], of=len(table), **said)
        made = f" ({said['conversion']})" if "conversion" in said else ""
        told.append(f"{name} {wanted[name]} of {len(table)} rows{made}")
    print(f"{WHERE}: {', '.join(told)}", file=sys.stderr)
    whole = Table.joined(parts)
    return whole.take(shuffled(whole.rows, context.stream("order"))) if shuffle else whole
