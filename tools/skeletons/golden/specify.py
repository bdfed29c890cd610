"""My method on texts whose rules are known beforehand."""

from __future__ import annotations

from truing.method import methods
from truing.principles import Principles
from truing.tables import Table

TEXTS = ["Be brief.", "Be kind."]
EXPECTED: dict[str, str] = {}  # id -> text of the rules that must come out


def test_by_hand() -> None:
    assert EXPECTED, "write down the rules that must come out"
    made = methods["specify/my_method"](Table("text", [{"text": t} for t in TEXTS]))
    assert isinstance(made, Principles)
    assert {p.id: p.text for p in made} == EXPECTED
