"""Weights as lazy mappings from names to tensors, read and written tensor by tensor.

`open_weights` maps the safetensors of a model folder (one file or shards) into memory; `Folded`
lays weight changes over them; `aligned` walks several models in parallel; `write` puts a stream of
tensors into sharded safetensors. None of them holds more than one shard at a time.

Changes are trained in float32, most bases are stored in bfloat16: its steps are 1/256 of a weight,
and an update smaller than half of one would vanish. So sums are taken in float32 and rounded once,
to what whoever asks wants: a module's own type when a model is read, the file's on export.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from truing.changes import Adapter, Weights
from truing.core.files import new_folder
from truing.core.modelfiles import jsonfile, patches
from truing.core.modelfiles.patches import AdapterPatch, BlendPatch, WeightsPatch
from truing.core.modelfiles.weight_files import INDEX, weight_files
from truing.errors import InputError

if TYPE_CHECKING:
    from truing.models import Model

Tensor = torch.Tensor
SHARD_BYTES = 1 << 30
INPUT, OUTPUT = "embed_tokens.weight", "lm_head.weight"
ALIKE = "Only models of one architecture and one vocabulary can be combined"
Patches = list[tuple[str, AdapterPatch | WeightsPatch | BlendPatch]]


class Stored(Mapping[str, Tensor]):
    """The tensors of some safetensors files, mapped into memory when asked for."""

    def __init__(self, files: Sequence[Path], hidden: Iterable[str] = ()) -> None:
        self._files: dict[str, Path] = {}
        self._opened: dict[Path, safe_open] = {}
        for path in files:
            try:
                self._opened[path] = safe_open(path, framework="pt")
                names = self._opened[path].keys()
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"the weights are damaged or cut off: {error}",
                    where=str(path),
                    seen=f"{path.stat().st_size} bytes" if path.exists() else "no such file",
                    fix="Fetch or save the model again",
                ) from None
            self._files |= dict.fromkeys(names, path)
        for name in hidden:
            self._files.pop(name, None)

    def __getitem__(self, name: str) -> Tensor:
        return cast(Tensor, self._opened[self._files[name]].get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header alone."""
        slice_ = self._opened[self._files[name]].get_slice(name)
        return tuple(cast("list[int]", slice_.get_shape()))

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor."""
        return self[name].dtype


def open_weights(path: Path) -> Stored:
    """The weights of a model folder or of one safetensors file.

    Where the configuration ties input and output embeddings, a stored copy of the output is left
    out, so that no change is applied to one tensor twice.
    Raises:
        InputError: no weights, or damaged ones.
    """
    files = [path] if path.is_file() else weight_files(path)
    if not files:
        raise InputError(
            "holds no weights in safetensors format",
            where=str(path),
            fix="Formats that may run code when read (.bin, .pt) are not opened: convert them",
        )
    stored = Stored(files)
    config = path / "config.json"
    facts = jsonfile.read(config) if config.is_file() else {}
    if facts.get("tie_word_embeddings"):
        inputs = [n for n in stored if n.endswith(INPUT)]
        outputs = [n for n in stored if n.endswith(OUTPUT)]
        if inputs and outputs:
            return Stored(files, hidden=outputs)
    return stored


def same_name(name: str, names: Iterable[str]) -> str | None:
    """The stored name for a module's own: files of a bare backbone lack the head's prefix."""
    known = names if isinstance(names, (set, dict)) else set(names)
    for candidate in (name, name.partition(".")[2], f"model.{name}", f"transformer.{name}"):
        if candidate in known:
            return candidate
    return None


class Folded(Mapping[str, Tensor]):
    """Base weights with weight changes applied in order, each tensor computed when asked for.

    `extra` holds the tensors that changes bring and the base has not, such as a value head. An
    output head of its own, which a change brings or makes, is laid over one that is tied to the
    embeddings: it then is a further tensor of the mapping, and `untied` says so.

    Args:
        changes: applied in float32, or in float64 where file or `dtype` are.
        dtype: of the tensors that changes touch; None rounds them to their file's, once and last.
            All others are as they are stored.
    """

    def __init__(
        self,
        base: Stored,
        changes: Sequence[Adapter | Weights],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.base, self.dtype = base, dtype
        self.extra: dict[str, Tensor] = {}
        self._names = dict.fromkeys(base)
        self._patches: dict[str, Patches] = {}
        self._tied: dict[str, tuple[str, Patches]] = {}  # what a head was made of
        for change in changes:
            patch = (
                AdapterPatch(change.path, open_weights(change.path / patches.ADAPTER))
                if isinstance(change, Adapter)
                else WeightsPatch(change, open_weights(change.path))
            )
            if isinstance(patch, WeightsPatch) and patches.BLEND in patch.tensors:
                self._blend(patch.tensors[patches.BLEND])
                continue
            for name in sorted(patch.names()):
                self._lay(name, patch, change.path)
        if "reward_head.weight" in self.extra:  # which is newer than that of transformers' form
            self._names.pop("score.weight", None)

    def _lay(self, name: str, patch: AdapterPatch | WeightsPatch, path: Path) -> None:
        """Let a change act on the tensor of that name, or bring it."""
        whole = patch.whole_name(name)
        if isinstance(patch, AdapterPatch) and whole is not None and name.endswith(INPUT):
            self.own_head()  # PEFT trains a copy of tied embeddings: the head stays as it was
        own = whole is not None and name == OUTPUT
        stored = self.own_head() if own else same_name(name, self._names)
        if stored is not None:
            patch.check(name, self.shape(stored))
            self._patches.setdefault(stored, []).append((name, patch))
        elif whole is not None and not (own and isinstance(patch, AdapterPatch)):
            self.extra |= patch.brought(name)
        else:
            raise InputError(
                f"the change touches {name!r}, which the model does not have",
                where=str(path),
                fix="Tied output embeddings cannot be changed apart from the input's"
                if name.endswith(OUTPUT)
                else "Put it on the model that it was made for",
            )

    def own_head(self) -> str | None:
        """Name of the output head; a tied one gets a place of its own, None where there is none."""
        own = same_name(OUTPUT, self._names)
        source = next((n for n in self.base if n.endswith(INPUT)), None)
        if own is not None or source is None:
            return own
        self._tied[OUTPUT] = (source, [*self._patches.get(source, ())])
        self._names[OUTPUT] = None
        return OUTPUT

    def _blend(self, weight_H: Tensor) -> None:
        """Make one output head of those that earlier changes brought."""
        up_HDr, down_HrD = (self.extra.pop(f"{patches.HEADS}.{n}", None) for n in ("up", "down"))
        output = self.own_head()
        if up_HDr is None or down_HrD is None or output is None:
            raise InputError("the change weighs output heads, which the model does not have")
        patch = BlendPatch(up_HDr, down_HrD, weight_H)
        self._patches.setdefault(output, []).append((output, patch))

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.unrounded(name)
        if not self._laid(name) or not tensor.is_floating_point():
            return tensor
        return tensor.to(self.dtype or self.stored_dtype(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _source(self, name: str) -> str:
        """The stored tensor that this one is made of."""
        return self._tied[name][0] if name in self._tied else name

    def _laid(self, name: str) -> Patches:
        """The changes that touch a tensor, in order; of a tied head's, those from before, too."""
        return [*self._tied.get(name, ("", []))[1], *self._patches.get(name, ())]

    def unrounded(self, name: str) -> Tensor:
        """A tensor as its changes make it: in float32 at least where one touches it."""
        tensor, laid = self.base[self._source(name)], self._laid(name)
        if laid and tensor.is_floating_point():
            double = torch.float64 in (tensor.dtype, self.dtype)
            tensor = tensor.to(torch.float64 if double else torch.float32)
        for own, patch in laid:
            tensor = patch.apply(own, tensor)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor without reading it."""
        return self.base.shape(self._source(name))

    def stored_dtype(self, name: str) -> torch.dtype:
        """Type that a tensor has, or would have, in the base's files."""
        return self.base.dtype(self._source(name))

    @property
    def untied(self) -> bool:
        """True where the output head is no longer tied, as the base's configuration says."""
        return bool(self._tied)

    @property
    def changed(self) -> set[str]:
        """Names that some change touches."""
        return {name for name in self._names if self._laid(name)}


