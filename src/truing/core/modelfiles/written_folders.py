"""Folders that truing wrote and may replace: those that hold what it wrote and nothing else."""

from __future__ import annotations

import hashlib
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import cast

from truing.core.modelfiles.bases import BASE_FILES
from truing.errors import InputError

CARD = "model.json"
EXPORTED = "truing_export.json"  # marks an export
MODEL_CARD = "README.md"
# By the file that marks them: what that says, and every file that there can be.
OURS: dict[str, tuple[set[str], tuple[str, ...]]] = {
    CARD: (
        {"schema_version", "key", "changes"},
        (CARD, "changes/*", "held/*", *(f"base/{name}" for name in BASE_FILES)),
    ),
    EXPORTED: (
        {"schema_version", "key"},
        (EXPORTED, MODEL_CARD, "adapter_config.json", *BASE_FILES),
    ),
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
    data = _facts(folder / mark)
    if not facts <= set(data):
        raise InputError("was not written by truing", where=str(folder / mark), fix=fix)
    card = folder / MODEL_CARD
    if MODEL_CARD in names and card.is_file() and text_hash(card.read_bytes()) != data.get("card"):
        raise InputError("was changed after the export", where=str(card), fix=f"{fix}, or move it")


def exported_mark(folder: Path) -> str:
    """The quarantine of the model that was exported into `folder`; "" where there is none."""
    return str(_facts(folder / EXPORTED).get("quarantine") or "")


def text_hash(text: bytes) -> str:
    """Tells a model card that was left as it was written from one that somebody edited."""
    return hashlib.sha256(text).hexdigest()


def _facts(path: Path) -> dict[str, object]:
    """What a marking file says; nothing where it is none of ours."""
    try:
        data: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("dict[str, object]", data) if isinstance(data, dict) else {}
