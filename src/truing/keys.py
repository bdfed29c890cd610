"""The key of a step: what its result depends on, hashed before it runs.

Method, settings (files by their content), content keys of the inputs, licences of models, seed,
device class, and the code of the method and of every component that it, settings, principles or
decoders refer to.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

from truing import catalogue
from truing.catalogue import Entry, used
from truing.changes import Decoder, Rewriter
from truing.core.endpoints.limits import without
from truing.core.identity import remembered
from truing.core.identity.code import code_key, forget_unloaded, text_key
from truing.core.identity.hashes import path_hash
from truing.core.modelfiles.panel import Panel
from truing.declared import declared, source
from truing.described import MAKERS
from truing.doctor import device_of_machine, drivers
from truing.errors import InputError
from truing.jsontext import plain
from truing.loading import module_of
from truing.method import Method
from truing.models import Model, held, held_by, named
from truing.principles import Principles
from truing.references import refuse_bare
from truing.store import Noun, Store
from truing.tables import Table, content_hash

Nouns = Mapping[str, Noun | Mapping[str, Noun]]


def _all(nouns: Nouns) -> list[Noun]:
    return [
        one
        for value in nouns.values()
        for one in (value.values() if isinstance(value, Mapping) else [value])
    ]


def _of_model(model: Model) -> list[str]:
    """Components that a model runs: its builder, decoders, rewriters, and what those hold."""
    if isinstance(model.base, Panel):
        return [name for one in model.base.judges.values() for name in _of_model(one)]
    names = [] if model.is_served else used(model.builder)
    for change in model.changes:
        if not isinstance(change, (Decoder, Rewriter)):
            continue
        names += [change.use, *used(dict(change.settings))]
        for noun in map(held, held_by(change)):
            if isinstance(noun, Principles):
                names += [n for rule in noun for n in used(rule.check)]
            elif isinstance(noun, Model):
                names += _of_model(noun)
    return names


def entries_of(method: Method, settings: Mapping[str, object], nouns: Nouns) -> list[Entry]:
    """What a step runs: its method, and what its settings and inputs refer to."""
    names = [*used(dict(settings)), *method.entry.names]
    added: list[Entry] = []
    if method.entry.kind in ("objective", "online") and settings.get("mix"):
        mix = cast("Mapping[str, object]", settings["mix"])
        added = [catalogue.training(name) for name in mix]
    for noun in [*_all(nouns), *(held(key) for key in named(settings))]:
        if isinstance(noun, Principles):
            names += [n for rule in noun for n in used(rule.check)]
        elif isinstance(noun, Model):
            names += _of_model(noun)
    refuse_bare(names)
    wanted = {n.replace("-", "_") for n in names}
    found = [e for e in catalogue.components().values() if e.name in wanted]
    return [method.entry, *added, *found]


def modules_of(method: Method, settings: Mapping[str, object], nouns: Nouns) -> set[str]:
    """Modules whose code a step runs."""
    return {e.module for e in entries_of(method, settings, nouns)}


def device_class() -> str:
    """ "cuda" or "cpu": what steps compute on.

    PyTorch, as long as nothing else has imported it, is asked once for each state of the drivers.
    """
    if "torch" in sys.modules:
        return device_of_machine()
    seen = drivers()
    if not seen:
        return "cpu"
    name = content_hash(["device", seen, remembered.installed()])
    found = remembered.find(name)
    if not isinstance(found, str):
        found = device_of_machine()
        if found != "cpu":  # a GPU that cannot be used now may be before its drivers change
            remembered.keep(name, found)
    return found


def _identity(value: object) -> object:
    """A setting as it enters the key: files by their content, addresses without limits."""
    if isinstance(value, Path):
        return {"content": path_hash(value)} if value.exists() else str(value)
    if isinstance(value, Mapping):
        items = cast("Mapping[str, object]", value)
        items = {**items, **_paths(items)} if "use" in items else items
        return {k: _identity(v) for k, v in items.items()}
    if isinstance(value, (list, tuple)):
        return [_identity(v) for v in cast("Sequence[object]", value)]
    return without(value) if isinstance(value, str) else plain(value)


def _paths(ref: Mapping[str, object]) -> dict[str, object]:
    """Settings of a reference that name files, as its component has them."""
    name = str(ref["use"]).replace("-", "_")
    found: dict[str, object] = {}
    for entry in (e for e in catalogue.components().values() if e.name == name):
        for setting in Method(entry).settings.values():
            if setting.name in ref and _takes_path(setting.type):
                with contextlib.suppress(InputError):  # another component of the name is meant
                    found[setting.name] = setting.validate(ref[setting.name])
    return found


def _takes_path(annotation: object) -> bool:
    return annotation is Path or any(map(_takes_path, typing.get_args(annotation)))


def _input(noun: Noun) -> object:
    """An input as it enters the key: a model with what goes on to whatever is made of it.

    Licences and quarantine are no part of what the model does, and so not of its own key.
    """
    if not isinstance(noun, Model):
        return noun.key
    found: list[object] = [noun.key, noun.base.licence, noun.licences]
    return [*found, noun.quarantine] if noun.quarantine else found


def code_of(entries: Iterable[Entry]) -> str:
    """Hash of the code of methods and components.

    Raises:
        InputError: nothing would tell the next version of one of them from this one.
    """
    found = [(e, source(e)) for e in entries]
    return code_key({e.module for e, own in found if own is None}, [o for _, o in found if o])


def step_key(method: Method, nouns: Nouns, settings: Mapping[str, object], seed: int) -> str:
    """The key of a step, before it runs.

    Raises:
        InputError: it runs a function of which nothing would tell the next version from this one.
    """
    inputs = {
        name: [[r, _input(n)] for r, n in value.items()]  # their order decides, too
        if isinstance(value, Mapping)
        else _input(value)
        for name, value in nouns.items()
    }
    code = code_of(entries_of(method, settings, nouns))
    values = {n: _identity(v) for n, v in settings.items()}
    parts: list[object] = [method.id, values, inputs, seed, device_class(), code]
    kept = {key: _input(held(key)) for key in named(settings)}
    return content_hash([*parts, kept] if kept else parts)


def key_to_run(
    method: Method, nouns: Nouns, settings: Mapping[str, object], seed: int, store: Store
) -> str:
    """The key of a step, all of whose modules are loaded unless the store has what it makes.

    Loading may be hours after their files were first read: the key is that of the code which runs,
    on the device that it finds.
    """
    key = step_key(method, nouns, settings, seed)
    if store.has(key):
        return key
    for entry in entries_of(method, settings, nouns):
        module_of(entry)
    if drivers():
        importlib.import_module("torch")
    forget_unloaded()
    return step_key(method, nouns, settings, seed)


def asked(method: Method, settings: Mapping[str, object], tables: Mapping[str, Table]) -> str:
    """Hash of all that decides whether a method's own checks pass; "" where that is not known.

    Args:
        settings: validated; models and data are named in them, not held.
        tables: those of its inputs that are at hand, or promised by another step.
    """
    try:
        entries = entries_of(method, settings, {})
    except InputError:  # a function that is given as it is
        return ""
    if any(declared(e) is not None for e in entries):
        return ""
    values = {n: _identity(v) for n, v in settings.items()}
    given = [[n, type(t).__name__, t.key] for n, t in tables.items()]
    text = text_key([*{e.module for e in entries}, *MAKERS])
    if not text:
        return ""
    return content_hash(["asked", method.id, values, given, text, remembered.installed()])
