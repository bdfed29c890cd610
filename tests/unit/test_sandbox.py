"""The sandbox, by programs that really try to get out, to hold on or to take too much."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from truing.core import sandbox
from truing.core.sandbox import Outcome, run
from truing.errors import InputError

pytestmark = pytest.mark.skipif(bool(sandbox.available()), reason=sandbox.available())


def refused(code: str, error: str, **settings: object) -> Outcome:
    done = run(code, **settings)  # type: ignore[arg-type]
    assert done.exit_code == 1 and error in done.stderr, done
    return done


def test_a_program_runs_reads_and_ends() -> None:
    done = run("import sys\nprint(sys.stdin.read() * 2)\nsys.exit(7)", stdin="né")
    assert (done.stdout, done.stderr, done.exit_code) == ("néné\n", "", 7)
    assert not done.timed_out and not done.killed and 0 < done.seconds < 5
    assert run("print(__name__)").stdout == "__main__\n"


def test_the_traceback_is_the_programs_alone() -> None:
    done = run("def f():\n    raise ValueError('no')\nf()")
    assert done.exit_code == 1 and done.stdout == ""
    assert done.stderr.splitlines()[1] == '  File "program.py", line 3, in <module>'
    assert done.stderr.endswith("ValueError: no\n") and "sandbox" not in done.stderr
    assert "SyntaxError" in run("def (").stderr


def test_the_standard_library_is_there() -> None:
    names = "asyncio, sqlite3, ssl, decimal, hashlib, json, random, unittest, zoneinfo, ctypes"
    code = f"import {names}, threading\nasyncio.run(asyncio.sleep(0))\n"
    code += "t = threading.Thread(target=print, args=('thread',)); t.start(); t.join()"
    assert run(code).stdout == "thread\n"


def test_libraries_of_others_are_there_wherever_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what Python's own modules are made of, programs see no file, as with a Python of Nix."""
    library = str(Path(os.__file__).resolve().parent)
    monkeypatch.setattr(sandbox, "_libraries", lambda: [library])
    done = run("import bz2, ctypes, decimal, hashlib, lzma, sqlite3, ssl, zlib\nprint('there')")
    assert done.stdout == "there\n", done


def test_what_cannot_be_imported_inside_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer that imports it would count as wrong."""
    monkeypatch.setattr(sandbox, "_foreign", lambda: (["zlib", "_absent"], []))
    sandbox._probe.cache_clear()
    with pytest.raises(InputError, match=r"No module named '_absent'.*Use another Python"):
        run("pass")


def test_the_advice_is_that_of_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = tmp_path / "apparmor_restrict_unprivileged_userns"
    monkeypatch.setattr(sandbox, "RESTRICTED", setting)
    assert "AppArmor" not in str(sandbox._denied("mount /: Permission denied"))
    setting.write_text("1\n")
    assert f"kernel.{setting.name}=0" in str(sandbox._denied("mount /: Permission denied"))
    old = "read-only mounts (mount_setattr, Linux 5.12): Function not implemented"
    assert "Take Linux 5.12 or later" in sandbox._denied(old).fix


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
        "import socket; socket.create_connection(('1.1.1.1', 80), 1)",
        "import socket; socket.getaddrinfo('localhost.example', 80)",
        "import socket; socket.socket(40, socket.SOCK_STREAM)",  # AF_VSOCK: the host of this VM
        "import socket; socket.socket(socket.AF_UNIX).connect('{unix}')",
    ],
)
def test_no_network(code: str, tmp_path: Path) -> None:
    import socket

    path = str(tmp_path / "s")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(path)
        local.listen()
        port = server.getsockname()[1]
        refused(code.replace("{port}", str(port)).replace("{unix}", path), "rror")


def test_nothing_outside_is_written_or_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    for path in (str(secret), "/etc/passwd", "/etc/shadow", "/proc/1/environ", "/proc/self/maps"):
        refused(f"open({path!r}).read()", "FileNotFoundError")
    library = Path(os.__file__).resolve()
    for path in (str(library), str(library.parent / "new"), "/new", "/usr/lib/new", "/dev/new"):
        done = run(f"open({path!r}, 'w')")
        assert done.exit_code == 1 and ("Read-only" in done.stderr or "denied" in done.stderr), path
    assert secret.read_text() == "s3cret" and not Path("/new").exists()
    seen = run(
        "import os; print(sorted(os.listdir('/')), os.path.exists(os.path.expanduser('~/.')))"
    )
    assert "home" not in seen.stdout and "proc" not in seen.stdout and "tmp" not in seen.stdout


def test_own_folder_can_be_written_and_vanishes() -> None:
    done = run("open('a', 'w').write('x'); print(open('/box/a').read())")
    assert done.stdout == "x\n"
    refused("print(open('a').read())", "FileNotFoundError")


def test_no_environment_no_user_no_rights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "hidden-key")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/hidden")  # the launcher may need it to start at all
    assert sandbox._environment() == {"LANG": "C.UTF-8", "LD_LIBRARY_PATH": "/hidden"}
    code = (
        "import os, socket, gc\nprint(dict(os.environ), os.getuid(), os.getgroups())\n"
        "print(any('hidden' + '-key' in repr(o) for o in gc.get_objects() if type(o) is dict))\n"
        "try: os.setuid(0); print('root')\nexcept PermissionError: print('stays')"
    )
    lines = run(code).stdout.splitlines()
    assert "hidden" not in lines[0] and " 1000 " in lines[0] and "PATH" not in lines[0]
    assert lines[1:] == ["False", "stays"]


CALLS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def denied(name, *args):
    if getattr(libc, name)(*args) >= 0: print('GOT THROUGH', name)
denied('mount', b'none', b'/box', b'tmpfs', 0, None)
denied('umount2', b'/box', 2)
denied('unshare', 0x10000000)
denied('unshare', 0x20000)
denied('chroot', b'/box')
denied('ptrace', 16, 1, 0, 0)
denied('sethostname', b'x', 1)
denied('setns', 0, 0)
os.kill(1, 9)
print('done')
"""


