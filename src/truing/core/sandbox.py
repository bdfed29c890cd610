"""Run generated Python code with no network, little time, little memory and nothing to read.

Each run is a process of its own, walled in by the kernel: new user, mount, process, network and IPC
namespaces; a root that holds Python's library, four devices and one small folder in memory, so that
no file of this machine can be written and none of its users' can be read; an empty environment; no
capability and no way to one; limits on processor time, address space, files and processes; a
seccomp filter where the machine has one. At the wall-clock limit everything is killed at once.
Where the system denies any of this but seccomp, nothing is run: an InputError says why.

Programs have the standard library only, and cannot start processes (threads they can). Folder
`/box` is where they are and may write.
"""

from __future__ import annotations

import contextlib
import functools
import marshal
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from truing.errors import InputError

OUTPUT = 64 * 1024  # bytes kept of stdout and of stderr, where no other number is given
WRITABLE_MB = 16  # what a program may write
SETUP_SECONDS = 20.0  # to make the walls, on a machine that is busy
LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache")
# What of Python's own is made of libraries of others, and how these are found: a Python of Spack,
# of Nix or of a cluster's modules has them in folders of their own.
FOREIGN = (
    "_bz2",
    "_ctypes",
    "_decimal",
    "_hashlib",
    "_lzma",
    "_sqlite3",
    "_ssl",
    "_uuid",
    "_zstd",
    "pyexpat",
    "zlib",
)
LOOK = f"""
for name in {FOREIGN}:
    try:
        __import__(name)
        print(name)
    except ImportError:
        pass
print(open("/proc/self/maps").read())
"""
# 1 where AppArmor takes from new user namespaces what the walls are made with (Ubuntu 24.04).
RESTRICTED = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
ENDED = re.compile(rb"ready\nexit (-?[0-9]{1,3})\n")  # a run's whole report
CUT = "\n[cut here: more than {} bytes]\n"


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Args:
        stdout: what it printed, cut off at 64 KiB or what `keep` says.
        stderr: the same; a traceback where it raised.
        exit_code: 0 for success; -N when signal N ended it.
        timed_out: it was stopped at the wall-clock limit.
        killed: a signal ended it: one of the limits, or a crash.
        seconds: wall time of the program alone.
        cut: it printed more to stdout than was kept.
    """

    stdout: str
    stderr: str
    exit_code: int
    timed_out: bool
    killed: bool
    seconds: float
    cut: bool = False


@functools.cache
def available() -> str:
    """ "" where programs can be run here, else the reason why not."""
    try:
        _probe()
    except _Refused as error:
        return str(error)
    return ""


def run(
    code: str,
    *,
    stdin: str = "",
    seconds: float = 5.0,
    memory_mb: int = 256,
    keep: int = OUTPUT,
) -> Outcome:
    """Run a Python program as `__main__` inside the walls.

    Args:
        code: its source text.
        stdin: what it reads.
        seconds: wall-clock limit; processor time is limited to a second more.
        memory_mb: limit of its address space, at least 64.
        keep: bytes of stdout and of stderr that are kept.
    Raises:
        InputError: the system denies the walls (nothing was run), or a setting is out of range.
    """
    _check(code, stdin, seconds, memory_mb)
    try:
        _probe()
        return _run(code, stdin, seconds, memory_mb, keep)
    except _Refused as error:
        raise _denied(str(error)) from None


class _Refused(Exception):
    """A wall could not be made."""


@functools.cache
def _probe() -> None:
    """Run what only imports, once; raises where even that is denied."""
    if sys.platform != "linux":
        raise _Refused(f"it needs Linux namespaces, and this is {sys.platform}")
    names, _ = _foreign()
    done = _run("\n".join(f"import {n}" for n in names), "", SETUP_SECONDS, 256)
    if done.exit_code == 1:
        said = done.stderr.rstrip().rpartition("\n")[2]
        raise _Refused(f"programs cannot import what Python can outside: {said}")


def _denied(reason: str) -> InputError:
    fix = "Allow unprivileged user namespaces (sysctl user.max_user_namespaces; in a container, "
    fix += "its security profile"
    if _restricted():
        fix += f"; where AppArmor restricts them, sysctl kernel.{RESTRICTED.name}=0, or a profile "
        fix += f"with userns for {_python()[0]}"
    fix += ")"
    if "mount_setattr" in reason:
        fix = "Take Linux 5.12 or later, and in a container a profile that allows mount_setattr"
    if "cannot import" in reason:
        fix = "Use another Python, such as that of the system or of uv"
    return InputError(
        f"generated code runs only in the sandbox, which is not to be had here: {reason}",
        where="sandbox",
        fix=f"{fix}, or leave steps out that run code",
    )


def _restricted() -> bool:
    """Whether AppArmor restricts user namespaces, or may: not everybody can read it."""
    try:
        return RESTRICTED.read_text().strip() != "0"
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _check(code: str, stdin: str, seconds: float, memory_mb: int) -> None:
    if not 0 < seconds <= 3600:
        raise InputError("seconds must lie between 0 and 3600", where="sandbox", seen=seconds)
    if memory_mb < 64:
        raise InputError("memory_mb must be at least 64", where="sandbox", seen=memory_mb)
    if max(len(code.encode("utf-8", "surrogatepass")), len(stdin)) > WRITABLE_MB << 19:
        said = f"code and what it reads must be smaller than {WRITABLE_MB // 2} MiB"
        raise InputError(said, where="sandbox", fix="Leave longer answers or tests out")


def _python() -> list[str]:
    """Python as programs are started by it: the one behind a virtual environment."""
    own = getattr(sys, "_base_executable", "") or sys.executable
    return [str(Path(own).resolve()), "-I", "-S", "-B", "-X", "utf8"]


def _environment() -> dict[str, str]:
    """What the launcher is told, of which programs see nothing."""
    kept = {n: os.environ[n] for n in ("LD_LIBRARY_PATH",) if n in os.environ}
    return {"LANG": "C.UTF-8", **kept}


@functools.cache
def _foreign() -> tuple[list[str], list[str]]:
    """Modules of `FOREIGN` that Python has, and all shared libraries with these loaded."""
    try:
        done = subprocess.run(
            [*_python(), "-c", LOOK],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            cwd="/",
            encoding="utf-8",
            errors="surrogateescape",
        )
    except OSError as error:
        raise _Refused(f"no process can be started: {error}") from None
    names = [n for n in FOREIGN if n in done.stdout.splitlines()]
    return names, sorted(set(re.findall(r" (/.*\.so[^/ \n]*)$", done.stdout, re.M)))


def _libraries() -> list[str]:
    """What Python needs of the file system."""
    prefix = Path(sys.base_prefix).resolve()
    own = [str(prefix / n) for n in ("lib", "lib64")]
    found = [p for p in (*LIBRARIES, *own) if Path(p).exists()]
    return [p for p in found if not any(p != q and p.startswith(q + "/") for q in found)]


def _run(code: str, stdin: str, seconds: float, memory_mb: int, keep: int = OUTPUT) -> Outcome:
    shown = _libraries()
    unseen = [p for p in _foreign()[1] if not p.startswith(tuple(f"{s}/" for s in shown))]
    request = {
        "code": code,
        "stdin": stdin,
        "seconds": seconds,
        "memory_mb": memory_mb,
        "writable_mb": WRITABLE_MB,
        "lib": shown,
        "load": unseen,
    }
    from truing.core import sandbox_inside

    report, told = os.pipe()
    try:
        process = subprocess.Popen(
            [*_python(), sandbox_inside.__file__, str(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
            cwd="/",
            pass_fds=(told,),
            start_new_session=True,
        )
    except OSError as error:
        os.close(report)
        raise _Refused(f"no process can be started: {error}") from None
    finally:
        os.close(told)
    with process, os.fdopen(report, "rb", buffering=0) as said:
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(marshal.dumps(request))
                process.stdin.close()
            return _Watch(process, said, seconds, keep).outcome()
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


class _Watch:
    """Reads what a run prints and reports until it ends, or ends it."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        said: IO[bytes],
        seconds: float,
        keep: int = OUTPUT,
    ) -> None:
        self.process, self.seconds, self.keep = process, seconds, keep
        self.kept = {"stdout": bytearray(), "stderr": bytearray(), "report": bytearray()}
        self.open = selectors.DefaultSelector()
        for name, stream in (
            ("stdout", process.stdout),
            ("stderr", process.stderr),
            ("report", said),
        ):
            assert stream is not None
            self.open.register(stream, selectors.EVENT_READ, name)

    def _read(self, until: float) -> bool:
        """Take what has come; False when there is nothing more to come or the time is over."""
        for key, _ in self.open.select(max(0.0, until - time.monotonic())):
            name = str(key.data)
            block = os.read(key.fd, 1 << 16)
            if not block:
                self.open.unregister(key.fileobj)
            elif len(self.kept[name]) <= self.keep:
                self.kept[name] += block
        return bool(self.open.get_map()) and time.monotonic() < until

    def outcome(self) -> Outcome:
        """Wait for the end."""
        until = time.monotonic() + SETUP_SECONDS
        while b"\n" not in self.kept["report"] and self._read(until):
            pass
        began = time.monotonic()
        if not self.kept["report"].startswith(b"ready\n"):
            raise _Refused(self._reason())
        while self._status() is None and self._read(began + self.seconds):
            pass
        seconds = time.monotonic() - began
        timed_out = self._status() is None and seconds >= self.seconds
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        # With the first process dead the kernel ends all others; the pipes then close.
        while self._read(time.monotonic() + 1.0):
            pass
        status = self._status()
        code = -signal.SIGKILL if status is None else status
        return Outcome(
            self._text("stdout"),
            self._text("stderr"),
            code,
            timed_out,
            code < 0,
            seconds,
            len(self.kept["stdout"]) > self.keep,
        )

    def _status(self) -> int | None:
        """How the program ended; None while it has not, or where the report is none."""
        found = ENDED.fullmatch(self.kept["report"])
        return int(found[1]) if found else None

    def _reason(self) -> str:
        report = self.kept["report"].decode(errors="replace").strip()
        if report.startswith("refused "):
            return report.removeprefix("refused ")
        last = self.kept["stderr"].decode(errors="replace").strip().splitlines()
        return last[-1] if last else "it did not start in time"

    def _text(self, name: str) -> str:
        kept = self.kept[name]
        text = kept[: self.keep].decode("utf-8", "replace")
        return text + CUT.format(self.keep) if len(kept) > self.keep else text
