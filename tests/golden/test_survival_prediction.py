"""OncoReason's metrics against values worked out by hand."""

from __future__ import annotations

import importlib
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from test_survival_answer import made
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from truing.core.tiny import fill
from truing.models import Model
from truing.train.reward.survival_answer import Prediction, rouge_l

rouge = pytest.importorskip("rouge_score.rouge_scorer")
for package in ("sklearn", "sacrebleu", "bert_score"):  # which the modules here import
    pytest.importorskip(package)
evaluation = importlib.import_module("truing.evaluate.survival_prediction")
text_overlap = importlib.import_module("truing.evaluate.text_overlap")


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


def test_concordance_of_many() -> None:
    source = np.random.default_rng(6)

    def some(n: int, most: int) -> list[object]:
        rows = source.integers(0, most, (n, 2)).tolist()
        return [case(int(s), t, m) for s, (t, m) in zip(source.random(n) < 0.7, rows)]

    few, pairs, right = some(200, 40), 0, 0.0
    for a in few:
        for b in few:
            if a.status == 1 and a.months < b.months:
                pairs += 1
                right += 0.5 * (a.said.months == b.said.months) + (a.said.months < b.said.months)
    assert evaluation.concordance(few) == pytest.approx(right / pairs, abs=1e-12)
    many = some(20_000, 240)
    tracemalloc.start()
    assert 0.49 < evaluation.concordance(many) < 0.51
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_errors_and_f1_by_hand() -> None:
    cases = [case(1, 10, 12), case(1, 5, 4, 0), case(0, 7, 90, 0), case(0, 3, None, None)]
    assert evaluation.mae(cases) == pytest.approx(1.5)  # the living have no survival to miss
    # deceased: 1 right, 1 missed, 1 unreadable counted against it; living the same.
    assert evaluation.macro_f1(cases) == pytest.approx(0.5)
    assert evaluation.mae([case(1, 10, 10)]) == 0


def test_a_single_step_has_no_coherence(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = {"p": (1.0, 0.0), "one": (0.6, 0.8), "two": (0.0, 1.0)}
    monkeypatch.setattr(
        evaluation, "embed", lambda texts: np.array([vectors[t] for t in texts], np.float32)
    )
    alone = {"relevance": 0.6, "minimum relevance": 0.6, "prompt overlap": 0.6}
    assert evaluation.trace_quality("p", ["one"]) == pytest.approx(alone)
    both = {"relevance": 0.3, "minimum relevance": 0.0, "prompt overlap": 0.6, "coherence": 0.8}
    assert evaluation.trace_quality("p", ["one", "two"]) == pytest.approx(both)

    def reasons(*texts: str | None) -> dict[str, tuple[float, int]]:
        cases = [evaluation.Case(1, 5.0, Prediction(1, 5.0, text, True)) for text in texts]
        made = evaluation._reasons([{"prompt": "p"}] * len(texts), cases)
        return {m.name: (round(m.value, 6), m.n) for m in made}

    # Of three patients one has two steps, one none: the coherence is that of the first alone.
    found = reasons("1. one\n2. two", "1. one", None)
    assert found["coherence"] == (0.8, 1) and found["relevance"] == (0.45, 2)
    assert "coherence" not in reasons("1. one", "1. two") and reasons(None) == {}


@pytest.fixture
def small_encoder(monkeypatch: pytest.MonkeyPatch) -> tuple[BertModel, PreTrainedTokenizerFast]:
    """A BERT of two layers with the words of this file's texts, in place of the real one."""
    words = "the cat sat on a mat dog".split()
    known = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    core = Tokenizer(WordLevel(known, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=512,
    )  # fmt: skip
    config = BertConfig(
        vocab_size=len(known), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    module = BertModel(config, add_pooling_layer=False).eval()
    fill(module, 0.4, 3)
    monkeypatch.setattr(text_overlap, "encoder", lambda: (module, tokenizer))
    return module, tokenizer


def test_bert_score_by_hand(
    small_encoder: tuple[BertModel, PreTrainedTokenizerFast],
) -> None:
    """Each word with its nearest; a word may match a special token, which itself does not count."""
    module, tokenizer = small_encoder

    def states(text: str) -> np.ndarray:
        with torch.no_grad():
            found = module(torch.tensor([tokenizer.encode(text)])).last_hidden_state[0].numpy()
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    said = ["the cat sat on the mat", "a dog", "", "the cat", " "]
    wanted = ["on the mat a cat sat", "the cat sat", "the cat", "the cat", "  "]
    found = text_overlap.bert_scores(said, wanted)
    assert found[2] == found[4] == 0.0 and found[3] == pytest.approx(1.0)
    for i in (0, 1):
        cosine = states(said[i]) @ states(wanted[i]).T
        p = float(np.mean([max(row) for row in cosine[1:-1]]))
        r = float(np.mean([max(column) for column in cosine.T[1:-1]]))
        assert found[i] == pytest.approx(2 * p * r / (p + r), abs=1e-5)
        assert 0 < found[i] < 1
    with pytest.raises(ValueError, match=r"shorter|longer"):
        text_overlap.bert_scores(said, wanted[:2])


def test_report(tiny_path: Path, monkeypatch: pytest.MonkeyPatch, small_encoder: object) -> None:
    """Exact answers have no error and full overlap."""
    data = made("test")
    wanted = [(str(r["completion"]), True) for r in data]
    monkeypatch.setattr(evaluation, "answer_all", lambda *_, **__: wanted)
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
    assert report.get("macro F1").lo < 1  # of so few patients
