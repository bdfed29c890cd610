"""What of a store is to be kept: the artefacts that runs and single commands refer to.

    roots/<name>.json      what a run refers to, and where the run lies
    recent/<key>           touched when a single command asked for the artefact

`truing store gc` deletes the rest.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable
from pathlib import Path

from truing.core import files
from truing.errors import InputError
from truing.tables import content_hash

KEEP_DAYS = 30.0  # what only single commands asked for, and what stopped steps left behind


def _root(path: Path) -> tuple[Path, set[str]]:
    """The folder of a run and the keys that it refers to; an InputError when that is unknown."""
    state = path.stat()
    return _read_root(path, state.st_ino, state.st_mtime_ns, state.st_size)


@functools.lru_cache(4096)  # gc asks all of them under the lock of each key
def _read_root(path: Path, *_: int) -> tuple[Path, set[str]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Path(data["folder"]), {str(key) for key in data["keys"]}
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"what a run refers to cannot be read: {error}",
            where=str(path),
            fix="Delete the file: what that run alone refers to may then be collected",
        ) from None


class Roots:
    """The roots of the store in this folder."""

    def __init__(self, store: Path) -> None:
        self._runs, self._recent = store / "roots", store / "recent"

    def keep_run(self, folder: Path, keys: Iterable[str], *, final: bool = False) -> None:
        """Remember that the run in `folder` refers to `keys`, so that gc leaves them alone.

        A run that goes on adds to what it referred to before; only a finished one lets go of it.
        """
        where = str(folder.resolve())
        path = self._runs / f"{content_hash(where, 8)}.json"
        if not final and path.is_file():
            with contextlib.suppress(InputError):  # a damaged one is written anew
                keys = {*keys, *_root(path)[1]}
        files.write_text(path, json.dumps({"folder": where, "keys": sorted(set(keys))}))

    def keep_recent(self, key: str) -> None:
        """Remember that a single command asked for this artefact now: no run refers to it."""
        path = self._recent / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def referred(self, *, drop: bool = False, days: float = KEEP_DAYS) -> set[str]:
        """Keys that a run or a single command of the last `days` refers to.

        A run whose parent folder is gone too may lie on a disk that is not mounted: it counts. One
        whose own folder is gone may have been moved: it counts until its last step is `days` old.
        With `drop`, what deleted runs and older commands refer to is let go.
        """
        found: set[str] = set()
        for path in self._recent.glob("*"):
            if files.age(path) < days:
                found.add(path.name)
            elif drop:
                path.unlink(missing_ok=True)
        for path in sorted(self._runs.glob("*.json")):
            folder, keys = _root(path)
            gone = folder.parent.is_dir() and not (folder / "manifest.json").is_file()
            if drop and gone and files.age(path) >= days:
                path.unlink()
            else:
                found |= keys
        return found

    def in_use(self, key: str, days: float) -> bool:
        """Whether `key` is among those of `referred` now."""
        asked, roots = self._recent / key, self._runs.glob("*.json")
        recent = asked.exists() and files.age(asked) < days
        return recent or any(key in _root(p)[1] for p in roots)
