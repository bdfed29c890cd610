"""Files of models and data: the user's cache, locks, atomic folders.

Free of torch, so that names and keys are known before anything heavy is imported.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import functools
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO

from truing.errors import InputError

BLOCK = 1 << 22
FILE = 1 << 12  # bytes of the disk that the smallest file takes
COPY = "consolidated*.safetensors"
_FICLONE = 0x40049409  # Linux ioctl: share the blocks of a file, copy on write


def home() -> Path:
    """The user's cache: TRUING_HOME, or ~/.cache/truing."""
    chosen = os.environ.get("TRUING_HOME", "")
    try:
        return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "truing"
    except RuntimeError:  # a user whom the system does not know, such as in a container
        raise InputError(
            "there is no home folder to keep models and results in",
            where=f"TRUING_HOME={chosen}" if chosen else "HOME",
            fix="Set TRUING_HOME to a folder that can be written",
        ) from None


def expanded(text: str | Path) -> Path:
    """A path with ~ as the user's home; as it is where there is none, as in a shell."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = True, said: str = "") -> Generator[bool]:
    """Hold an exclusive lock between processes; released by the system when this one dies.

    Yields True; with `wait=False` False at once where another holds it. Then a file system that
    has no locks counts as free.

    Args:
        said: on stderr, to who has to wait.
    Raises:
        InputError: the file system has no locks, and one is needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        if not _locked(file, wait, said):
            yield False
            return
        try:
            yield True
        finally:
            with contextlib.suppress(OSError):  # it ends with the file in any case
                fcntl.flock(file, fcntl.LOCK_UN)


def _locked(file: IO[str], wait: bool, said: str) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            return False
        if said:
            print(said, file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        if wait:
            raise InputError(
                "this file system has no locks, by which processes keep out of each other's way",
                where=file.name,
                fix="Set TRUING_HOME to a disk that has them, or mount it with -o flock",
            ) from None
    return True


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some file systems flush no folders
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Flush all that lies in a folder and below it: files, and the names that lead to them."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file() or path.is_dir():
            sync(path)


@contextlib.contextmanager
def new_folder(target: Path) -> Generator[Path]:
    """A folder to fill that becomes `target` in one rename, or vanishes on an exception.

    An earlier folder of that name is put aside, and deleted when the new one stands in its place.
    What a kill in between has put aside comes back, or goes, with the next call.
    Raises:
        InputError: a file or a link has that name.
    """
    known = next(p for p in target.absolute().parents if p.is_dir())
    target.parent.mkdir(parents=True, exist_ok=True)
    _recover(target)
    if target.is_symlink() or target.is_file():
        raise InputError(
            "is not a folder, and not replaced by one",
            where=str(target),
            fix="Move it, or name another folder",
        )
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        yield partial
        sync_folder(partial)
        _swap(partial, target)
        for folder in target.absolute().parents:  # its new name, and those of new folders above
            sync(folder)
            if folder == known:
                break
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(partial: Path, target: Path) -> None:
    """Put `partial` in the place of `target`, which is never half there."""
    for attempt in range(8):
        with contextlib.suppress(FileNotFoundError):
            put_aside(target, partial.with_name(f"{partial.name}.{attempt}.old"))
        try:
            partial.rename(target)
            break
        except OSError as error:  # another process was faster: its folder is replaced in turn
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == 7:
                raise
        finally:
            _recover(target)


def put_aside(folder: Path, to: Path, mark: str = "") -> None:
    """Give a folder another name, so that it is out of sight at once; where that fails, delete it.

    In a container the folders of its image (overlayfs) take no other name, while what they hold
    can be deleted: first `mark`, the file without which the folder counts as none.
    """
    try:
        folder.rename(to)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        if mark:
            (folder / mark).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _recover(target: Path) -> None:
    """Give `target` back what was put aside, where it is missing; delete all that is left over."""
    aside = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}\.[0-9]\.(old|gone)")
    for path in [p for p in target.parent.iterdir() if aside.fullmatch(p.name)]:
        # Another process may be at the same work.
        with contextlib.suppress(OSError):
            if path.suffix == ".old" and not target.exists():
                path.rename(target)
                continue
            # Under a name of its own first: what is half deleted must not be given back.
            gone = path.rename(path.with_suffix(".gone"))
            shutil.rmtree(gone, ignore_errors=True)


