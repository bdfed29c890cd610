"""Replies of endpoints as they are kept: on the disk for good, or for a while in memory.

On the disk, under TRUING_HOME, a reply is a file, put in its place by one rename; a damaged file
counts as none. When a process first asks, the files longest unused go until `LIMIT` bytes are left,
which is told, since they may have cost money.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
from collections.abc import Generator
from pathlib import Path
from typing import cast

from truing.core import files
from truing.errors import InputError

SCHEMA_VERSION = 1
LIMIT = 4 * 2**30  # bytes on disk, of all runs together
Reply = dict[str, object]


class Replies:
    """Kept replies: one JSON file each, safe against kills and between processes."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or files.home() / "replies"

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> Reply | None:
        """The reply kept under `key`, or None."""
        path = self._path(key)
        try:
            data: object = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None
        with contextlib.suppress(OSError):
            path.touch()
        kept = cast("Reply", data) if isinstance(data, dict) else {}
        return kept if kept.get("schema_version") == SCHEMA_VERSION else None

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply; an InputError when the disk takes none, since it may have cost money."""
        path = self._path(key)
        try:
            files.write_text(path, json.dumps(reply | {"schema_version": SCHEMA_VERSION}))
        except OSError as error:
            raise InputError(
                f"a reply cannot be kept: {error.strerror}",
                where=str(path.parent),
                fix="Free some space, or point TRUING_HOME to another disk",
            ) from None

    def make_room(self) -> None:
        """Let the files longest unused go, once in a process."""
        said = f"replies, longest unused, are deleted to keep {LIMIT / 2**30:.3g} GiB of them"
        files.make_room_once(self.folder, LIMIT, f"{said}; what they answer is asked anew")


class _Passing(Replies):
    """Replies that are kept in memory alone."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, Reply] = {}

    def get(self, key: str) -> Reply | None:
        return self._kept.get(key)

    def put(self, key: str, reply: Reply) -> None:
        self._kept[key] = reply

    def make_room(self) -> None:
        pass


passing: contextvars.ContextVar[Replies | None] = contextvars.ContextVar("passing", default=None)


@contextlib.contextmanager
def unkept() -> Generator[None]:
    """Keep replies until the block's end and no longer: others' answers, which nobody draws again.

    A request without a seed is never asked twice, and with one it may be another model's by then.
    """
    token = passing.set(_Passing())
    try:
        yield
    finally:
        passing.reset(token)
