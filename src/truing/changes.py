"""What may be laid over base weights: the ordered changes that make up a `Model`.

Weight changes (`Adapter`, `Weights`) fold into a state dict in the order they were made. Run-time
changes act in a fixed order: `Edits` on activations, `Prefix` messages before the prompt,
`Rewriter` of the prompt, `Decoder` over the logits or samples. `logprob` uses all but the decoder.
Each has a `key`: the hash of its content, wherever its files lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from truing.catalogue import used
from truing.core.files import place_tree
from truing.core.identity.hashes import path_hash
from truing.errors import InputError, OtherVersion
from truing.references import refuse_bare
from truing.tables import Message, content_hash

if TYPE_CHECKING:
    from truing.models import Model


def _json(value: object) -> dict[str, object]:
    return dict(cast("Mapping[str, object]", value)) if isinstance(value, Mapping) else {}


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: a folder in PEFT's format (adapter_config.json, adapter_model.safetensors).

    Only these two files count; what else lies in the folder does not change the key.
    """

    path: Path
    kind = "adapter"

    @property
    def key(self) -> str:
        """Hash of configuration and weights."""
        files = [self.path / n for n in ("adapter_config.json", "adapter_model.safetensors")]
        return content_hash([self.kind, [path_hash(f) for f in files]])


@dataclass(frozen=True)
class Weights:
    """Whole tensors that replace the base's, or with `delta` differences that are added.

    `path` is a safetensors file or a folder of them. Names that the base has not become `extra`
    tensors, such as a value head. With `sparse` only single entries are replaced: `NAME.at` holds
    their places in the flattened tensor, `NAME.to` their values.
    """

    path: Path
    delta: bool = False
    sparse: bool = False
    kind = "weights"

    @property
    def key(self) -> str:
        """Hash of the tensors and of how they are applied."""
        return content_hash([self.kind, path_hash(self.path), self.delta, self.sparse])


@dataclass(frozen=True)
class Edits:
    """Activation edits: a file or folder written by a steering method, applied with `strength`."""

    path: Path
    strength: float = 1.0
    kind = "edits"

    @property
    def key(self) -> str:
        """Hash of the edit and its strength."""
        return content_hash([self.kind, path_hash(self.path), self.strength])


@dataclass(frozen=True)
class Prefix:
    """Messages put before every prompt: a system message, examples in context."""

    messages: Sequence[Message] = field(hash=False)
    kind = "prefix"

    @property
    def key(self) -> str:
        """Hash of the messages."""
        return content_hash([self.kind, list(self.messages)])


@dataclass(frozen=True)
class Rewriter:
    """A registered component of kind "rewriter" that changes the prompt before the model sees it.

    `holds` names other artefacts that it uses (see `truing.models.hold`), by key.
    """

    use: str
    settings: Mapping[str, object] = field(default_factory=dict, hash=False)
    holds: Mapping[str, str] = field(default_factory=dict, hash=False)
    kind = "rewriter"

    @property
    def key(self) -> str:
        """Hash of name, settings and the keys held."""
        return content_hash([self.kind, self.use, self.settings, self.holds])


@dataclass(frozen=True)
class Decoder:
    """A registered component of kind "decoder" that controls how answers are drawn.

    `holds` names other artefacts that it uses, such as a reward model, by key.
    """

    use: str
    settings: Mapping[str, object] = field(default_factory=dict, hash=False)
    holds: Mapping[str, str] = field(default_factory=dict, hash=False)
    kind = "decoder"

    @property
    def key(self) -> str:
        """Hash of name, settings and the keys held."""
        return content_hash([self.kind, self.use, self.settings, self.holds])


Change = Adapter | Weights | Edits | Prefix | Rewriter | Decoder
WeightChange = Adapter | Weights
KINDS: dict[str, type[Change]] = {
    c.kind: c for c in (Adapter, Weights, Edits, Prefix, Rewriter, Decoder)
}
ANEW = "Copy its whole folder again, or save the model anew"
RUN_TIME = ("edits", "prefix", "rewriter", "decoder")


