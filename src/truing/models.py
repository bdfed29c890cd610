"""`Model`: base weights plus an ordered list of changes, whoever made them and however.

Whatever aligns a model returns a `Model`; whoever uses one need not know how it was aligned. The
base is a folder in Hugging Face's format (safetensors, tokenizer, template), a folder of a
registered builder (builder.json, safetensors), or a served endpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

from truing.changes import RUN_TIME, WeightChange, in_order
from truing.changes import Adapter as Adapter
from truing.changes import Change as Change
from truing.changes import Decoder as Decoder
from truing.changes import Edits as Edits
from truing.changes import Prefix as Prefix
from truing.changes import Rewriter as Rewriter
from truing.changes import Weights as Weights
from truing.changes import run_time_of as run_time_of
from truing.core import files
from truing.core.modelfiles import jsonfile
from truing.core.modelfiles.bases import Folder as Folder
from truing.core.modelfiles.bases import Served as Served
from truing.core.modelfiles.licences import strictest
from truing.core.modelfiles.loaded import Loaded as Loaded
from truing.errors import InputError
from truing.faults import placing
from truing.tables import Message as Message
from truing.tables import content_hash

if TYPE_CHECKING:
    from truing.core.modelfiles.panel import Panel
    from truing.core.weights import Folded
    from truing.principles import Principles
    from truing.tables import Table

SCHEMA_VERSION = 1
LOCAL = "Give a model of this machine"  # where a served one cannot do what is asked


@dataclass(frozen=True, eq=False)
class Model:
    """Base weights plus changes. Whatever changes one gives back another.

    Args:
        base: `Folder` or `Served`; of several models that judge as one,
            `core.modelfiles.panel.Panel`.
        changes: weight changes in the order made, then run-time changes.
        name: how reports call it.
        licences: of everything that went into it.
        quarantine: the attacks that it was made by; see `truing.quarantine`.
    """

    base: Folder | Served | Panel
    changes: tuple[Change, ...] = ()
    name: str = "model"
    licences: tuple[str, ...] = ()
    quarantine: str = ""

    @staticmethod
    def open(source: str | Path) -> Model:
        """The model of that name; named ones are fetched when absent.

        Args:
            source: a folder, a name of `truing models`, a hub name or an address, such as
                "http://host:port/v1#model". Limits behind it (see `core.endpoints.limits`) hold for
                that model until it is opened with others, or without any.
        Raises:
            InputError: it is found nowhere, its files are damaged, or there is no network.
        """
        from truing.core import opening

        return opening.open_model(str(source), anew=True)

    def __repr__(self) -> str:
        laid = "".join(f" + {c.kind}" for c in self.changes)
        mark = f"; quarantined: {self.quarantine}" if self.quarantine else ""
        return f"Model({self.name}{laid}; licence {self.licence}{mark})"

    @property
    def is_served(self) -> bool:
        """True for an endpoint."""
        return isinstance(self.base, Served)

    @property
    def local(self) -> Folder:
        """The base; an InputError for a served model or a panel: no weights are here."""
        if isinstance(self.base, Folder):
            return self.base
        raise InputError(
            f"a {'served model' if self.is_served else 'panel of judges'} has no weights here",
            where=self.name,
            fix="Give a local model where weights, gradients or activations are needed",
        )

    @property
    def folder(self) -> Path:
        """Folder of the base's weights; an InputError where `local` is one."""
        return self.local.path

    @cached_property
    def builder(self) -> dict[str, object]:
        """Reference to the builder component of an architecture outside transformers, or {}."""
        path = self.folder / "builder.json"
        if not path.is_file():
            return {}
        data = jsonfile.read(path)
        _check_version(data, path)
        builder = data.get("builder")
        if not isinstance(builder, dict):
            raise InputError("'builder' must be {use: name, ...}", where=str(path), seen=builder)
        return dict(cast("dict[str, object]", builder))

    @property
    def can(self) -> frozenset[str]:
        """Subset of {"generate", "logprob", "hidden", "weights"}: what methods may ask of it."""
        return self.base.can

    @property
    def licence(self) -> str:
        """The strictest licence of the lineage."""
        return strictest([self.base.licence or "unknown", *self.licences])

    @property
    def weight_changes(self) -> tuple[WeightChange, ...]:
        """Changes that fold into the state dict, in order."""
        return tuple(c for c in self.changes if isinstance(c, (Adapter, Weights)))

    @property
    def run_time_changes(self) -> tuple[Change, ...]:
        """Edits, prefix, rewriter, decoder: in the order in which they act."""
        return tuple(c for kind in RUN_TIME for c in self.changes if c.kind == kind)

    @property
    def base_key(self) -> str:
        """Content hash of the base alone: weights, configuration, tokenizer, template."""
        return self.base.key

    @cached_property
    def weights_key(self) -> str:
        """Content hash of base and weight changes: equal keys, equal folded weights."""
        return content_hash([self.base_key, [c.key for c in self.weight_changes]])

    @cached_property
    def key(self) -> str:
        """Content hash of everything that decides what the model does."""
        return content_hash([self.weights_key, [c.key for c in self.run_time_changes]])

    def adding(self, change: Change, *, licence: str = "") -> Model:
        """This model with one more change.

        Args:
            change: placed after earlier ones of its sort.
            licence: of what the change was made from, such as the training data.
        Raises:
            InputError: a served model, and a change that its server would have to make.
        """
        if self.is_served and not isinstance(change, (Prefix, Rewriter, Decoder)):
            said = f"a served model cannot take a change of kind {change.kind!r}"
            raise InputError(said, where=self.name, fix=LOCAL)
        licences = (*self.licences, licence) if licence else self.licences
        return replace(self, changes=in_order([*self.changes, change]), licences=licences)

    def with_changes(self, changes: Iterable[Change]) -> Model:
        """The same base under other changes."""
        return replace(self, changes=in_order(changes))

    def thinking(self, on: bool) -> Model:
        """The same model, told by its template to think before it answers, or not to."""
        return replace(self, base=replace(self.local, thinking=on))

    def with_template(self, template: str | Path = "", *, end: str = "") -> Model:
        """The same model under another chat template: "NAME?template=FILE&end=TOKEN".

        It takes the place of what was chosen before.

        Args:
            template: a file of Jinja, as transformers reads it; "none" for no template, so that
                texts continue as they stand; "" for the model's own.
            end: a special token of the tokenizer that ends an answer, beside those at which the
                model stops; the template has to write it. "" for no other.
        Raises:
            InputError: there is no such file or token, the template does not write an answer, or
                ends it otherwise.
        """
        from truing.core.modelfiles import choices

        return replace(self, base=choices.chosen(self.local, template, end))

    def quantised(self, bits: int = 4) -> Model:
        """The same model with the linear layers of its blocks in 4 bits (NF4): "NAME?bits=4".

        What is trained on it is an adapter; adapters that it has stand beside those layers.

        Args:
            bits: 4, or 0 for weights as they are stored.
        Raises:
            InputError: another number, or an architecture outside transformers.
            MissingExtra: the package for it is not installed: pip install 'truing[quant]'.
        """
        from truing.core.modelfiles import nf4

        if bits:
            nf4.check(self, bits)
        return replace(self, base=replace(self.local, bits=bits))

    def called(self, name: str) -> Model:
        """The same model under another name; the key does not change."""
        return replace(self, name=name)

    def with_licences(self, licences: Iterable[str]) -> Model:
        """The same model with the licences of more ancestors (other merged models, data)."""
        return replace(self, licences=tuple(dict.fromkeys([*self.licences, *licences])))

    def folded(self) -> Folded:
        """Weights with weight changes folded in, lazily, by the names of the base's files."""
        from truing.core.modelfiles.nf4 import weights_of
        from truing.core.weights import Folded

        return Folded(weights_of(self.local), self.weight_changes)

    def load_module(
        self,
        dtype: str = "auto",
        device: str | None = None,
        *,
        fresh: bool = False,
        packed: bool = False,
    ) -> Loaded:
        """Read the model into memory, or take it from the cache: a torch module in eval mode.

        Args:
            dtype: "float32", "bfloat16", "float16", "float64"; "auto" is float32 on a CPU and for a
                fresh module, on a GPU what `core.passes.precision.own` says.
            device: None takes the accelerator where there is one.
            fresh: a module of one's own, to train or change; never shared nor cached.
            packed: of a fresh one of 4 bits, those layers stay packed, and are not to be written
                to; they always are in shared ones.
        """
        from truing.core.modelfiles import loaded

        return loaded.load_module(self, dtype, device, fresh=fresh, packed=packed)

    @placing()
    def save(self, folder: str | Path) -> Path:
        """Write the whole model into a folder: base, changes and what they hold.

        Within the user's cache files are hard-linked, elsewhere shared or copied. The folder
        must be new or empty, or an earlier save and nothing else, which is replaced in one rename.
        """
        from truing.core import opening

        return opening.save(self, files.expanded(folder))

    @staticmethod
    def load(folder: str | Path) -> Model:
        """Read what `save` wrote; an InputError when its files are not those that were saved."""
        from truing.core import opening

        return opening.load(files.expanded(folder))

    @placing()
    def export(
        self, folder: str | Path, *, weights_only: bool = False, quarantined: bool = False
    ) -> Path:
        """Write a plain Hugging Face folder with folded weights, tokenizer and template.

        A reward model with a score head becomes transformers' sequence classification where that
        gives the same scores.

        Args:
            folder: new or empty, or an earlier export and nothing else, which is replaced.
            weights_only: drop run-time changes and heads that such a folder cannot express.
            quarantined: write one in quarantine, too.
        Raises:
            InputError: the folder holds something else; or what the two settings would let pass.
        """
        from truing import quarantine
        from truing.core import opening

        quarantine.refuse(self, "exported", asked=quarantined, fix="say quarantined=True")
        return opening.export(self, files.expanded(folder), weights_only=weights_only)

    @placing()
    def export_adapter(self, folder: str | Path, *, quarantined: bool = False) -> Path:
        """Write all adapters of the model as one in PEFT's format, which names its base.

        The base is named by its name on the hub where it has one, else by where it lies. A
        tokenizer or a template that is not the base's own is written beside the adapter.

        Args:
            folder: new or empty, or an earlier export and nothing else, which is replaced.
            quarantined: write one in quarantine, too.
        Raises:
            InputError: there is none, or something else changes the model, too.
        """
        from truing import quarantine
        from truing.core.modelfiles import adapters

        quarantine.refuse(self, "exported", asked=quarantined, fix="say quarantined=True")
        return adapters.export(self, files.expanded(folder))


