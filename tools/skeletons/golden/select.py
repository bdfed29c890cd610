"""My method on rows whose fate is known beforehand."""

from __future__ import annotations

from truing.method import methods
from truing.tables import Table

ANSWERS = ["", "two words", "three words here", "and four words here"]
EXPECTED: list[str] = []  # the answers that must stay, told without this package


def test_by_hand() -> None:
    assert EXPECTED, "write down which answers must stay"
    data = Table("example", [{"prompt": "say", "completion": a} for a in ANSWERS])
    kept = methods["select/my_method"](data, least=3)
    assert isinstance(kept, Table)
    assert kept.column("completion") == EXPECTED
