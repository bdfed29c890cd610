"""f-DPO by hand for each divergence; the reverse KL, and alpha -> 1, are DPO."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from objective_numbers import pairs, r, softminus, values

from truing.errors import InputError
from truing.method import methods
from truing.train.preference.dpo import dpo
from truing.train.preference.f_dpo import f_dpo, score

FORMS: dict[str, Callable[[float], float]] = {
    "reverse_kl": lambda x: x,
    "forward_kl": lambda x: 1 - math.exp(-x),
    "js": lambda x: math.log(2) - math.log1p(math.exp(-x)),
    "alpha": lambda x: (math.exp(-0.5 * x) - 1) / -0.5,
}


@pytest.mark.parametrize("name", FORMS)
def test_by_hand(name: str) -> None:
    s = FORMS[name]
    expected = [softminus(0.2 * (s(r(i, 0)) - s(r(i, 1)))) for i in range(3)]
    found = f_dpo(pairs(), beta=0.2, divergence=name)  # type: ignore[arg-type]
    assert values(found) == pytest.approx(expected, rel=1e-5)


def test_limits_are_dpo() -> None:
    plain = dpo(pairs(), beta=0.2).per_unit
    assert torch.equal(f_dpo(pairs(), beta=0.2, divergence="reverse_kl").per_unit, plain)
    for a in (1.0, 1.0001):
        near = f_dpo(pairs(), beta=0.2, divergence="alpha", divergence_alpha=a).per_unit
        assert torch.allclose(near, plain, atol=1e-3)


def test_exponents_are_clamped() -> None:
    assert score(torch.tensor([-500.0]), "forward_kl", 0.5).isfinite().all()
    assert score(torch.tensor([500.0]), "alpha", 3.0).isfinite().all()


def test_only_the_alpha_divergence_has_an_alpha() -> None:
    half = f_dpo(pairs(), divergence="alpha", divergence_alpha=0.5).per_unit
    assert torch.equal(f_dpo(pairs(), divergence="alpha").per_unit, half)
    for name in set(FORMS) - {"alpha"}:
        with pytest.raises(InputError, match=r"^setting 'divergence_alpha': only divergence 'a"):
            f_dpo(pairs(), divergence=name, divergence_alpha=0.5)  # type: ignore[arg-type]
    given = methods["f_dpo"].validate({"divergence_alpha": 0.2})
    with pytest.raises(InputError, match="'divergence_alpha'"):  # before a model is fetched
        methods["f_dpo"].check(given, {})
