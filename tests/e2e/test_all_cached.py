"""A run whose steps are all in the store: neither PyTorch nor a method is imported for it."""

from __future__ import annotations

import json
import subprocess
import sys

from small_run import RUN, STEPS, Small

CODE = """
import sys, time
from truing.cli import main
code = main(sys.argv[1:])
heavy = [n for n in ("torch", "transformers") if n in sys.modules]
print(f"{time.process_time():.3f}", *heavy, file=sys.stderr)
sys.exit(code)
"""


def again(small: Small, runs: str) -> tuple[float, list[str]]:
    """Processor time of another run in a process of its own, and what it imported for nothing."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *RUN, "--runs", runs], cwd=small.folder, env=small.env(),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cached_steps"] == len(STEPS)
    seconds, *heavy = done.stderr.splitlines()[-1].split()
    return float(seconds), heavy


def test_it_takes_under_a_second_and_no_torch(whole: Small) -> None:
    """The best of three: work beside it on the same core lengthens processor time, too."""
    took: list[float] = []
    for runs in ("again", "more", "last"):
        seconds, heavy = again(whole, runs)
        assert not heavy and whole.hashes(runs) == whole.hashes()
        took.append(seconds)
        if seconds < 1.0:
            break
    assert min(took) < 1.0
