"""No file of Python is parsed twice; whatever is wrong with what was remembered is found anew."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from truing.core import code, parsed

MODULE = "truing.train.preference.dpo"


@pytest.fixture
def parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts were parsed, in a cache of its own."""
    monkeypatch.setenv("TRUING_HOME", str(tmp_path))
    seen, bare = [0], parsed.bare

    def counted(tree: ast.Module) -> ast.Module:
        seen[0] += 1
        return bare(tree)

    monkeypatch.setattr(parsed, "bare", counted)
    return seen


def key(module: str = MODULE) -> str:
    """As a new process finds it."""
    code._known.clear()
    parsed._memory.cache_clear()
    return code.code_key([module])


def test_a_second_process_parses_nothing(parses: list[int]) -> None:
    first, count = key(), parses[0]
    assert count > 50
    assert key() == first and parses[0] == count


@pytest.mark.parametrize("text", ["", "{", "[]", '{"by": "x"}', '{"by": 1, "texts": {"a": 1}}'])
def test_a_damaged_memory_is_made_again(parses: list[int], tmp_path: Path, text: str) -> None:
    first, count = key(), parses[0]
    whole = (tmp_path / "code.json").read_text()
    (tmp_path / "code.json").write_text(text)
    assert key() == first and parses[0] == 2 * count
    assert (tmp_path / "code.json").read_text() == whole


def test_what_another_python_found_is_not_taken(
    parses: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, count = key(), parses[0]
    monkeypatch.setattr(parsed, "PYTHON", [3, 99])
    key()
    assert parses[0] == 2 * count


def test_it_is_no_larger_than_needed(
    parses: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parsed, "MOST", 10)
    key("truing.merge.linear")
    key("truing.merge.slerp")
    memory = parsed._Memory(tmp_path / "code.json")
    assert len(memory.found) < 200
    assert set(memory.found) == set(parsed.memory().used)


def test_a_place_that_cannot_be_written_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = key()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "file"))
    assert key() == expected


def test_words_do_not_count_and_dots_are_followed() -> None:
    one = b'"why"\nfrom ..a import b\nimport os\ndef f():\n    "words"\n    return 1\n'
    two = b"from ..a import b  # what\nimport os\ndef f(): return 1\n"
    memory = parsed._Memory(Path("/nowhere"))
    found = [memory.code(text, "p.q.r", False) for text in (one, two, two.replace(b"1", b"2"))]
    assert found[0][0] == found[1][0] != found[2][0]
    assert found[0][1] == found[1][1] == {"p.a", "p.a.b", "os"}
    assert memory.code(one, "p.q.r", True)[1] == {"p.q.a", "p.q.a.b", "os"}
