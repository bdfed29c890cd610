"""What `truing data ROWS` says is what a training of these rows reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from truing import cli
from truing.dataview import facts, text
from truing.errors import InputError
from truing.method import methods
from truing.tables import Row

LIMIT = 40
PAIRS: list[Row] = [
    {"prompt": "Why?" * n, "chosen": "So. " * m, "rejected": "No."}
    for n, m in ((1, 1), (2, 1), (2, 9), (90, 1), (1, 0))
]


def written(folder: Path, rows: list[Row]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_lengths_are_those_of_the_rows_as_training_reads_them(
    tmp_path: Path, tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = written(tmp_path, PAIRS)
    found: Any = facts(rows, str(tiny_path), LIMIT)
    assert (found["kind"], found["rows"], found["used"]) == ("pair", 5, 3)
    assert found["counts"] == {"cut": 1, "left_out_empty": 1, "left_out_long": 1}
    # What the template writes around a question is 19 tokens, and an answer's end is one.
    assert found["tokens"]["prompt"] == {"50": 27, "90": 379, "99": 379, "max": 379}
    assert found["tokens"]["answer"] == {"50": 4, "90": 37, "99": 37, "max": 37}
    assert found["tokens"]["together"]["max"] == 379 + 5
    methods["dpo"](str(tiny_path), rows, steps=1, max_length=LIMIT, batch=2)
    told = capsys.readouterr().err
    assert "rows: 3, cut: 1, left_out_empty: 1, left_out_long: 1" in told
    assert str(found["receipt"]) in told and found["receipt"].count("branch") == 2


FORMS: list[tuple[Row, str, int, int]] = [
    ({"prompt": "Why?", "completion": "So."}, "example", 23, 4),
    ({"instruction": "Why?", "output": "So."}, "alpaca", 23, 4),
    ({"messages": [{"role": "user", "content": "Why?"},
                   {"role": "assistant", "content": "So."}]}, "example", 23, 4),
    ({"prompt": "Why?", "completions": ["So.", "Hm."], "scores": [1, 0]}, "group", 23, 4),
    ({"prompt": "Why?", "completion": "So.", "label": False}, "unpaired", 23, 4),
    ({"text": "Why?"}, "text", 1, 4),
]  # fmt: skip


@pytest.mark.parametrize(("row", "kind", "prompt", "answer"), FORMS, ids=[f[1] for f in FORMS])
def test_every_kind_that_is_trained_on_has_lengths(
    tmp_path: Path, tiny_path: Path, row: Row, kind: str, prompt: int, answer: int
) -> None:
    found: Any = facts(written(tmp_path, [row]), str(tiny_path))
    assert found["kind"] == kind and found["max_length"] == 1024 and found["used"] == 1
    assert found["tokens"]["prompt"]["max"] == prompt
    assert found["tokens"]["answer"]["max"] == answer
    assert ">>>" in found["receipt"]


def test_a_prompt_alone_has_no_answer(tmp_path: Path, tiny_path: Path) -> None:
    found: Any = facts(written(tmp_path, [{"prompt": "Why?"}]), str(tiny_path))
    assert found["tokens"]["prompt"]["50"] == 23 and not found["tokens"]["answer"]
    assert "answer  " not in text(found) and "0 with loss" in found["receipt"]


def test_no_row_is_longer_than_the_context(tmp_path: Path, tiny_path: Path) -> None:
    found: Any = facts(written(tmp_path, PAIRS), str(tiny_path), 10**6)
    assert found["max_length"] == found["context"] and "model's context" in text(found)


def test_the_command_for_people_and_for_machines(
    tmp_path: Path, tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = written(tmp_path, [{"question": "Why?", "answer": "So."}])
    assert cli.main(["data", rows]) == 0
    told = capsys.readouterr().out
    assert "1 rows of kind record (question, answer)" in told and "?prompt=question" in told
    named = f"{rows}?prompt=question&completion=answer"
    assert cli.main(["data", named, "--model", str(tiny_path), "--max-length", "8"]) == 0
    told = capsys.readouterr().out
    assert "0 rows are used (cut: 0, left_out_long: 1)" in told and "99%" in told
    assert cli.main(["data", named, "--model", str(tiny_path), "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["tokens"]["together"] == {"50": 27, "90": 27, "99": 27, "max": 27}


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda rows, model: facts("", model), "no rows are named"),
        (lambda rows, model: facts(rows, "", 64), "tokens of a model.*--model"),
        (lambda rows, model: facts(f"{rows}?text=answer", model, 3),
         "setting 'max_length' must be at least 8"),
        (lambda rows, model: facts(rows, model), r"needs rows of kind example.*\?prompt=question"),
        (lambda rows, model: facts(f"{rows}?prompt=question", "http://127.0.0.1:1/v1#m"),
         "no weights here"),
    ],
)  # fmt: skip
def test_mistakes(
    tmp_path: Path, tiny_path: Path, ask: Callable[[str, str], object], told: str
) -> None:
    rows = written(tmp_path, [{"question": "Why?", "answer": "So."}])
    with pytest.raises(InputError, match=told):
        ask(rows, str(tiny_path))
