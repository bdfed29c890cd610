"""My method: the score of an answer that can be worked out by hand."""

from __future__ import annotations

import pytest

from truing.method import methods

EXPECTED: list[float] = []  # the score of the answer below


def test_by_hand() -> None:
    assert EXPECTED, "write down the score of the answer"
    found = methods["evaluate/my_method"].score("Say three words.", "one two three")
    assert found == pytest.approx(EXPECTED[0])
