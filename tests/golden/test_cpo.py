"""CPO's three forms and SLiC by hand."""

from __future__ import annotations

import pytest
from objective_numbers import LOGP, lp, mask_of, mean, nll, padded, pairs, softminus, total

from truing.core.objective import Measurements
from truing.train.preference.cpo import cpo, slic

GAP = [lp(i, 0) - lp(i, 1) for i in range(3)]


def test_forms_by_hand() -> None:
    b = 0.3
    plain = sum(softminus(b * g) for g in GAP) / 3
    assert total(cpo(pairs(), beta=b, alpha=0.5)) == pytest.approx(plain + 0.5 * nll(), rel=1e-5)
    hinge = sum(max(0.0, 1 - b * g) for g in GAP) / 3
    assert total(cpo(pairs(), beta=b, alpha=0.0, loss="hinge")) == pytest.approx(hinge, rel=1e-5)
    ipo = sum((mean(i, 0) - mean(i, 1) - 1 / (2 * b)) ** 2 for i in range(3)) / 3
    assert total(cpo(pairs(), beta=b, alpha=0.0, loss="ipo")) == pytest.approx(ipo, rel=1e-5)
    e = 0.1
    soft = sum((1 - e) * softminus(b * g) + e * softminus(-b * g) for g in GAP) / 3
    found = cpo(pairs(), beta=b, alpha=0.0, label_smoothing=e)
    assert total(found) == pytest.approx(soft, rel=1e-5)


def test_slic_by_hand() -> None:
    gold = [[-0.5, -0.5], [-1.5], [-0.25, -1.0, -2.0]]
    rows = [(*y, g) for y, g in zip(LOGP, gold)]
    m = Measurements(mask_of(rows), {"logp": padded(rows)})
    rank = sum(max(0.0, 2.0 - g) for g in GAP) / 3
    imitate = -sum(map(sum, gold)) / 6
    assert total(slic(m, delta=2.0, alpha=0.25)) == pytest.approx(rank + 0.25 * imitate)
