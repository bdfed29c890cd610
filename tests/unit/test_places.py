"""Places that cannot be used: one clear line and an exit code that says whose fault it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from truing import runs
from truing.cli import main
from truing.errors import InputError

RULES = "- {id: brief, text: Be brief., check: {use: max_words, n: 4}}\n"
RECIPE = "name: small\nsteps:\n  rules: {do: specify/principles_file, path: rules.yaml}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    (tmp_path / "rules.yaml").write_text(RULES)
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err, said.err
    return said.err.splitlines()[-1]


@pytest.mark.parametrize("place", ["rules.yaml", "rules.yaml/inside", "/proc/truing/runs"])
def test_runs_that_cannot_be_a_folder(
    folder: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    said = told(capsys, "run", "r.yaml", "--runs", place)
    assert f"--runs {place}" in said


def test_a_home_that_cannot_be_made(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUING_HOME", "/dev/null")
    for words in (
        ("specify", "principles-file", "--path", "rules.yaml"),
        ("run", "r.yaml"),
    ):
        assert "TRUING_HOME" in told(capsys, *words)


@pytest.mark.parametrize(
    "text", ["[]", '"x"', '{"steps": []}', '{"steps": {"a": {}}}', "[" * 100_000]
)
def test_a_manifest_that_is_none(
    folder: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (folder / "manifest.json").write_text(text)
    assert "of a run" in told(capsys, "why", "abc", "--run", ".")
    with pytest.raises(InputError):
        runs.read(folder)


def shell(line: str) -> tuple[int, str]:
    full = line.replace("truing", f"{sys.executable} -m truing.cli")
    done = subprocess.run(["bash", "-c", full], capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("words", ["list", "list --json", "lst --json"])
def test_stdout_on_a_full_disk(words: str) -> None:
    code, said = shell(f"truing {words} > /dev/full")
    assert code == (2 if "lst" in words else 3) and said.count("\n") == 1, said
    assert ("unknown command" if "lst" in words else "disk is full") in said


def test_closed_streams() -> None:
    code, said = shell("truing list >&-")
    assert code == 2 and said.count("\n") == 1 and "stdout is closed" in said
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m truing.cli doctr --json 2>&-"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and json.loads(done.stdout)["exit_code"] == 2


def test_a_verb_is_not_shown_and_its_list_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "`truing train --help`" in told(capsys, "show", "train")


def test_a_role_given_twice(capsys: pytest.CaptureFixture[str]) -> None:
    said = told(capsys, "merge", "linear", "--models", "a=X", "--models", "a=Y")
    assert "a role is given twice" in said and "a=X" in said
