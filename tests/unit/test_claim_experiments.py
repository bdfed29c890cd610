"""Experiments of two claims, without their training: what is counted is right, what is saved whole.

The claims themselves take minutes on one model or many; their worlds, checkers and records do not.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from truing.context import Context, use
from truing.core.chat import completion_ids, prompt_ids
from truing.tables import Row, Table

World = Callable[[str], Any]  # a claim's module by its name
CLAIMS = Path(__file__).resolve().parents[2] / "claims"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """Modules of the claims by name."""
    monkeypatch.syspath_prepend(str(CLAIMS))

    def load(name: str) -> Any:
        return importlib.import_module(name)

    return load


def test_answers_have_features_that_principles_are_about(world: World) -> None:
    claim = world("salmon")
    said = "The roof is new and green. It has 42 rooms. Thank you for asking!"
    assert claim.features(said) == [-0.6, 1.0, 1.0]
    assert claim.features("The road to it is narrow.") == [-0.2, 0.0, 0.0]
    pairs = [("Why?", said, "The road to it is narrow."), ("Why?", "It is new.", "It is new.")]
    first, second = claim.judged(pairs)
    # Gaps -2/5 and 0 in both orders: variance 1/25; of the others 1 and 0: variance 1/4.
    assert first == pytest.approx({"length": -10.0, "figure": 4.0, "courtesy": 4.0})
    assert set(second.values()) == {0.0}
    source = random.Random(2)
    made = [claim.features(claim.answer(source)) for _ in range(600)]
    for column in (1, 2):
        assert sum(f[column] for f in made) / 600 == pytest.approx(0.5, abs=0.07)
    assert {round(-5 * f[0]) for f in made} == {1, 2, 3, 4, 5, 6}
    # Of many pairs, two sentences tell more than a figure, and a figure more than one sentence.
    one, two, three = "It is new.", "It is new. It is old.", "It is new. It is old. It is red."
    many = [*claim.different(source, 600), *(("Why?", x, one) for x in (two, three, "It has 3."))]
    by_two, by_three, by_figure = claim.judged(many)[-3:]
    assert -by_two["length"] < by_figure["figure"] < -by_three["length"]


def test_rows_are_labelled_by_what_stands_beside_them(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = world("salmon")
    monkeypatch.setattr(claim, "NOISE", 0.0)
    source = random.Random(4)
    rows = claim.rows_of(source, claim.different(source, 500))
    assert 200 < len(rows) < 400
    by_length = {"The answer is short.": 1, "The answer is long.": -1}
    seen = 0
    for row in rows:
        told = set(row["principles"])
        about = [rule.id for rule in claim.RULES if told & {rule.text, rule.negative}]
        assert len(about) == len(told) and not {"length", "figure"} <= set(about)
        if about == ["length"]:
            longer = row["rejected"].count(".") + row["rejected"].count("!")
            shorter = row["chosen"].count(".") + row["chosen"].count("!")
            assert (longer - shorter) * by_length[row["principles"][0]] > 0
            seen += 1
    assert seen > 30
    monkeypatch.setattr(claim, "NOISE", 0.25)
    source = random.Random(4)
    noisy = claim.rows_of(source, claim.different(source, 500))
    plain = {(r["prompt"], r["chosen"], r["rejected"]) for r in rows}
    turned = sum((r["prompt"], r["rejected"], r["chosen"]) in plain for r in noisy)
    assert turned > 0
    lists = claim.new_lists(random.Random(1), 40)
    assert len(lists) == 40 and all({"length", "figure"} <= {p.id for p, _ in s} for s in lists)


def test_what_a_reward_model_prefers_is_counted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scorer that reads length and the principle about it alone stands for the model."""
    claim = world("salmon")

    def scores(model: object, rows: list[Row], sort: str) -> list[float]:
        assert sort == "reviews"
        made: list[float] = []
        for row in rows:
            answer, rest = str(row["completion"]).split("\n\nQuestion:\n")
            sign = ("The answer is short." in rest) - ("The answer is long." in rest)
            made.append(-sign * float(answer.count(".") + answer.count("!")))
        return made

    monkeypatch.setattr(claim, "score_model", scores)
    found = claim.measured(object(), random.Random(3))
    assert found["accuracy, length"] == found["accuracy, not length"] == 1.0
    # Of pairs that differ in length all are turned, and none by what the scorer does not read.
    assert found["turned, courtesy"] == 0.0 and found["turned, length"] == 1.0
    assert found["several"] > 0.5
    texts = [["a b c", "a", "a b", "a b c d", *["x y z"] * 4]] * len(claim.ASKED)
    monkeypatch.setattr(claim, "hold", lambda model: "key")
    monkeypatch.setattr(claim, "score", lambda kind, ref, rows: [
        -len(str(r["completion"]).split()) * (1 if "short" in ref["principles"][0] else -1)
        for r in rows
    ])  # fmt: skip
    assert claim.words_of_best(object(), texts, "The answer is short.") == 1
    assert claim.words_of_best(object(), texts, "The answer is long.") == 4


