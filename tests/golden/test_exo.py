"""EXO by hand."""

from __future__ import annotations

import math

import pytest
from objective_numbers import D, at_reference, pairs, sigma, values

from truing.errors import InputError
from truing.train.preference.exo import exo


def test_by_hand() -> None:
    e, expected = 0.01, []
    for d in D:
        q = sigma(0.3 * d)
        expected.append(
            q * (math.log(q) - math.log(1 - e)) + (1 - q) * (math.log(1 - q) - math.log(e))
        )
    found = exo(pairs(), beta=0.3, label_smoothing=e)
    assert values(found) == pytest.approx(expected, rel=1e-5)


def test_even_labels_at_the_reference_cost_nothing() -> None:
    assert values(exo(at_reference(), label_smoothing=0.5)) == pytest.approx([0.0] * 3, abs=1e-7)


def test_certain_labels_are_refused() -> None:
    with pytest.raises(InputError, match="label_smoothing"):
        exo(pairs(), label_smoothing=0.0)
