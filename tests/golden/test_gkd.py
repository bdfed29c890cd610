"""Generalised Jensen-Shannon divergence by hand, its limits, bounds and symmetry."""

from __future__ import annotations

import math

import pytest
import torch
from teaching import drawn, slopes
from test_forward_kl import S, T, kl

from truing.core.objective import Measurements
from truing.errors import InputError
from truing.train.distill.forward_kl import teacher_forward_kl, teacher_reverse_kl
from truing.train.distill.gkd import gkd, gkd_on_policy, teacher_jsd


def jsd(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    return slopes(teacher_jsd, student, teacher_logp=teacher, beta=torch.tensor(beta))[0]


def test_by_hand() -> None:
    student, teacher = torch.tensor([S]).log(), torch.tensor([T]).log()
    for beta in (0.1, 0.5, 0.8):
        m = [beta * t + (1 - beta) * s for t, s in zip(T, S, strict=True)]
        want = beta * kl(T, m) + (1 - beta) * kl(S, m)
        assert float(jsd(student, teacher, beta)) == pytest.approx(want, abs=1e-6)


def test_limits_bound_and_symmetry() -> None:
    a, b = drawn(2).log_softmax(1), drawn(3).log_softmax(1)
    for beta, limit in ((0.0, teacher_forward_kl), (1.0, teacher_reverse_kl)):
        assert torch.equal(jsd(a, b, beta), slopes(limit, a, teacher_logp=b)[0])
    half = jsd(a, b, 0.5)
    assert torch.allclose(half, jsd(b, a, 0.5)) and (half < math.log(2)).all() and (half > 0).all()
    far = torch.tensor([[40.0, 0, 0], [0, 40, 0]], dtype=torch.float64).log_softmax(1)
    assert jsd(far, far.flip(0), 0.5).tolist() == pytest.approx([math.log(2)] * 2, abs=1e-6)
    assert jsd(a, a, 0.3).abs().max() < 1e-12


def test_own_answers_have_a_mean_and_a_weight_of_their_own() -> None:
    mask = torch.tensor([[[1.0, 1], [1, 0]], [[1, 0], [1, 1]]])
    value = torch.tensor([[[0.1, 0.2], [0.6, 9]], [[0.3, 9], [0.2, 0.4]]])
    m = Measurements(mask, {"teacher_jsd": value})
    assert float(gkd_on_policy(m, on_policy=0.25).total()) == pytest.approx(0.75 * 0.2 + 0.25 * 0.4)
    given = gkd(m.branches(0)).total()
    assert torch.allclose(gkd_on_policy(m, on_policy=0.0).total(), given)
    for wrong in ({"beta": 1.5}, {"on_policy": -0.1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            gkd_on_policy(m, **wrong)