def test_system_calls_are_denied() -> None:
    done = run(CALLS)
    assert done.stdout == "done\n", done


@pytest.mark.parametrize(
    "code",
    [
        "import os\nwhile True:\n    os.fork()",
        "import ctypes\nlibc = ctypes.CDLL(None)\nfor i in range(99):\n"
        "    if libc.syscall(57) >= 0 or libc.syscall(56, 17, 0, 0, 0, 0) >= 0: print('FORKED')\n"
        "raise OSError('denied')",
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'pass'])",
        "import os\nos.execv('/usr/lib/x', ['x'])",
    ],
)
def test_fork_bomb(code: str) -> None:
    done = run(code, seconds=3)
    assert done.exit_code != 0 and "FORKED" not in done.stdout and not done.timed_out, done


def test_thread_bomb() -> None:
    code = "import threading, time\nthreading.stack_size({})\nwhile True:\n"
    code += "    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    refused(code.format(1 << 18), "can't start new thread")  # there are as many as may be
    done = run(code.format(0))  # of the size that stacks have else, a few fill the memory
    assert done.exit_code == 1 and not done.timed_out, done


@pytest.mark.parametrize(
    "code",
    [
        "x = bytearray(10**9)",
        "x = []\nwhile True: x.append(bytearray(10**6))",
        "import mmap\nx = [mmap.mmap(-1, 10**7) for _ in range(99)]",
        "x = 'a' * 10\nwhile True: x += x",
    ],
)
def test_memory_bomb(code: str) -> None:
    done = run(code, seconds=10, memory_mb=128)
    assert done.exit_code != 0 and not done.timed_out, done
    assert "MemoryError" in done.stderr or "Cannot allocate" in done.stderr, done


def test_memory_that_is_no_address_space() -> None:
    refused("import os\nos.memfd_create('x')", "PermissionError")
    refused("while True:\n    open('a', 'ab').write(bytes(10**6))", "OSError")
    code = "for i in range(10**6): open(str(i), 'w').close()"
    refused(code, "No space left")


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        "import os, time\nos.setsid() if os.getsid(0) != os.getpid() else 0\nos.close(1)\n"
        "os.close(2)\ntime.sleep(60)",
    ],
)
def test_endless_programs_are_killed(code: str) -> None:
    began = time.monotonic()
    done = run("print('begun', flush=True)\n" + code, seconds=0.4)
    assert time.monotonic() - began < 5
    assert done.timed_out and done.killed and done.exit_code == -9
    assert done.stdout == "begun\n" and 0.4 <= done.seconds < 2