def in_order(changes: Iterable[Change]) -> tuple[Change, ...]:
    """Weight changes in the order made, then run-time changes in the order in which they act."""
    items = list(changes)
    weights = [c for c in items if isinstance(c, (Adapter, Weights))]
    return (*weights, *(c for kind in RUN_TIME for c in items if c.kind == kind))


def save(change: Change, folder: Path, place: str, *, link: bool) -> dict[str, object]:
    """Plain data of a change; its files go to `folder/place`."""
    data: dict[str, object] = {"kind": change.kind, "key": change.key}
    if isinstance(change, Prefix):
        return data | {"messages": [dict(m) for m in change.messages]}
    if isinstance(change, (Rewriter, Decoder)):
        refuse_bare(used(change.settings), what="a saved model", where=str(folder))
        return data | {
            "use": change.use,
            "settings": dict(change.settings),
            "holds": dict(change.holds),
        }
    name = f"{place}/{change.path.name}" if change.path.is_file() else place
    if isinstance(change, Adapter):
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            place_tree(change.path / file, folder / name / file, link=link)
        return data | {"path": name}
    place_tree(change.path, folder / name, link=link)
    data["path"] = name
    if isinstance(change, Weights):
        return data | {"delta": change.delta, "sparse": change.sparse}
    return data | {"strength": change.strength}


def load(data: Mapping[str, object], folder: Path) -> Change:
    """What `save` wrote, checked against its key."""
    kind = str(data.get("kind"))
    where = str(folder / "model.json")
    if kind not in KINDS:
        fix = "Upgrade truing: another version wrote it"
        raise OtherVersion(f"unknown change {kind!r}", where=where, fix=fix)
    try:
        if kind == "prefix":
            change: Change = Prefix(cast("list[Message]", data["messages"]))
        elif kind in ("rewriter", "decoder"):
            make = Rewriter if kind == "rewriter" else Decoder
            holds = cast("dict[str, str]", _json(data.get("holds")))
            change = make(str(data["use"]), _json(data.get("settings")), holds)
        else:
            path = folder / str(data["path"])
            if not path.resolve().is_relative_to(folder.resolve()):
                fix = "Let it name a file inside of the model's folder"
                raise InputError(
                    "a path leaves the folder", where=where, seen=data["path"], fix=fix
                )
            if kind == "adapter":
                change = Adapter(path)
            elif kind == "weights":
                change = Weights(path, bool(data["delta"]), bool(data["sparse"]))
            else:
                change = Edits(path, float(cast(float, data["strength"])))
    except KeyError as error:
        raise InputError(f"a change lacks the field {error}", where=where, fix=ANEW) from None
    if change.key != data.get("key"):
        raise InputError(
            f"the files of a change of kind {kind!r} are not those that were saved",
            where=str(folder),
            seen=f"key {change.key}, saved as {data.get('key')}",
            fix=ANEW,
        )
    return change


def run_time_of(
    models: Mapping[str, Model], keep: str = "", *, where: str = ""
) -> tuple[Change, ...]:
    """The run-time changes that a model made from the weights of `models` carries on.

    Weights are what is trained, merged or recovered; prefixes and edits stay outside. Where they
    differ, the caller must say whose to keep.
    Raises:
        InputError: they differ and `keep` is not one of the roles.
    """
    if keep:
        if keep not in models:
            raise InputError(
                "no such role", where=where, seen=keep, fix=f"Known: {', '.join(models)}"
            )
        return models[keep].run_time_changes
    sets = {role: [c.key for c in m.run_time_changes] for role, m in models.items()}
    first = next(iter(sets), "")
    for role, keys in sets.items():
        if keys != sets[first]:
            kinds = {r: [c.kind for c in models[r].run_time_changes] for r in (first, role)}
            raise InputError(
                f"models {first!r} and {role!r} have different run-time changes",
                where=where,
                seen=kinds,
                fix=f"Say whose to carry on: keep={first!r} or keep={role!r}",
            )
    return models[first].run_time_changes if models else ()
