"""A second run takes what the store has: it imports no method, and says of mistakes the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from truing.cli import main
from truing.method import methods

PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
CODE = """
import sys
from truing.cli import main
code = main(sys.argv[1:])
known = ("torch", "transformers", "truing.train.preference.dpo", "truing.evaluate.preference")
print("imported:", *(n for n in known if n in sys.modules), file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_path: Path, home: Path) -> Path:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(PAIR) + "\n" for _ in range(4)))
    rows = [{"prompt": f"What is number {i} good for?"} for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "rules.yaml").write_text(
        "- {id: brief, text: Be brief., check: {use: max_words, n: 4}}\n"
    )
    (tmp_path / "r.yaml").write_text(
        f"name: small\nmodels: {{base: {tiny_path}}}\nsteps:\n"
        "  rules: {do: specify/principles_file, path: rules.yaml}\n"
        "  few: {do: select/checked, data: prompts.jsonl, checks: [{use: language, code: en}]}\n"
        "  tuned: {do: train/dpo, model: base, data: pairs.jsonl, steps: 1, rank: 2}\n"
        "  seen: {do: evaluate/preference, model: tuned, data: pairs.jsonl}\n"
    )
    return tmp_path


def started(folder: Path, *words: str) -> tuple[int, str, set[str]]:
    """Exit code, what was said, and which of the known modules a process of its own imported."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *words], cwd=folder, capture_output=True, text=True
    )
    *said, last = done.stderr.splitlines()
    assert last.startswith("imported:"), done.stderr
    return done.returncode, "\n".join(said) + done.stdout, set(last.split()[1:])


def test_a_run_from_the_store_imports_no_method(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert main(["run", "r.yaml"]) == 0
    assert started(folder, "run", "r.yaml")[::2] == (0, set())
    # What has to run is imported, and nothing that does not run.
    again, _, imported = started(folder, "run", "r.yaml", "--set", "seen.max_length=512")
    assert again == 0 and "truing.evaluate.preference" in imported
    assert "truing.train.preference.dpo" not in imported


@pytest.mark.parametrize("given", ["beta=-1", "bata=1", "rank=two", "keep_best=true", "data=no"])
def test_a_mistake_is_told_as_by_the_method_itself(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    words = ["run", "r.yaml", "--set", f"tuned.{given}"]
    monkeypatch.chdir(folder)
    assert methods["train/dpo"].settings and main(words) == 2  # here its module is loaded
    told = capsys.readouterr().err
    assert f"'{given.partition('=')[0]}'" in told or "tuned.data" in told
    code, said, imported = started(folder, *words)
    assert code == 2 and said == told.rstrip("\n")
    # What its loss alone knows, it has to be asked.
    assert bool(imported) == (given == "beta=-1")


def test_so_does_a_command_of_its_own(
    folder: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    words = ["train", "dpo", "--model", str(tiny_path), "--data", "pairs.jsonl", "--steps", "1"]
    assert main(words) == 0
    code, said, imported = started(folder, *words)
    assert code == 0 and imported == set() and '"cached": true' in said
