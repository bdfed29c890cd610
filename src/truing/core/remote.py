"""Data from outside: one file by address and checksum, or from the Hugging Face hub.

Of a set on the hub only what was asked for is downloaded: a file, the files that a pattern such as
"data/train*" matches, or a split by the name that its files begin with, whose shards
("train_sft-00000-of-00003.parquet") are one table.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import re
import tempfile
import urllib.parse
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from truing.core import files, hub
from truing.dataindex import TABLES, surest
from truing.errors import InputError

TIMEOUT = 60.0  # seconds without a byte
# What the hub's own library puts beside the tables of a set.
BESIDE = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "config.json")
SHARD = re.compile(r"-\d{5}-of-(\d{5})(-[0-9a-f]+)?$")


def fetch_data(source: str) -> tuple[list[Path], str]:
    """(files, licence) of "https://...#sha256=HEX" or "hub:owner/set[/file, pattern or split]".

    "owner/set@revision" is a branch, tag or commit of it; a slash in its name is written %2F.
    """
    if source.startswith("hub:"):
        return _from_hub(source.removeprefix("hub:"))
    return [_from_address(source)], "unknown"


def _from_address(source: str) -> Path:
    address, _, fragment = source.partition("#")
    expected = dict(urllib.parse.parse_qsl(fragment)).get("sha256", "")
    if not re.fullmatch(r"[0-9a-f]{64}", expected):
        raise InputError(
            "an address needs the file's checksum",
            where=address,
            fix="Write it as ADDRESS#sha256=HEX, so that the same name always gives the same rows",
        )
    name = Path(urllib.parse.urlsplit(address).path).name or "data"
    target = files.home() / "data" / expected / name
    if target.is_file():
        return target
    import httpx

    target.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=".fetch-")
    try:
        with os.fdopen(handle, "wb") as out:
            try:
                with httpx.stream("GET", address, timeout=TIMEOUT, follow_redirects=True) as reply:
                    reply.raise_for_status()
                    for block in reply.iter_bytes():
                        out.write(block)
            except httpx.HTTPError as error:
                raise InputError(
                    f"the data could not be downloaded: {error}",
                    where=address,
                    fix="Check the address and the network, or download the file by hand",
                ) from None
            out.flush()
            os.fsync(out.fileno())
        seen = files.sha256(Path(partial))
        if seen != expected:
            raise InputError(
                "wrong checksum: not the expected file",
                where=address,
                seen=f"sha256 {seen}, expected {expected}",
                fix="Correct the address or its sha256; the file there may have changed",
            )
        Path(partial).rename(target)
    finally:
        Path(partial).unlink(missing_ok=True)
    return target


def _from_hub(name: str) -> tuple[list[Path], str]:
    from huggingface_hub import snapshot_download

    from truing.core.opening import stated_licence

    owner, _, rest = name.partition("/")
    set_name, _, wanted = rest.partition("/")
    set_name, _, revision = set_name.partition("@")
    repository, revision = f"{owner}/{set_name}", urllib.parse.unquote(revision)
    snapshot = functools.partial(
        snapshot_download, repository, repo_type="dataset", revision=revision or None
    )
    try:
        names, whole = _listed(repository, revision or None)
        if not whole and not wanted:
            raise OSError("the hub cannot be reached, and what is in the cache may be a part")
        found = _chosen(names, wanted, repository)
        folder = Path(snapshot(allow_patterns=[*found, "README.md"]))
        missing = [n for n in found if not (folder / n).is_file()]
        if missing:
            raise OSError(f"{missing[0]} is not in the cache")
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        said, fix = hub.trouble(error, f"datasets/{repository}", revision)
        raise InputError(
            f"the data set {repository!r} could not be had from the Hugging Face hub",
            where="data",
            seen=said,
            fix=fix or "Check the spelling and the network, or download the file and give its path",
        ) from None
    return [folder / n for n in found], stated_licence(folder) or "unknown"


def _listed(repository: str, revision: str | None) -> tuple[list[str], bool]:
    """The set's files that can be tables, and whether they are all: offline, those in the cache."""
    from huggingface_hub import HfApi, snapshot_download

    fault, names = None, list[str]()
    try:
        told = HfApi().dataset_info(repository, revision=revision)
        names = [s.rfilename for s in told.siblings or ()]
    except Exception as error:  # the network's are of whatever library the hub's client uses
        fault = error
    if fault is not None:
        try:
            # Of a set that is there in part, the part is asked for that always comes along.
            cached = snapshot_download(
                repository, repo_type="dataset", revision=revision, allow_patterns="README.md",
                local_files_only=True,
            )  # fmt: skip
        except OSError:
            if isinstance(fault, OSError):
                raise fault from None
            raise OSError(str(fault) or type(fault).__name__) from None
        here = Path(cached)
        names = [p.relative_to(here).as_posix() for p in here.rglob("*") if p.is_file()]
    tables = [n for n in names if n.endswith(TABLES) and PurePosixPath(n).name not in BESIDE]
    return sorted(tables), fault is None


def _chosen(names: Sequence[str], wanted: str, repository: str) -> list[str]:
    """The files that are meant, those of one table; an InputError that names the choice."""
    splits: dict[str, list[str]] = {}
    for name in names:
        splits.setdefault(_split(name), []).append(name)
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
        where=f"hub:{repository}",
        seen=seen[:12],
        fix=f"Say which: hub:{repository}/{(near or [*splits, 'FILE'])[0]}",
    )


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
    return max((t for t in TABLES if name.endswith(t)), key=len, default="")


def _whole(shards: list[str]) -> list[str]:
    """All shards of a table, in order; an OSError where their names say that some are missing."""
    for name in shards:
        numbered = SHARD.search(name.removesuffix(_ending(name)))
        if numbered and int(numbered[1]) != len(shards):
            raise OSError(f"{len(shards)} of {int(numbered[1])} shards of {_split(name)} are there")
    return shards
