"""Content hashes of files and folders: what a base, an adapter or a setting's file is known by.

Reading gigabytes takes a while, so that hashes of large files are remembered, in `hashes.json` of
the user's cache, by what tells a file and its state: inode, size and time of change. All links to a
file share one, such as the base that lies in the folder of each of its adapters.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import json
import os
import threading
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path

from truing.core.files import below, home, lock, write_text
from truing.errors import InputError, no_file
from truing.tables import content_hash

BLOCK = 1 << 22
LARGE = 1 << 20  # bytes beyond which a hash is remembered
_hashes: dict[str, list[str]] | None = None  # path and hash
_gone: set[str] = set()
_guard = threading.Lock()
_read: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("read", default=None)


def _stored() -> dict[str, list[str]]:
    """What was remembered, but for files that this process found gone."""
    try:
        known = json.loads((home() / "hashes.json").read_text())
        return {name: [path, own] for name, (path, own) in known.items() if name not in _gone}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _known() -> dict[str, list[str]]:
    global _hashes
    if _hashes is None:  # once: each file is looked for
        _gone.clear()
        _gone.update(n for n, (path, _) in _stored().items() if not os.path.lexists(path))
        _hashes = _stored()
    return _hashes


def _remember(name: str, path: Path, digest: str) -> None:
    global _hashes
    _known()[name] = [str(path), digest]
    # A cache of hashes that cannot be written costs time only.
    with contextlib.suppress(OSError, InputError), lock(home() / ".hashes.lock"):
        _hashes = _stored() | _known()  # other processes have hashed since
        write_text(home() / "hashes.json", json.dumps(_hashes))


@contextlib.contextmanager
def reading_all() -> Generator[None]:
    """Inside the block every hash is of bytes that are read there, each file's once.

    A disk may lose bits without the time of change telling.
    """
    outer = _read.get()
    token = _read.set({} if outer is None else outer)
    try:
        yield
    finally:
        _read.reset(token)


def file_hash(path: Path) -> str:
    """BLAKE2b of a file's content (32 hex digits); see `reading_all`."""
    path = path.resolve()
    state, read = path.stat(), _read.get()
    name = f"{state.st_ino}-{state.st_size}-{state.st_mtime_ns}"
    if read is None:
        if state.st_size > LARGE and (found := _found(name, path, state)):
            return found
    elif found := read.get(f"{state.st_dev}-{name}"):
        return found
    hashed = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            hashed.update(block)
    digest = hashed.hexdigest()
    if read is not None:
        read[f"{state.st_dev}-{name}"] = digest
    if state.st_size > LARGE:
        with _guard:
            _remember(name, path, digest)
    return digest


def _found(name: str, path: Path, state: os.stat_result) -> str:
    """The hash that is remembered of a file, or ""; the same number elsewhere is another's."""
    with _guard:
        known, digest = _known().get(name, ("", ""))
    with contextlib.suppress(OSError):
        if known == str(path) or os.path.samestat(Path(known).stat(), state):
            return digest
    return ""


def files_hash(folder: Path, names: Iterable[str]) -> str:
    """Content hash of the named files of a folder, names included."""
    return parts_hash({n: folder / n for n in names})


def parts_hash(parts: Mapping[str, Path]) -> str:
    """Content hash of files by name, wherever they lie."""
    return content_hash([[n, file_hash(path)] for n, path in sorted(parts.items())])


def path_hash(path: Path) -> str:
    """Content hash of a file, or of all files of a folder; independent of where it lies."""
    if path.is_file():
        return file_hash(path)
    if not path.is_dir():
        raise no_file("file or folder", path)
    return files_hash(path, [str(p.relative_to(path)) for p in below(path)])
