"""Data from outside: one file by address and checksum, or from the Hugging Face hub.

Of a set on the hub only what was asked for is downloaded: a file, the files that a pattern such as
"data/train*" matches, or a split by the name that its files begin with, whose shards
("train_sft-00000-of-00003.parquet") are one table.
"""

from __future__ import annotations

import functools
import os
import re
import urllib.parse
from pathlib import Path, PurePosixPath

from truing.core import files
from truing.core.modelfiles import hub
from truing.dataindex import TABLES
from truing.errors import InputError
from truing.shards import BESIDE, chosen

TIMEOUT = 60.0  # seconds without a byte


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

    from truing.core.endpoints.endpoint import surroundings

    with surroundings():
        client = httpx.Client(timeout=TIMEOUT, follow_redirects=True)
    with files.new_file(target) as partial:
        with client, partial.open("wb") as out:
            try:
                with client.stream("GET", address) as reply:
                    reply.raise_for_status()
                    for block in reply.iter_bytes():
                        out.write(block)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise InputError(
                    f"the data could not be downloaded: {error}",
                    where=address,
                    fix="Check the address and the network, or download the file by hand",
                ) from None
            out.flush()
            os.fsync(out.fileno())
        seen = files.sha256(partial)
        if seen != expected:
            raise InputError(
                "wrong checksum: not the expected file",
                where=address,
                seen=f"sha256 {seen}, expected {expected}",
                fix="Correct the address or its sha256; the file there may have changed",
            )
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
        found = chosen(names, wanted, f"hub:{repository}")
        folder = Path(snapshot(allow_patterns=[*found, "README.md"]))
        missing = [n for n in found if not (folder / n).is_file()]
        if missing:
            raise OSError(f"{missing[0]} is not in the cache")
    except InputError:
        raise
    except Exception as error:  # the hub's client has errors of its own, and of several libraries
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
                repository,
                repo_type="dataset",
                revision=revision,
                allow_patterns="README.md",
                local_files_only=True,
            )
        except OSError:
            if isinstance(fault, OSError):
                raise fault from None
            raise OSError(str(fault) or type(fault).__name__) from None
        here = Path(cached)
        names = [p.relative_to(here).as_posix() for p in here.rglob("*") if p.is_file()]
    tables = [n for n in names if n.endswith(TABLES) and PurePosixPath(n).name not in BESIDE]
    return sorted(tables), fault is None
