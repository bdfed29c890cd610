"""Keep the rows whose text passes a list of checks: the plainest filter there is.

The checks are those of principles (`truing list` shows them), applied to the prompt, the answer or
the chosen answer: synthesized prompts that end in mid-sentence or in another language are better
dropped before a model answers them. Our own; no paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

from truing import own_checks
from truing.components import asked
from truing.errors import InputError
from truing.method import method, score
from truing.select.near_duplicates import row_text
from truing.specify.satisfaction import KEPT
from truing.tables import Row, Table


def passing(rows: list[Row], checks: list[dict[str, object]], of: str) -> list[bool]:
    """For each row, whether the text in column `of` keeps every check."""
    texts = [row_text(r) if of == "prompt" else str(r.get(of, "")) for r in rows]
    asked: list[Row] = [
        {"prompt": row_text(r), "completion": t} for r, t in zip(rows, texts, strict=True)
    ]
    kept = [True] * len(rows)
    for check in checks:
        values = score("check", check, asked, where="select/checked")
        kept = [k and v >= KEPT for k, v in zip(kept, values, strict=True)]
    return kept


def _check(settings: Mapping[str, object], tables: Mapping[str, Table]) -> None:
    for ref in cast("list[dict[str, object]]", settings.get("checks", [])):
        asked("check", ref, where="select/checked setting 'checks'")


@method(makes="data")
@own_checks.checks(_check)
def checked(
    data: Table,
    *,
    checks: list[dict[str, object]],
    of: Literal["prompt", "completion", "chosen", "rejected"] = "prompt",
) -> Table:
    """Keep the rows whose text passes a list of checks.

    Args:
        checks: references to check components, such as {use: min_words, n: 5}.
        of: the column that the checks read.
    """
    if not checks:
        raise InputError("give at least one check", where="select/checked setting 'checks'")
    if of != "prompt":
        data.column(of)  # names the column when it is not there
    with data.naming():
        kept = passing(data.rows, checks, of)
    if data.rows and not any(kept):
        raise InputError(
            f"none of {len(data)} rows passes the checks",
            where="select/checked",
            fix="Loosen the checks, or leave one out",
        )
    names = ", ".join(str(c.get("use")) for c in checks)
    found = data.take(i for i, k in enumerate(kept) if k)
    return found.with_lineage(filter=f"checked {names}")
