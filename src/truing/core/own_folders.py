"""Folders that truing wrote and may replace: those that hold what it wrote and nothing else."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import cast

from truing.errors import InputError
from truing.models import BASE_FILES

CARD = "model.json"
EXPORTED = "truing_export.json"  # marks an export
# By the file that marks them: what that says, and every file that there can be.
OURS: dict[str, tuple[set[str], tuple[str, ...]]] = {
    CARD: (
        {"schema_version", "key", "changes"},
        (CARD, "changes/*", "held/*", *(f"base/{name}" for name in BASE_FILES)),
    ),
    EXPORTED: ({"schema_version", "key"}, (EXPORTED, "README.md", *BASE_FILES)),
    "builder.json": ({"schema_version", "builder"}, BASE_FILES),
}


def must_be_free(folder: Path, mark: str) -> None:
    """Raise unless the folder is new, empty, or an earlier one of ours alone, which is replaced."""
    there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if not there:
        return
    fix = "Give a new or empty folder"
    facts, names = OURS[mark]
    if mark in there:
        found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        there = sorted(f for f in found if not any(fnmatch(f, n) for n in names))
    if there:
        raise InputError("the folder holds other files", where=str(folder), seen=there[:6], fix=fix)
    try:
        data: object = json.loads((folder / mark).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        data = None
    if not isinstance(data, dict) or not facts <= set(cast("dict[str, object]", data)):
        raise InputError("was not written by truing", where=str(folder / mark), fix=fix)
