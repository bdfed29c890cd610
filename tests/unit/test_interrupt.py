"""Ctrl-C is a wish to stop, also where compiled code makes another error of it; so is SIGTERM."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from misbehaving import careless

from truing import interrupt
from truing.errors import Stopped
from truing.pipeline import told


def pressed_in_compiled_code() -> None:
    """What safetensors does when Ctrl-C arrives while it asks a storage for its shape."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape") from None


def test_an_error_after_ctrl_c_is_the_wish_to_stop() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupt.heard():
        pressed_in_compiled_code()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_step_that_it_hits_is_stopped_and_not_failed() -> None:
    with pytest.raises(Stopped, match="interrupted"), told("outer"), told("inner"):
        pressed_in_compiled_code()


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ValueError, match="mine"), told("step"):
        raise ValueError("mine")


def test_another_thread_may_use_it() -> None:
    seen: list[BaseException] = []

    def work() -> None:
        try:
            with interrupt.heard():
                raise ValueError("mine")
        except ValueError as error:
            seen.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [str(e) for e in seen] == ["mine"]


SLOW = '''
import time

import truing


@truing.method(verb="select")
def slow(data: truing.Table) -> truing.Table:
    """Take a while."""
    print("at work", flush=True)
    time.sleep(120)
    return data


def recipe():
    plan = truing.Plan("slow")
    plan.step("wait", "select/slow", data="rows.jsonl")
    return plan
'''


def test_a_run_that_is_told_to_end_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    command = [sys.executable, "-m", "truing.cli", "run", "slow.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, **pipes) as running:  # type: ignore[call-overload]
        assert running.stdout.readline() == "at work\n"
        running.terminate()
        said = running.communicate()[1]
    assert running.returncode == Stopped.exit_code
    assert "stopped; the same command goes on from here" in said  # as after Ctrl-C
    (manifest,) = tmp_path.glob("runs/*/manifest.json")
    assert json.loads(manifest.read_text())["status"] == "stopped"


def test_who_listens_to_being_told_to_end_still_does() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with interrupt.ended():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_being_told_to_end_is_swallowed_by_no_function(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):  # and the next one is heard again
        with pytest.raises(KeyboardInterrupt), interrupt.heard(), interrupt.ended():
            careless()
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background
    try:
        with pytest.raises(KeyboardInterrupt), interrupt.heard(), interrupt.ended():
            careless()
    finally:
        signal.signal(signal.SIGINT, ignored)
    monkeypatch.setattr(interrupt, "TWICE", 60.0)
    with interrupt.ended():  # to a group and to the process, one wish comes twice
        with pytest.raises(KeyboardInterrupt):
            careless()
        assert careless() == 1.0
