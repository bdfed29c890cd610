"""My method: which of a few answers must be given."""

from __future__ import annotations

from truing.method import methods

ANSWERS = ["three words here", "one", "two words"]
EXPECTED: list[int] = []  # index of the answer that must be given


def test_by_hand() -> None:
    assert EXPECTED, "write down which answer must be given"
    assert methods["decode/my_method"].choose(ANSWERS) == EXPECTED[0]
