"""Data from outside: one file by address and checksum, or from the Hugging Face hub."""

from __future__ import annotations

import os
import re
import tempfile
import urllib.parse
from pathlib import Path

from truing.core import files
from truing.errors import InputError

TIMEOUT = 60.0  # seconds without a byte


def fetch_data(source: str) -> tuple[Path, str]:
    """(file, licence) of "https://...#sha256=HEX" or "hub:owner/set[/file]"."""
    if source.startswith("hub:"):
        return _from_hub(source.removeprefix("hub:"))
    return _from_address(source), "unknown"


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
            )
        Path(partial).rename(target)
    finally:
        Path(partial).unlink(missing_ok=True)
    return target


def _from_hub(name: str) -> tuple[Path, str]:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    owner, _, rest = name.partition("/")
    set_name, _, file = rest.partition("/")
    repository = f"{owner}/{set_name}"
    wanted = ["*.parquet", "*.jsonl", "*.jsonl.gz", "*.csv", "README.md"]
    try:
        if file:
            found = Path(hf_hub_download(repository, file, repo_type="dataset"))
            return found, "unknown"
        folder = Path(snapshot_download(repository, repo_type="dataset", allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"the data set {repository!r} could not be had from the Hugging Face hub",
            where="data",
            seen=first,
            fix="Check the spelling and the network, or download the file and give its path",
        ) from None
    from truing.core.opening import stated_licence

    tables = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "README.md")
    if len(tables) != 1:
        raise InputError(
            "the set has several files" if tables else "the set has no file that can be read",
            where=f"hub:{repository}",
            seen=[str(p.relative_to(folder)) for p in tables][:12],
            fix=f"Say which: hub:{repository}/FILE",
        )
    return tables[0], stated_licence(folder) or "unknown"
