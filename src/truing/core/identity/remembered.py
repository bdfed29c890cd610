"""What was found once, by the hash of all that decides it, so that nobody has to find it again.

A command whose steps are all in the store would import PyTorch and its methods, for seconds, to
hear what it was told the last time: which settings a method takes, that those of a plan are right,
that a model's files are whole. Each such answer is a small file `known/<hash>` in the user's cache.
What is missing or damaged is found anew; deleting the folder costs time only.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from pathlib import Path

from truing.core.files import home, make_room_once, write_text
from truing.errors import InputError
from truing.tables import content_hash

LIMIT = 2**24  # bytes on disk; the longest unused go first
ENDS = (".dist-info", ".egg-info")


def find(name: str) -> object:
    """What was kept under this hash; None where nothing was, or it cannot be read."""
    with contextlib.suppress(InputError, OSError, ValueError):
        path = _place(name)
        head, _, text = path.read_text(encoding="utf-8").partition("\n")
        if head == content_hash(text):
            with contextlib.suppress(OSError):  # such as another user's, who lets it be read
                os.utime(path)
            return json.loads(text)
    return None


def keep(name: str, value: object) -> None:
    """Keep plain data under the hash of all that decides it; costs time only where it cannot be."""
    with contextlib.suppress(InputError, OSError):
        path, text = _place(name), json.dumps(value)
        make_room_once(path.parent, LIMIT)
        write_text(path, f"{content_hash(text)}\n{text}")


def _place(name: str) -> Path:
    return home() / "known" / name


def installed() -> str:
    """Hash of this Python and of what it can import: names, versions, when it was installed."""
    return _installed(tuple(sys.path))


@functools.cache
def _installed(folders: tuple[str, ...]) -> str:
    found: set[tuple[str, int]] = set()
    for folder in folders:
        with contextlib.suppress(OSError):
            inside = [p for p in Path(folder).iterdir() if p.name.endswith(ENDS)]
            found |= {(p.name, p.stat().st_mtime_ns) for p in inside}
    return content_hash([sys.version, sys.platform, sorted(found)])