def aligned(
    models: Mapping[str, Folded], *, where: str = ""
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Walk models of one architecture together: (name, {role: tensor}), one tensor at a time.

    Tensors that no model's changes touch are as they are stored. The others are in float32 at
    least, since what was trained may be less than a step of the file's type. Where one has an
    output head of its own, a head that is tied counts as a copy of its embeddings.

    Raises:
        InputError: before the first tensor, when names or shapes differ, or one has extra heads.
    """
    for role, folded in models.items():
        if folded.extra:
            raise InputError(
                f"model {role!r} has tensors beyond its architecture",
                where=where,
                seen=sorted(folded.extra)[:4],
                fix="Leave its heads out: in Python, model.export(folder, weights_only=True)",
            )
    if any(OUTPUT in folded for folded in models.values()):
        for folded in models.values():
            folded.own_head()
    (first, reference), *others = models.items()
    for role, other in others:
        pair, odd = f"models {first!r} and {role!r}", sorted(set(reference) ^ set(other))
        if odd:
            raise InputError(f"{pair} have different tensors", where=where, seen=odd[:4], fix=ALIKE)
        for name in reference:
            own, its = reference.shape(name), other.shape(name)
            if own != its:
                told = f"{pair} differ in the shape of {name!r}"
                raise InputError(told, where=where, seen=f"{own} and {its}", fix=ALIKE)
    trained = set[str]().union(*(folded.changed for folded in models.values()))
    for name in reference:
        each = {role: folded.unrounded(name) for role, folded in models.items()}
        if name in trained:
            each = {role: _wide(tensor) for role, tensor in each.items()}
        yield name, each


def _wide(tensor: Tensor) -> Tensor:
    """A tensor in float32 or wider; numbers that are none of the real ones stay."""
    narrow = tensor.is_floating_point() and tensor.dtype.itemsize < 4
    return tensor.float() if narrow else tensor


def untie(folder: Path) -> None:
    """Let the configuration in `folder` say that the output head has weights of its own."""
    config = jsonfile.read(folder / "config.json") | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], *, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write `model.safetensors`, or shards with their index, into an existing folder.

    Tensors are taken from the stream as they come; at most one shard is held in memory.
    """
    shards: list[tuple[Path, list[str], int]] = []
    batch: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal batch, size
        path = folder / f"model-{len(shards) + 1:05d}.partial"
        save_file(batch, path, metadata={"format": "pt"})
        shards.append((path, list(batch), size))
        batch, size = {}, 0

    for name, tensor in tensors:
        number = tensor.numel() * tensor.element_size()
        if batch and size + number > shard_bytes:
            flush()
        batch[name] = tensor.detach().cpu().contiguous()
        size += number
    flush()
    if len(shards) == 1:
        shards[0][0].rename(folder / "model.safetensors")
        return folder
    weight_map: dict[str, str] = {}
    for i, (path, names, _) in enumerate(shards, 1):
        final = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": sum(s for *_, s in shards)}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1))
    return folder


def differences(
    base: Stored, tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Those of `tensors` whose values differ from the base's, and those that it has not.

    Both are compared in the wider type of the two: an update that the base's type could not hold is
    a difference, and the tensor is kept in the type that it has.
    """
    for name, tensor in tensors:
        if name not in base:
            yield name, tensor
            continue
        old = base[name]
        wide = torch.promote_types(old.dtype, tensor.dtype)
        if not torch.equal(old.to(wide), tensor.to(wide)):
            yield name, tensor


def replaced(model: Model, tensors: Iterable[tuple[str, Tensor]], folder: Path) -> Model:
    """`model` with its weights replaced by `tensors` (full names of the base's file).

    Only tensors that differ from the base's are stored, in the type that they come in, in `folder`,
    whose name must tell inputs and settings apart: what already lies there is taken as it is.
    Earlier weight changes and 4 bits are dropped, since these tensors are the result; what changes
    brought beyond it, such as a score head, is stored with it. Run-time changes are kept.
    """
    base, extra, model = open_weights(model.folder), model.folded().extra, model.quantised(0)
    if not folder.is_dir():
        with new_folder(folder) as partial:
            write(partial, chain(differences(base, tensors), extra.items()))
    kept = model.run_time_changes
    if not len(open_weights(folder)):
        return model.with_changes(kept)
    return model.with_changes((Weights(folder), *kept))


def patched(model: Model, entries: Mapping[str, tuple[Tensor, Tensor]], folder: Path) -> Model:
    """`model` with single entries replaced: {name: (places [N] in the flat tensor, values [N])}.

    Stored as one sparse change in `folder`, laid over the changes that the model has.
    """
    if not any(len(places) for places, _ in entries.values()):
        return model
    if not folder.is_dir():
        with new_folder(folder) as partial:
            flat = {
                f"{name}.{part}": tensor
                for name, pair in entries.items()
                if len(pair[0])
                for part, tensor in zip(("at", "to"), pair, strict=True)
            }
            write(partial, flat.items())
    return model.adding(Weights(folder, sparse=True))
