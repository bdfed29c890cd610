"""Processes of Python that start in hundredths of a second: forks of one that has imported it all.

Most of what a start of `truing` takes, some five seconds of a core, is the import of torch and of
transformers. A server, itself a process without threads in which nothing has been computed, imports
them once. A start is a fork of it with a folder, environment, session and files of its own, in
which a program runs as Python would run it: signals reach it by its number, and nothing that it
does is seen by another.

What is not as in a real start: the starter is not its parent; modules are not taken apart at the
end; and the seed of strings' hashes, which orders sets, is the server's. So what such runs give is
held against that of a real one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import IO, cast

ADDRESS = "TRUING_TEST_FORKS"  # in environments: where the server of whoever started it listens
# What is otherwise imported by the way, and components that recipes name.
IMPORTED = (
    "pyarrow.dataset", "pyarrow.parquet", "torch.distributed.run", "transformers.generation.utils",
    "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama",
    "truing.pipeline", "truing.report", "truing.select.embedders",
)  # fmt: skip
# Of torch, and of pyarrow, whose allocator would have one from its import on.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
LIMIT = 1 << 17  # bytes of a message: environments have some thousand
RANKS = "TRUING_TEST_FORKED_RANKS"  # in torchrun's environment: those that it is to fork
TORCHRUN = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import forked
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from torch.distributed.run import main
subprocess_handler.Popen = forked.popen
main()
"""  # torchrun itself, but for how it starts its processes

# The starter's side


class Started:
    """A process that runs `python WORDS`: what tests use of `subprocess.Popen`."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str | Path = ".",
        session: bool = True,
        kept: bool = True,
    ) -> None:
        """Start it.

        Args:
            session: it gets a session of its own.
            kept: what it writes is kept for `communicate`; else it goes where the starter's goes.
        """
        self.args, self.returncode = list(words), cast("int | None", None)
        self._files: list[IO[bytes]] = [tempfile.TemporaryFile() for _ in range(2 * kept)]
        address = os.environ.get(ADDRESS) or _server()
        asked = {
            "words": self.args, "env": {**env, ADDRESS: address}, "cwd": str(Path(cwd).absolute()),
            "session": session,
        }  # fmt: skip
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.connect(address)
        files = [f.fileno() for f in self._files] or [1, 2]
        socket.send_fds(self._server, [json.dumps(asked).encode()], files)
        self.pid = int(self._server.recv(LIMIT) or 0)
        assert self.pid, "the server of forks has ended; on stderr it has said why"

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """The same when it has ended; subprocess.TimeoutExpired where that takes longer."""
        if self.returncode is None:
            if not select.select([self._server], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            with self._server as server:
                self.returncode = int(server.recv(LIMIT) or -signal.SIGKILL)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to stdout and stderr, when it has ended."""
        self.wait(timeout)
        out, err = (_text(file) for file in self._files)
        return out, err

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def _text(file: IO[bytes]) -> str:
    with file:
        file.seek(0)
        return file.read().decode()


def popen(
    args: Sequence[str], env: Mapping[str, str], **settings: object
) -> Started | subprocess.Popen[bytes]:
    """In the place of `subprocess.Popen` for torchrun: a fork for some ranks only."""
    if env["RANK"] not in env[RANKS].split():
        return subprocess.Popen(args, env=env, start_new_session=True)
    assert args[0] == sys.executable, args
    assert settings == {"stdout": None, "stderr": None, "start_new_session": True}, settings
    return Started(args[1:], env=env, kept=False)


@functools.cache
def _server() -> str:
    """Start the server of this process; its address."""
    folder = tempfile.TemporaryDirectory(prefix="truing-forks-")
    address = f"{folder.name}/socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()  # who connects from now on waits until the server has imported
        process = subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno())],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[listener.fileno()],
            env={**os.environ, **ONE_THREAD}, start_new_session=True,
        )  # fmt: skip
    atexit.register(_end, folder, process)
    return address


def _end(folder: tempfile.TemporaryDirectory[str], server: subprocess.Popen[bytes]) -> None:
    """With its stdin ends the server, and it does so however this process ends."""
    server.communicate()
    folder.cleanup()


# The server's side


def _import_all() -> None:
    """What the recipes of these tests use. Code is read for the keys of steps, too."""
    import distributed_run
    import pyarrow
    import small_run
    import yaml

    from truing.core.identity.code import code_key
    from truing.method import methods

    for name in IMPORTED:
        import_module(name)
    pyarrow.array([0])  # which imports pandas, where that is installed
    recipes = (small_run.RECIPE.read_text(), distributed_run.recipes()["r"])
    used = {step["do"] for text in recipes for step in yaml.safe_load(text)["steps"].values()}
    code_key(methods[name].module.__name__ for name in used)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has one thread, whatever others held"


def _serve(listener: socket.socket) -> tuple[dict[str, object], list[int]]:
    """Fork for whoever asks; in a fork: what was asked, and the files for what it writes."""
    watched = selectors.DefaultSelector()
    watched.register(0, selectors.EVENT_READ)
    watched.register(listener, selectors.EVENT_READ)
    started: dict[int, tuple[int, socket.socket]] = {}  # by a descriptor that tells their ends
    while True:
        for key, _ in watched.select():
            if key.fd == 0:  # the starter has ended
                for pid, _ in started.values():
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            elif key.fd in started:
                watched.unregister(key.fd)
                _tell_end(key.fd, *started.pop(key.fd))
            else:
                caller, _ = listener.accept()
                asked, files, *_ = socket.recv_fds(caller, LIMIT, 2)
                pid = os.fork()
                if not pid:
                    watched.close()
                    for one in (listener, caller, *(c for _, c in started.values())):
                        one.close()
                    return json.loads(asked), files
                for file in files:
                    os.close(file)
                caller.send(str(pid).encode())
                end = os.pidfd_open(pid)
                started[end] = pid, caller
                watched.register(end, selectors.EVENT_READ)


def _tell_end(end: int, pid: int, caller: socket.socket) -> None:
    os.close(end)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with caller, contextlib.suppress(OSError):  # who asked may have gone
        caller.send(str(code).encode())


def _run(asked: Mapping[str, object], files: Sequence[int]) -> None:
    """Become the process that was asked for."""
    if asked["session"]:
        os.setsid()
    os.chdir(cast(str, asked["cwd"]))
    os.environ.clear()
    os.environ.update(cast("dict[str, str]", asked["env"]))
    for place, file in enumerate((os.open(os.devnull, os.O_RDONLY), *files)):
        os.dup2(file, place)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    words = cast("list[str]", asked["words"])
    words = words[words[0] == "-u" :]  # what torchrun adds: whatever is written is flushed at once
    if words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


def _code(asked: Mapping[str, object], files: Sequence[int]) -> int:
    """Run the program to its end; its exit code."""
    try:
        _run(asked, files)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as heard:
        _import_all()
        gc.collect()
        gc.freeze()
        request = _serve(heard)
    code = _code(*request)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)  # modules are the server's pages, and would be copied to be taken apart
