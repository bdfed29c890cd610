"""Write constraints-floors.txt, the oldest versions that pyproject.toml allows.

    python tools/floors.py

`make test-floors` runs the tests under them; `tests/unit/test_floors.py` says when the file is old.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PINNED = "trl"  # an extra that the benchmarks install, by exact version and in its own place
HEAD = "# The oldest versions that pyproject.toml allows, written by tools/floors.py.\n"


def floors(pyproject: str) -> str:
    """The file's text: each package that is asked for, extras' too, at its lower bound.

    Raises:
        ValueError: a package has no lower bound, or several.
    """
    project = tomllib.loads(pyproject)["project"]
    extras = project["optional-dependencies"]
    asked = [project["dependencies"], *(extras[name] for name in extras if name != PINNED)]
    lines: list[str] = []
    for requirement in (Requirement(text) for group in asked for text in group):
        if requirement.name == project["name"]:
            continue  # an extra that is made of others
        low = [s.version for s in requirement.specifier if s.operator == ">="]
        if len(low) != 1:
            raise ValueError(f"{requirement} has {len(low)} lower bounds instead of one")
        lines.append(f"{requirement.name}=={low[0]}\n")
    return HEAD + "".join(lines)


if __name__ == "__main__":
    made = floors((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (ROOT / "constraints-floors.txt").write_text(made, encoding="utf-8")
