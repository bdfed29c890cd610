"""Whether the weights of a folder can be opened: told at once, not in the middle of a run."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from truing.changes import WeightChange
from truing.core.identity import remembered
from truing.core.identity.code import code_key
from truing.tables import content_hash

INDEX = "model.safetensors.index.json"
READER = "truing.core.weights"  # which needs PyTorch


def check_weights(folder: Path, changes: Sequence[WeightChange] = ()) -> None:
    """Raise an InputError for weights that are missing or damaged, or do not fit their changes.

    Files that were in order are not opened again as long as they are the same.
    """
    seen = [_files(one) for one in (folder, *(c.path for c in changes))]
    name = content_hash(["weights", seen, code_key([READER]), remembered.installed()])
    known = remembered.find(name) is not None
    if known and READER not in sys.modules:
        return
    from truing.core.weights import Folded, open_weights

    Folded(open_weights(folder), changes)
    if not known:
        remembered.keep(name, True)


def _files(place: Path) -> list[list[object]]:
    """What tells files from others, and from themselves once they have been written to."""
    found: Iterable[Path] = place.iterdir() if place.is_dir() else [place]
    states = [(p.resolve(), p.stat()) for p in sorted(found) if p.is_file()]
    return [[str(p), s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for p, s in states]
