"""What the slow tests gave, as the small file that is committed: `tests/slow.json`.

    python tools/slow.py build/slow.xml

Reads pytest's JUnit report. Together they take hours, so parts may be run at different times
(`make test-slow SLOW="-k kill"`): a test that was not run again keeps what it gave last, with the
commit and the day of that run, and those that no part has run yet are named (`never_run`). Exit
code 1 when a test of this report failed.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "tests" / "slow.json"


def outcome(case: ElementTree.Element) -> str:
    """How one test ended."""
    for name in ("failure", "error", "skipped"):
        found = case.find(name)
        if found is not None:
            reason = (found.get("message") or "").splitlines()[:1]
            return f"{name}: {reason[0]}" if reason else name
    return "passed"


def commit() -> str:
    """The checkout's commit."""
    asked = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def known() -> set[str]:
    """All slow tests, by the names that the summary has for them."""
    asked = ["--collect-only", "-q", "-o", "addopts=", "-m", "slow", "tests"]
    command = [sys.executable, "-m", "pytest", *asked]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = (line.partition("::") for line in said.splitlines() if "::" in line)
    return {f"{Path(file).stem}::{name}" for file, _, name in found}


def main(argv: list[str]) -> int:
    """Add the report to the summary."""
    if not Path(argv[0]).is_file():
        raise SystemExit(f"no report {argv[0]}")
    from truing.runs import hardware, versions

    cases = list(ElementTree.parse(argv[0]).getroot().iter("testcase"))
    when = {"commit": commit(), "date": datetime.date.today().isoformat()}
    made = {
        f"{c.get('classname', '').rsplit('.', 1)[-1]}::{c.get('name')}": {
            "outcome": outcome(c),
            "seconds": round(float(c.get("time", 0)), 1),
            **when,
        }
        for c in cases
    }
    earlier = json.loads(OUT.read_text())["tests"] if OUT.exists() else {}
    there = known()
    if lost := sorted(set(made) - there):
        raise SystemExit(f"{lost[0]} was run and is not among the slow tests: see known()")
    tests = {n: t for n, t in sorted((earlier | made).items()) if n in there}
    ended = [t["outcome"] for t in tests.values()]
    data = {
        "schema_version": 2,
        "passed": ended.count("passed"),
        "skipped": sum(e.startswith("skipped") for e in ended),
        "failed": sum(e.startswith(("failure", "error")) for e in ended),
        "never_run": sorted(there - set(tests)),
        "seconds": round(sum(t["seconds"] for t in tests.values()), 1),
        "hardware": hardware(),
        "versions": versions(),
        "tests": tests,
    }
    OUT.write_text(json.dumps(data, indent=1) + "\n")
    print(json.dumps({k: data[k] for k in ("passed", "skipped", "failed", "seconds")}))
    return int(any(t["outcome"].startswith(("failure", "error")) for t in made.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
