"""What an answer must be, where a request says so: JSON of a schema, or a call of a tool.

A grammar is made of it, which tells before each token those that may come next; no other can be
drawn. So an answer that is not cut short is what was asked for. How good it is in that form is the
model's. Schemas are followed by `llguidance`, with one space behind each comma and colon and none
elsewhere, and properties in the order of the schema; what it cannot follow is refused before
anything is written.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from truing.errors import InputError, MissingExtra, shorten
from truing.serve.openai_calls import Form
from truing.serve.openai_errors import Json, Refused, unsupported

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Shape:
    """What an answer must be: any of these.

    Args:
        param: the setting of the request that says so.
        schema: of the JSON that it may be; None where it may be none.
        calls: functions that it may call, by name, each with the schema of its parameters.
    """

    param: str
    schema: Json | None
    calls: Mapping[str, Json]


def shape_of(choice: str | Json, wanted: Json, tools: Mapping[str, Json]) -> Shape | None:
    """What a request's `tool_choice` and `response_format` make of an answer; None for anything.

    Args:
        tools: functions that it offers, each with the schema of its parameters.
    Raises:
        Refused: they are none of the protocol's, or of those that this server has not.
    """
    schema = _schema(wanted)
    if choice in ("auto", "none"):
        return None if schema is None else Shape("response_format", schema, tools)
    if choice == "required":
        calls = tools
    elif isinstance(choice, dict) and choice.get("type") == "function":
        function = choice.get("function")
        name = cast("Json", function).get("name") if isinstance(function, dict) else None
        calls = {n: parameters for n, parameters in tools.items() if n == name}
    else:
        raise unsupported(
            "tool_choice", f"{shorten(choice)} is none of 'auto', 'none', 'required' and a function"
        )
    if not calls:
        said = f"tool_choice: the request offers no such tool (seen: {shorten(choice)})"
        raise Refused(400, said, param="tool_choice")
    return Shape("tool_choice", None, calls)


def _schema(wanted: Json) -> Json | None:
    """The schema that a `response_format` asks for; None for texts of any form."""
    kind = wanted.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise unsupported("response_format", f"its type is {shorten(kind)}")
    given = wanted.get("json_schema")
    schema = cast("Json", given).get("schema") if isinstance(given, dict) else None
    if not isinstance(schema, dict):
        place = "response_format.json_schema.schema"
        raise Refused(400, f"{place}: must be an object", param=place)
    return cast("Json", schema)


def _grammar(shape: Shape, form: Form, tokens: Mapping[str, int]) -> str:
    """The grammar of an answer, in the form of Lark that llguidance reads.

    Args:
        tokens: texts that are tokens of their own, such as most marks of calls.
    """
    rules: list[str] = []
    starts: list[str] = []
    if shape.schema is not None:
        starts.append("said")
        rules.append(f"said: %json {_json(shape.schema)}")
    # Behind a thought that the prompt has begun, where calls are none, a call stands by itself.
    before = [f"{form.thought[0]}/{form.thought[1:]}", "\n\n"] if form.thinking else []
    opens, closes = ([form.opens, "\n"], ["\n", form.closes]) if form.opens else ([], [])
    for i, (name, parameters) in enumerate(shape.calls.items()):
        head = [*before, *opens, f'{{"name": {json.dumps(name)}, "arguments": ']
        starts.append(f"call_{i}")
        rules.append(f"call_{i}: {_texts(head, tokens)} told_{i} {_texts(['}', *closes], tokens)}")
        rules.append(f"told_{i}: %json {_json(parameters | {'type': 'object'})}")
    return "\n".join([f"start: {' | '.join(starts)}", *rules])


def _json(schema: Json) -> str:
    return json.dumps({**schema, "x-guidance": SPACED})


def _texts(texts: Sequence[str], tokens: Mapping[str, int]) -> str:
    """Texts one behind the other."""
    made = [f"<[{tokens[t]}]>" if t in tokens else json.dumps(t, ensure_ascii=False) for t in texts]
    return " ".join(made)


class Guide:
    """Holds one answer to its shape.

    Args:
        matcher: of its grammar, at the beginning.
        ends: tokens that end an answer.
    """

    def __init__(self, matcher: LLMatcher, ends: Sequence[int]) -> None:
        self._matcher, self._ends, self._seen = matcher, list(ends), 0

    def another(self) -> Guide:
        """A guide for another answer of that shape; of one that has not begun."""
        return Guide(self._matcher.deep_copy(), self._ends)

    def close(self, ids: Sequence[int], logits_V: Tensor) -> None:
        """Make impossible what may not follow `ids`, in place.

        Args:
            ids: of the answer so far; those of the call before, and more.
        """
        self._matcher.consume_tokens(list(ids[self._seen :]))
        self._seen = len(ids)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        open_V = np.unpackbits(bits, bitorder="little")[: len(logits_V)].astype(bool)
        if self._matcher.is_accepting():
            open_V[self._ends] = True
        if error := self._matcher.get_error() or ("" if open_V.any() else "no token may follow"):
            raise InputError(f"an answer cannot be held to its form: {error}", where="the server")
        logits_V.masked_fill_(torch.from_numpy(~open_V).to(logits_V.device), -torch.inf)


class Guides:
    """Makes the guides of one model's answers.

    Args:
        tokenizer: the model's.
        vocab: how many tokens its logits are of.
        ends: tokens that end an answer.
        form: how it writes calls.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocab: int, ends: Sequence[int], form: Form
    ) -> None:
        self._tokenizer, self._vocab, self._form = tokenizer, vocab, form
        self._ends = list(ends)
        self._tokens: LLTokenizer | None = None

    def guide(self, shape: Shape) -> Guide:
        """A guide to answers of that shape.

        Raises:
            Refused: there is none for it.
            MissingExtra: the package that makes them is not installed.
        """
        if importlib.util.find_spec("llguidance") is None:
            raise MissingExtra("llguidance", "serve", where=shape.param)
        import llguidance
        import llguidance.hf

        fast = cast("PreTrainedTokenizerFast", self._tokenizer)
        if self._tokens is None:
            try:
                self._tokens = llguidance.hf.from_tokenizer(fast, self._vocab, self._ends)
            except ValueError as error:
                why = f"the bytes of the model's tokens are not known: {error}"
                raise unsupported(shape.param, why) from None
        grammar = _grammar(shape, self._form, fast.get_added_vocab())
        matcher = llguidance.LLMatcher(self._tokens, grammar, log_level=0)
        if error := matcher.get_error():
            said = f"{shape.param}: the schema cannot be followed: {shorten(error, 400)}"
            raise Refused(400, said, param=shape.param)
        return Guide(matcher, self._ends)
