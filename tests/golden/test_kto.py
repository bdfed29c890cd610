"""KTO by hand, with mismatched answers above and below zero."""

from __future__ import annotations

import pytest
import torch
from objective_numbers import pairs, r, sigma, singles, values

from truing.core.objective import Measurements
from truing.errors import InputError
from truing.train.preference.kto import apo_zero_unpaired, kto


def rows(sign: float = 1.0) -> Measurements:
    """Own answer: the chosen one; mismatched: the rejected one, its ratio times `sign`."""
    m = pairs(label=[1.0, 0.0, 1.0])
    logp = m.logp_UKT.clone()
    logp[:, 1] = m.ref_logp_UKT[:, 1] + sign * (logp[:, 1] - m.ref_logp_UKT[:, 1])
    return m.having(logp=logp)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_by_hand(sign: float) -> None:
    z0 = max(0.0, sum(sign * r(i, 1) for i in range(3)) / 3)
    assert (z0 > 0) == (sign < 0)
    loss = kto(rows(sign), beta=0.4, desirable=2.0, undesirable=0.5)
    expected = [
        2.0 * (1 - sigma(0.4 * (r(0, 0) - z0))),
        0.5 * (1 - sigma(0.4 * (z0 - r(1, 0)))),
        2.0 * (1 - sigma(0.4 * (r(2, 0) - z0))),
    ]
    assert values(loss) == pytest.approx(expected, rel=1e-5)
    assert loss.metrics["kl"].tolist() == pytest.approx([z0] * 3)


def test_at_the_reference_and_without_gradient_into_z0() -> None:
    m = rows(-1.0)
    leaf = m.logp_UKT.detach().requires_grad_()
    kto(m.having(logp=leaf)).total().backward()
    assert leaf.grad is not None
    assert leaf.grad[:, 1].abs().sum() == 0 and leaf.grad[:, 0].abs().sum() > 0
    same = m.having(logp=m.ref_logp_UKT)
    assert values(kto(same)) == pytest.approx([0.5] * 3)


def test_one_row_is_refused() -> None:
    m = rows()
    one = Measurements(m.mask_UKT[:1], {n: t[:1] for n, t in m.tensors.items()}, m.columns)
    with pytest.raises(InputError, match="two rows"):
        kto(one)


def test_apo_zero_unpaired_by_hand() -> None:
    loss = apo_zero_unpaired(singles([1.0, 0.0, 1.0]), beta=0.4)
    reward = [0.4 * r(i, 0) for i in range(3)]
    expected = [1 - sigma(reward[0]), sigma(reward[1]), 1 - sigma(reward[2])]
    assert values(loss) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(loss.metrics["accuracy"], torch.tensor([0.0, 0.0, 1.0]))
