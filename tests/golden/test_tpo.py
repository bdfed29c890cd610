"""TPO by hand."""

from __future__ import annotations

import pytest
from objective_numbers import LOGP, lp, mask_of, mean, padded, softminus, total

from truing.core.objective import Measurements
from truing.train.preference.tpo import tpo, tpo_l

GOLD = [[-0.5, -0.5], [-1.5], [-0.25, -1.0, -2.0]]
ROWS = [(*y, g) for y, g in zip(LOGP, GOLD)]
IMITATE = -sum(map(sum, GOLD)) / 6


def test_by_hand() -> None:
    m = Measurements(mask_of(ROWS), {"logp": padded(ROWS)})
    rank = sum(softminus(0.3 * (lp(i, 0) - lp(i, 1))) for i in range(3)) / 3
    assert total(tpo(m, beta=0.3, alpha=0.7)) == pytest.approx(rank + 0.7 * IMITATE, rel=1e-6)
    rank = sum(softminus(0.3 * (mean(i, 0) - mean(i, 1)) - 0.5) for i in range(3)) / 3
    assert total(tpo_l(m, beta=0.3, alpha=0.7)) == pytest.approx(rank + 0.7 * IMITATE, rel=1e-6)
