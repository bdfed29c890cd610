"""What all tests rely on: nothing of the user's environment reaches one, and none vanishes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ONE = """
import json, os
import pytest

def test_nothing_of_the_user_s():
    names = {n for n in os.environ if n.startswith(("TRUING_", "HF_", "OPENAI", "HTTP_"))}
    assert names <= {"TRUING_HOME", "TRUING_TEST_NAMED"}
    assert os.environ["TRUING_HOME"] != "/theirs" and os.environ["CUDA_VISIBLE_DEVICES"] == ""

def test_kept(users_environment):
    assert users_environment.items() >= {"TRUING_HOME": "/theirs", "TRUING_TIMEOUT": "1"}.items()

def test_known():
    pytest.skip("there is no Chromium")

@pytest.mark.skipif(True, reason="x")
def test_unknown():
    pass
"""
RENAMED = "import pytest\npytest.importorskip('truing.renamed')\ndef test_it(): pass\n"
ABSENT = "import pytest\npytest.importorskip('no_such_package')\ndef test_it(): pass\n"


def test_the_environment_is_put_away_and_a_skip_must_have_a_reason(tmp_path: Path) -> None:
    shutil.copy(TESTS / "conftest.py", tmp_path)
    for name, text in {"one": ONE, "renamed": RENAMED, "absent": ABSENT}.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    named = {
        "TRUING_HOME": "/theirs", "TRUING_TIMEOUT": "1", "TRUING_API_KEY_EXAMPLE_ORG": "key",
        "HTTP_PROXY": "http://127.0.0.1:9", "OPENAI_API_KEY": "key", "HF_TOKEN": "token",
    }  # fmt: skip
    own = {n: v for n, v in os.environ.items() if not n.startswith("TRUING_")}
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=own | named, capture_output=True, text=True)
    ends = {line.split(" - ")[0] for line in done.stdout.splitlines() if " test_" in line}
    assert {e for e in ends if e.startswith(("PASSED", "FAILED", "ERROR"))} == {
        "PASSED test_one.py::test_nothing_of_the_user_s", "PASSED test_one.py::test_kept",
        "ERROR test_one.py::test_unknown", "ERROR test_renamed.py",
    }, done.stdout  # fmt: skip
    assert "2 passed, 2 skipped, 2 errors" in done.stdout and done.returncode == 1
