"""The data sets at hand: of the repository's `data/`, then of the mirror that TRUING_DATA names.

The first are as `data/NOTICE` describes them; the second are listed in the mirror's index.json:

    [{"name": "gsm8k", "title": "Grade-school problems", "licence": "MIT", "non_commercial": false,
      "origin": [{"source": "openai/grade-school-math", "version": "3101c7d"}],
      "files": [{"file": "train.jsonl.gz", "sha256": "...", "records": 7473}]}, ...]

`name` is the folder of the files. `origin` says where they were taken from, in words or as a list;
it, `non_commercial`, `sha256` and `records` may be left out, and more may stand there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NotRequired, TypedDict, TypeVar, cast

from truing.core.files import expanded
from truing.core.modelfiles.licences import allows_commercial, sort_of
from truing.errors import InputError

T = TypeVar("T")
JSON = ".json"  # a list of rows mostly, but whoever made a set may keep anything in it
TABLES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet", JSON)
TEXTS = (".txt", ".txt.gz")
# The repository's own sets and the kind of their rows: known by name without a checkout, too.
OWN = {
    "answer_or_ask": "pair",
    "common_knowledge": "prompt",
    "digits": "record",
    "everyday_prompts": "prompt",
    "helpful_pairs": "pair",
    "prose": "text",
}


@dataclass(frozen=True)
class File:
    """One file of a set; `name` is its path inside the set, `sha256` as the index states it."""

    path: Path
    name: str
    sha256: str = ""
    records: int = 0

    @property
    def part(self) -> str:
        """The file's name without .jsonl, .csv, .txt, .gz."""
        return re.sub(r"(\.(jsonl|json|csv|tsv|parquet|txt))?(\.gz)?$", "", self.name)

    @property
    def readable(self) -> bool:
        """True for what becomes a table; images and archives are for their own readers."""
        return self.path.name.endswith(TABLES + TEXTS)


@dataclass(frozen=True)
class DataSet:
    """One named set; `origin` is where it lies, `source` where it was taken from."""

    name: str
    about: str
    licence: str
    origin: str
    files: list[File] = field(default_factory=list)
    source: str = ""


def surest(names: Iterable[T], name: Callable[[T], str]) -> list[T]:
    """Of files that can be tables those that are for certain; the .json ones where none is.

    Beside other tables a .json file mostly tells of them, and is read where it is named.
    """
    found = list(names)
    return [one for one in found if not name(one).endswith(JSON)] or found


def repository() -> Path | None:
    """The `data/` folder of the checkout; None where truing is installed without one."""
    folder = Path(__file__).resolve().parents[2] / "data"
    return folder if (folder / "NOTICE").is_file() else None


def _shipped() -> Iterator[DataSet]:
    """Sets of the repository, as its NOTICE describes them."""
    folder = repository()
    if folder is None:
        return
    text = (folder / "NOTICE").read_text(encoding="utf-8")
    for block in re.split(r"\n\n", text):
        name, _, body = block.strip("\n").partition("\n")
        facts = dict(re.findall(r"^  (\w[\w-]*): (.*(?:\n  (?! *[\w-]+: ).*)*)", body, re.M))
        path = folder / name.strip()
        if "SHA-256" in facts and path.is_file():
            facts = {k: " ".join(v.split()) for k, v in facts.items()}
            file = File(path, path.name, facts["SHA-256"])
            about, licence, source = (facts.get(n, "") for n in ("What", "Licence", "Origin"))
            yield DataSet(file.part, about, licence, "repository", [file], source)


class _Listed(TypedDict):
    """A file as the index has it."""

    file: str
    sha256: NotRequired[str | None]
    records: NotRequired[int | None]


class _Entry(TypedDict):
    """A set as the index has it."""

    name: str
    title: str
    licence: str
    non_commercial: NotRequired[bool]
    origin: NotRequired[str | list[dict[str, str]]]
    files: list[_Listed]


