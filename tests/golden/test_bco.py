"""BCO by hand over two steps of its running mean, and its pairwise form."""

from __future__ import annotations

import math

import pytest
import torch
from objective_numbers import at_reference, pairs, r, singles, softminus, values

from truing.train.preference.bco import bco, bco_pair

B = 0.5
REWARD = [B * r(i, 0) for i in range(3)]


def test_first_step_by_hand() -> None:
    loss = bco(singles([1.0, 0.0, 1.0], prompt_is_good=[0.5] * 3), beta=B)
    delta = sum(REWARD) / 3
    expected = [softminus(s * (x - delta)) for s, x in zip((1, -1, 1), REWARD)]
    assert values(loss) == pytest.approx(expected, rel=1e-6)
    assert loss.state is not None
    assert float(loss.state["mean"]) == pytest.approx(delta) and loss.state["count"] == 3


def test_mean_runs_on() -> None:
    first = bco(singles([1.0, 0.0, 1.0], prompt_is_good=[0.5] * 3), beta=B)
    m = singles([1.0, 0.0, 1.0], prompt_is_good=[0.5] * 3)
    two = type(m)(
        m.mask_UKT[:2],
        {n: t[:2] for n, t in m.tensors.items()},
        {n: c[:2] for n, c in m.columns.items()},
    )
    second = bco(two, first.state, beta=B)
    delta = (sum(REWARD) + sum(REWARD[:2])) / 5
    assert second.state is not None and float(second.state["mean"]) == pytest.approx(delta)
    assert values(second) == pytest.approx(
        [softminus(REWARD[0] - delta), softminus(delta - REWARD[1])], rel=1e-6
    )


def test_density_ratio_weighs_bad_rows() -> None:
    p = [0.9, 0.75, 0.1]
    loss = bco(singles([1.0, 0.0, 0.0], prompt_is_good=p), beta=B)
    plain = bco(singles([1.0, 0.0, 0.0], prompt_is_good=[0.5] * 3), beta=B)
    factors = (loss.per_unit / plain.per_unit).tolist()
    assert factors == pytest.approx([1.0, 3.0, 0.5], rel=1e-5)  # 0.1 / 0.9 is clipped to 0.5


def test_delta_is_constant() -> None:
    m = singles([1.0, 1.0, 1.0], prompt_is_good=[0.5] * 3)
    bco(m, beta=B).per_unit[0].backward()
    slope = m.tensors["logp"]
    (g,) = torch.autograd.grad(bco(m, beta=B).per_unit[0], slope)
    assert g[1:].abs().sum() == 0


def test_pairs_by_hand() -> None:
    expected = [softminus(B * r(i, 0)) + softminus(-B * r(i, 1)) for i in range(3)]
    assert values(bco_pair(pairs(), beta=B)) == pytest.approx(expected, rel=1e-6)
    assert values(bco_pair(at_reference())) == pytest.approx([2 * math.log(2)] * 3)
