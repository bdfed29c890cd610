"""What rewards read of the rows themselves, such as right answers: asked before anything is drawn.

A reward that cannot do without a column says so by a function of rows and its settings that raises
the InputError which the reward would, without reading any answer (`truing.own_checks`). Else a run
would end in its middle, where the row is drawn.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Generator, Mapping, Sequence

from truing.components import own_copy, told
from truing.core.judging.scores import kind_of
from truing.errors import InputError, shorten
from truing.method import resolve
from truing.own_checks import rows_check_of
from truing.tables import Row, Table, user_text

Refs = Mapping[str, Mapping[str, object]]


def check_gold(refs: Refs, table: Table, where: str) -> None:
    """Raise an InputError that names the first row of `table` which a reward cannot read.

    Args:
        refs: rewards and checks by the name of their term.
    """
    for name, ref in refs.items():
        function, settings = resolve(kind_of(ref), ref, where=where)
        check = rows_check_of(function)
        if check is None:
            continue
        takes = inspect.signature(check).parameters
        at = f"{where} reward {name!r}"
        with _at(at), table.naming(), told(check, "its check of rows", ""):
            check(own_copy(list(table)), **{n: v for n, v in settings.items() if n in takes})


@contextlib.contextmanager
def _at(where: str) -> Generator[None]:
    try:
        yield
    except InputError as error:
        place = re.search(r"(\S*\s*row \d+)$", error.where)
        error.where = f"{where} {place[1] if place else error.where}".strip()
        raise


@contextlib.contextmanager
def of_prompt(rows: Sequence[Row]) -> Generator[None]:
    """Inside the block an error of "row N" names the prompt that this one of `rows` answers."""
    try:
        yield
    except InputError as error:
        found = re.fullmatch(r"(.*?)\s*row (\d+)", error.where)
        if found and 0 < int(found[2]) <= len(rows):
            asked = shorten(user_text(rows[int(found[2]) - 1].get("prompt")), 80)
            error.where = f"{found[1]} an answer to {asked}".strip()
        raise
