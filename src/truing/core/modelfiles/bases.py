"""What changes are laid over: a folder of weights on this machine, or a served model.

A folder may have its tokenizer elsewhere, as under an adapter that was trained with one of its own.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast

from truing.core import files, private
from truing.core.identity import hashes
from truing.core.modelfiles import jsonfile
from truing.errors import InputError
from truing.tables import content_hash

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
TEMPLATES = ("chat_template.jinja", "chat_template.json")
GENERATION = "generation_config.json"
WORDS = (
    *TOKENIZER_FILES,
    *TEMPLATES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
)
# What makes up a base; optimizer states, logs and the like belong to whoever put them there.
BASE_FILES = (
    *WORDS,
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "builder.json",
    GENERATION,
    "preprocessor_config.json",
    "processor_config.json",
)
ALL = frozenset({"generate", "logprob", "hidden", "weights"})


@dataclass(frozen=True)
class Folder:
    """A base on disk; `licence` as its source states it, `thinking` as its template is told.

    `words` is a folder whose tokenizer and template stand in the place of its own, or whose
    template alone where it has no tokenizer. `chosen` is one with the files of another template,
    which stand in the place of both; see `core.modelfiles.choices`. `bits` is 4 where the linear
    layers of its blocks are packed, and 0 where weights are as they are stored (`.nf4`).
    """

    path: Path
    licence: str = ""
    thinking: bool | None = None
    words: Path | None = None
    chosen: Path | None = None
    bits: int = 0

    def parts(self) -> dict[str, Path]:
        """Files that make up the base, by name."""
        found = _there(self.path, BASE_FILES)
        if self.words is not None:
            names = WORDS if _there(self.words, TOKENIZER_FILES) else TEMPLATES
            own = {n: p for n, p in found.items() if n not in names}
            found = own | _there(self.words, (*names, GENERATION))
        if self.chosen is not None:
            own = {n: p for n, p in found.items() if n not in TEMPLATES}
            found = own | _there(self.chosen, (*WORDS, GENERATION))
        return dict(sorted(found.items()))

    def names(self) -> list[str]:
        """File names that make up the base."""
        return list(self.parts())

    @contextlib.contextmanager
    def together(self) -> Generator[Path]:
        """Its files but for the weights in one folder, for libraries that read one."""
        if self.words is None and self.chosen is None:
            yield self.path
            return
        with tempfile.TemporaryDirectory() as made:
            for name, path in self.parts().items():
                if ".safetensors" not in name:
                    (Path(made) / name).symlink_to(path.resolve())
            yield Path(made)

    @cached_property
    def key(self) -> str:
        """Content hash of the base's files, of what its template is told, and of its bits."""
        found = hashes.parts_hash(self.parts())
        found = found if self.thinking is None else content_hash([found, self.thinking])
        return content_hash([found, "bits", self.bits]) if self.bits else found

    @cached_property
    def config(self) -> dict[str, object]:
        """config.json, or nothing for a builder's folder."""
        path = self.path / "config.json"
        return jsonfile.read(path) if path.is_file() else {}

    @property
    def can(self) -> frozenset[str]:
        """What the architecture is for; of encoder-decoder models nothing is computed."""
        if self.config.get("is_encoder_decoder"):
            return frozenset({"weights"})
        names = self.config.get("architectures") or []
        if not isinstance(names, list):
            where, fix = str(self.path / "config.json"), 'Such as ["LlamaForCausalLM"]'
            raise InputError("'architectures' must be a list", where=where, seen=names, fix=fix)
        ends = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
        writes = any(str(n).endswith(ends) for n in cast("list[object]", names))
        return ALL if writes else frozenset({"hidden", "weights"})


def _there(folder: Path, patterns: Iterable[str]) -> dict[str, Path]:
    """Files of a folder by name, less those that lie there twice."""
    found = {p.name: p for pattern in patterns for p in folder.glob(pattern)}
    return {n: p for n, p in found.items() if p.is_file() and not files.is_copy(p)}


@dataclass(frozen=True)
class Served:
    """A model behind an OpenAI-compatible endpoint: `url` ends in /v1.

    `reasoning_tokens` is what an answer may have beyond what is asked for, for one that thinks out
    of sight before it answers.
    """

    url: str
    model: str
    licence: str = ""
    reasoning_tokens: int = 0

    def __post_init__(self) -> None:
        """A name and a password in the address stay out of whatever is written."""
        object.__setattr__(self, "url", private.keep_login(self.url))

    @property
    def key(self) -> str:
        """Hash of address and name: what the server does cannot be known."""
        room = [self.reasoning_tokens] if self.reasoning_tokens else []
        return content_hash(["served", self.url, self.model, *room])

    @property
    def can(self) -> frozenset[str]:
        """Only what every endpoint offers."""
        return frozenset({"generate"})


def check_unchanged(base: Folder) -> None:
    """Raise an InputError where files are no longer those that the key of a base was made of.

    Those of the caches never change.
    """
    fixed = all(files.is_managed(p) or files.is_of_hub(p) for p in base.parts().values())
    if not fixed and base.key != replace(base).key:  # which is another one, that knows no key yet
        raise InputError(
            "the model's files have changed since it was opened",
            where=str(base.path),
            fix="Run it again once nothing writes there",
        )


def _lock(key: str) -> contextlib.AbstractContextManager[bool]:
    return files.lock(files.home() / "bases" / f".{key}.lock")


@contextlib.contextmanager
def kept(base: Folder) -> Generator[dict[str, Path]]:
    """Its files, to link from: those outside the cache are copied into it once per content.

    A user's folder may be overwritten in place by the next training run; what the store holds
    must not change with it. Files of the hub's cache, named by their content, never are: they are
    linked where the file system can. Until the end of the block the base is not swept.
    """
    parts = base.parts()
    if all(map(files.is_managed, parts.values())):
        yield parts
        return
    key = hashes.parts_hash(parts)  # of the files alone, whatever is told to its template
    folder = files.home() / "bases" / key
    with _lock(key):
        if not folder.is_dir():
            with files.new_folder(folder) as partial:
                for name, path in parts.items():
                    fixed = files.is_managed(path) or files.is_of_hub(path)
                    files.place(path, partial / name, link=fixed)
                check_unchanged(base)
        yield {name: folder / name for name in parts}


def sweep() -> list[str]:
    """Delete kept bases that neither a saved model nor the hub's cache links to; their keys."""
    gone: list[str] = []
    places = files.home() / "bases"
    _clear(places)  # first: what a kill left of a base must not stand where it is put now
    for path in sorted(places.glob("[0-9a-f]*")):
        with _lock(path.name):  # whoever is about to link to it holds this
            if path.is_dir() and all(p.stat().st_nlink == 1 for p in path.iterdir()):
                files.put_aside(path, path.with_name(f".{path.name}.gone"))
                gone.append(path.name)
    _clear(places)
    return gone


def _clear(places: Path) -> None:
    """Delete what is half-made or half-gone."""
    for left in [p for p in places.glob(".*") if p.is_dir()]:
        with _lock(left.name[1:].partition(".")[0]):
            shutil.rmtree(left, ignore_errors=True)
