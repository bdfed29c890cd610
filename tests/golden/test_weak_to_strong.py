"""Learning from weak labels by hand; its limits; the gap recovered."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from objective_numbers import softminus, values
from test_bradley_terry import scored

from truing.context import Context, use
from truing.errors import InputError
from truing.evaluate.performance_gap import balanced, recovered
from truing.method import methods
from truing.models import Model
from truing.reports import Report
from truing.tables import Table
from truing.train.supervised.weak_to_strong import (
    hard_labels,
    weak_to_strong,
    weak_to_strong_confidence,
    weak_to_strong_product,
)

S, Q = [0.5, -1.0, 2.0], [0.75, 0.25, 1.0]


def ce(s: float, t: float) -> float:
    return t * softminus(s) + (1 - t) * softminus(-s)


def test_soft_labels_by_hand() -> None:
    made = weak_to_strong(scored(S, score=Q))
    assert values(made) == pytest.approx([ce(s, q) for s, q in zip(S, Q, strict=True)], rel=1e-5)
    assert made.metrics["agreement"].tolist() == [1, 1, 1]
    with pytest.raises(InputError, match="probability"):
        weak_to_strong(scored(S, score=[0.5, 1.5, 0.0]))


def test_confidence_by_hand() -> None:
    m = scored(S, score=Q)
    first = weak_to_strong_confidence(m, None, confidence=0.6, warmup_steps=2)
    assert torch.allclose(first.per_unit, weak_to_strong(m).per_unit)  # c = 0
    assert first.state is not None
    second = weak_to_strong_confidence(m, first.state, confidence=0.6, warmup_steps=2)
    # mean q = 2/3: the threshold is the 1/3 quantile of p, between the two lowest.
    p = [1 / (1 + math.exp(-s)) for s in sorted(S)]
    threshold = p[0] + (2 / 3) * (p[1] - p[0])
    hard = [float(1 / (1 + math.exp(-s)) >= threshold) for s in S]
    assert hard == [1, 0, 1]
    want = [ce(s, 0.7 * q + 0.3 * h) for s, q, h in zip(S, Q, hard, strict=True)]
    assert values(second) == pytest.approx(want, rel=1e-5)


def test_the_share_of_hard_labels_follows_the_weak_ones() -> None:
    source = torch.Generator().manual_seed(0)
    for _ in range(20):
        p, q = torch.rand(40, generator=source), torch.rand(40, generator=source)
        assert abs(float(hard_labels(p, q).mean() - q.mean())) <= 1 / 40 + 1e-6


def test_product_by_hand() -> None:
    made = weak_to_strong_product(scored(S[:2], score=Q[:2]), weak_power=2.0, student_power=0.5)
    want: list[float] = []
    for s, q in zip(S[:2], Q[:2], strict=True):
        p = 1 / (1 + math.exp(-s))
        up, down = p**0.5 * q**2, (1 - p) ** 0.5 * (1 - q) ** 2
        want.append(ce(s, up / (up + down)))
    assert values(made) == pytest.approx(want, rel=1e-4)
    none = weak_to_strong_product(scored(S[:2], score=Q[:2]), student_power=0.0)
    assert torch.allclose(none.per_unit, weak_to_strong(scored(S[:2], score=Q[:2])).per_unit)


def test_gap_recovered() -> None:
    assert recovered(0.6, 0.6, 0.8) == 0 and recovered(0.6, 0.8, 0.8) == 1
    assert recovered(0.6, 0.7, 0.8) == pytest.approx(0.5) and recovered(0.6, 0.9, 0.605) is None
    assert recovered(0.4, 0.3, 0.2) == pytest.approx(0.5)  # lower is better: signs cancel
    assert balanced([True, True, False, True], [True, True, True, False]) == pytest.approx(5 / 6)


def test_from_weak_labels_to_the_gap(tiny_path: Path, tmp_path: Path) -> None:
    words = "lime oak rain stone river cloud".split()
    rows = [
        {"prompt": f"say {w}", "completion": w + end, "label": end == "!"}
        for w in words
        for end in "!?"
    ]
    model, data = Model.open(tiny_path), Table("unpaired", rows)
    with use(Context(folder=tmp_path)):
        weak = methods["guard"](model, data.split(4)[0], steps=1, lr=1e-4)
        assert isinstance(weak, Model)
        labels = methods["weak_labels"](weak, data)
        assert isinstance(labels, Table) and len(labels) == len(rows)
        assert all(0 <= float(str(r["score"])) <= 1 for r in labels)
        student = methods["weak_to_strong_confidence"](model, labels, steps=2)
        ceiling = methods["guard"](model, data, steps=25, lr=3e-3)
        report = methods["performance_gap"](weak, student, ceiling, data)
        assert isinstance(report, Report) and report.get("accuracy ceiling").value >= 0.9
        assert report.samples is not None and len(report.samples) == len(rows)
        with pytest.raises(InputError, match="no score head"):
            methods["weak_labels"](model, data)
