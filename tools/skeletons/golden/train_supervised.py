"""My method by hand, on the chosen answers of `objective_numbers`."""

from __future__ import annotations

import pytest
from objective_numbers import pairs, total

from truing.method import methods

# The loss of the step, worked out without this package: by hand, or with `math` from LOGP.
EXPECTED: list[float] = []


def test_by_hand() -> None:
    assert EXPECTED, "write down what the equation gives for the three answers"
    loss = methods["train/my_method"].loss(pairs().branches(0))
    assert total(loss) == pytest.approx(EXPECTED[0], rel=1e-5)
