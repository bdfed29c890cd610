"""Files of weights, and whether they can be opened: told at once, not in the middle of a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from truing.changes import WeightChange
from truing.core.files import is_copy
from truing.core.identity import remembered
from truing.core.identity.code import code_key
from truing.errors import InputError
from truing.tables import content_hash

INDEX = "model.safetensors.index.json"
READER = "truing.core.weights"  # which needs PyTorch


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order; all named by its index must be there."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise InputError(f"not a readable index: {error}", where=str(index)) from None
        # Beside the index alone: keys and copies of a model know no other folder.
        missing = [n for n in names if Path(n).name != n or not (folder / n).is_file()]
        if missing:
            fix = "Fetch or save the model again, all of its files in one folder"
            raise InputError("weight files are missing", where=str(folder), seen=missing, fix=fix)
        return [folder / n for n in names]
    return sorted(p for p in folder.glob("*.safetensors") if not is_copy(p))


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
