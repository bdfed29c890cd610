"""My method by hand, on the three pairs of `objective_numbers`."""

from __future__ import annotations

import pytest
from objective_numbers import pairs, values

from truing.method import methods

# One value a pair, worked out without this package: by hand, or with `math` from D, r, lp.
EXPECTED: list[float] = []


def test_by_hand() -> None:
    assert EXPECTED, "write down what the equation gives for the three pairs"
    loss = methods["train/my_method"].loss(pairs(), beta=0.3)
    assert values(loss) == pytest.approx(EXPECTED, rel=1e-5)
