"""A forked start is as one of Python: what the program finds, how it ends, what truing makes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import ADDRESS, Started
from small_run import STEPS, Small

FOUND = """
import atexit, json, os, signal, sys, threading
atexit.register(print, "at the end")
print(json.dumps({
    "argv": sys.argv, "path": sys.path, "cwd": os.getcwd(), "environ": dict(os.environ),
    "own session": os.getsid(0) == os.getpgid(0) == os.getpid(), "read": sys.stdin.read(),
    "signals": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)],
    "files": sorted(os.listdir("/proc/self/fd")), "tasks": len(os.listdir("/proc/self/task")),
    "main": [__name__, sys.modules["__main__"].__dict__ is globals()],
    "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), "umask": os.umask(0),
}))
print("a word", file=sys.stderr)
import truing
assert not hasattr(truing, "left"), "what another start has done is seen"
truing.left = True
raise SystemExit(3)
"""
WAITING = """
import pathlib, sys, time
pathlib.Path("began").touch()
try:
    time.sleep(100)
except KeyboardInterrupt:
    sys.exit(5)
"""


@pytest.mark.parametrize("as_file", [False, True])
def test_a_program_finds_what_it_finds_elsewhere(tmp_path: Path, as_file: bool) -> None:
    (tmp_path / "program.py").write_text(FOUND)
    words = [str(tmp_path / "program.py"), "a", "-u"] if as_file else ["-c", FOUND, "a", "-u"]
    env = {**os.environ, "OWN": "word", ADDRESS: "set by every start"}
    real = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=env, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, capture_output=True,
    )  # fmt: skip
    expected = json.loads(real.stdout.splitlines()[0])
    for _ in range(2):
        process = Started(words, cwd=tmp_path, env=env)
        out, err = process.communicate(timeout=60)
        found = json.loads(out.splitlines()[0])
        found["environ"][ADDRESS] = env[ADDRESS]
        assert found == expected and out.splitlines()[1:] == ["at the end"]
        assert (process.returncode, err) == (3, "a word\n") == (real.returncode, real.stderr)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 5), (signal.SIGKILL, -9)])
def test_signals_reach_it_by_its_number(tmp_path: Path, number: int, code: int) -> None:
    process = Started(["-c", WAITING], cwd=tmp_path, env=os.environ)
    while not (tmp_path / "began").exists():
        time.sleep(0.005)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    assert process.poll() is None
    os.kill(process.pid, number)
    assert process.communicate(timeout=20) == ("", "")
    assert process.wait() == process.poll() == code
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_a_run_gives_what_the_command_gives(whole: Small, tmp_path: Path) -> None:
    """The command has another seed of hashes, and has read the code of each step itself."""
    small = Small.until(whole, "pairs", tmp_path / "small")
    assert small.finish()["cached_steps"] == STEPS.index("pairs")
    assert small.hashes() == whole.hashes()