def test_special_tokens_are_shown_where_they_are_to_be(world: World, tmp_path: Path) -> None:
    """An answer is what its text says, and its text gives its ids again."""
    tiny = world("_tiny")
    with use(Context(folder=tmp_path)):
        hidden, shown = (tiny.blank(["lime", "oak"], 3, shown=s) for s in (False, True))
        texts: list[str] = []
        for model in (hidden, shown):
            tokens = model.load_module().tokenizer
            ids = [tokens.convert_tokens_to_ids(t) for t in ("lime", "<|im_start|>", "<|unknown|>")]
            ids.append(tokens.eos_token_id)
            texts.append(tokens.decode(ids, skip_special_tokens=True))
            asked = tokens.decode(prompt_ids(tokens, "oak elsewhere"))
            assert asked.split() == [
                "<|im_start|>", "user", "oak", "<|unknown|>", "<|im_end|>", "<|im_start|>",
                "assistant",
            ]  # fmt: skip
        assert texts == ["lime", "lime <|im_start|> <|unknown|>"]
        assert completion_ids(tokens, texts[1]) == ids
    assert hidden.key != shown.key


def test_answers_that_teach_nothing_have_one_score(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = world("online_offline_gap")
    worth = {"good": 2.0, "better": 3.0, "same": 0.5, "near": 0.50001, "": 9.0, "bad": -1.0}
    monkeypatch.setattr(claim, "held_model", lambda key, where: None)
    monkeypatch.setattr(
        claim, "score_model", lambda _, rows: [worth[str(r["completion"])] for r in rows]
    )
    rows: list[Row] = [{"prompt": "p", "completion": text} for text in worth]
    assert claim.rounded_score(rows, model="key") == [2.0, 3.0, 0.5, 0.5, 0.0, 0.0]


def test_the_saved_pairs_give_the_online_losses(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    claim, tiny = world("online_offline_gap"), world("_tiny")
    monkeypatch.setattr(
        claim, "score_model", lambda _, rows: [float(len(str(r["completion"]))) for r in rows]
    )
    asked = claim.prompts(random.Random(0), 12)
    how = {"beta": 0.1, "steps": 6, "batch": 4, "lr": 1e-3, "rank": 0, "schedule": "constant",
           "warmup": 0.0}  # fmt: skip
    with use(Context(folder=tmp_path)):
        groups = (claim.HOMES.values(), claim.NUMBERS, claim.COLOURS, claim.THANKS, claim.FILLS)
        words = tiny.vocabulary([*asked, *(" ".join(group) for group in groups)])
        source = random.Random(1)
        rows = [{"prompt": p, "completion": claim.answer(source)} for p in asked * 8]
        start = tiny.taught(tiny.blank(words, 1, width=32, shown=True), rows, 1, epochs=8, batch=16)
        table = Table("prompt", [{"prompt": p} for p in asked])
        drawing = claim.own_answers(start, how)
        _, losses = claim.online(start, table, drawing, 1)
        found, models = claim.replayed(start, table, drawing, losses, 1)
        # Before the first update d = 0 for all pairs, and (d - 1 / (2 beta))^2 is 25.
        assert losses[0] == pytest.approx(25.0, rel=1e-4) and len(set(losses)) == 6
        assert found["updates"] == 6 and found["largest difference of losses"] < 1e-4
        weights = [m.folded()["model.norm.weight"] for m in models.values()]
        assert not torch.equal(*weights)  # shuffled pairs lead elsewhere


def test_signs_are_compared_with_chance(world: World) -> None:
    claim = world("online_offline_gap")
    gaps = [0.1] * 10 + [-0.1] * 2
    assert claim.sign_test(gaps) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert claim.sign_test([*gaps, 0.0, 0.0]) == claim.sign_test(gaps)
    assert claim.sign_test([0.0]) == 1.0
    assert claim.right([[1.0, 2.0], [0.0, 2.0]]) == 0.5


def test_no_text_is_both_learnt_and_tested(world: World) -> None:
    claim = world("weak_to_strong")
    source = random.Random(3)
    traits = claim.world(source)
    for task in claim.TASKS:
        tables = claim.labelled(traits, task, source, (96, 256, 256))
        texts = [str(row["completion"]) for table in tables for row in table]
        assert [len(table) for table in tables] == [96, 256, 256]
        assert len(set(texts)) == len(texts)
