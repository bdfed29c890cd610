"""Progress: a log of steps, and readers that go away."""

from __future__ import annotations

import sys

import pytest

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
