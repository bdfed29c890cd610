"""The oldest versions that are promised are those that `make test-floors` installs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from floors import PINNED, floors  # noqa: E402

PYPROJECT = (ROOT / "pyproject.toml").read_text()


def pins(name: str) -> dict[str, str]:
    """Versions by package of a file of constraints."""
    lines = (line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#"))
    return dict(line.split("==") for line in lines)


def test_the_file_has_the_lower_bounds_of_pyproject() -> None:
    project = tomllib.loads(PYPROJECT)["project"]
    extras = project["optional-dependencies"]
    assert extras.pop(PINNED)[0].startswith("trl==")  # installed apart, by the benchmarks alone
    asked = project["dependencies"] + [text for group in extras.values() for text in group]
    bounds = [re.match(r"([\w-]+)>=([\d.]+)(,<\d+)?$", text) for text in asked]
    assert [text for text, bound in zip(asked, bounds) if not bound] == [
        "truing[serve,metrics,watch,quant]"
    ]
    assert pins("constraints-floors.txt") == {b[1]: b[2] for b in bounds if b}
    assert (ROOT / "constraints-floors.txt").read_text() == floors(PYPROJECT)


@pytest.mark.parametrize("text", ["numpy", "numpy<3", "numpy==2"])
def test_a_package_without_a_lower_bound_is_refused(text: str) -> None:
    project = f'[project]\nname = "x"\ndependencies = ["{text}"]\noptional-dependencies = {{}}\n'
    with pytest.raises(ValueError, match="0 lower bounds"):
        floors(project)


def test_what_ci_runs_is_allowed() -> None:
    project = tomllib.loads(PYPROJECT)["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    allowed = {r.name: r.specifier for r in (Requirement(t) for group in groups for t in group)}
    seen = {name.replace("_", "-"): version for name, version in pins("constraints.txt").items()}
    both = allowed.keys() & seen.keys()
    assert {"torch", "transformers", "pydantic"} <= both
    assert [name for name in sorted(both) if seen[name] not in allowed[name]] == []


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_installs_the_floors_apart_and_tests_there(tmp_path: Path) -> None:
    command = ["make", "-n", "test-floors", f"FLOORS={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.replace("\\\n", " ").splitlines()
    torch, rest = (line for line in lines if " pip install " in line)
    assert re.findall(r"[\w-]*constraints[\w-]*", torch) == ["constraints-floors"]
    tests = next(line for line in lines if " pytest " in line)
    assert all(f"{tmp_path}/bin/python" in line for line in (torch, rest, tests))
    folders = ["tests/unit", "tests/contract", "tests/golden", "tests/e2e/test_serve*.py"]
    assert tests.split()[-4:] == folders
