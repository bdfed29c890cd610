"""How long `.ci/run` took, as the small file that is committed: `tests/ci.json`.

    .ci/run && .venv/bin/python tools/ci_seconds.py

Reads what the run left: the second at which each part began (`build/ci.txt`) and pytest's JUnit
report (`build/test.xml`). The tests run in one session, so those of `tests/unit` and
`tests/contract` get the share of its time that they have of all tests' seconds. Exit code 1 where
either is beyond its bound.
"""

from __future__ import annotations

import datetime
import json
import sys
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

from slow import ROOT, commit

BEGAN, TESTED = ROOT / "build" / "ci.txt", ROOT / "build" / "test.xml"
OUT = ROOT / "tests" / "ci.json"
END = "end"  # stands last in the first of them, where all parts have passed
QUICK = ("tests.unit.", "tests.contract.")
BOUNDS = {"unit and contract tests": 240, "all": 900}  # seconds


def parts(began: str) -> dict[str, int]:
    """Seconds of each part.

    Args:
        began: lines of the second at which a part began and its name, the last of them the end.
    Raises:
        ValueError: the run has not come to its end.
    """
    lines = [line.split(" ", 1) for line in began.splitlines()]
    if not lines or lines[-1][1] != END:
        raise ValueError("the run has not come to its end")
    return {name: int(end) - int(start) for (start, name), (end, _) in pairwise(lines)}


def quick(report: ElementTree.Element) -> float:
    """Seconds of a session, by pytest's report, that are due to unit and contract tests."""
    cases = [(c.get("classname", ""), float(c.get("time", 0))) for c in report.iter("testcase")]
    share = sum(t for name, t in cases if name.startswith(QUICK)) / sum(t for _, t in cases)
    return share * sum(float(suite.get("time", 0)) for suite in report.iter("testsuite"))


def beyond(data: dict[str, object]) -> list[str]:
    """What took longer than it may, in words."""
    took: dict[str, float] = data["seconds"]  # type: ignore[assignment]
    return [
        f"{name}: {took[name]} of {most} s" for name, most in BOUNDS.items() if took[name] > most
    ]


def main() -> int:
    """Write the file."""
    from truing.runs import hardware, versions

    if missing := next((p for p in (BEGAN, TESTED) if not p.is_file()), None):
        raise SystemExit(f"no {missing.relative_to(ROOT)}: run .ci/run first")
    try:
        took = parts(BEGAN.read_text())
    except ValueError as error:
        raise SystemExit(f"{BEGAN.relative_to(ROOT)}: {error}: run .ci/run again") from None
    tests = quick(ElementTree.parse(TESTED).getroot())
    data = {
        "schema_version": 1,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "seconds": {"unit and contract tests": round(tests), "all": sum(took.values())},
        "parts": took,
        "hardware": hardware(),
        "versions": versions(),
    }
    OUT.write_text(json.dumps(data, indent=1) + "\n")
    print(json.dumps(data["seconds"]))
    late = beyond(data)
    print("".join(f"{text}\n" for text in late), end="", file=sys.stderr)
    return int(bool(late))


if __name__ == "__main__":
    sys.exit(main())
