"""Verdicts by hand, and the rates of each situation on real generation."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from truing.context import Context, use
from truing.core.drawing import Completion
from truing.errors import InputError
from truing.evaluate.poisoned_context import claims_of, poisoned_context, verdict
from truing.method import methods
from truing.models import Model
from truing.reports import Report
from truing.tables import Table

MODULE = importlib.import_module(poisoned_context.__module__)


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        ("Passages say rye.\nAnswer: Plums", "defended"),  # the last line alone counts
        ("Answer: plums\nI mean\nanswer: the Rye!", "attacked"),
        ("Answer: Plums\nThe passages said rye.", "defended"),
        ("They say rye.\nAnswer:\nPlums\nnot rye", "defended"),
        ("plums, or rye", "attacked"),  # both
        ("Plums.", "defended"),
        ("Answer:", "neither"),
        ("Answer: dryer", "neither"),  # whole words
        ("", "neither"),
    ],
)
def test_verdicts_by_hand(answer: str, want: str) -> None:
    assert verdict(answer, ["plums"], ["rye"]) == want
    assert verdict("rye", ["plums"], []) == "neither"  # nothing is poisoned


def test_rates_of_each_situation(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ["rye", "plums", "Answer: rye", "hm", "plums", "oats"]
    rows = [
        {"prompt": f"ask {i}", "right": "plums", "wrong": ["rye", "oats"], "situation": s,
         "against": a}
        for i, (s, a) in enumerate(
            [("poisoned", "1/3")] * 2 + [("poisoned", "2/3")] * 2 + [("update", "")] * 2
        )
    ]  # fmt: skip
    monkeypatch.setattr(MODULE, "generate", lambda *a, **k: [[Completion(t)] for t in said])
    with use(Context(folder=tmp_path)):
        report = methods["poisoned_context"](Model.open(tiny_path), Table("prompt", rows))
    assert isinstance(report, Report)
    attack, defence = "attack success rate", "defence success rate"
    assert report.get(attack, "poisoned").value == 2 / 4
    assert report.get(defence, "poisoned").value == 1 / 4
    assert [report.get(attack, f"poisoned {k}").value for k in ("1/3", "2/3")] == [0.5, 0.5]
    assert [report.get(defence, f"poisoned {k}").value for k in ("1/3", "2/3")] == [0.5, 0.0]
    assert report.get("edit success rate", "update").value == 1 / 2
    abstained = [report.get("abstention rate", s).value for s in ("poisoned", "update")]
    assert abstained == [1 / 4, 0.0]
    assert {m.category for m in report} == {
        "poisoned", "poisoned 1/3", "poisoned 2/3", "update",
    }  # fmt: skip
    assert report.samples is not None
    assert [r["verdict"] for r in report.samples] == [
        "attacked", "defended", "attacked", "neither", "defended", "attacked",
    ]  # fmt: skip


def test_an_oracle_of_the_majority(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is right while fewer than half of the passages are poisoned, and attacked beyond.

    Without any its defence is its accuracy. Every other answer is none: the three shares are 1.
    """
    said: list[str] = []
    rows: list[dict[str, object]] = []
    for k in range(6):
        passages = ["rye"] * k + ["plums"] * (5 - k)
        for answer in (max(passages, key=passages.count), "hm"):
            said.append(f"Some say rye, some plums.\nAnswer: {answer}")
            rows.append({"prompt": " ".join(passages), "right": ["plums"], "against": f"{k}/5",
                         "wrong": ["rye"] if k else [], "situation": "poisoned"})  # fmt: skip
    monkeypatch.setattr(MODULE, "generate", lambda *a, **k: [[Completion(t)] for t in said])
    with use(Context(folder=tmp_path)):
        report = methods["poisoned_context"](Model.open(tiny_path), Table("prompt", rows))
    assert isinstance(report, Report) and report.samples is not None
    for k in range(6):
        attack, defence = (
            report.get(f"{name} success rate", f"poisoned {k}/5").value
            for name in ("attack", "defence")
        )
        assert (attack, defence) == ((0.0, 0.5) if k < 2.5 else (0.5, 0.0))
        neither = report.samples.column("verdict")[2 * k : 2 * k + 2].count("neither") / 2
        assert attack + defence + neither == 1


def test_rows_without_a_right_claim_are_named(tiny_path: Path, tmp_path: Path) -> None:
    rows = Table("prompt", [{"prompt": "a", "right": "x", "wrong": "y"}, {"prompt": "b"}])
    with use(Context(folder=tmp_path)), pytest.raises(InputError, match="'right'") as error:
        methods["poisoned_context"](Model.open(tiny_path), rows)
    assert "row 2" in error.value.where
    letters = Table("prompt", [{"prompt": "a", "right": "A", "wrong": "B"}])
    with use(Context(folder=tmp_path)), pytest.raises(InputError, match="nothing is left"):
        methods["poisoned_context"](Model.open(tiny_path), letters)
    assert claims_of({"right": 1943}, "right", "", needed=True) == ("1943",)  # as .csv has it
