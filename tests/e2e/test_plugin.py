"""A package of somebody else's, really installed with pip: its method is listed, shown and runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest

from truing.store import Store

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "tests" / "plugin"
RULES = """
principles:
  - {id: polite, text: Say please., check: {use: polite, word: pray}}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip installed the package, without a network."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(PLUGIN, folder / "source")
    words = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    words += ["--disable-pip-version-check", "--target", str(folder / "site"), str(source)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert list((folder / "site").glob("my_methods-1.0.dist-info"))
    return folder / "site"


def truing(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "truing.cli", *words],
        env=environment, capture_output=True, text=True, cwd=site.parent,
    )  # fmt: skip


def test_it_is_listed(installed: Path) -> None:
    listed = json.loads(truing(installed, "list", "--json").stdout)
    assert {
        "name": "long_answers", "verb": "select", "group": "", "field": "text", "paper": "",
        "summary": "Keep rows with long answers.",
    } in listed  # fmt: skip
    components = json.loads(truing(installed, "list", "--components", "--json").stdout)
    assert {"name": "polite", "kind": "check", "summary": "The answer says `word`."} in components


def test_it_is_shown(installed: Path) -> None:
    found = json.loads(truing(installed, "show", "long-answers", "--json").stdout)
    assert found["returns"] == "Table" and found["inputs"] == {"data": "Table"}
    least = found["settings"]["least"]
    assert least["default"] == 20 and least["type"] == "int" and "number of words" in least["doc"]


def test_it_runs_and_is_stored(installed: Path) -> None:
    data = installed.parent / "rows.jsonl"
    rows = [{"prompt": "x", "completion": "a " * n} for n in (1, 5, 30)]
    data.write_text("\n".join(json.dumps(r) for r in rows))
    words = ("select", "long-answers", "--data", str(data), "--least", "5", "--json")
    first, again = (truing(installed, *words) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["about"].startswith("2 ")
    assert json.loads(again.stdout)["cached"] is True
    facts = Store().facts(json.loads(first.stdout)["key"])
    assert cast("dict[str, str]", facts["versions"])["my-methods"] == "1.0"
    record = installed / "my_methods-1.0.dist-info" / "METADATA"
    record.write_text(record.read_text().replace("Version: 1.0", "Version: 1.1"))
    third = truing(installed, *words)
    assert "made with my-methods 1.0, now 1.1" in third.stderr
    record.write_text(record.read_text().replace("Version: 1.1", "Version: 1.0"))
    wrong = truing(installed, "select", "long-answers", "--data", str(data), "--leest", "5")
    assert wrong.returncode == 2 and "Did you mean 'least'?" in wrong.stderr


def test_its_check_is_one_of_a_principle(installed: Path) -> None:
    path = installed.parent / "rules.yaml"
    path.write_text(RULES)
    done = truing(installed, "specify", "principles-file", "--path", str(path), "--json")
    assert done.returncode == 0, done.stderr


def test_without_it_the_names_are_unknown() -> None:
    done = truing(PLUGIN, "show", "long-answers")
    assert done.returncode == 2 and "unknown method" in done.stderr


def test_the_documentation_shows_this_package() -> None:
    page = (ROOT / "docs" / "plugins.md").read_text()
    for language, name in (("toml", "pyproject.toml"), ("python", "my_methods.py")):
        shown = re.search(rf"```{language}\n(.*?)^```", page, re.S | re.M)
        assert shown is not None and shown[1] == (PLUGIN / name).read_text()
