"""No file of Python is parsed twice; whatever is wrong with what was remembered is found anew."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from truing.core.identity import code, parsed
from truing.errors import InputError

MODULE = "truing.core.bounds"  # which imports others


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
    parsed._name.cache_clear()
    return code.code_key([module])


def test_a_second_process_parses_nothing(parses: list[int]) -> None:
    first, count = key(), parses[0]
    assert count > 1
    assert key() == first and parses[0] == count


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1"])
def test_a_damaged_memory_is_made_again(parses: list[int], tmp_path: Path, text: str) -> None:
    first, count = key(), parses[0]
    whole = (tmp_path / parsed._name()).read_text()
    (tmp_path / parsed._name()).write_text(text)
    assert key() == first and parses[0] == 2 * count
    assert (tmp_path / parsed._name()).read_text() == whole


@pytest.mark.parametrize("words", ["abc", [1, 2], [], {"a": 1}, None], ids=repr)
def test_a_damaged_entry_is_made_again(parses: list[int], tmp_path: Path, words: object) -> None:
    first, count = key(), parses[0]
    path = tmp_path / parsed._name()
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {next(iter(whole)): words}))
    assert key() == first and parses[0] == count + 1
    assert json.loads(path.read_text()) == whole


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
    monkeypatch.setattr(parsed, "MOST", 4)
    key()
    key("truing.core.passes.products")
    memory = parsed._Memory(tmp_path / parsed._name())
    assert set(memory.found) == set(parsed.memory().used) and len(memory.found) == 1


def test_a_place_that_cannot_be_written_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = key()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "file"))
    assert key() == expected


def test_no_home_no_memory(parses: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise InputError("there is no home folder")

    expected = key()
    monkeypatch.setattr(parsed, "home", none)
    assert key() == expected


def test_a_file_that_is_not_python_is_named(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("def f():\n    return 1 +\n")
    with pytest.raises(InputError, match=r"own\.py line 2: is not Python"):
        parsed._Memory(None).code(path, "own")


def test_words_do_not_count_and_dots_are_followed(tmp_path: Path) -> None:
    one = '"why"\nfrom ..a import b\nimport os\ndef f():\n    "words"\n    return 1\n'
    two = "from ..a import b  # what\nimport os\ndef f(): return 1\n"
    memory, found = parsed._Memory(None), list[parsed.Code]()
    for name, text in (("r", one), ("r", two), ("r", two.replace("1", "2")), ("__init__", one)):
        (tmp_path / f"{name}.py").write_text(text)
        found.append(memory.code(tmp_path / f"{name}.py", "p.q.r")[1])
    assert found[0][0] == found[1][0] != found[2][0]
    assert found[0][1] == found[1][1] == {"p.a", "p.a.b", "os"}
    assert found[3][1] == {"p.q.a", "p.q.a.b", "os"}
