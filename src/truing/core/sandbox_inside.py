"""Started by `core.sandbox` in a process of its own: walls itself in, then runs the given program.

Uses the standard library alone, and little of it, since every run pays for it; imported only to say
where it lies.
Three processes: the launcher makes the namespaces; the first process of the new process namespace
waits, and takes all others with it when it dies; its child is the program. They are told by stdin,
and tell by the descriptor that is their only argument, which becomes `REPORT` at once:

- stdin: one marshalled dict: code, stdin, seconds, memory_mb, writable_mb, lib, load;
- "ready" once the walls stand and the program is about to run, "exit STATUS" when it has ended,
  "refused REASON" when a wall cannot be made; a line each.
"""

# pathlib takes as long to import as all the rest.
# ruff: noqa: PTH102, PTH103, PTH106, PTH110, PTH112, PTH114, PTH115, PTH120, PTH123, PTH211

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import signal
import struct
import sys

NEW = {
    "user": 0x10000000,
    "mount": 0x20000,
    "pid": 0x20000000,
    "network": 0x40000000,
    "ipc": 0x8000000,
    "uts": 0x4000000,
}
RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
DETACH = 2
MOUNT_SETATTR, AT_RECURSIVE, AT_FDCWD = 442, 0x8000, -100
PR_PDEATHSIG, PR_DUMPABLE, PR_SECCOMP, PR_BOUNDING_DROP, PR_NO_NEW_PRIVS = 1, 4, 22, 24, 38
USER, NOBODY = 1000, 65534  # who the program is inside; who it is outside when started by root
REPORT = 3  # the lowest number, so that all that is open lies below the limit on open files
OPEN = 64  # files that the program may have open
ROOT = "/tmp"  # becomes the new root
WORK = "/box"
DEVICES = ("null", "zero", "random", "urandom")
EPERM, ENOSYS, EAFNOSUPPORT = 1, 38, 97

# System calls by machine: the number of its audit architecture, and of what the program may not do.
# Starting processes is among it: one process's memory is then all there is to limit.
CALLS: dict[str, tuple[int, dict[str, int], str]] = {
    "x86_64": (
        0xC000003E,
        {"clone": 56, "socket": 41},
        "57 58 59 322 101 165 166 155 161 272 308 250 248 249 321 298 323 319 304 303 310 311 29 "
        "68 64 246 320 175 313 176 135 240",
    ),
    "aarch64": (
        0xC00000B7,
        {"clone": 220, "socket": 198},
        "221 281 117 40 39 41 51 97 268 219 217 218 280 241 282 279 265 264 270 271 194 186 190 "
        "104 294 105 273 106 92 180",
    ),
}
# The same everywhere: the newer mount calls, io_uring, pidfd_getfd, mount_setattr, memfd_secret.
EVERYWHERE = [*range(425, 434), 438, 442, 447]
CLONE3 = 435

libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """A wall that this system does not let us make."""


def check(result: int, what: str) -> None:
    """Raise with the system's own word where a call failed."""
    if result < 0:
        raise Refused(f"{what}: {os.strerror(ctypes.get_errno())}")


def tell(report: int, text: str) -> None:
    """A line to whoever started this."""
    os.write(report, text.encode() + b"\n")


