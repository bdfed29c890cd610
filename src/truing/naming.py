"""Models and other nouns that settings name inside references to components.

    rewards: {steps: {use: step_reward, model: prm}}

Which settings of a component are keys of nouns, their types say: `ModelKey`, `PrinciplesKey`. What
a recipe or a command writes there is a name, like that of an input: of a step, of a model, of a
place. Before the step runs, the noun is held (`truing.models.hold`) and its key stands in place of
the name, so that the step depends on what the noun is and not on what it is called.

Where a judge is named, a reference to a component that makes one of several models may stand, too:
`judge: {use: panel, judges: [a, b]}` for an input, `{use: judged, model: {use: panel, ...}}` inside
a setting, where the key of what it makes takes its place.
"""

from __future__ import annotations

import contextlib
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
MADE = ("judge",)  # kinds of components that make a model, for an input of that name
# The key of a step's result, or its beginning; with the name of what lies beside it.
STORED = re.compile(r"[0-9a-f]{12,}(/[\w-]+)?")


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


def _noun_listed(annotation: object) -> str:
    """The noun whose keys a list of this type holds, "" for none."""
    args = typing.get_args(annotation)
    if typing.get_origin(annotation) is list:
        return _noun_of(args[0])
    return next(filter(None, map(_noun_listed, args)), "")


def _nouns_of(ref: Mapping[str, object]) -> dict[str, str]:
    """Nouns by the settings of a reference that name one; {} for what is no reference."""
    return _typed(ref, {n for n, v in ref.items() if n != "use" and any(_texts(v))})


def _typed(ref: Mapping[str, object], given: set[str]) -> dict[str, str]:
    """Those of the given settings of a reference that take a noun's key, and which noun's."""
    from truing.method import Method

    if not given or not isinstance(ref.get("use"), str):
        return {}
    name = str(ref["use"]).replace("-", "_")
    found: dict[str, str] = {}
    for entry in catalogue.components().values():
        if entry.name == name:
            known = Method(entry).settings
            for n in given & set(known):
                listed = isinstance(ref[n], (list, tuple))
                found[n] = (_noun_listed if listed else _noun_of)(known[n].type)
    return {n: noun for n, noun in found.items() if noun}


def _texts(value: object) -> list[str]:
    """The texts that a setting is, or lists."""
    items = cast("Sequence[object]", value) if isinstance(value, (list, tuple)) else [value]
    return [v for v in items if isinstance(v, str)]


def _found(value: object) -> Iterator[Place]:
    if isinstance(value, Mapping):
        items = cast("Mapping[str, object]", value)
        for name, noun in _nouns_of(items).items():
            yield from ((noun, text) for text in _texts(items[name]))
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
    """Settings with the keys of nouns in place of their names, and of models that are made."""
    makers = {name for kind in MADE for name in catalogue.components(kind)}
    if not keys and not makers & set(catalogue.used(dict(settings))):
        return dict(settings)
    return {n: _filled(value, keys) for n, value in settings.items()}


def _filled(value: object, keys: Mapping[Place, str]) -> object:
    if isinstance(value, Mapping):
        items = cast("Mapping[str, object]", value)
        made = {n: _filled(v, keys) for n, v in items.items()}
        for name, noun in _nouns_of(items).items():
            made[name] = _keyed(made[name], noun, keys)
        for name in _typed(made, {n for n, v in made.items() if _refers(v)}):
            made[name] = _made_key(cast("Mapping[str, object]", made[name]))
        return made
    if isinstance(value, (list, tuple)):
        return [_filled(v, keys) for v in cast("Sequence[object]", value)]
    return value


def _keyed(value: object, noun: str, keys: Mapping[Place, str]) -> object:
    if isinstance(value, str):
        return keys.get((noun, value), value)
    return [_keyed(v, noun, keys) for v in cast("Sequence[object]", value)]


def _refers(value: object) -> bool:
    return isinstance(value, Mapping) and "use" in value


def _made_key(ref: Mapping[str, object]) -> str:
    """The key of the model that a reference inside a setting makes."""
    from truing.method import get_component

    use = str(ref.get("use")).replace("-", "_")
    kind = next((k for k in MADE if use in catalogue.components(k)), MADE[0])
    return models.hold(cast("models.Model", get_component(kind, ref)()))


def check_names(settings: Mapping[str, object], *, where: str = "") -> None:
    """Raise an InputError for nouns that settings name and that are not there; fetches nothing."""
    from truing.sources import nowhere

    for one in nouns_in(settings):
        if one.noun != "Model" or nowhere(one.text):
            _opened_noun(one, where)


