"""Lint of principles: faults found by the checks on answers whose properties we wrote."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from truing.core import generate as generating
from truing.errors import InputError
from truing.models import Folder, Model
from truing.principles import Principle, Principles
from truing.reports import Report
from truing.specify import lint as module
from truing.specify import texts
from truing.specify.principles_file import principles_file
from truing.tables import Table


@pytest.fixture(autouse=True)
def no_sentence_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "relevance", lambda rows: [0.5] * len(rows))
    monkeypatch.setattr(module, "text_cosines", lambda texts: np.eye(len(texts)))


def rule(id: str, use: str, **settings: object) -> Principle:
    return Principle(id, f"Rule {id}.", check={"use": use, **settings})


def answers(*texts: str) -> Table:
    return Table("example", [{"prompt": f"p{i}", "completion": t} for i, t in enumerate(texts)])


def faults(report: object) -> dict[str, str]:
    return {str(r["fault"]): str(r["principles"]) for r in report.samples}


def test_phi_by_hand() -> None:
    # n11 = 3, n10 = 1, n01 = 1, n00 = 5: phi = (3 * 5 - 1) / (4 * 6)
    x = [True] * 4 + [False] * 6
    y = [True] * 3 + [False] + [True] + [False] * 5
    r, lo, hi = module.phi(x, y)
    assert r == pytest.approx(14 / 24)
    assert (lo, hi) == pytest.approx(
        (math.tanh(math.atanh(r) - 1.96 / 7**0.5), math.tanh(math.atanh(r) + 1.96 / 7**0.5))
    )
    assert module.phi([True] * 5, [True, False] * 2 + [True]) == (0.0, -1.0, 1.0)


def test_contradiction_is_found_by_the_checks() -> None:
    rules = Principles([rule("short", "max_words", n=4), rule("long", "min_words", n=6)])
    texts = [f"Word{i} two three." for i in range(12)]
    texts += [f"Word{i} two three four five six seven." for i in range(12)]
    report = module.lint(rules, answers=answers(*texts))
    assert faults(report) == {"contradiction": "short, long"}
    assert report.get("contradiction").value == 1
    assert "both kept by 0 of 24" in str(report.samples[0]["detail"])


def test_independent_rules_pass() -> None:
    rules = Principles([rule("short", "max_words", n=4), rule("calm", "no_exclamation")])
    ends = [".", "!"]
    texts = [f"Word{i} two three{ends[i % 2]}" for i in range(20)]
    texts += [f"Word{i} two three four five six{ends[i % 2]}" for i in range(20)]
    assert faults(module.lint(rules, answers=answers(*texts))) == {}


def test_rule_that_no_answer_keeps_and_rule_without_check() -> None:
    rules = Principles([rule("never", "must_include", words=["zebra"]), Principle("x", "Be good.")])
    report = module.lint(rules, answers=answers("One horse.", "Two cows."))
    assert faults(report) == {"never kept": "never", "not measured": "x"}


def measures(report: Report) -> dict[str, float]:
    return {m.name: m.value for m in report}


def test_what_was_not_looked_for_is_not_counted() -> None:
    rules = Principles([rule("short", "max_words", n=4), Principle("x", "Be good.")])
    assert measures(module.lint(rules)) == {"duplicate": 0, "not measured": 1}
    found = module.lint(rules, answers=answers("One horse.", "Two cows."))
    assert measures(found) == {
        "duplicate": 0, "contradiction": 0, "never kept": 0, "not measured": 1,
    }  # fmt: skip
    # Answers that are none, and rules without a check, tell nothing either.
    assert measures(module.lint(rules, answers=answers("", ""))).keys() == {
        "duplicate", "not measured",
    }  # fmt: skip
    plain = Principles([Principle("x", "Be good.")])
    assert measures(module.lint(plain, answers=answers("One horse."))).keys() == {
        "duplicate", "not measured",
    }  # fmt: skip


def test_answers_are_given_in_one_whole_way() -> None:
    rules = Principles([rule("short", "max_words", n=4)])
    model, prompts = Model(Folder(Path("none"))), Table("prompt", [{"prompt": "p"}])
    with pytest.raises(InputError, match="'model' is given without 'prompts'"):
        module.lint(rules, model)
    with pytest.raises(InputError, match="'prompts' is given without 'model'"):
        module.lint(rules, None, prompts)
    with pytest.raises(InputError, match="answers are given, and a model or prompts"):
        module.lint(rules, model, prompts, answers("One horse."))


def test_an_answer_cut_at_the_limit_need_not_end_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever is long is cut: held to its end, the two rules would seem to contradict."""
    whole = [("Three words here.", "stop")] * 8
    cut = [(f"Word{i} and so on and on without any end", "length") for i in range(8)]

    def drawn(model: Model, asked: list[object], **_: object) -> list[list[SimpleNamespace]]:
        return [[SimpleNamespace(text=t, finish=f) for t, f in whole + cut] for _ in asked]

    monkeypatch.setattr(generating, "generate", drawn)
    rules = Principles([rule("long", "min_words", n=6), rule("ended", "ends_with_sentence")])
    prompts = Table("prompt", [{"prompt": "p"}])
    report = module.lint(rules, Model(Folder(Path("none"))), prompts)
    assert faults(report) == {} and report.meta["answers"] == 16


def test_answers_may_come_as_messages() -> None:
    rules = Principles([rule("never", "must_include", words=["zebra"])])
    said = [
        {"messages": [{"role": "user", "content": f"p{i}"}, {"role": "assistant", "content": t}]}
        for i, t in enumerate(["One horse.", "Two cows."])
    ]
    report = module.lint(rules, answers=Table("example", said))
    assert faults(report) == {"never kept": "never"} and report.meta["answers"] == 2


def test_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    cosines = np.array([[1, 0.9, 0], [0.9, 1, 0], [0, 0, 1]])
    monkeypatch.setattr(module, "text_cosines", lambda texts: cosines)
    rules = Principles([Principle("a", "A."), Principle("b", "B."), Principle("c", "C.")])
    found = [r for r in module.lint(rules).samples if r["fault"] == "duplicate"]
    assert [r["principles"] for r in found] == ["a, b"]
    same = Principles([rule("a", "max_words", n=3), rule("b", "max_words", n=3)])
    monkeypatch.setattr(module, "text_cosines", lambda texts: np.eye(2))
    assert faults(module.lint(same)) == {"duplicate": "a, b"}


def test_file_with_unknown_check_or_setting(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("principles:\n  - {id: a, text: T, check: {use: max_wrods, n: 3}}\n")
    with pytest.raises(InputError, match=r"principle a.*max_wrods.*Did you mean 'max_words'"):
        principles_file(path=path)
    path.write_text("principles:\n  - {id: a, text: T, check: {use: max_words, m: 3}}\n")
    with pytest.raises(InputError, match="unknown setting 'm'"):
        principles_file(path=path)
    with pytest.raises(InputError, match="no such principles file"):
        principles_file(path=tmp_path / "none.yaml")


def test_shipped_principles_are_valid() -> None:
    path = Path(__file__).parents[2] / "recipes" / "principles.yaml"
    rules = principles_file(path=path)
    assert len(rules) == 4 and len({p.kind for p in rules}) == 2
    assert rules["brief"].check == {"use": "max_words", "n": 40}
    assert rules["prose"].check == {"use": "no_lists"}
    for p in rules:
        for example in p.examples:
            for name, kept in (("good", True), ("bad", False)):
                if name in example:
                    rows = [{"prompt": example["prompt"], "completion": example[name]}]
                    from truing.method import score

                    assert (score("check", p.check, rows)[0] >= 0.5) is kept
