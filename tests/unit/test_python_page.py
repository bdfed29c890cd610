"""The page of Python: every public name with its signature, arguments and errors."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest

import truing

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import python_pages  # noqa: E402

PAGE = python_pages.python_page()
NAMES = [n for n in truing.__all__ if n[0] != "_"]


def _section(name: str) -> str:
    found = re.search(rf"^### truing\.{name}\n(.*?)(?=^##|\Z)", PAGE, re.S | re.M)
    assert found, name
    return found[1]


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_told_with_all_its_arguments(name: str) -> None:
    section, found = _section(name), getattr(truing, name)
    if name in ("methods", "online", "InputError", "Stopped"):  # told of their bases, or by others
        return
    told = set(re.findall(r"^\| `([\w, ]+)` \|", section, re.M))
    told = {one for names in told for one in names.split(", ")}
    assert told == set(inspect.signature(found).parameters)


def test_a_name_without_a_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truing, "__all__", [*truing.__all__, "newcomer"])
    with pytest.raises(SystemExit, match="no section for newcomer"):
        python_pages.python_page()


def test_members_errors_and_exit_codes_are_told() -> None:
    opened = "- `Model.open(source: str | Path) -> Model`<br>"
    assert opened in _section("Model")
    assert "raises `InputError`: it is found nowhere" in _section("Model")
    assert "- `table.where(keep: Callable[[Row], bool]) -> Table`<br>" in _section("Table")
    assert "- `report.key: str`<br>" in _section("Report")
    assert "_derived" not in PAGE and "self" not in _section("Plan")
    assert "Raises `Diverged`: no method's loss stays finite." in _section("compare")
    codes = re.findall(r"### truing\.(\w+)\n(?:(?!###).)*`exit_code = (\d)`", PAGE, re.S)
    assert codes == [("TruingError", "1"), ("InputError", "2"), ("Stopped", "3")]


def test_what_users_are_given_has_its_fields_told() -> None:
    given = PAGE.partition("### Completion\n")[2].partition("\n###")[0]
    assert '- `completion.finish: str`<br>"stop" when it ended by itself' in given
    assert "Completion(" not in given


def test_sections_of_a_docstring() -> None:
    doc = "One.\n\nTwo.\nArgs:\n    lo, hi: ends\n        of it.\n    n: how many.\n"
    doc += "Raises:\n    E: no."
    parts = python_pages.told(doc)
    assert parts[""] == ["One.", "", "Two."]
    assert python_pages.named(parts["Args"]) == [("lo, hi", "ends of it."), ("n", "how many.")]
    assert python_pages.named(parts["Raises"]) == [("E", "no.")]
    after = python_pages.told("Args:\n    n: how many.\n\nMore.")
    assert after[""] == ["More."] and python_pages.named(after["Args"]) == [("n", "how many.")]
