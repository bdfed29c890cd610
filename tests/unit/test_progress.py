"""Progress: a log of steps, and readers that go away."""

from __future__ import annotations

import io
import sys
import time

import pytest

from truing.output import width
from truing.progress import Progress


def test_a_log_has_a_line_when_a_step_begins_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("[1/2] ")
    progress.start("pairs", "synthesize/principle_pairs")
    progress.tell(1, 10, "rows")  # too soon for a line
    progress.end("8 pair rows", False, 2.0, "a note")
    assert capsys.readouterr().err.splitlines() == [
        "[1/2] pairs (synthesize/principle_pairs)",
        "[1/2] pairs: 8 pair rows; 2.0 s; a note",
    ]


def test_a_reader_that_goes_away_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Gone())
    progress = Progress()
    progress.start("pairs", "synthesize/principle_pairs")
    progress._said = -1e9
    progress.tell(1, 10, "rows")
    progress.end("8 pair rows", True, 2.0)


@pytest.mark.parametrize("columns", [100, 60, 30])
def test_a_line_that_moves_never_wraps(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress("[9/14] ")
    progress.start("aligned", "train/rpo")
    progress._said = -1e9
    progress.tell(12, 96, "training (\u65e5\u672c\u8a9e)")
    assert isinstance(sys.stderr, Terminal)
    _, line = sys.stderr.getvalue().split("\r\033[K")
    assert line.startswith("[9/14] aligned") and width(line) < columns
    assert (": 12/96" in line, "[###....." in line) == (columns >= 60, columns == 100)
    monkeypatch.setenv("TERM", "dumb")  # which knows no way back
    assert not Progress().live


def test_counts_within_another_have_their_own_clocks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = Progress()
    progress.start("aligned", "train/grpo")
    for step in range(1, 3):
        for done in (1, 50, 64):
            now += 20.0
            progress.tell(done, 64, "answers")
        progress.tell(step, 10, "training")  # not said: too soon after the answers
        now += 20.0
        progress.tell(step, 10, "training")
    assert capsys.readouterr().err.splitlines()[1:] == [
        "aligned: answers: 1/64",  # too few to tell by
        "aligned: answers: 50/64, about 6 s left",
        "aligned: answers: 64/64",
        "aligned: training: 1/10",
        "aligned: answers: 1/64",
        "aligned: answers: 50/64, about 6 s left",
        "aligned: answers: 64/64",
        "aligned: training: 2/10, about 800 s left",
    ]
