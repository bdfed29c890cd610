"""kill -9, Ctrl-C, a full disk, a second run at once: the quick start comes out as without."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from forked import Started
from small_run import PROGRAM, RUN, STEPS, Small

pytestmark = pytest.mark.timeout(600)


def seconds(small: Small) -> float:
    """How long its steps took together."""
    return sum(float(str(s["seconds"])) for s in small.steps().values())


def stop_somewhere(
    small: Small, how: signal.Signals, moment: float, step: str = "rules"
) -> tuple[int, str, str]:
    """Send a signal `moment` seconds after a step began; (exit code, stdout, stderr)."""
    process = small.start()
    small.wait_until_running(process, step)
    time.sleep(moment)
    process.send_signal(how)
    out, err = process.communicate(timeout=120)
    return process.wait(), out, err


def goes_on(small: Small, whole: Small) -> None:
    """Resume; nothing that had been made is made again, and all is as in the undisturbed run."""
    before, finished = small.made(), [n for n, s in small.steps().items() if s["status"] == "done"]
    small.verify()
    small.finish()
    small.verify()
    assert small.hashes() == whole.hashes()
    assert [n for n in finished if not small.steps()[n]["cached"]] == []
    now = small.made()
    assert {k: now[k] for k in before} == before
    store = small.folder / "home" / "store"
    assert not list((store / "scratch").glob("*")), "scratch of steps that have ended"
    assert not list(small.folder.rglob("*.partial")), "half-written files"
    assert not list((store / "artefacts").glob("??/.*")), "half-made artefacts"
    (page,) = (small.folder / "runs").glob("*/report.html")
    assert page.read_text().rstrip().endswith("</html>")


def kills(template: Path, whole: Small, folder: Path, seed: int, times: int) -> None:
    """One run, killed up to `times` times on its way, at random moments."""
    source = random.Random(seed)
    span, killed, tried = seconds(whole) / times, 0, 0
    while not killed:  # a machine may be so much faster now that it ends before
        tried += 1
        small = Small.copy(template, folder / f"small{tried}")
        for _ in range(times):
            code, _, err = stop_somewhere(small, signal.SIGKILL, source.uniform(0, span))
            assert code in (0, -signal.SIGKILL), err
            if code == 0:  # it has ended, and nothing is left to kill
                break
            killed += 1
        span /= 2
    goes_on(small, whole)


def test_killed_three_times_and_resumed(template: Path, whole: Small, tmp_path: Path) -> None:
    kills(template, whole, tmp_path, seed=1, times=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_twenty_moments(template: Path, whole: Small, tmp_path: Path, seed: int) -> None:
    kills(template, whole, tmp_path, seed=100 + seed, times=1)


def test_ctrl_c_is_clean_and_resumable(whole: Small, tmp_path: Path) -> None:
    small = Small.until(whole, "aligned", tmp_path / "small")
    code, out, err = stop_somewhere(small, signal.SIGINT, 0.0, "aligned")
    assert code == 3 and "Traceback" not in err, err
    line = json.loads(out)
    assert line["exit_code"] == 3 and "he same command goes on from here" in line["error"]
    assert [e for e in err.splitlines() if e.startswith("truing: ")] == [f"truing: {line['error']}"]
    assert small.manifest()["status"] == "stopped"
    goes_on(small, whole)


def test_two_runs_at_once_share_the_store(template: Path, whole: Small, tmp_path: Path) -> None:
    small = Small.copy(template, tmp_path / "small")
    both = {runs: small.start(runs) for runs in ("one", "two")}
    for process in both.values():
        _, err = process.communicate(timeout=280)
        assert process.returncode == 0, err
    assert small.hashes("one") == small.hashes("two") == whole.hashes()
    cached = [[bool(s["cached"]) for s in small.steps(runs).values()] for runs in both]
    assert [a != b for a, b in zip(*cached, strict=True)] == [True] * len(STEPS)  # each made once
    small.verify()


# A small disk is mounted by a shell that alone sees it; a program joins it there.
JOINED = """
import ctypes, os, sys
shell, disk = sys.argv[1:3]
del sys.argv[1:3]
for space in ("user", "mnt"):
    file = os.open(f"/proc/{shell}/ns/{space}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(file, 0):
        raise OSError(ctypes.get_errno(), "the shell cannot be joined")
os.chdir(disk)
"""


@contextlib.contextmanager
def shell_apart() -> Generator[tuple[int, Callable[..., None]]]:
    """A shell that may mount: its number, and a function that has it run lines of commands."""
    with subprocess.Popen(
        ["unshare", "-Urm", "sh", "-e"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as shell:
        assert shell.stdin and shell.stdout
        write, read = shell.stdin, shell.stdout

        def do(*lines: str) -> None:
            print(*lines, "echo done", sep="\n", file=write, flush=True)
            assert read.readline() == "done\n", lines

        yield shell.pid, do


def test_full_disk(whole: Small, tmp_path: Path) -> None:
    """A file system of a few MiB: one message, nothing half there, and on it goes with space."""
    probe = ["unshare", "-Urm", "sh", "-c", f"mount -t tmpfs -o size=1m small {tmp_path}"]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("this system lets no user mount a file system in a namespace")
    begun, after = Small.until(whole, "aligned", tmp_path / "begun"), Small(tmp_path / "after")
    disk = tmp_path / "disk"
    disk.mkdir()
    with shell_apart() as (number, do):

        def run() -> tuple[int, str, str]:
            words = ["-c", JOINED + PROGRAM, str(number), str(disk), *RUN]
            process = Started(words, env=Small(disk).env())
            out, err = process.communicate(timeout=280)
            return process.wait(), out, err

        do(
            f"mount -t tmpfs -o size=64m small {disk}",
            f"cp -r {begun.folder}/. {disk}",
            f"free=$(df --output=avail -k {disk} | tail -1)",
            f"dd if=/dev/zero of={disk}/ballast bs=1024 count=$((free - 18 * 1024)) status=none",
        )
        code, out, err = run()
        do(f"rm {disk}/ballast")
        again, _, told = run()
        do(f"mkdir {after.folder}", f"cp -r {disk}/runs {disk}/home {after.folder}")
    assert code == 3 and "Traceback" not in err, err
    line = json.loads(out)
    assert line["exit_code"] == 3 and "aligned" in line["error"] and "disk is full" in line["error"]
    assert "Free some space; the same command goes on from here" in line["error"]
    assert again == 0, told
    assert after.hashes() == whole.hashes()
    assert after.steps()["picked"]["cached"] and not after.steps()["aligned"]["cached"]
    after.verify()
