"""What a user says of a model behind its name, and the files that a chosen chat template makes.

    "owner/name?template=chatml.jinja&end=<|im_end|>&thinking=true"

A chosen template takes the place of the model's own in every form that files have it in, and the
token that ends an answer is written to where transformers and vLLM look for it. These files are
made once, by their content, beside the model and not in it. So loading, keys, saving and export
treat them like all others of a base.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from truing.core import files
from truing.core.batch.template import turn_of
from truing.core.identity import hashes
from truing.core.modelfiles import jsonfile
from truing.core.modelfiles.bases import GENERATION, TEMPLATES, WORDS, Folder
from truing.errors import InputError, no_file, unknown
from truing.tables import content_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from truing.models import Model

NONE = "none"  # texts continue as they stand
SETTINGS = "tokenizer_config.json"
KNOWN = ("template", "end", "thinking", "bits")
_NAMED = re.compile(rf"(?!https?://)(.+?)(\?(?:{'|'.join(KNOWN)})=.*)", re.S)
_NEXT = re.compile(rf"&(?=(?:{'|'.join(KNOWN)})=)")  # a file's name may have a "&" of its own
_OTHER = re.compile(r"(?!https?://).+?\?(\w+)=")


class Choices(NamedTuple):
    """What is said behind a model's name.

    Args:
        template: a file with a chat template; "none" for none at all, "" for the model's own.
        end: a token that ends an answer besides those of the model, "" for none.
        thinking: what the template is told, None for nothing.
        bits: of the weights, 0 as they are stored.
    """

    template: str = ""
    end: str = ""
    thinking: bool | None = None
    bits: int = 0


def named(source: str) -> tuple[str, str]:
    """A model's name, and what is said behind it: "?template=none", "" where nothing is."""
    found = _NAMED.fullmatch(source)
    return (found[1], found[2]) if found else (source, "")


def paths(source: str) -> list[Path]:
    """Where a model of that name and the template said behind it would be on this machine."""
    name, said = named(source)
    return [files.expanded(p) for p in (name, *(v for n, v in _pairs(said) if _is_file(n, v)))]


def placed(said: str, place: Callable[[str], Path]) -> str:
    """What is said behind a name with its template's file as seen from elsewhere."""
    return _written([(n, str(place(v)) if _is_file(n, v) else v) for n, v in _pairs(said)])


def joined(own: str, said: str) -> str:
    """What a recipe's name of a model stands for says behind it, and what a step says of it."""
    more = _pairs(said)
    gone = {n for n, _ in more}
    gone |= {"end"} if "template" in gone else set()  # an end is that of a template
    kept = [(n, v) for n, v in _pairs(own) if n not in gone]
    return _written([*kept, *more])


def _written(pairs: list[tuple[str, str]]) -> str:
    return "?" + "&".join(f"{n}={v}" for n, v in pairs) if pairs else ""


def _is_file(name: str, value: str) -> bool:
    return name == "template" and value not in ("", NONE)


def _pairs(said: str) -> list[tuple[str, str]]:
    split = (one.partition("=") for one in _NEXT.split(said[1:]))
    return [(name, value) for name, _, value in split if name]


def read(said: str) -> Choices:
    """What is said behind a name.

    Raises:
        InputError: one thing is said twice, nothing is said of it, or things that exclude another.
    """
    pairs = _pairs(said)
    names = [n for n, _ in pairs]
    if twice := next((n for n in names if names.count(n) > 1), ""):
        raise InputError(f"{twice!r} is said twice", where=said, fix="Leave one of them out")
    given = dict(pairs)
    if empty := next((n for n, v in given.items() if not v), ""):
        raise InputError(f"nothing is said of {empty!r}", where=said, fix=f"Leave out {empty}=")
    thinking = {"true": True, "false": False, None: None}.get(given.get("thinking"), "")
    if thinking == "":
        raise InputError(
            "'thinking' is true or false",
            where=said,
            seen=given["thinking"],
            fix="Write ?thinking=true behind the model's name",
        )
    if (bits := given.get("bits", "0")) not in ("0", "4"):
        raise InputError(
            "'bits' is 4",
            where=said,
            seen=bits,
            fix="Write ?bits=4, or nothing for the files' own weights",
        )
    told = cast("bool | None", thinking)
    return Choices(given.get("template", ""), given.get("end", ""), told, int(bits))


def taken(model: Model, said: str) -> Model:
    """A model with what is said behind its name."""
    choices = read(said)
    if choices.template == NONE and choices.thinking:
        raise InputError(
            "a model without a chat template cannot be told to think",
            where=model.name,
            seen=said,
            fix="Leave out thinking=true, or name a template that reads enable_thinking",
        )
    if choices.template or choices.end:
        model = model.with_template(choices.template, end=choices.end)
    model = model.quantised(choices.bits) if choices.bits else model
    return model if choices.thinking is None else model.thinking(choices.thinking)


def check_said(source: str) -> None:
    """Raise an InputError for what is behind a name and means nothing there."""
    if found := _OTHER.match(source):
        error = unknown("word", found[1], KNOWN, where=source)
        error.message = f"{error.message} behind a model's name"
        raise error


