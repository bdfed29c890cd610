"""OncoReason's metrics against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from test_survival_answer import made

from truing.models import Model
from truing.train.reward.survival_answer import Prediction, rouge_l

rouge = pytest.importorskip("rouge_score.rouge_scorer")
evaluation = pytest.importorskip("truing.evaluate.survival_prediction")
text_overlap = pytest.importorskip("truing.evaluate.text_overlap")


def test_rouge_l_is_the_library_s() -> None:
    scorer = rouge.RougeScorer(["rougeL"])
    texts = ["the cat sat on the mat", "on the mat a cat sat", "", "Stage IV, grade 3.", "mat"]
    for a in texts:
        for b in texts:
            assert rouge_l(a, b) == pytest.approx(scorer.score(b, a)["rougeL"].fmeasure)
    assert rouge_l("the same words", "the same words") == 1.0


def case(status: int, months: float, said: float | None, guess: int | None = 1) -> object:
    return evaluation.Case(status, months, Prediction(guess, said, None, False))


def test_concordance_by_hand() -> None:
    # Known pairs: (a, b), (a, c), (b, c); c is censored at 9, d censored at 1 comes in no pair.
    a, b, c, d = case(1, 2, 5), case(1, 4, 4), case(0, 9, 8), case(0, 1, 99)
    assert evaluation.concordance([a, b, c, d]) == pytest.approx(2 / 3)
    assert evaluation.concordance([a, case(1, 4, 5), c]) == pytest.approx(2.5 / 3)
    assert evaluation.concordance([a, case(1, 4, None)]) != evaluation.concordance(
        [a, b]
    )  # nothing to compare
    assert math.isnan(evaluation.concordance([c, d]))


def test_errors_and_f1_by_hand() -> None:
    cases = [case(1, 10, 12), case(1, 5, 4, 0), case(0, 7, 90, 0), case(0, 3, None, None)]
    assert evaluation.mae(cases) == pytest.approx(1.5)  # the living have no survival to miss
    # deceased: 1 right, 1 missed, 1 unreadable counted against it; living the same.
    assert evaluation.macro_f1(cases) == pytest.approx(0.5)
    assert evaluation.mae([case(1, 10, 10)]) == 0


def test_bert_score_by_hand() -> None:
    x = np.array([[1, 0], [0, 1]], np.float32)
    y = np.array([[1, 0], [0.6, 0.8], [1, 0]], np.float32)
    p, r = (1 + 0.8) / 2, (1 + 0.8 + 1) / 3
    assert text_overlap.bert_f1(x, y) == pytest.approx(2 * p * r / (p + r))
    assert text_overlap.bert_f1(x, x) == pytest.approx(1.0)
    assert text_overlap.bert_f1(x, y[:0]) == 0.0


def test_report(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact answers have no error and full overlap; the encoder is put in place of by words."""

    def vectors(text: str) -> np.ndarray:
        words = text.split() or ["-"]
        return np.eye(64, dtype=np.float32)[[len(w) for w in words]]

    data = made("test")
    wanted = [(str(r["completion"]), True) for r in data]
    monkeypatch.setattr(evaluation, "answer_all", lambda *_, **__: wanted)
    monkeypatch.setattr(text_overlap, "token_vectors", vectors)
    monkeypatch.setattr(
        evaluation, "embed", lambda texts: np.eye(16, dtype=np.float32)[[1] * len(texts)]
    )
    report = evaluation.survival_prediction(Model.open(tiny_path), data, made("train"))
    found = {m.name: m.value for m in report}
    for name in ("coverage", "all blocks", "accuracy", "macro F1", "BLEU", "ROUGE-L", "BERTScore",
                 "relevance", "coherence", "prompt overlap"):  # fmt: skip
        assert found[name] == pytest.approx(1.0), name
    assert found["MAE"] <= 0.5 < found["MAE of the mean"]  # months are told in whole numbers
    assert found["concordance"] > 0.95 and found["R2"] > 0.9
