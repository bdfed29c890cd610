"""AOT by hand; one pair is DPO; the order within each list does not matter."""

from __future__ import annotations

import pytest
import torch
from objective_numbers import LOGP, REF, pairs, r, softminus, total, values

from truing.core.objective import Measurements
from truing.train.preference.aot import aot, aot_unpaired
from truing.train.preference.dpo import dpo


def test_paired_by_hand() -> None:
    a = sorted(sum(w) - sum(x) for w, x in LOGP)
    b = sorted(sum(w) - sum(x) for w, x in REF)
    expected = [softminus(0.2 * (p - q)) for p, q in zip(a, b)]
    assert values(aot(pairs(), beta=0.2)) == pytest.approx(expected, rel=1e-5)


def test_unpaired_by_hand() -> None:
    w, x = sorted(r(i, 0) for i in range(3)), sorted(r(i, 1) for i in range(3))
    e = 0.1
    expected = [
        (1 - e) * softminus(0.2 * (p - q)) + e * softminus(-0.2 * (p - q)) for p, q in zip(w, x)
    ]
    found = aot_unpaired(pairs(), beta=0.2, label_smoothing=e)
    assert values(found) == pytest.approx(expected, rel=1e-5)


def test_one_pair_is_dpo() -> None:
    m = pairs()
    for i in range(3):
        one = Measurements(m.mask_UKT[i : i + 1], {n: t[i : i + 1] for n, t in m.tensors.items()})
        for loss in (aot, aot_unpaired):
            assert values(loss(one, beta=0.3)) == pytest.approx(values(dpo(one, beta=0.3)))


def test_policy_and_reference_may_be_shuffled_apart() -> None:
    m = pairs()
    turn = torch.tensor([2, 0, 1])
    # With one mask for both, shuffle sums: put them on one token each.
    flat = Measurements(
        torch.ones(3, 2, 1),
        {n: m.seq(n)[..., None] for n in ("logp", "ref_logp")},
    )
    other = flat.having(logp=flat.logp_UKT[turn])
    assert total(aot(flat)) == pytest.approx(total(aot(other)))
    assert total(dpo(flat)) != pytest.approx(total(dpo(other)))
