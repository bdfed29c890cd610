"""The seconds of `.ci/run`: how they are counted, and that the recorded ones are within bounds."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import ci_seconds  # noqa: E402

BEGAN = "0 install\n20 check\n75 test\n390 end\n"
REPORT = """<testsuites><testsuite time="300.0">
<testcase classname="tests.unit.test_a" name="a" time="100.0"/>
<testcase classname="tests.contract.test_b" name="b[x]" time="50.0"/>
<testcase classname="tests.e2e.test_c" name="c" time="450.0"/>
</testsuite></testsuites>"""


def test_a_run_is_told_by_its_parts() -> None:
    assert ci_seconds.parts(BEGAN) == {"install": 20, "check": 55, "test": 315}
    for cut in ("", "0 install\n20 check\n"):
        with pytest.raises(ValueError, match="not come to its end"):
            ci_seconds.parts(cut)
    # 600 seconds of tests in a session of 300, of which a quarter is theirs.
    assert ci_seconds.quick(ElementTree.fromstring(REPORT)) == pytest.approx(75.0)


def test_what_is_written_and_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ci_seconds, "ROOT", tmp_path)
    for name in ("BEGAN", "TESTED", "OUT"):
        monkeypatch.setattr(ci_seconds, name, tmp_path / name)
    with pytest.raises(SystemExit, match=r"no BEGAN: run \.ci/run first"):
        ci_seconds.main()
    (tmp_path / "BEGAN").write_text("0 install\n")
    (tmp_path / "TESTED").write_text(REPORT)
    with pytest.raises(SystemExit, match=r"not come to its end: run \.ci/run again"):
        ci_seconds.main()
    (tmp_path / "BEGAN").write_text(BEGAN)
    assert ci_seconds.main() == 0
    made = json.loads((tmp_path / "OUT").read_text())
    assert made["seconds"] == {"unit and contract tests": 75, "all": 390}
    assert made["parts"]["test"] == 315 and made["hardware"]["cores"]
    assert json.loads(capsys.readouterr().out) == made["seconds"]
    (tmp_path / "BEGAN").write_text(BEGAN.replace("390", "990"))
    assert ci_seconds.main() == 1
    assert capsys.readouterr().err == "all: 990 of 900 s\n"


def test_the_recorded_run_is_within_the_bounds() -> None:
    assert ci_seconds.BOUNDS == {"unit and contract tests": 240, "all": 900}
    if ci_seconds.OUT.exists():
        assert ci_seconds.beyond(json.loads(ci_seconds.OUT.read_text())) == []


def test_a_run_of_ci_leaves_what_is_read() -> None:
    text = (ROOT / ".ci" / "run").read_text()
    names = {str(p.relative_to(ROOT)) for p in (ci_seconds.BEGAN, ci_seconds.TESTED)}
    assert names <= set(re.findall(r"build/[\w.]+", text))
    assert text.rstrip().endswith(f'note "{ci_seconds.END}"')
