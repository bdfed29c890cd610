"""Calls of tools in messages, as the chat template at hand wants them, or refused.

A call is {function: {name, arguments}}, or {name, arguments} alone. Templates that know none write
the message without it: the model would learn to answer nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from truing.errors import InputError
from truing.jsontext import loads_or_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Said = Mapping[str, object]
ID = "zqcallzqz"  # nine characters, since Mistral's templates take no others
_texts: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, bool]]
_texts = weakref.WeakKeyDictionary()


def refusals() -> tuple[type[Exception], ...]:
    """What a template that does not take its messages raises."""
    from jinja2 import TemplateError

    return TemplateError, TypeError, KeyError


def _no_calls(seen: object) -> InputError:
    return InputError(
        "the chat template does not write calls of tools, so a model would see or learn none",
        seen=seen,
        fix="Take a model whose template does, or write the calls into the message's content",
    )


def calls_of(message: Said) -> list[Mapping[str, object]]:
    """The functions that a message calls, each with its name and arguments."""
    calls = cast("Sequence[object]", message.get("tool_calls") or ())
    known = [cast("Mapping[str, object]", c) for c in calls if isinstance(c, Mapping)]
    inner = [call.get("function", call) for call in known]
    return [cast("Mapping[str, object]", f) for f in inner if isinstance(f, Mapping)]


def check_calls(message: Said, text: str) -> None:
    """Raise InputError where `text`, written for a message, lacks a function that it calls."""
    for call in calls_of(message):
        if str(call.get("name")) not in text:
            raise _no_calls(message.get("tool_calls"))


def with_calls(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Said], template: str
) -> Sequence[Said]:
    """Messages with the arguments of calls as the template wants them.

    OpenAI's protocol has them as JSON text. Where a template makes JSON of what it is given, such
    as Qwen2.5's, that text would be encoded twice.
    """
    if "tool_calls" not in template:
        raise _no_calls([m["tool_calls"] for m in messages if m.get("tool_calls")])
    texts = any(isinstance(c.get("arguments"), str) for m in messages for c in calls_of(m))
    if not texts or _takes_text(tokenizer, template):
        return messages
    return [{**m, "tool_calls": _read(m["tool_calls"])} if calls_of(m) else m for m in messages]


def _takes_text(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a template writes arguments that are a text as they stand."""
    if tokenizer not in _texts or _texts[tokenizer][0] != template:
        text = f'{{"{ID}": 1}}'
        call = {"id": ID, "type": "function", "function": {"name": "f", "arguments": text}}
        asked = [{"role": "user", "content": "u"}]
        said = [{"role": "assistant", "content": "", "tool_calls": [call]}]
        try:
            made = tokenizer.apply_chat_template(
                cast("list[dict[str, str]]", asked + said), chat_template=template, tokenize=False
            )
        except refusals():
            made = ""
        _texts[tokenizer] = (template, text in cast(str, made))
    return _texts[tokenizer][1]


def _read(calls: object) -> list[object]:
    """Calls whose arguments, where they are JSON text, are what that says."""
    made: list[object] = []
    for call in cast("Sequence[Mapping[str, object]]", calls):
        (function,) = calls_of({"tool_calls": [call]}) or [{}]
        text = function.get("arguments")
        if isinstance(text, str):
            found = loads_or_text(text) if text.strip() else {}
            if not isinstance(found, Mapping):
                raise InputError(
                    "the arguments of a call are no JSON object",
                    seen=text,
                    fix='Write them as {"name": value}, as an object or as JSON text',
                )
            function = {**function, "arguments": found}
            call = {**call, "function": function} if "function" in call else function
        made.append(call)
    return made
