"""Files that are one table: shards by their numbers, those of a pattern, a saved set of the hub's.

The shards of a table have its name and a number ("train-00000-of-00003.parquet"). A folder or a
pattern may stand for them, and so does their common name ("data/train").
"""

from __future__ import annotations

import fnmatch
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import cast

from truing.dataindex import TABLES, surest
from truing.errors import InputError

ARROW = ".arrow"
# What the hub's own library puts beside the tables of a set.
STATE, SPLITS = "state.json", "dataset_dict.json"
BESIDE = ("dataset_info.json", "dataset_infos.json", SPLITS, STATE, "config.json")
SHARD = re.compile(r"-\d{5}-of-(\d{5})(-[0-9a-f]+)?$")


def chosen(names: Sequence[str], wanted: str, where: str) -> list[str]:
    """The files that are meant, those of one table; an InputError that names the choice.

    Args:
        names: of the files that there are.
        wanted: a file, a pattern or the name of a table; "" is the only one.
        where: what holds them, as it is written before the name of a file.
    """
    splits = _splits(names)
    if wanted in names:
        return [wanted]
    if wanted and (matching := fnmatch.filter(names, wanted)):
        return surest(matching, str)
    near = surest((s for s in splits if not wanted or wanted in _called(s)), str)
    if len(near) == 1:
        return _whole(splits[near[0]])
    seen = [f"{s} ({len(splits[s])} files)" if len(splits[s]) > 1 else s for s in near or splits]
    if not splits:
        why = "the set has no file that can be read"
    elif not near:
        why = f"the set has no file or split {wanted!r}"
    else:
        why = "the set has several tables"
    raise InputError(
        why,
        where=where,
        seen=seen[:12],
        fix=f"Say which: {where}/{(near or [*splits, 'FILE'])[0]}",
    )


def _splits(names: Sequence[str]) -> dict[str, list[str]]:
    """Files by the table that they are of."""
    splits: dict[str, list[str]] = {}
    for name in names:
        splits.setdefault(_split(name), []).append(name)
    return splits


def _split(name: str) -> str:
    """What the shards of one table have in common: their name without the number.

    A file that is no shard is a table by itself.
    """
    ending = _ending(name)
    return SHARD.sub("", name.removesuffix(ending)) + ending


def _called(split: str) -> set[str]:
    """What a table may be called: with its folder and ending, and without."""
    stem = split.removesuffix(_ending(split))
    return {name for s in (split, stem) for name in (s, PurePosixPath(s).name)}


def _ending(name: str) -> str:
    return max((t for t in (*TABLES, ARROW) if name.endswith(t)), key=len, default="")


def _whole(shards: list[str]) -> list[str]:
    """All shards of a table, in order; an OSError where their names say that some are missing."""
    for name in shards:
        numbered = SHARD.search(name.removesuffix(_ending(name)))
        if numbered and int(numbered[1]) != len(shards):
            raise OSError(f"{len(shards)} of {int(numbered[1])} shards of {_split(name)} are there")
    return shards


# On this machine


def tables_in(folder: Path) -> list[str]:
    """Names of the files of a folder that can be tables, in order; [] where none can be listed."""
    try:
        names = [p.name for p in folder.iterdir() if p.is_file()]
    except OSError:
        return []
    return sorted(n for n in names if _ending(n) and n not in BESIDE)


def local(path: Path) -> list[Path]:
    """The files of the table that a folder, a pattern or a common name stands for; [] for none.

    Of a folder its shards are a table; a file by itself is read where it is named.

    Raises:
        InputError: a folder of several tables or splits, or one that lacks some of the shards.
    """
    folder, wanted = (path, "") if path.is_dir() else (path.parent, path.name)
    if not folder.is_dir():
        return []
    if not wanted and (saved := _saved(folder)):
        return saved
    names = tables_in(folder)
    if matching := fnmatch.filter(names, wanted):
        return [folder / name for name in surest(matching, str)]
    shards = [n for n in names if _split(n) != n]
    if not shards or (wanted and not any(wanted in _called(_split(n)) for n in shards)):
        return []
    try:
        return [folder / name for name in chosen(shards, wanted, str(folder))]
    except OSError as error:
        fix = "Copy the others there, too, or name some by a pattern, as in 'train-*.parquet'"
        raise InputError(str(error), where=str(folder), fix=fix) from None


def _saved(folder: Path) -> list[Path]:
    """Files of a folder that `save_to_disk` of the hub's library wrote; [] for others."""
    if (folder / SPLITS).is_file():
        seen = sorted(p.name for p in folder.iterdir() if (p / STATE).is_file())
        fix = f"Name one of them: {folder / (seen or ['SPLIT'])[0]}"
        raise InputError("a folder of several splits", where=str(folder), seen=seen, fix=fix)
    if not (folder / STATE).is_file():
        return []
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        files = cast("list[dict[str, str]]", state["_data_files"])
        return [folder / Path(file["filename"]).name for file in files]
    except (OSError, ValueError, LookupError, TypeError) as error:
        said = f"its {STATE} does not say which files it has: {error}"
        raise InputError(said, where=str(folder), fix="Save the set again") from None


def warn_of_others(path: Path) -> None:
    """Say that a file is one shard of a table, where others of it lie beside it."""
    mine = _split(path.name)
    if mine == path.name:
        return
    n = sum(_split(name) == mine for name in tables_in(path.parent))
    if n > 1:
        print(
            f"truing: warning: {path} is one of {n} shards that lie there. All of them are "
            f"{path.parent / mine.removesuffix(_ending(mine))}",
            file=sys.stderr,
        )
