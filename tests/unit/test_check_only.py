"""`truing run RECIPE --check`: all that is known without a model, and nothing is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from truing.cli import main

RECIPE = """\
name: small
models: {base: someone/not-fetched}
data: {pairs: pairs.jsonl}
steps:
  few: {do: select/sample, data: pairs, n: 1}
  aligned: {do: train/dpo, model: base, data: few, steps: 1}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    Path("recipe.yaml").write_text(RECIPE)
    return Path("recipe.yaml")


def test_it_shows_the_steps_and_makes_nothing(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(recipe), "--check"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["few", "select/sample", "pairs.jsonl"] == lines[2]
    assert main(["run", str(recipe), "--check", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["job"] == "small"
    assert told["steps"][1] == {
        "name": "aligned", "do": "train/dpo", "from": ["few", "someone/not-fetched"]
    }  # fmt: skip
    assert not Path("runs").exists()


def test_rows_and_settings_are_checked(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(recipe), "--check", "--set", "aligned.lr=-1"]) == 2
    assert "lr" in capsys.readouterr().err
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    assert main(["run", str(recipe), "--check"]) == 2
    assert "recipe.yaml line 6" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nosuch", "smollm2-135m-instuct", "./missing", "pairs.jsonl"])
def test_a_model_that_cannot_be_is_told(
    recipe: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["run", str(recipe), "--check", "--set", f"models.base={name}"]) == 2
    assert name.removeprefix("./") in capsys.readouterr().err