def mount(source: str, target: str, sort: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    texts = [t.encode() or None for t in (source, target, sort)]
    check(libc.mount(*texts, flags, data.encode() or None), f"mount {target}")


def write(path: str, text: str) -> None:
    """Write a file of the kernel's."""
    with open(path, "w") as file:
        file.write(text)


def map_users(pid: int) -> None:
    """Say who the user of `pid` is inside: from outside, since root needs its own rights for it."""
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:
        two = f"0 0 1\n{USER} {NOBODY} 1\n"
        try:
            write(f"/proc/{pid}/uid_map", two)
        except OSError:
            pass  # root of a namespace that has no second user: as any other user below
        else:
            write(f"/proc/{pid}/gid_map", two)
            return
    write(f"/proc/{pid}/uid_map", f"{USER} {uid} 1\n")
    write(f"/proc/{pid}/setgroups", "deny")
    write(f"/proc/{pid}/gid_map", f"{USER} {gid} 1\n")


def new_namespaces() -> None:
    """Leave every namespace of the caller."""
    read, told = os.pipe()
    me, mapper = os.getpid(), os.fork()
    if mapper == 0:
        os.close(told)
        try:
            if os.read(read, 1):
                map_users(me)
            os._exit(0)
        except OSError:
            os._exit(1)
    os.close(read)
    flags = 0
    for flag in NEW.values():
        flags |= flag
    done = libc.unshare(flags)
    reason = os.strerror(ctypes.get_errno())
    if done == 0:
        os.write(told, b"1")
    os.close(told)
    _, status = os.waitpid(mapper, 0)
    if done < 0:
        raise Refused(f"new user, mount, process and network namespaces are denied: {reason}")
    if status != 0:
        raise Refused("the user of a new namespace cannot be set")


def bind(source: str, target: str) -> None:
    """Show a folder or file at `target`, read-only with everything below it."""
    mount(source, target, flags=BIND | REC)
    attributes = struct.pack("QQQQ", RDONLY | NOSUID, 0, 0, 0)
    done = libc.syscall(
        MOUNT_SETATTR, AT_FDCWD, target.encode(), AT_RECURSIVE, attributes, len(attributes)
    )
    check(done, "read-only mounts (mount_setattr, Linux 5.12)")


def show(path: str) -> None:
    """Make a path of the old root visible in the new one: links as links, the rest read-only."""
    old = "/old" + path
    if os.path.islink(old):
        if not os.path.lexists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.symlink(os.readlink(old), path)
        return
    if os.path.isdir(old):
        os.makedirs(path, exist_ok=True)
    elif os.path.exists(old):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w"):
            pass
    else:
        return
    bind(old, path)


def new_root(request: dict) -> None:
    """A root of nothing but libraries, four devices and an empty folder that may be written."""
    mount("", "/", flags=REC | PRIVATE)
    mount("root", ROOT, "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    os.mkdir(f"{ROOT}/old")
    check(libc.pivot_root(ROOT.encode(), f"{ROOT}/old".encode()), "pivot_root")
    os.chdir("/")
    for path in request["lib"]:
        show(path)
    for name in DEVICES:
        show(f"/dev/{name}")
    os.mkdir(WORK)
    check(libc.umount2(b"/old", DETACH), "leaving the old root")
    os.rmdir("/old")
    mount("root", "/", flags=REMOUNT | BIND | RDONLY | NOSUID | NODEV)
    size = f"size={request['writable_mb']}m,nr_inodes=4096,mode=777"
    mount("box", WORK, "tmpfs", NOSUID | NODEV | NOEXEC, size)
    os.chdir(WORK)
    with open("program.py", "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(request["code"])


def drop_rights() -> None:
    """No capability now, none to be had later."""
    for capability in range(64):
        if libc.prctl(PR_BOUNDING_DROP, capability, 0, 0, 0) < 0:
            break
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
    header = struct.pack("II", 0x20080522, 0)
    check(libc.capset(header, bytes(24)), "dropping capabilities")
    check(libc.prctl(PR_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def limit(request: dict, tasks: int) -> None:
    """Ceilings on what the program can take."""
    seconds = int(request["seconds"]) + 1
    writable = request["writable_mb"] << 20
    for what, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_AS, request["memory_mb"] << 20, request["memory_mb"] << 20),
        (resource.RLIMIT_FSIZE, writable, writable),
        (resource.RLIMIT_NPROC, tasks, tasks),
        (resource.RLIMIT_NOFILE, OPEN, OPEN),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
    ):
        resource.setrlimit(what, (soft, hard))


def filter_calls() -> bool:
    """Refuse, by seccomp, what no honest program here needs; False where the machine has none.

    Sockets are left of the kinds that the empty network namespace holds; threads may be started,
    processes may not.
    """
    if os.uname().machine not in CALLS:
        return False
    architecture, named, denied = CALLS[os.uname().machine]
    load, equal, above, bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000
    steps = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        (give, 0, 0, refuse | EPERM),
        (load, 0, 0, 0),
        (above, 0, 1, 0x40000000),
        (give, 0, 0, refuse | EPERM),
        (equal, 0, 1, CLONE3),
        (give, 0, 0, refuse | ENOSYS),  # the library then takes clone
    ]
    for call in [*map(int, denied.split()), *EVERYWHERE]:
        steps += [(equal, 0, 1, call), (give, 0, 0, refuse | EPERM)]
    thread = 0x10000
    steps += [
        (equal, 0, 4, named["clone"]),
        (load, 0, 0, 16),
        (bits, 1, 0, thread),
        (give, 0, 0, refuse | EPERM),
        (give, 0, 0, allow),
        (equal, 0, 5, named["socket"]),
        (load, 0, 0, 16),
        (equal, 3, 0, 1),
        (equal, 2, 0, 2),
        (equal, 1, 0, 10),
        (give, 0, 0, refuse | EAFNOSUPPORT),
        (give, 0, 0, allow),
    ]
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    held = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(held))
    return libc.prctl(PR_SECCOMP, 2, ctypes.c_char_p(program), 0, 0) == 0


def run_program(request: dict, report: int) -> int:
    """The program itself, as `__main__` in the folder that may be written; its exit code."""
    words = os.memfd_create("stdin")
    os.write(words, request["stdin"].encode("utf-8", "surrogatepass"))
    os.lseek(words, 0, os.SEEK_SET)
    os.dup2(words, 0)
    sys.stdin = open(0, encoding="utf-8", errors="replace")  # noqa: SIM115
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(0)
    limit(request, 64)
    if not filter_calls():
        limit(request, 2)  # without it, processes cannot be told from threads: neither may start
    main = type(sys)("__main__")
    main.__dict__["__file__"] = f"{WORK}/program.py"
    sys.modules["__main__"] = main
    sys.argv = ["program.py"]
    sys.path.insert(0, WORK)
    os.environ.clear()
    os.environ.update({"HOME": WORK, "TMPDIR": WORK, "LANG": "C.UTF-8"})
    tell(report, "ready")
    os.closerange(REPORT, OPEN)
    source = request["code"]
    request.clear()  # frames lead here, and what was read from stdin must not be found again
    try:
        exec(compile(source, "program.py", "exec"), main.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        import traceback

        ours = error.__traceback__
        traceback.print_exception(error.with_traceback(ours.tb_next if ours else None))
        return 1
    return 0


def first_process(request: dict, report: int) -> None:
    """Wait for the program and tell how it ended; this process's death is the end of all others."""
    libc.prctl(PR_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_DUMPABLE, 0, 0, 0, 0)
    # Should everybody outside be dead, it still ends.
    signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
    signal.alarm(int(request["seconds"]) + 15)
    child = os.fork()
    if child == 0:
        sys.exit(run_program(request, report))
    for stream in (0, 1, 2):
        os.close(stream)
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == child:
            tell(report, f"exit {os.waitstatus_to_exitcode(status)}")
            os._exit(0)


def alone(report: int) -> int:
    """The report under the lowest number, and no other descriptor but the three standard ones.

    It comes under the number that it has in the caller, which may have any number of files open:
    where that is not among those closed later on, the program could write its own report.
    """
    if report != REPORT:
        os.dup2(report, REPORT, inheritable=False)
    most = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 1 << 16)
    os.closerange(REPORT + 1, max(most, report + 1))
    return REPORT


def main() -> None:
    """Launch."""
    report = alone(int(sys.argv[1]))
    libc.prctl(PR_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    request = marshal.loads(sys.stdin.buffer.read())
    try:
        for path in request["load"]:  # what is loaded is found by name, without its file
            ctypes.CDLL(path)
        new_namespaces()
        new_root(request)
        first = os.fork()
        if first == 0:
            drop_rights()
            first_process(request, report)
        os.close(1)
        os.close(2)
        os.waitpid(first, 0)
    except (Refused, OSError) as error:
        tell(report, f"refused {error}".replace("\n", " "))
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
