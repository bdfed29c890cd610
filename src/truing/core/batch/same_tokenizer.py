"""Whether models mean the same by their tokens, however their files have it.

Libraries have written one tokenizer in several forms: merges as "a b" or as ["a", "b"], the chat
template in a file of its own or inside tokenizer_config.json, settings that were new left out. So
files that differ are no proof: then what loading makes of them is compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from truing.core.batch.template import told
from truing.core.identity import hashes
from truing.core.modelfiles import jsonfile
from truing.core.modelfiles.bases import TOKENIZER_FILES, Folder
from truing.errors import InputError
from truing.models import Model

VOCABULARY = (*TOKENIZER_FILES, "merges.txt")
FILES = (*VOCABULARY, "tokenizer_config.json", "chat_template.jinja")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


class Facts(NamedTuple):
    """What decides the meaning of token ids.

    Args:
        template: the chat template with what it is told of thinking, "" for none.
        tokens: vocabulary, merges, added tokens and how text is split before.
    """

    template: str
    tokens: object


def same_tokens(models: Mapping[str, Model], *, where: str = "", bare: bool = False) -> None:
    """Raise unless all models share tokenizer and template: their tokens must mean the same.

    Args:
        bare: a model without a template is no difference, such as the base of merged experts.
    """
    if len({(_hash(m.local.parts(), FILES), _thinking(m)) for m in models.values()}) == 1:
        return
    found = {role: facts_of(m) for role, m in models.items()}
    if _odd(found, bare):
        # Only now: reading a tokenizer takes longer than its file.
        found = {role: _loaded(m, found[role]) for role, m in models.items()}
    if odd := _odd(found, bare):
        first, other, what = odd
        raise InputError(
            f"models {first!r} and {other!r} differ in tokenizer or chat template: the {what}",
            where=where,
            seen=[_shown(models[first]), _shown(models[other])],
            fix="Give models of one tokenizer and template, such as those of one family; one that "
            "lacks the template, or has another, takes it by its name: NAME?template=FILE",
        )


def templated(models: Mapping[str, Model]) -> Model:
    """The first model that has a chat template; the first of all where none has."""
    every = list(models.values())
    return next((m for m in every if facts_of(m).template), every[0])


def _odd(found: Mapping[str, Facts], bare: bool) -> tuple[str, str, str] | None:
    """Two roles that differ, and in what; None where all are alike."""
    (first, facts), *others = found.items()
    for role, other in others:
        if other.tokens != facts.tokens:
            return first, role, "tokenizer"
    told = {r: f.template for r, f in found.items() if f.template or not bare}
    first = next(iter(told), "")
    role = next((r for r, template in told.items() if template != told[first]), "")
    return (first, role, "chat template") if role else None


def facts_of(model: Model) -> Facts:
    """What the files of a model's folder say, in the form that they have it in."""
    parts = model.local.parts()
    template = told(_template(parts), _thinking(model))
    if own := parts.get("tokenizer.json"):
        return Facts(template, _core(jsonfile.read(own)))
    return Facts(template, _hash(parts, VOCABULARY))


def _thinking(model: Model) -> bool | None:
    return model.base.thinking if isinstance(model.base, Folder) else None


def _shown(model: Model) -> str:
    thinking = _thinking(model)
    told = [] if thinking is None else [f"thinking={str(thinking).lower()}"]
    chosen = isinstance(model.base, Folder) and model.base.chosen is not None
    said = "&".join([*(["template=..."] if chosen else []), *told])
    return f"{model.name}?{said}" if said else model.name


def _hash(parts: Mapping[str, Path], names: Sequence[str]) -> str:
    """Of those of the files that are there."""
    return hashes.parts_hash({n: parts[n] for n in names if n in parts})


def _core(data: Mapping[str, object]) -> object:
    """Of tokenizer.json what changes meanings: padding, and which tokens are hidden, do not."""
    added = _objects(data.get("added_tokens"))
    tokens = [[t.get("id"), t.get("content"), *(bool(t.get(f)) for f in FLAGS)] for t in added]
    return [data.get("model"), tokens, data.get("pre_tokenizer")]


def _objects(value: object) -> list[dict[str, object]]:
    """The JSON objects in a list."""
    items = cast("list[object]", value) if isinstance(value, list) else []
    return [cast("dict[str, object]", one) for one in items if isinstance(one, dict)]


def _template(parts: Mapping[str, Path]) -> str:
    """The chat template among files: chat_template.jinja, or the entry of the configuration."""
    if own := parts.get("chat_template.jinja"):
        return own.read_text(encoding="utf-8")
    config = parts.get("tokenizer_config.json")
    return _default(jsonfile.read(config).get("chat_template")) if config else ""


def _default(template: object) -> str:
    """The template that is used unless another one is asked for by name."""
    if isinstance(template, list):  # of older files
        template = {t.get("name"): t.get("template") for t in _objects(template)}
    if isinstance(template, Mapping):
        template = cast("Mapping[str, object]", template).get("default")
    return str(template or "")


def _loaded(model: Model, plain: Facts) -> Facts:
    """What loading makes of a model's tokenizer; what its files say where there is none to load."""
    from truing.core.modelfiles.loaded import load_tokenizer

    if model.local.parts().keys().isdisjoint(TOKENIZER_FILES):
        return plain
    tokenizer = load_tokenizer(model)
    core = getattr(tokenizer, "backend_tokenizer", None)
    tokens = plain.tokens if core is None else _core(json.loads(core.to_str()))
    return Facts(_default(tokenizer.chat_template), tokens)