def _check_version(data: Mapping[str, object], path: Path) -> None:
    if (version := data.get("schema_version")) != SCHEMA_VERSION:
        raise InputError(
            f"schema version {version!r} is not the one that this version reads ({SCHEMA_VERSION})",
            where=str(path),
            fix="Save it again with the version of truing that wrote it, or upgrade",
        )


_held: dict[str, object] = {}


def hold(artefact: Model | Table | Principles) -> str:
    """Let a change refer to another artefact: its key, under which `held` gives it back."""
    _held[artefact.key] = artefact
    return artefact.key


def held_by(change: Rewriter | Decoder) -> list[str]:
    """Keys of what a change holds, and of what its settings name so, such as a reward's judge."""
    return list(dict.fromkeys([*change.holds.values(), *named(change.settings)]))


def named(value: object) -> Iterator[str]:
    """Keys of held artefacts anywhere in a setting, or in what models and other records have."""
    if is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, f.name) for f in fields(value)]
    if isinstance(value, Mapping):
        value = list(cast("Mapping[object, object]", value).values())
    if isinstance(value, (list, tuple)):
        for one in cast("Iterable[object]", value):
            yield from named(one)
    elif isinstance(value, str) and value in _held:
        yield value


def hold_at(key: str, noun: str, folder: Path, content: str = "") -> None:
    """Say where a held artefact lies, to be read when it is asked for.

    Args:
        content: its key as files hold it, where that differs from `key`.
    """
    known = _held.get(key)
    gone = isinstance(known, tuple) and not cast("tuple[str, Path, str]", known)[1].exists()
    if known is None or gone:
        _held[key] = (noun, folder, content)


def read_held(key: str, noun: str, folder: Path, content: str = "") -> Model | Table | Principles:
    """The artefact that was saved in `folder` to be held; an InputError when it is another one."""
    from truing.principles import Principles
    from truing.tables import Table

    nouns = {"Model": Model, "Table": Table, "Principles": Principles}
    found = nouns[noun].load(folder)
    if found.key != (content or key):
        raise InputError(
            "an artefact that a change holds is not the one that was saved",
            where=str(folder),
            seen=f"key {found.key}, saved as {content or key}",
            fix="If it lies in the store, `truing store verify` drops it, to be made again",
        )
    return found


def held(key: str) -> Model | Table | Principles:
    """The artefact that a change or a setting holds, by its key, or by what names it elsewhere.

    Raises:
        InputError: it is not at hand, and no folder, address or key of the store either.
    """
    from truing.naming import at_place

    found = _held.get(key)
    if isinstance(found, tuple):
        found = _held[key] = read_held(key, *cast("tuple[str, Path, str]", found))
    found = at_place(key) if found is None else found
    return cast("Model | Table | Principles", found)