def age(path: Path) -> float:
    """Days since anything was written at or under `path`."""
    latest = 0.0
    for one in (path, *path.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            latest = max(latest, one.stat().st_mtime)
    return (time.time() - latest) / 86400


def make_room(folder: Path, limit: int, said: str = "") -> None:
    """Delete the files of `folder` and below that were longest unused, until `limit` bytes remain.

    A file's time is that of its last use: whoever reads one touches it.

    Args:
        said: on stderr, behind how many are deleted, if any.
    """
    found: list[tuple[float, int, Path]] = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another run was faster
            facts = path.stat()
            if stat.S_ISREG(facts.st_mode):
                # Small files take a block of the disk each.
                found.append((facts.st_mtime, max(facts.st_size, facts.st_blocks * 512), path))
    total, gone = sum(size for _, size, _ in found), 0
    for _, size, path in sorted(found):
        if total <= limit:
            break
        with contextlib.suppress(OSError):
            path.unlink()
        total, gone = total - size, gone + 1
    if gone and said:
        print(f"{folder}: {gone} {said}", file=sys.stderr)


_written: dict[Path, int] = {}


def make_room_for(folder: Path, limit: int, size: int) -> None:
    """`make_room` before `size` bytes are written: a process's first, then once in limit / 8 bytes.

    Looking takes a while, which is why the folder may grow by that eighth beyond the limit.
    """
    written = _written.get(folder)
    if written is None or written + size > limit // 8:
        make_room(folder, limit - size)
        written = 0
    _written[folder] = written + size


@functools.cache
def make_room_once(folder: Path, limit: int, said: str = "") -> None:
    """`make_room`, once a process: what it writes itself stays, and looking takes a while."""
    make_room(folder, limit, said)


@contextlib.contextmanager
def new_file(path: Path) -> Generator[Path]:
    """A file to write that becomes `path` in one rename, or vanishes on an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file's text in one rename, so that no reader ever sees half of it."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file: what checksums of downloads are stated in."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All files of a folder, in order, those behind links to other folders among them."""
    here = folder.resolve()
    if here in above:  # a link that leads back
        return
    try:
        paths = sorted(folder.iterdir())
    except PermissionError:
        fix = "Name a folder without it, or ask its owner to let you read it"
        raise InputError("this folder cannot be read", where=str(folder), fix=fix) from None
    for path in paths:
        if path.is_dir():
            yield from below(path, (*above, here))
        elif path.is_file():
            yield path


def place(source: Path, target: Path, *, link: bool) -> None:
    """Put a file at `target`: hard-linked if `link`, else sharing blocks, else copied.

    Only files that nobody rewrites in place may be linked, since a link sees later changes.
    """
    source = source.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(source, target)
            return
    with source.open("rb") as read, target.open("wb") as write:
        try:
            fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())
            return
        except OSError:
            shutil.copyfileobj(read, write, BLOCK)


def place_tree(source: Path, target: Path, *, link: bool) -> None:
    """`place` for a file or for every file of a folder."""
    if source.is_file():
        place(source, target, link=link)
        return
    for path in below(source):
        place(path, target / path.relative_to(source), link=link)


def is_copy(path: Path) -> bool:
    """True for weights that lie there twice, as Mistral's own code reads them: the second time."""
    others = ("model.safetensors", "model.safetensors.index.json")
    twice = fnmatch.fnmatch(path.name, COPY)
    return twice and any((path.parent / name).is_file() for name in others)


def is_of_hub(path: Path) -> bool:
    """True for files in the cache of the Hugging Face hub."""
    from huggingface_hub import constants

    return path.resolve().is_relative_to(Path(constants.HF_HUB_CACHE).resolve())


def is_managed(path: Path) -> bool:
    """True for files under the user's cache, which are written once and never changed.

    Its store may lie on another disk, behind a link.
    """
    resolved = path.resolve()
    return any(resolved.is_relative_to(p.resolve()) for p in (home(), home() / "store"))
