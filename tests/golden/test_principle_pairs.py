"""Pairs by principles: scores, choice and lineage by hand; a stand-in writes the answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from truing import context
from truing.errors import InputError
from truing.principles import Principle, Principles
from truing.specify import checks, texts
from truing.specify.in_context import with_principles
from truing.specify.satisfaction import Kept, satisfaction
from truing.synthesize import principle_pairs as module
from truing.synthesize import told_answers
from truing.tables import Row, Table

RULES = Principles(
    [
        Principle(
            "brief", "Use at most five words.", priority=2, check={"use": "max_words", "n": 5}
        ),
        Principle("calm", "Do not shout.", check={"use": "no_exclamation"}),
        Principle("kind", "Be kind."),
    ]
)
MODEL = SimpleNamespace(key="model-key", name="model")
SHORT, SHOUT, LONG = (
    "Red wood burns hot.",
    "Red wood burns hot!",
    "Red wood from the old dark hills burns very hot!",
)


@pytest.fixture(autouse=True)
def no_sentence_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "relevance", lambda rows: [0.5] * len(rows))


class Writer:
    """Stands for `generate`: hands out the given answers and counts its calls."""

    def __init__(self, answers: Sequence[tuple[str, str]]) -> None:
        self.answers, self.calls, self.prompts = answers, 0, []

    def __call__(
        self, model: object, prompts: list[object], *, n: int, **_: object
    ) -> list[list[object]]:
        self.calls += 1
        self.prompts += prompts
        drawn = [SimpleNamespace(text=t, finish=f) for t, f in self.answers[:n]]
        self.answers = [*self.answers[n:], *self.answers[:n]]
        return [drawn for _ in prompts]


def kept(brief: float, calm: float, unusable: str = "") -> Kept:
    return Kept({"brief": brief, "calm": calm}, 0.5, unusable)


def answer(
    text: str, score: float, *, finished: bool = True, why: Kept | None = None
) -> module.Answer:
    return module.Answer(text, finished, False, why or kept(1, 1), score)


def test_score_weights_principles_by_priority() -> None:
    rows = [{"prompt": "p", "completion": t} for t in (SHORT, SHOUT, LONG)]
    values = [k.value(RULES) for k in satisfaction(RULES, rows)]
    brief = checks.BROKEN * 5 / 10
    assert values == pytest.approx([1.0, (2 + checks.BROKEN / 2) / 3, (2 * brief + 0.245) / 3])


def test_unusable_answers_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "Say why red wood burns so hot today"
    said = ["", "...", "The fire is hot. The fire is hot.", prompt, "Fine.", "Off."]
    monkeypatch.setattr(texts, "relevance", lambda rows: [0.9] * 5 + [0.1])
    found = satisfaction(RULES, [{"prompt": prompt, "completion": t} for t in said])
    assert [f.unusable for f in found] == ["empty", "empty", "repeated", "echo", "", "off topic"]
    assert [len(f.violated()) for f in found] == [2, 2, 2, 2, 0, 2]


def test_choice_is_invariant_to_a_constant_and_takes_the_first_on_ties() -> None:
    scores = [0.2, 0.9, 0.9, 0.2]
    assert module.best_and_worst(scores) == (1, 0)
    assert module.best_and_worst([s + 7 for s in scores]) == (1, 0)


def test_chosen_is_finished_and_usable() -> None:
    unusable = kept(0, 0, "empty")
    answers = [
        answer("a", 0.9, finished=False),
        answer("b", 0.8, why=unusable),
        answer("c", 0.7),
        answer("d", 0.1),
    ]
    assert module.choose(answers, 0.2, False) == (2, 3)
    assert module.choose(answers[2:], 0.7, False) is None
    assert module.choose([answer("a", 0.5, finished=False), answer("b", 0.1)], 0.2, False) is None
    broken = [answer("a", 0.6, why=kept(0.3, 1)), answer("b", 0.1)]
    assert module.choose(broken, 0.2, False) == (0, 1)
    assert module.choose(broken, 0.2, True) is None


def test_separating_principle_is_weighted() -> None:
    assert module.separating_principle(kept(1, 1), kept(0.4, 0.1), RULES) == "brief"
    assert module.separating_principle(kept(1, 1), kept(0.9, 0.1), RULES) == "calm"
    assert module.separating_principle(kept(0, 0), kept(0, 0), RULES) == ""


def test_principles_in_context() -> None:
    user = with_principles("Why?", RULES, "user")
    assert user == [
        {"role": "user", "content": "Why?\n\nUse at most five words. Do not shout. Be kind."}
    ]
    dialogue = [{"role": "system", "content": "S"}, {"role": "user", "content": "Why?"}]
    told = with_principles(dialogue, RULES, "system")
    assert [m["role"] for m in told] == ["system", "user"]
    assert (
        told[0]["content"].startswith("S\n\n")
        and "1. Use at most five words." in told[0]["content"]
    )
    assert dialogue[0]["content"] == "S"


def test_a_prompt_that_cannot_state_principles_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer([])
    monkeypatch.setattr(told_answers, "generate", writer)
    alone = [{"role": "system", "content": "S"}]
    prompts = Table("prompt", [{"prompt": "Why is fire hot?"}, {"prompt": alone}], where="p.jsonl")
    with pytest.raises(InputError, match=r"p\.jsonl row 2.*without a message of the user's"):
        module.principle_pairs(MODEL, prompts, RULES, k=4)
    assert with_principles(alone, RULES, "system")[0]["content"].startswith("S\n\n")


def test_pairs_with_lineage(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer([(LONG, "length"), (SHOUT, "stop"), (SHORT, "stop"), (LONG, "stop")])
    monkeypatch.setattr(told_answers, "generate", writer)
    prompts = Table("prompt", [{"prompt": "Why is fire hot?"}])
    pairs = module.principle_pairs(MODEL, prompts, RULES, k=4)
    assert len(pairs) == 1 and pairs.kind == "pair"
    row = pairs[0]
    assert (row["prompt"], row["chosen"], row["rejected"]) == (
        "Why is fire hot?",
        SHORT,
        LONG,
    )
    assert row["rejected_finished"] is False and row["principle"] == "brief"
    lineage = row["lineage"]
    assert lineage["parents"] == [prompts[0]["id"]] and lineage["generator"] == "model-key"
    assert lineage["in_context"] == {"chosen": True, "rejected": False}
    assert lineage["rejected_because"] == "brief, calm"
    assert lineage["check"] == {"use": "max_words", "n": 5}
    assert [isinstance(p, list) for p in writer.prompts] == [False, True]


def test_a_judge_decides_between_answers_that_checks_hold_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """s = 1 (both checks kept) + c * 0.5 + j * verdict, with c = 0.5 and j = 0.5."""
    judge = SimpleNamespace(key="judge-key")
    other = "Old wood burns slow."
    seen: list[tuple[object, str]] = []

    def verdicts(model: object, rows: Sequence[Row], *, criteria: str) -> list[float]:
        assert model is judge
        seen.extend((row["completion"], criteria) for row in rows)
        return [0.9 if row["completion"] == other else 0.1 for row in rows]

    monkeypatch.setattr("truing.core.judge.pointwise", verdicts)
    prompts = Table("prompt", [{"prompt": "Why is fire hot?"}])
    said = [(SHORT, "stop"), (other, "stop")]

    def made(judge: object = None, **settings: float) -> Row:
        monkeypatch.setattr(told_answers, "generate", Writer(said))
        return module.principle_pairs(MODEL, prompts, RULES, judge, k=2, **settings)[0]

    row = made(judge)
    assert (row["chosen"], row["rejected"]) == (other, SHORT)
    assert row["score_chosen"] == pytest.approx(1 + 0.25 + 0.5 * 0.9)
    assert row["score_rejected"] == pytest.approx(1 + 0.25 + 0.5 * 0.1)
    assert row["lineage"]["judge"] == "judge-key" and row["principle"] == ""
    assert seen == [(SHORT, RULES.as_text()), (other, RULES.as_text())]
    against = made(judge, judge_weight=-0.5)
    assert (against["chosen"], against["rejected"]) == (SHORT, other)
    # By the checks alone the first of equals is the best and the worst: no pair.
    with pytest.raises(InputError, match="no pair came out of 1 prompts"):
        made(margin=0.0)
    prompts = Table("prompt", [{"prompt": "Why is wood red?"}])  # the first one's answers are kept
    said[1] = (LONG, "stop")
    assert made()["lineage"]["judge"] == "checks"


def test_resumes_from_the_journal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = [(SHORT, "stop"), (LONG, "stop"), (SHOUT, "stop"), (LONG, "length")]
    prompts = Table("prompt", [{"prompt": f"Question {i}?"} for i in range(40)])
    writer = Writer(answers)

    def stop_early(*args: object, **kw: object) -> object:
        if writer.calls == 3:
            raise KeyboardInterrupt
        return writer(*args, **kw)

    monkeypatch.setattr(told_answers, "ROWS", 32)
    monkeypatch.setattr(told_answers, "generate", stop_early)
    with context.use(context.Context(seed=1, folder=tmp_path)), pytest.raises(KeyboardInterrupt):
        module.principle_pairs(MODEL, prompts, RULES, k=4)
    monkeypatch.setattr(told_answers, "generate", again := Writer(answers))
    with context.use(context.Context(seed=1, folder=tmp_path)):
        resumed = module.principle_pairs(MODEL, prompts, RULES, k=4)
    assert again.calls == 4  # two of three chunks; the first was in the journal
    monkeypatch.setattr(told_answers, "generate", Writer(answers))
    with context.use(context.Context(seed=1, folder=tmp_path / "new")):
        whole = module.principle_pairs(MODEL, prompts, RULES, k=4)
    assert resumed.key == whole.key and len(whole) == 40


def test_faults_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = Table("prompt", [{"prompt": "Why?"}])
    monkeypatch.setattr(told_answers, "generate", Writer([("Same words here.", "stop")] * 2))
    with pytest.raises(InputError, match="no pair came out of 1 prompts"):
        module.principle_pairs(MODEL, prompts, RULES, k=2)
    with pytest.raises(InputError, match="at least two answers"):
        module.principle_pairs(MODEL, prompts, RULES, k=1)
    with pytest.raises(InputError, match="no principle has a check"):
        module.principle_pairs(MODEL, prompts, Principles([Principle("a", "Be good.")]), k=2)
