"""Ability against transformers' own loss, choices by hand, and win rates by closed form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from truing.core import judge as judge_module
from truing.errors import InputError
from truing.evaluate import adherence
from truing.evaluate import win_rate as win_module
from truing.evaluate.ability import ability, best_choice, token_logp
from truing.evaluate.win_rate import verdicts
from truing.method import methods
from truing.models import Model
from truing.principles import Principle, Principles
from truing.specify import texts
from truing.tables import Table

TEXTS = Table("text", [{"text": "The cat sat on the mat."}, {"text": "A dog ran over the hill."}])
LONG = "A long tale of a cat that sat on a mat, and of a dog that ran over the green hill. " * 2
QUESTIONS = Table(
    "record",
    [
        {"prompt": "One and one is", "choices": ["two", "nine"], "answer": 0},
        {"prompt": "The sky is", "choices": ["soup", "blue"], "answer": 1},
    ],
)


def test_token_logp_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1.0, 1.0, 1.0]]))
    found = token_logp(logits, torch.tensor([0, 2, 1]))
    assert found.tolist() == pytest.approx(torch.log(torch.tensor([0.25, 0.8])).tolist())


def test_best_choice_is_by_mean_and_first_on_ties() -> None:
    short, long = torch.tensor([-1.0]), torch.tensor([-0.9, -0.9, -0.9])
    assert best_choice([short, long]) == 1
    assert best_choice([short, short.clone()]) == 0


def test_log_loss_is_that_of_transformers(tiny_path: Path) -> None:
    model = Model.open(str(tiny_path))
    report = ability(model, TEXTS, QUESTIONS)
    loaded = model.load_module()
    nats, tokens = 0.0, 0
    for row in TEXTS:
        ids = [1, *loaded.tokenizer.encode(str(row["text"]), add_special_tokens=False)]
        ids_1T = torch.tensor([ids])
        with torch.no_grad():
            loss = loaded.module(input_ids=ids_1T, labels=ids_1T).loss
        nats, tokens = nats + float(loss) * (len(ids) - 1), tokens + len(ids) - 1
    found = report.get("ability")
    assert found.value == pytest.approx(nats / tokens, rel=1e-5)
    assert found.lo <= found.value <= found.hi and found.better == "lower"
    assert report.get("choices").n == 2
    assert report.meta["metric"] == "held-out nats per token"


def test_texts_without_a_token_to_score_are_no_part_of_the_interval(tiny_path: Path) -> None:
    model = Model.open(str(tiny_path))
    alone = ability(model, Table("text", TEXTS.rows[:1]), QUESTIONS).get("ability")
    report = ability(model, Table("text", [TEXTS[0], {"text": ""}]), QUESTIONS)
    found = report.get("ability")  # a resample of the empty text alone would have no loss
    wanted = (alone.value, alone.value, alone.value, 1)
    assert (found.value, found.lo, found.hi, found.n) == pytest.approx(wanted)
    assert report.samples is not None and [bool(r["tokens"]) for r in report.samples] == [1, 0]


def test_text_is_cut_at_max_length(tiny_path: Path) -> None:
    model = Model.open(str(tiny_path))
    report = ability(model, TEXTS, QUESTIONS, max_length=5)
    assert report.samples is not None and [r["tokens"] for r in report.samples] == [5, 5]


def test_text_beyond_the_context_is_scored_in_pieces(tiny_path: Path, tmp_path: Path) -> None:
    """Windows of 32 tokens that go on by 16: each token is scored by the first that has it."""
    folder = tmp_path / "short"
    shutil.copytree(tiny_path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}))
    model = Model.open(str(folder))
    loaded = model.load_module()
    ids = loaded.tokenizer.encode(LONG, add_special_tokens=False)
    if loaded.tokenizer.bos_token_id is not None:
        ids = [loaded.tokenizer.bos_token_id, *ids]
    nats, scored = 0.0, 1
    with torch.no_grad():
        for start in range(0, len(ids), 16):
            window = torch.tensor(ids[start : start + 32])
            logp_TV = loaded.module(input_ids=window[None]).logits[0].log_softmax(-1)
            for at in range(scored - start, len(window)):
                nats -= float(logp_TV[at - 1, window[at]])
                scored = start + at + 1
    report = ability(model, Table("text", [{"text": LONG}]), QUESTIONS, max_length=0)
    assert report.samples is not None
    (row,) = report.samples.rows
    assert row["tokens"] == len(ids) - 1 > 64 and scored == len(ids)
    assert row["nats"] == pytest.approx(nats, rel=1e-5)


def test_malformed_question_is_named(tiny_path: Path) -> None:
    bad = Table("record", [{"prompt": "Q", "choices": ["a", "b"], "answer": 2}])
    with pytest.raises(InputError, match=r"row 1.*'answer'"):
        ability(Model.open(str(tiny_path)), TEXTS, bad)


def test_tables_of_another_kind_are_refused(tiny_path: Path) -> None:
    model = Model.open(str(tiny_path))
    pairs = Table("pair", [{"prompt": "p", "chosen": "c", "rejected": "r"}])
    with pytest.raises(InputError, match="needs rows of kind text, got 'pair'"):
        ability(model, pairs, QUESTIONS)
    with pytest.raises(InputError, match="needs rows of kind prompt, got 'text'"):
        ability(model, TEXTS, TEXTS)
    asked = [{"role": "user", "content": "One and one is"}]
    dialogue = Table("prompt", [{"messages": asked, "choices": ["two", "nine"], "answer": 0}])
    with pytest.raises(InputError, match=r"row 1.*a text 'prompt'"):
        ability(model, TEXTS, dialogue)


def test_nothing_is_left_out_in_silence(tiny_path: Path) -> None:
    model = Model.open(str(tiny_path))
    for name in ("max_length", "limit"):
        with pytest.raises(InputError, match=rf"setting '{name}' must be at least 0"):
            ability(model, TEXTS, QUESTIONS, **{name: -1})
        with pytest.raises(InputError, match=rf"setting '{name}' must be at least 0"):
            methods["ability"].check({name: -1}, {})  # before a model is fetched
    none = Table("text", [{"text": ""}, {"text": ""}])
    with pytest.raises(InputError, match=rf"{none.source}: no text has two tokens.*2 texts"):
        ability(model, none, QUESTIONS)


def test_verdicts() -> None:
    ours, theirs = [1.0, 0.0, 0.5], [0.0, 1.0, 0.5]
    assert verdicts(ours, theirs) == [1.0, 0.0, 0.5]
    assert verdicts(theirs, ours) == [0.0, 1.0, 0.5]  # both sides together win once
    assert verdicts(ours, ours) == [0.5] * 3


def test_a_model_wins_half_against_itself(tiny_path: Path) -> None:
    """Its answers are ties, whoever decides."""
    model, prompts = Model.open(tiny_path), Table("prompt", [{"prompt": p} for p in "pqr"])
    letters = {"use": "share_of", "letters": "abcdefghijklm"}
    for how in ({"judge": model}, {"reward": letters}):
        made = win_module.win_rate(model, model, prompts, **how, max_tokens=6, temperature=0.0)
        won = made.get("win rate")
        assert won.value == 0.5 and won.n == 3 and won.lo < 0.5 < won.hi
        assert made.samples is not None and made.samples.column("score") == [0.5] * 3


def test_win_rate_by_principles(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"a": ["x", "x y z", "x"], "b": ["x y z", "x", "y"]}

    def generate(model: SimpleNamespace, prompts: list[str], **_: object) -> list[list[object]]:
        return [[SimpleNamespace(text=t, finish="stop")] for t in answers[model.key]]

    monkeypatch.setattr(adherence, "generate", generate)
    monkeypatch.setattr(texts, "relevance", lambda rows: [0.5] * len(rows))
    rules = Principles([Principle("brief", "Be brief.", check={"use": "max_words", "n": 1})])
    prompts = Table("prompt", [{"prompt": f"Question {i}"} for i in range(3)])
    models = [SimpleNamespace(key=k, name=k) for k in "ab"]
    report = win_module.win_rate(models[0], models[1], prompts, rules)
    assert report.get("win rate").value == pytest.approx(0.5)
    assert [r["score"] for r in report.samples] == [1.0, 0.0, 0.5]
    turned = win_module.win_rate(models[1], models[0], prompts, rules)
    assert [r["score"] for r in turned.samples] == [0.0, 1.0, 0.5]
    monkeypatch.setattr(adherence, "generate", lambda *_, **__: pytest.fail("answers were drawn"))
    with pytest.raises(InputError, match="nothing to decide by"):
        win_module.win_rate(models[0], models[1], prompts)
    with pytest.raises(InputError, match="no principle has a check"):
        loose = Principles([Principle("kind", "Be kind.")])
        win_module.win_rate(models[0], models[1], prompts, loose)


def test_an_answer_that_was_cut_is_not_held_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule asks for an end of the last sentence: of the answers that came to theirs."""
    answers = {"a": ("It goes on and", "length"), "b": ("It has no end", "stop")}

    def generate(model: SimpleNamespace, prompts: list[str], **_: object) -> list[list[object]]:
        text, finish = answers[model.key]
        return [[SimpleNamespace(text=text, finish=finish)] for _ in prompts]

    monkeypatch.setattr(adherence, "generate", generate)
    monkeypatch.setattr(texts, "relevance", lambda rows: [0.5] * len(rows))
    rules = Principles([Principle("end", "End.", check={"use": "ends_with_sentence"})])
    models = [SimpleNamespace(key=k, name=k) for k in "ab"]
    prompts = Table("prompt", [{"prompt": f"Question {i}"} for i in range(2)])
    report = win_module.win_rate(*models, prompts, rules)
    assert report.get("win rate").value == 1.0
    assert report.samples is not None
    ends = [(r["finished"], r["baseline_finished"]) for r in report.samples]
    assert ends == [(False, True)] * 2