def holding(settings: Mapping[str, object], *, where: str = "") -> dict[str, object]:
    """Settings with every noun that they name opened and held; see `with_keys`.

    Raises:
        InputError: there is none of that name.
    """
    keys = {
        (one.noun, one.text): models.hold(cast("models.Model", _opened_noun(one, where)))
        for one in nouns_in(settings)
    }
    return with_keys(settings, keys)


def _opened_noun(one: Named, where: str) -> Noun:
    from truing.sources import open_noun

    try:
        return _stored(one.text) or open_noun(one.noun, one.text)
    except InputError as error:
        error.where = f"{where} setting {one.setting!r} {error.where}".strip()
        raise


def is_reference(name: str, value: object) -> bool:
    """True for {use: ..., ...} given as an input that a component can make."""
    return name in MADE and _refers(value)


def check_reference(
    name: str, ref: Mapping[str, object], *, where: str = "", stored: bool = False
) -> None:
    """Raise an InputError for a reference given as an input that would go wrong later.

    Args:
        name: of the input, and of its components' kind.
        stored: or that no stored step can have; see `catalogue.check_used`.
    """
    from truing.components import asked

    try:
        catalogue.check_used({name: dict(ref)}, stored=stored)
        asked(name, ref)
    except InputError as error:
        error.where = f"{where}: {error.where}".strip(": ")
        raise


def check_settings(settings: Mapping[str, object]) -> None:
    """Raise an InputError for settings that a component referred to in `settings` would refuse.

    Of what only the component knows, such as whether a model can reward, nothing is asked.
    """
    for setting, value in settings.items():
        try:
            for ref in catalogue.references(value):
                if isinstance(ref["use"], str):
                    _check_settings(ref)
        except InputError as error:
            error.message = f"setting {setting!r}: {error.message}"
            raise


def _check_settings(ref: Mapping[str, object]) -> None:
    """The same of one reference; of several components of its name, any may be meant."""
    from truing.components import settings_of
    from truing.method import Method

    name = str(ref["use"]).replace("-", "_")
    made = _typed(ref, {n for n, v in ref.items() if _refers(v)})
    given = {n: "" if n in made else v for n, v in ref.items()}  # a key will stand there
    errors: list[InputError] = []
    for entry in (e for e in catalogue.components().values() if e.name == name):
        try:
            settings_of(Method(entry), given, where=f"{entry.component} {entry.name}")
        except InputError as error:
            errors.append(error)
        else:
            return
    if errors:
        raise errors[0]


def referred_model(name: str, ref: Mapping[str, object], *, where: str = "") -> models.Model:
    """The model that a reference given as an input of this name stands for.

    Args:
        ref: to a component of kind `name`; in Python its models may be given as they are.
    Raises:
        InputError: there is no such component, or its settings are wrong.
    """
    from truing.method import get_component

    held = cast("Mapping[str, object]", _with_held(ref))
    found = holding({name: held}, where=where)[name]
    made = get_component(name, cast("Mapping[str, object]", found), where=where)()
    return cast("models.Model", made)


def _with_held(value: object) -> object:
    """A setting with keys in place of models."""
    if isinstance(value, models.Model):
        return models.hold(value)
    if isinstance(value, Mapping):
        return {n: _with_held(v) for n, v in cast("Mapping[str, object]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_with_held(v) for v in cast("Sequence[object]", value)]
    return value


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
    from truing.core.files import expanded
    from truing.core.modelfiles import fetch
    from truing.core.opening import open_model
    from truing.store import MARKS, load_noun

    folder = expanded(text)
    if text and folder.is_dir():
        noun = next((n for n, mark in MARKS.items() if (folder / mark).is_file()), "Model")
        return models.Model.open(folder) if noun == "Model" else load_noun(noun, folder)
    if text.startswith(("http://", "https://")) or text in fetch.names():
        return open_model(text)
    return _stored(text)


def _stored(text: str) -> Noun | None:
    """What the user's store has under this key, or one that begins so and is the only one."""
    from truing.store import Store

    if STORED.fullmatch(text) is None:
        return None
    start, _, name = text.partition("/")
    store, known = Store(), Store().keys()
    found = [k for k in known if k.startswith(start)]
    if len(found) != 1:
        return None
    with contextlib.suppress(OSError):  # such as a store that can only be read
        store.roots.keep_recent(found[0])
    return store.load(f"{found[0]}/{name}" if name else found[0])
