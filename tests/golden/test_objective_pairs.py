"""Pairs of several objectives from one set of answers: vectors of rewards and choices by hand."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from truing.context import Context, use
from truing.errors import InputError
from truing.synthesize import objective_pairs as module
from truing.synthesize.objective_pairs import best_and_worst, objective_pairs
from truing.tables import Row, Table
from truing.train.reward import rules

MODEL = SimpleNamespace(key="model-key", name="model")
BRIEF, KIND, LONG, CUT = "Yes.", "Yes, of course my friend.", "It may be so or not so.", "Yes, my"
WORDS = {"brief": {"use": "length_near", "n": 1}, "kind": {"use": "must_include", "words": ["my"]}}
PROMPTS = Table("prompt", [{"prompt": "Is it?"}, {"prompt": "Was it?"}])


def test_best_and_worst_by_hand() -> None:
    assert best_and_worst([0.1, 0.9, 0.9, 0.1], [True] * 4, 0.0) == (1, 0)
    assert best_and_worst([0.1, 0.9, 0.5], [True, False, True], 0.0) == (2, 0)
    assert best_and_worst([0.5, 0.5], [True, True], 0.0) is None
    assert best_and_worst([0.5, 0.8], [True, True], 0.4) is None
    assert best_and_worst([0.5, 0.8], [False, False], 0.0) is None


@pytest.fixture(autouse=True)
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(model: object, prompts: list[object], *, n: int, **_: object) -> object:
        texts = [(BRIEF, "stop"), (KIND, "stop"), (LONG, "stop"), (CUT, "length")]
        items = [SimpleNamespace(text=t, finish=f) for t, f in texts]
        return [items[:n] for _ in prompts]

    monkeypatch.setattr(module, "generate", generate)


def pairs(**more: object) -> Table:
    return objective_pairs(MODEL, PROMPTS, k=4, **more)  # type: ignore[arg-type]


def test_each_objective_ranks_the_same_answers() -> None:
    with use(Context(seed=2, name="made")) as context:
        found = pairs(rewards=WORDS)
        seen = context.metrics[-1]
    counts = {"pairs": 4, "pairs_brief": 2, "pairs_kind": 2}
    assert seen == {"prompts": 2, "empty_answers": 0, **counts}
    brief, kind = found.rows[:2]
    # 1, 5, 7 and 2 words: 1 is met, 5 and 7 are worth nothing. The cut answer cannot be chosen.
    assert (brief["chosen"], brief["rejected"]) == (BRIEF, KIND) and brief["objective"] == 0
    assert (brief["score_chosen"], brief["score_rejected"]) == (1.0, 0.0)
    assert (kind["chosen"], kind["rejected"]) == (KIND, BRIEF) and kind["objective"] == 1
    assert kind["objective_name"] == "kind" and kind["rejected_finished"] is True
    lineage = kind["lineage"]
    assert isinstance(lineage, dict) and lineage["generator"] == "model-key"
    assert lineage["seed"] == 2 and lineage["step"] == "made"
    assert lineage["rewards"]["brief"] == {"chosen": 0.0, "rejected": 1.0}  # at odds
    assert lineage["parents"] == [PROMPTS.rows[0]["id"]]


def test_reward_models_and_rewards_of_several_values(monkeypatch: pytest.MonkeyPatch) -> None:
    @functools.wraps(rules.length_near)
    def several(rows: list[Row], *, n: int) -> list[dict[str, float]]:
        lengths = [float(len(str(r["completion"]))) for r in rows]
        return [{"long": x, "short": n - x} for x in lengths]

    monkeypatch.setattr(rules, "length_near", several)
    monkeypatch.setattr(module, "check_reward_model", lambda m, where: None)
    order = {BRIEF: 0.0, KIND: -1.0, LONG: 3.0, CUT: -5.0}

    def scored(model: object, rows: Sequence[Row]) -> list[float]:
        return [order[str(r["completion"])] for r in rows]

    monkeypatch.setattr(module, "score_model", scored)
    found = pairs(rewards={"size": WORDS["brief"]}, reward_models={"liked": MODEL})
    assert [(r["objective"], r["objective_name"]) for r in found.rows[:3]] == [
        (0, "size/long"), (1, "size/short"), (2, "liked"),
    ]  # fmt: skip
    assert [(r["chosen"], r["rejected"]) for r in found.rows[:3]] == [
        (KIND, BRIEF), (BRIEF, KIND), (LONG, CUT),
    ]  # fmt: skip
    assert found.rows[2]["rejected_finished"] is False


def test_empty_answers_are_neither_chosen_nor_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is briefer than one who says nothing."""
    texts = {"Is it?": (" ", LONG, BRIEF, ""), "Was it?": ("", "", "", " ")}

    def generate(model: object, prompts: list[str], **_: object) -> object:
        return [[SimpleNamespace(text=t, finish="stop") for t in texts[p]] for p in prompts]

    monkeypatch.setattr(module, "generate", generate)
    with use(Context()) as context:
        found = pairs(rewards={"brief": {"use": "max_words", "n": 3}})
    assert [(r["chosen"], r["rejected"]) for r in found] == [(BRIEF, LONG)]
    assert context.metrics[-1]["empty_answers"] == 6
    texts["Is it?"] = texts["Was it?"]
    with pytest.raises(InputError, match="tells the 4 answers to any"), use(Context()):
        pairs(rewards={"brief": {"use": "max_words", "n": 3}})


def test_faults_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for more, match in (
        ({"rewards": {}}, "no objective"),
        ({"rewards": WORDS, "reward_models": {"kind": MODEL}}, "one name"),
        ({"rewards": {"brief": {"use": "length_nar", "n": 1}}}, "length_near"),
        ({"rewards": {"same": {"use": "no_refusal"}}}, "tells the 4 answers to any of 2 prompts"),
    ):
        with pytest.raises(InputError, match=match):
            pairs(**more)
    given: list[float] = []

    @functools.wraps(rules.length_near)
    def broken(rows: list[Row], *, n: int) -> list[float]:
        return given

    monkeypatch.setattr(rules, "length_near", broken)
    for values, match in (
        ([1.0] * 7 + [float("nan")], r"row 8.*not a finite number"),
        ([1.0] * 7, "one score a row"),
    ):
        given[:] = values
        with pytest.raises(InputError, match=match):
            pairs(rewards={"brief": WORDS["brief"]})
