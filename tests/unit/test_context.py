"""The step's surroundings: chunks that a killed step does not make again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from truing.context import Context, Journal, Json


def test_finished_chunks_outlive_a_kill(tmp_path: Path) -> None:
    asked: list[int] = []
    told: list[tuple[int, int]] = []

    def squares(stop_at: int) -> list[tuple[list[int], Json]]:
        context = Context(
            folder=tmp_path, on_progress=lambda done, total, _: told.append((done, total))
        )

        def make(start: int, chunk: Sequence[int]) -> Json:
            if start >= stop_at:
                raise KeyboardInterrupt
            asked.append(start)
            return [i * i for i in chunk]

        def name(start: int, chunk: Sequence[int]) -> str:
            return f"{start}/{list(chunk)}"

        try:
            found = context.chunks("squares", range(7), 3, name, make, "numbers")
            return [(list(chunk), made) for chunk, made in found]
        finally:
            context.close()

    with pytest.raises(KeyboardInterrupt):
        squares(stop_at=6)
    with (tmp_path / "squares.jsonl").open("ab") as notes:
        notes.write(b'["6/[6]", [3')  # the kill tore a line
    assert asked == [0, 3]
    told.clear()
    assert squares(stop_at=9) == [([0, 1, 2], [0, 1, 4]), ([3, 4, 5], [9, 16, 25]), ([6], [36])]
    assert asked == [0, 3, 6]  # nothing twice
    assert told == [(3, 7), (6, 7), (7, 7)]


def test_a_journal_keeps_its_values_on_the_disk(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "notes.jsonl")
    for number in range(3):
        journal.put(f"row {number}", {"text": "x" * 10000, "number": number})
    journal.put("row 0", [1.5])
    assert "xxxx" not in repr(vars(journal))
    assert journal.get("row 0") == [1.5] and journal.get("row 3") is None
    for again in (journal, Journal(tmp_path / "notes.jsonl")):
        assert len(again) == 3 and again.get("row 2") == {"text": "x" * 10000, "number": 2}
        again.close()