def test_win_rate_by_a_judge_says_how_far_to_believe_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five pairs: won, lost, the first place in both orders, a tie, and one that is not read."""
    given = judge_module.Comparison([1.0, 0.0, 1.0, 0.5, None], [1.0, 0.0, 0.0, 0.5, 1.0])

    def generate(model: SimpleNamespace, prompts: list[str], **_: object) -> list[list[object]]:
        return [[SimpleNamespace(text=f"{model.key} x", finish="stop")] for _ in prompts]

    monkeypatch.setattr(adherence, "generate", generate)
    monkeypatch.setattr(judge_module, "compare", lambda *_, **__: given)
    prompts = Table("prompt", [{"prompt": f"Question {i}"} for i in range(5)])
    ours, theirs, judge = (SimpleNamespace(key=k, name=k) for k in "abj")
    report = win_module.win_rate(ours, theirs, prompts, judge=judge)
    found = {m.name: (m.value, m.n) for m in report.measures}
    # Position: the first place is worth 1/2 in one pair of the four that were read.
    assert found == {
        "win rate": (pytest.approx((1 + 0 + 0.5 + 0.5) / 4), 4),
        "extra words": (0.0, 5),
        "position bias": (pytest.approx(0.5 / 4), 4),
        "consistency": (pytest.approx(3 / 4), 4),
        "unparsed": (pytest.approx(1 / 5), 5),
    }
    bias = report.get("position bias")
    assert bias.lo <= bias.value <= bias.hi and bias.hi > bias.lo
    assert bias.unit == "difference of shares"
    assert report.samples is not None and len(report.samples) == 4
    assert report.meta["unparsed"] == [prompts[4]["id"]]
    given = judge_module.Comparison([1.0, None, 1.0, 0.5, None], [1.0, 0.0, 0.0, 0.5, 1.0])
    with pytest.raises(InputError, match="2 of 5 pairs"):
        win_module.win_rate(ours, theirs, prompts, judge=judge)


def test_architectures_without_trees_give_the_same_values(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from truing.evaluate import ability as module

    model = Model.open(str(tiny_path))
    packed = ability(model, TEXTS, QUESTIONS)
    monkeypatch.setattr(module, "_by_trees", lambda loaded: False)
    plain = ability(model, TEXTS, QUESTIONS)
    assert plain.get("ability").value == pytest.approx(packed.get("ability").value, rel=1e-6)
    assert plain.meta["right"] == packed.meta["right"]
