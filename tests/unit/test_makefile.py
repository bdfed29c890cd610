"""What `make` would do, from its dry run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("version", ["2.11.0", ""])
def test_the_torch_that_was_asked_for_stays(tmp_path: Path, version: str) -> None:
    """Of the two calls of pip, the second must not pin another torch than the first installed."""

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout

    given = (f"VENV={tmp_path}", f"TORCH_VERSION={version}", "CONSTRAINTS=constraints.txt")
    dry = run("make", "-n", "install", *given)
    lines = dry.replace("\\\n", " ").splitlines()
    first, second = (line for line in lines if " pip install " in line)
    if version:
        assert f"torch=={version}" in first.split()
    for line in lines:
        if line.startswith("grep "):
            run("sh", "-c", line)
    (left,) = re.findall(r"-c (\S+)", second)
    pins = (ROOT / left).read_text().splitlines()
    every = (ROOT / "constraints.txt").read_text().splitlines()
    assert [p for p in every if p not in pins] == [p for p in every if p.startswith("torch==")]
    assert "torch==" not in second


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_what_was_compiled_is_kept(tmp_path: Path) -> None:
    """Whatever the environment says: pip compiles nothing, and each start would all of PyTorch."""
    (tmp_path / "Makefile").write_text(f"include {ROOT / 'Makefile'}\nseen:\n\t@env\n")
    told = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "KEPT": "1"}
    words = ["make", "-s", "-f", str(tmp_path / "Makefile"), "seen"]
    done = subprocess.run(words, cwd=ROOT, env=told, capture_output=True, text=True, check=True)
    names = {line.partition("=")[0] for line in done.stdout.splitlines()}
    assert "KEPT" in names and "PYTHONDONTWRITEBYTECODE" not in names


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_report_of_an_earlier_run_is_not_taken_for_this_one(tmp_path: Path) -> None:
    asked = ["make", "-n", "test-slow", f"VENV={tmp_path}"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    removed, made, read = (
        done.index(said)
        for said in ("rm -f build/slow.xml", "--junitxml build/slow.xml", "slow.py")
    )
    assert removed < made < read
    none = str(tmp_path / "none.xml")
    told = subprocess.run([sys.executable, "tools/slow.py", none], cwd=ROOT, stderr=subprocess.PIPE)
    assert told.returncode == 1 and told.stderr.decode() == f"no report {none}\n"
