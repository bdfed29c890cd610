"""Models and other nouns that settings name inside references to components.

    rewards: {steps: {use: step_reward, model: prm}}

Which settings of a component are keys of nouns, their types say: `ModelKey`, `PrinciplesKey`. What
a recipe or a command writes there is a name, like that of an input: of a step, of a model, of a
place. Before the step runs, the noun is held (`truing.models.hold`) and its key stands in place of
the name, so that the step depends on what the noun is and not on what it is called.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, cast

from truing import catalogue, models
from truing.errors import InputError

if typing.TYPE_CHECKING:
    from truing.store import Noun

Place = tuple[str, str]  # a noun, and the text that names it
STORED = re.compile(r"[0-9a-f]{12,}")  # the key of a step's result, or its beginning


@dataclass(frozen=True)
class Key:
    """Marks a setting's type: the key of a noun, or what names it."""

    noun: str


ModelKey = Annotated[str, Key("Model")]
PrinciplesKey = Annotated[str, Key("Principles")]


@dataclass(frozen=True)
class Named:
    """A noun that stands inside a setting, by name.

    Args:
        setting: of the step.
        noun: "Model" or "Principles".
        text: what names it.
    """

    setting: str
    noun: str
    text: str


def _noun_of(annotation: object) -> str:
    """The noun that a setting of this type is the key of, "" for none."""
    for mark in cast("tuple[object, ...]", getattr(annotation, "__metadata__", ())):
        if isinstance(mark, Key):
            return mark.noun
    return next(filter(None, map(_noun_of, typing.get_args(annotation))), "")


def _nouns_of(ref: Mapping[str, object]) -> dict[str, str]:
    """Nouns by the settings of a reference that name one; {} for what is no reference."""
    from truing.method import Method

    given = {n for n, v in ref.items() if isinstance(v, str) and v and n != "use"}
    if not given or not isinstance(ref.get("use"), str):
        return {}
    name = str(ref["use"]).replace("-", "_")
    found: dict[str, str] = {}
    for entry in catalogue.components().values():
        if entry.name == name:
            known = Method(entry).settings
            found |= {n: _noun_of(known[n].type) for n in given if n in known}
    return {n: noun for n, noun in found.items() if noun}


def _found(value: object) -> Iterator[Place]:
    if isinstance(value, Mapping):
        items = cast("Mapping[str, object]", value)
        yield from ((noun, str(items[n])) for n, noun in _nouns_of(items).items())
        value = list(items.values())
    if isinstance(value, (list, tuple)):
        for one in cast("Sequence[object]", value):
            yield from _found(one)


def nouns_in(settings: Mapping[str, object]) -> list[Named]:
    """Nouns that settings name, at whatever depth; held keys and addresses stand for themselves."""
    return [
        Named(setting, noun, text)
        for setting, value in settings.items()
        for noun, text in dict.fromkeys(_found(value))
        if not text.startswith(("http://", "https://")) and not any(models.named(text))
    ]


def with_keys(settings: Mapping[str, object], keys: Mapping[Place, str]) -> dict[str, object]:
    """Settings with the keys of nouns in place of their names."""
    return {n: _filled(value, keys) for n, value in settings.items()} if keys else dict(settings)


def _filled(value: object, keys: Mapping[Place, str]) -> object:
    if isinstance(value, Mapping):
        items = cast("Mapping[str, object]", value)
        made = {n: _filled(v, keys) for n, v in items.items()}
        for name, noun in _nouns_of(items).items():
            made[name] = keys.get((noun, str(items[name])), made[name])
        return made
    if isinstance(value, (list, tuple)):
        return [_filled(v, keys) for v in cast("Sequence[object]", value)]
    return value


def holding(settings: Mapping[str, object], *, where: str = "") -> dict[str, object]:
    """Settings with every noun that they name opened and held; see `with_keys`.

    Raises:
        InputError: there is none of that name.
    """
    from truing.sources import open_noun

    keys: dict[Place, str] = {}
    for one in nouns_in(settings):
        try:
            found = _stored(one.text) or open_noun(one.noun, one.text)
        except InputError as error:
            error.where = f"{where} setting {one.setting!r} {error.where}".strip()
            raise
        keys[one.noun, one.text] = models.hold(cast("models.Model", found))
    return with_keys(settings, keys)


_opened: dict[str, Noun] = {}


def found_at(text: str) -> Noun | None:
    """The noun that a folder, an address, the name of a model or a key of the store names.

    For calls in Python, whose settings nobody has looked through before.
    """
    if text not in _opened:
        made = _looked_up(text)
        if made is None:
            return None
        _opened[text] = made
    return _opened[text]


def at_place(text: str) -> Noun:
    """As `found_at`; an InputError where there is nothing."""
    found = found_at(text)
    if found is None:
        raise InputError(
            "there is no artefact of that key or name at hand",
            seen=text,
            fix="Give the folder or the key of a saved one, or hold it: "
            "truing.models.hold(Model.open(...)); a model brings along what it holds when opened",
        )
    return found


def _looked_up(text: str) -> Noun | None:
    from truing.core import fetch
    from truing.core.files import expanded
    from truing.store import MARKS, load_noun

    folder = expanded(text)
    if text and folder.is_dir():
        noun = next((n for n, mark in MARKS.items() if (folder / mark).is_file()), "Model")
        return models.Model.open(folder) if noun == "Model" else load_noun(noun, folder)
    if text.startswith(("http://", "https://")) or text in fetch.names():
        return models.Model.open(text)
    return _stored(text)


def _stored(text: str) -> Noun | None:
    """What the user's store has under this key, or one that begins so and is the only one."""
    from truing.store import Store

    if STORED.fullmatch(text) is None:
        return None
    store, known = Store(), Store().keys()
    found = [k for k in known if k.startswith(text)]
    return store.load(found[0]) if len(found) == 1 else None