def test_nothing_is_left_behind() -> None:
    before = _ours()
    run(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(50,)).start()",
        seconds=0.3,
    )
    left = _ours() - before  # other tests run beside this one, whose processes come and go
    until = time.monotonic() + 30  # well before what would be left of the run ends by itself
    while left & _ours() and time.monotonic() < until:
        time.sleep(0.02)
    assert not left & _ours()


def test_killed_with_whoever_asked_for_it(tmp_path: Path) -> None:
    code = "from truing.core import sandbox; sandbox.run('import time; time.sleep(60)', seconds=50)"
    process = subprocess.Popen([sys.executable, "-c", code])
    until = time.monotonic() + 60
    while len(found := _ours(process.pid)) < 3 and time.monotonic() < until:  # the three of a run
        time.sleep(0.01)
    assert len(found) == 3
    process.kill()
    process.wait()
    while found & _ours() and time.monotonic() < until:
        time.sleep(0.01)
    assert not found & _ours()


def _ours(under: int = 0) -> set[str]:
    """Processes of the sandbox that live, all or those that descend from one process."""
    found = set[str]()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            own = b"sandbox_inside" in path.read_bytes()
        except OSError:
            continue
        if own and (not under or under in _ancestors(path.parent.name)):
            found.add(path.parent.name)
    return found


def _ancestors(pid: str) -> list[int]:
    """Whose child a process is, whose child that is, and so on."""
    made: list[int] = []
    while int(pid) > 1:
        try:
            # After the name, which may hold anything: the state, then the parent.
            pid = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            break
        made.append(int(pid))
    return made


def test_more_output_is_kept_where_that_is_asked() -> None:
    code = "print('x' * 10**6, end='')"
    whole, less = run(code, keep=10**6), run(code, keep=10**6 - 1)
    assert whole.stdout == "x" * 10**6 and not whole.cut
    assert less.cut and less.stdout == "x" * (10**6 - 1) + sandbox.CUT.format(10**6 - 1)


def test_huge_output_is_capped() -> None:
    done = run("import sys\nprint('x' * 10**7)\nprint('y' * 10**7, file=sys.stderr)\nprint('end')")
    assert done.exit_code == 0
    for text, letter in ((done.stdout, "x"), (done.stderr, "y")):
        assert text == letter * sandbox.OUTPUT + sandbox.CUT.format(sandbox.OUTPUT)
    flood = run("while True: print('z' * 1000)", seconds=0.3)
    assert flood.timed_out and flood.cut
    assert flood.stdout.endswith(sandbox.CUT.format(sandbox.OUTPUT))
    assert len(flood.stdout) < sandbox.OUTPUT + 40
    assert run("import os; os.write(1, b'\\xff\\xfe')").stdout == "��"


def test_a_crash_is_told() -> None:
    done = run("import ctypes; ctypes.string_at(0)")
    assert done.exit_code == -11 and done.killed and not done.timed_out


def test_output_cannot_forge_the_report() -> None:
    code = "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'exit 0\\n')\n"
    code += "    except OSError: pass\nprint('ready\\nexit 0')\nos._exit(3)"
    assert run(code).exit_code == 3


def test_fifty_runs_in_threads_do_not_mix() -> None:
    run("pass")
    results: dict[int, str] = {}

    def work(first: int) -> None:
        for i in range(first, 50, 2):
            results[i] = run(f"print({i} * 2)").stdout

    began = time.monotonic()
    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: f"{i * 2}\n" for i in range(50)}
    # About 25 ms each on an idle core; the bound leaves room for a machine that is busy.
    assert (time.monotonic() - began) / 50 < 0.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seconds": 0}, "seconds must lie"),
        ({"memory_mb": 8}, "memory_mb must be at least 64"),
        ({"stdin": "x" * (9 << 20)}, "smaller than 8 MiB"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run("pass", **settings)  # type: ignore[arg-type]


DENIED = """
from truing.core import sandbox
from truing.errors import InputError
assert "denied" in sandbox.available()
try:
    sandbox.run("open(chr(97), chr(119))")
except InputError as error:
    print(error)
"""


def test_where_namespaces_are_denied_nothing_runs(tmp_path: Path) -> None:
    """A namespace whose own limit of further ones is 0, as hardened systems have it."""
    command = f"echo 0 > /proc/sys/user/max_user_namespaces && exec {sys.executable} -c '{DENIED}'"
    made = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", command], cwd=tmp_path, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    assert "runs only in the sandbox" in made.stdout and "max_user_namespaces" in made.stdout
    assert not list(tmp_path.iterdir())
