"""The report of a run is out of the program's reach, however many files the caller has open."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from truing.core import sandbox
from truing.core.sandbox import run

# Every descriptor that a program can have, whatever the limit on new ones.
FORGER = """
import os, sys
found = []
for fd in range(3, 5000):
    try:
        os.fstat(fd)
    except OSError:
        continue
    found.append(fd)
    try:
        os.write(fd, b"exit 0\\n")
    except OSError:
        pass
print(found)
sys.stdout.flush()
os._exit(3)
"""


@pytest.fixture(params=[0, 59, 61, 100, 400])
def many_open(request: pytest.FixtureRequest) -> Iterator[None]:
    """So many files open here."""
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(request.param)]
    yield
    for handle in opened:
        os.close(handle)


@pytest.mark.skipif(bool(sandbox.available()), reason=sandbox.available())
@pytest.mark.usefixtures("many_open")
def test_no_descriptor_is_left_to_the_program() -> None:
    done = run(FORGER)
    assert (done.stdout, done.exit_code, done.killed) == ("[]\n", 3, False)


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (b"ready\nexit 0\n", 0),
        (b"ready\nexit -11\n", -11),
        (b"ready\n", -signal.SIGKILL),
        (b"ready\nexit 0", -signal.SIGKILL),  # cut off
        (b"ready\nexit 0\nexit 1\n", -signal.SIGKILL),  # two are one too many
        (b"ready\nexit now\n", -signal.SIGKILL),
        (b"ready\nwhatever\nexit 0\n", -signal.SIGKILL),
    ],
)
def test_a_report_is_read_to_the_letter(said: bytes, code: int) -> None:
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        [sys.executable, "-c", "pass"], stdin=quiet, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    report, told = os.pipe()
    os.write(told, said)
    os.close(told)
    with process, os.fdopen(report, "rb", buffering=0) as stream:
        done = sandbox._Watch(process, stream, 5.0).outcome()
    assert done.exit_code == code and done.killed == (code < 0)
