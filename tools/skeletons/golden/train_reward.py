"""My method by hand, on three pairs of scores."""

from __future__ import annotations

import pytest
import torch
from objective_numbers import values

from truing.core.objective import Measurements
from truing.method import methods

CHOSEN, REJECTED = [0.5, -1.0, 2.0], [0.25, 1.5, -0.5]
# One value a pair, worked out without this package: by hand, or with `math` from the scores.
EXPECTED: list[float] = []


def test_by_hand() -> None:
    assert EXPECTED, "write down what the equation gives for the three pairs"
    last_UK = torch.tensor([CHOSEN, REJECTED]).T
    scores_UKT = torch.stack([torch.full_like(last_UK, 5.0), last_UK], -1)  # the last token counts
    m = Measurements(torch.ones_like(scores_UKT), {"scores": scores_UKT})
    loss = methods["train/my_method"].loss(m, centring=0.1)
    assert values(loss) == pytest.approx(EXPECTED, rel=1e-5)
