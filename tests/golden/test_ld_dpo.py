"""LD-DPO by hand; alpha = 1 is DPO."""

from __future__ import annotations

import pytest
import torch
from objective_numbers import LOGP, REF, pairs, softminus, values

from truing.train.preference.dpo import dpo
from truing.train.preference.ld_dpo import ld_dpo


def test_by_hand() -> None:
    alpha, expected = 0.3, []
    for row, ref in zip(LOGP, REF):
        shared = min(len(row[0]), len(row[1]))

        def cut(y: list[float]) -> float:
            return sum(y[:shared]) + alpha * sum(y[shared:])

        d = (cut(row[0]) - cut(ref[0])) - (cut(row[1]) - cut(ref[1]))
        expected.append(softminus(0.2 * d))
    assert values(ld_dpo(pairs(), beta=0.2, alpha=alpha)) == pytest.approx(expected, rel=1e-5)


def test_one_is_dpo() -> None:
    m = pairs()
    assert torch.equal(ld_dpo(m, beta=0.2, alpha=1.0).per_unit, dpo(m, beta=0.2).per_unit)
