"""Answers that are thrown away are not drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from truing.context import Context, use
from truing.core import own_samples
from truing.core.own_samples import Answers, Asked
from truing.method import methods
from truing.models import Model
from truing.tables import Table


def test_before_training_fresh_ones_are_drawn_for_the_receipt_alone(
    shallow_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each step draws, and so what is learnt, is the same as if all rows had had some."""
    before: list[int] = []
    kept = own_samples.kept

    def counted(loaded: object, asked: Sequence[Asked], *more: object) -> list[Answers]:
        before.append(len(asked))
        return kept(loaded, asked, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(own_samples, "kept", counted)
    model = Model.open(shallow_path)
    rows = Table("example", [{"prompt": f"say {w}", "completion": w} for w in "abcdef"])
    keys: list[str] = []
    for shown in (6, 2):
        monkeypatch.setattr(own_samples, "SHOWN", shown)
        with use(Context(folder=tmp_path / str(shown), seed=3)) as context:
            made = methods["gkd_on_policy"](
                model, rows, teacher=model, steps=3, batch=2, rank=2, max_tokens=5, samples=2
            )
        assert isinstance(made, Model)
        keys.append(made.weights_key)
        (said,) = [m for m in context.metrics if "own_answers" in m]
        assert said["own_answers"] == 2 * shown
    assert before == [6, 2] and keys[0] == keys[1] != model.weights_key
