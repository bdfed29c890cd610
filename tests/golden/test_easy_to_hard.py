"""Voting by hand, its equalities, answers that mean the same, and a run on the tiny model."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from truing.context import Context, use
from truing.core.passes.scoring import ScoreHead
from truing.errors import InputError
from truing.evaluate.easy_to_hard import (
    WAYS,
    answer_of,
    best,
    chosen,
    normal,
    scores_of,
    vote,
)
from truing.method import methods
from truing.models import Model
from truing.reports import Report
from truing.tables import Table


def test_choices_by_hand() -> None:
    answers, scores = ["4", "5", "5", "", "6"], [0.3, 0.35, 0.1, 0.99, 0.44]
    assert vote(answers, [1.0] * 5) == "5" and vote(answers, scores) == "5"
    assert vote(answers, [0.5, 0.2, 0.2, 9.0, 0.45]) == "4" and best(answers, scores) == ""
    assert chosen(answers, scores) == dict(zip(WAYS, ["4", "5", "", "5"], strict=True))
    assert vote(["", ""], [1.0, 2.0]) == ""


def test_equalities() -> None:
    source = random.Random(0)
    changed = 0
    for _ in range(100):
        n = source.randint(1, 7)
        answers = [source.choice("abc") for _ in range(n)]
        scores = [source.random() for _ in range(n)]
        assert vote(answers, [0.25] * n) == vote(answers, [1.0] * n)
        assert best(answers, scores) == best(answers, [math.exp(9 * s) for s in scores])
        changed += vote(answers, scores) != vote(answers, [math.exp(9 * s) for s in scores])
        assert len(set(chosen(answers[:1], scores[:1]).values())) == 1
    assert changed  # weighted voting is not blind to the scale


def test_answers() -> None:
    assert (
        answer_of("so 3 + 4\n#### 7\nok") == "7" and answer_of("a 12, then 1,300.50") == "1,300.50"
    )
    assert answer_of("Step\n\n# Answer\n\n 1/2") == "1/2" and answer_of("no idea") == ""
    same = [
        ("1/2", "0.5"),
        ("1,300.50", "1300.5"),
        ("$7$.", "7"),
        ("Paris.", "paris"),
        ("-2.0", "-2"),
    ]
    assert all(normal(a) == normal(b) for a, b in same)
    assert normal("7") != normal("8") and normal("1/0") == "1/0" and normal("1.5/2") == "1.5/2"


def test_on_the_tiny_model(tiny_path: Path, tmp_path: Path) -> None:
    model = Model.open(tiny_path)
    reward = ScoreHead(128).added_to(model, tmp_path / "head")
    rows = [{"prompt": f"{i} + 1 =", "answer": i + 1, "level": 1 + i % 2} for i in range(4)]
    with use(Context(folder=tmp_path / "run")):
        made = methods["easy_to_hard"](model, reward, Table("prompt", rows), n=3, max_tokens=12)
        assert isinstance(made, Report) and made.samples is not None
        assert [len(m.category) > 0 for m in made] == [False] * 4 + [True] * 8
        for row in made.samples:
            # An untrained head says one half of every step.
            assert set(row["scores"]) <= {0.5, 0.0}  # type: ignore[call-overload]
        outcome = methods["easy_to_hard"](
            model, reward, Table("prompt", rows[:1]), n=2, max_tokens=4, by="outcome"
        )
        assert isinstance(outcome, Report)
        with pytest.raises(InputError, match="score head"):
            methods["easy_to_hard"](model, model, Table("prompt", rows))
        for row in ({"prompt": "p"}, {"prompt": "p", "answer": "?"}):
            with pytest.raises(InputError, match="row 1") as error:
                methods["easy_to_hard"](model, reward, Table("prompt", [row]))
            assert error.value.fix
        valued = ScoreHead(128, hidden=4).added_to(model, tmp_path / "values", sort="steps")
        with pytest.raises(InputError, match="no sigmoid"):
            methods["easy_to_hard"](model, valued, Table("prompt", rows))


def test_an_empty_solution_scores_nothing(tiny_path: Path, tmp_path: Path) -> None:
    reward = ScoreHead(128).added_to(Model.open(tiny_path), tmp_path / "head")
    for by in ("min", "outcome"):
        assert scores_of(reward, "p", ["", "4", " "], by, [True, True, False]) == [0.0, 0.5, 0.0]