def _entries(listed: object, where: str) -> list[_Entry]:
    """What an index lists, or an InputError that names the first entry of another form."""
    fix = (
        "An index is a list of sets: [{name, title, licence, files: [{file, sha256, records}], "
        "origin, non_commercial}]"
    )
    if not isinstance(listed, list):
        raise InputError("an index must be a list of sets", where=where, seen=listed, fix=fix)
    for i, entry in enumerate(cast("list[object]", listed), 1):
        at = f"{where} set {i}"
        if not isinstance(entry, dict):
            raise InputError("a set must be a mapping", where=at, seen=entry, fix=fix)
        facts = cast("dict[str, object]", entry)
        for name in ("name", "title", "licence"):
            if not isinstance(facts.get(name), str):
                raise InputError(
                    f"{name!r} must be a text", where=at, seen=facts.get(name), fix=fix
                )
        held = facts.get("files")
        if not isinstance(held, list) or not all(map(_is_listed, cast("list[object]", held))):
            raise InputError("'files' must list {file: name}", where=at, seen=held, fix=fix)
        for file in cast("list[_Listed]", held):
            if not re.fullmatch(r"[0-9a-f]{64}|", file.get("sha256") or ""):
                raise InputError(
                    "'sha256' must be 64 hexadecimal digits",
                    where=f"{at} file {file['file']}",
                    seen=file.get("sha256"),
                    fix=fix,
                )
        if not isinstance(facts.get("non_commercial", False), bool):
            seen = facts["non_commercial"]
            raise InputError("'non_commercial' must be true or false", where=at, seen=seen, fix=fix)
        if not _is_origin(facts.get("origin", "")):
            told = "'origin' must be a text or a list of {source, version}"
            raise InputError(told, where=at, seen=facts["origin"], fix=fix)
    return cast("list[_Entry]", listed)


def _is_origin(value: object) -> bool:
    items = cast("list[object]", value) if isinstance(value, list) else []
    return isinstance(value, (str, list)) and all(
        isinstance(item, dict)
        and isinstance(cast("dict[str, object]", item).get("source"), str)
        and isinstance(cast("dict[str, object]", item).get("version", ""), str)
        for item in items
    )


def _source(origin: str | list[dict[str, str]]) -> str:
    """Where a set was taken from, in one line."""
    if isinstance(origin, str):
        return " ".join(origin.split())
    return ", ".join(" ".join(filter(None, [o["source"], o.get("version")])) for o in origin)


def _is_listed(item: object) -> bool:
    if not isinstance(item, dict):
        return False
    facts = cast("dict[str, object]", item)
    kinds = {"file": str, "sha256": str | None, "records": int | None}
    return "file" in facts and all(isinstance(facts.get(n), k) for n, k in kinds.items())


def _mirrored() -> Iterator[DataSet]:
    """Sets of the data folder, TRUING_DATA."""
    root = os.environ.get("TRUING_DATA", "")
    if not root:
        return
    index = expanded(root) / "index.json"
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"the index of the data folder cannot be read: {error}",
            where=f"TRUING_DATA={root}",
            fix="It must be a folder with an index.json that lists sets and files",
        ) from None
    for entry in _entries(listed, str(index)):
        folder = index.parent / str(entry["name"])
        held = [
            File(folder / f["file"], f["file"], f.get("sha256") or "", f.get("records") or 0)
            for f in entry["files"]
            if (folder / f["file"]).resolve().is_relative_to(folder.resolve())
        ]
        licence = str(entry["licence"]).rstrip(".")
        if entry.get("non_commercial") and sort_of(licence) != "non-commercial":
            licence = f"non-commercial: {licence}"
        source = _source(entry.get("origin", ""))
        yield DataSet(entry["name"], entry["title"], licence, "TRUING_DATA", held, source)


def file_at(path: Path) -> tuple[DataSet, File] | None:
    """The set and the entry of a file that is given by its path; None where none lists it."""
    root = os.environ.get("TRUING_DATA", "")
    folders = [f for f in (expanded(root) if root else None, repository()) if f is not None]
    place = path.resolve()
    if not any(place.is_relative_to(folder.resolve()) for folder in folders):
        return None
    known = ((entry, file) for entry in (*_shipped(), *_mirrored()) for file in entry.files)
    return next((found for found in known if found[1].path.resolve() == place), None)


def sets() -> dict[str, DataSet]:
    """All sets at hand by name; the repository's stand before the mirror's of the same name.

    Raises:
        InputError: TRUING_DATA has no readable index.
    """
    found: dict[str, DataSet] = {}
    for entry in (*_shipped(), *_mirrored()):
        if entry.origin == "repository" and not allows_commercial(entry.licence):
            raise InputError(
                "a set for non-commercial use lies in the repository's data folder",
                where=entry.name,
                seen=entry.licence,
                fix="Such sets belong into TRUING_DATA",
            )
        found.setdefault(entry.name, entry)
    return found
