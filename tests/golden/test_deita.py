"""Deita's selection: its exact properties, and the filter by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from truing.select.deita import deita, repr_filter, row_score, turns
from truing.select.scorers import expected_score_of
from truing.tables import Table

RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=60).tolist()
VECTORS = RNG.normal(size=(60, 4)).astype(np.float32)


def test_filter_by_hand() -> None:
    vectors = np.array([[1, 0], [0, 1], [1, 0.01], [-1, 0]], dtype=np.float32)
    # order by score: 2, 0, 1, 3; row 0 resembles row 2
    assert repr_filter([3, 2, 4, 1], vectors, m=4, tau=0.9) == [2, 1, 3]


def test_a_dropped_row_drops_nothing() -> None:
    # 1 resembles 0 and 2 resembles 1, but 2 does not resemble 0: sequential rule keeps 0 and 2
    angles = np.radians([0, 20, 40])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert repr_filter([3, 2, 1], vectors, m=3, tau=float(np.cos(np.radians(30)))) == [0, 2]


def test_tau_above_one_keeps_the_top_m() -> None:
    doubled = np.concatenate([VECTORS, VECTORS])
    top = np.argsort(-np.array(SCORES * 2), kind="stable")[:10].tolist()
    assert repr_filter(SCORES * 2, doubled, m=10, tau=1.001) == top


def test_tau_below_minus_one_keeps_the_first() -> None:
    assert repr_filter(SCORES, VECTORS, m=10, tau=-1.001) == [int(np.argmax(SCORES))]


def test_selected_are_pairwise_different_and_a_prefix() -> None:
    chosen = repr_filter(SCORES, VECTORS, m=20, tau=0.7)
    unit = VECTORS[chosen] / np.linalg.norm(VECTORS[chosen], axis=1, keepdims=True)
    cosines = unit @ unit.T - 2 * np.eye(len(chosen))
    assert cosines.max() <= 0.7 + 1e-6
    for m in (1, 5, 11):
        assert repr_filter(SCORES, VECTORS, m=m, tau=0.7) == chosen[:m]


def test_scale_of_scores_and_vectors_does_not_matter() -> None:
    chosen = repr_filter(SCORES, VECTORS, m=20, tau=0.7)
    assert repr_filter([4.0 * s for s in SCORES], VECTORS * 8.0, m=20, tau=0.7) == chosen


def test_ties_go_to_the_earlier_row() -> None:
    assert repr_filter([1.0] * 60, VECTORS, m=3, tau=1.1) == [0, 1, 2]


def test_row_score() -> None:
    assert row_score([2.0, 3.0], [4.0, 5.0]) == 23.0
    assert row_score([2.0, 3.0], [4.0, 5.0], mean=True) == 11.5


def test_expected_score() -> None:
    uniform = torch.zeros(1, 6)
    assert expected_score_of(uniform).item() == pytest.approx(3.5)
    for digit in range(6):
        one_hot = torch.full((1, 6), -1e4)
        one_hot[0, digit] = 0.0
        assert expected_score_of(one_hot).item() == pytest.approx(digit + 1)
    z = torch.log(torch.tensor([[0.5, 0.25, 0.25, 0, 0, 0]]) + 1e-12)
    assert expected_score_of(z).item() == pytest.approx(0.5 + 0.5 + 0.75, abs=1e-5)


def test_turns_without_a_reply() -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert turns({"messages": messages}) == [("a", "b"), ("c", "")]


def test_method_with_scorers_by_name() -> None:
    rows = [{"prompt": "a b", "completion": "w " * n} for n in (3, 9, 5, 9)]
    data = Table("example", rows)
    constant = {"use": "constant"}
    picked = deita(data, m=2, complexity=constant, embedding="exact", tau=0.99)
    assert [len(str(r["completion"]).split()) for r in picked] == [9, 5]
    assert picked[0]["final_score"] == 9.0
    from_column = deita(
        Table("example", [r | {"s": float(-i)} for i, r in enumerate(rows)]),
        m=1,
        complexity=constant,
        quality={"use": "column", "name": "s"},
        embedding="exact",
    )
    assert from_column[0]["completion"] == rows[0]["completion"]