def chosen(base: Folder, template: str | Path, end: str) -> Folder:
    """The base under another template; see `Model.with_template`."""
    base, template = replace(base, chosen=None), str(template)
    if not template and not end:
        return base
    if template == NONE and end:
        raise InputError(
            "without a chat template an answer ends with the tokenizer's own end token",
            where=str(base.path),
            seen=end,
            fix="Leave out the end, or choose a template that writes it",
        )
    parts = base.parts()
    text = _text_of(template)
    facts = hashes.parts_hash({n: p for n, p in parts.items() if n in _RESTS_ON})
    key = content_hash([facts, text, end])
    made = replace(base, chosen=files.home() / "templates" / key)
    if not cast(Path, made.chosen).is_dir():
        with files.new_folder(cast(Path, made.chosen)) as partial:
            _write(base, partial, text, end)
            _check(replace(made, chosen=partial), template, end)
    return made


_RESTS_ON = (*WORDS, GENERATION, "config.json")


def _text_of(template: str) -> str | None:
    """The text of a template's file, "" for none; None for the model's own."""
    if template in ("", NONE):
        return "" if template else None
    path = files.expanded(template)
    if not path.is_file():
        raise no_file("file with a chat template", path, (".jinja",))
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError as error:
        fix = "Give a text file, such as the chat_template.jinja of a model"
        raise InputError(f"not UTF-8: {error}", where=str(path), fix=fix) from None
    if not text.strip():
        fix = f"Say template={NONE} where texts should continue as they stand"
        raise InputError("the chat template is empty", where=str(path), fix=fix)
    return text


def _write(base: Folder, folder: Path, text: str | None, end: str) -> None:
    """Write what differs from the base's own files, and its templates where they stay.

    Args:
        text: of the template; "" for none, None for the base's own.
    """
    parts = base.parts()
    settings = jsonfile.read(parts[SETTINGS]) if SETTINGS in parts else {}
    made = dict(settings)
    if text is None:
        for name in set(TEMPLATES) & set(parts):
            files.place(parts[name], folder / name, link=False)
    else:
        made.pop("chat_template", None)
        if text:
            (folder / "chat_template.jinja").write_bytes(text.encode())
    if end:
        tokenizer = _tokenizer(base)
        number = _number(tokenizer, end, str(base.path))
        if end not in tokenizer.all_special_tokens:
            _mark(made, end)
        generation = jsonfile.read(parts[GENERATION]) if GENERATION in parts else {}
        stops = _with_stop(generation, base.config, number)
        if stops != generation:
            _write_json(folder / GENERATION, stops)
    if made != settings:
        _write_json(folder / SETTINGS, made)


def _write_json(path: Path, data: Mapping[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _number(tokenizer: PreTrainedTokenizerBase, end: str, where: str) -> int:
    """The id of an end token, which texts are never split into by chance."""
    added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    if end not in added:
        error = unknown("token", end, added, where=where)
        error.message = f"the tokenizer has no special token {end!r} that could end an answer"
        error.fix += (
            "; tokens are not added to a model: take one that it has, and a template with it"
        )
        raise error
    return added[end]


def _mark(settings: dict[str, object], end: str) -> None:
    """Let a tokenizer count a token of its own among the special ones, under either key."""
    key = "extra_special_tokens"
    if not isinstance(settings.get(key), list):
        key = "additional_special_tokens"  # which transformers 4 and vLLM read, too
    settings[key] = [*cast("list[object]", settings.get(key) or []), end]


def _with_stop(
    generation: Mapping[str, object], config: Mapping[str, object], number: int
) -> dict[str, object]:
    """Settings of generation that stop at one more token: see `core.generation.stops.own_stops`."""
    inner = config.get("text_config")
    told = {**cast("dict[str, object]", inner if isinstance(inner, dict) else {}), **config}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    made = dict(generation) or {n: told[n] for n in names if told.get(n) is not None}
    own = made.get("eos_token_id")
    own = told.get("eos_token_id") if own is None else own
    stops = cast("list[int]", own if isinstance(own, list) else [] if own is None else [own])
    return made if number in stops else {**made, "eos_token_id": [*stops, number]}


def _tokenizer(base: Folder) -> PreTrainedTokenizerBase:
    from truing.core.modelfiles.loaded import load_tokenizer
    from truing.models import Model

    return load_tokenizer(Model(replace(base, thinking=None)))


def _check(base: Folder, template: str, end: str) -> None:
    """Raise an InputError for a template that writes no answer, or ends it with another token."""
    tokenizer = _tokenizer(base)
    where = str(files.expanded(template)) if template else str(base.path)
    if end and not tokenizer.chat_template:
        raise InputError(
            "the model has no chat template that could write the end of an answer",
            where=where,
            seen=end,
            fix=f"Choose one with it: ?template=FILE&end={end}",
        )
    try:
        tail = turn_of(tokenizer).tail
    except InputError as error:
        error.where = where
        raise
    if end and end not in tail:
        raise InputError(
            f"the chat template does not end an answer with {end!r}",
            where=where,
            seen=tail,
            fix="Give the token that it writes there, or another template",
        )
