"""Calls of tools in what a model writes, told apart from its words while it writes them.

How calls look is read off the chat template, which is given one to write: a JSON object with a name
and arguments (Llama calls them parameters), or a list of such, between what the template puts
around it:

    Qwen2.5, Hermes        <tool_call>\\n{"name": "add", "arguments": {"a": 1}}\\n</tool_call>
    Llama 3.1              {"name": "add", "parameters": {"a": 1}}
    Mistral                [{"name": "add", "arguments": {"a": 1}}]

The last two stand behind nothing, or behind a special token, which is none of the words: there a
whole answer is calls of tools that the request offers, or it is words. A template that writes no
such JSON counts as the first, in whose place Qwen3-Coder and Qwen3.5 have

    <function=add>\\n<parameter=a>\\n1\\n</parameter>\\n</function>

with texts as they are and all else as JSON; the tool's schema says which. What cannot be read as a
call stays text.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from truing import jsontext
from truing.core.batch.template import ANY_TOOL, Message, chat_text, turn_of
from truing.core.batch.tool_calls import ID
from truing.errors import InputError
from truing.kinds import with_tools
from truing.surrogates import mended

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = Mapping[str, Mapping[str, object]]  # name of a function: schemas of its parameters
_NONE: Tools = {}
_NAME, _RESULT = ID, "zqresultzqz"  # stand for a call and its result in a template
_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*)</function>\s*", re.S)
_PARAMETER = re.compile(r"\s*<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.S)
_PYTHON = {"True": "true", "False": "false", "None": "null"}  # as some templates write them
_ESCAPED = re.compile(r"\\.", re.S)
_LETTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Call:
    """A call of a tool; its arguments are JSON text, as the protocol has them."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Form:
    """How a model writes its calls.

    Args:
        opens: what stands before a call; "" where an answer that is a call is nothing else.
        closes: what stands behind it; "" for the answer's end.
        thought: how a thought begins; a call inside one is only thought of.
        thinking: whether the prompt has begun it.
        earlier: whether the template writes the calls and results of earlier turns.
    """

    opens: str = "<tool_call>"
    closes: str = "</tool_call>"
    thought: str = "<think>"
    thinking: bool = False
    earlier: bool = False


def form_of(tokenizer: PreTrainedTokenizerBase) -> Form:
    """The form that a tokenizer's template has for calls, by what it makes of one."""
    function = {"name": _NAME, "arguments": json.dumps({_NAME: 1})}
    call = {"id": _NAME, "type": "function", "function": function}
    asked = cast("list[Message]", with_tools("u", [ANY_TOOL]))
    said: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
    told: Message = {"role": "tool", "tool_call_id": _NAME, "name": _NAME, "content": _RESULT}
    try:
        turn = turn_of(tokenizer)
        begun = chat_text(tokenizer, asked, answer=True)
        written = chat_text(tokenizer, [*asked, said], answer=False)
        earlier = chat_text(tokenizer, [*asked, said, told], answer=True)
    except InputError:
        return Form()
    thought, thinking = turn.tag or Form.thought, bool(turn.opened)
    kept = _NAME in earlier and _RESULT in earlier
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(begun, written, strict=False))
    found = _around(written[sum(1 for _ in same) :])  # behind the prompt: the model's to write
    if found is None:
        return Form(thought=thought, thinking=thinking, earlier=kept)
    before, behind = found
    for token in tokenizer.all_special_tokens:
        behind = behind.split(token)[0]
    # The last word of it: what else stands there, such as an empty thought, is no part of a call.
    opens = "".join(_shown(tokenizer, before.rpartition(_closing(thought))[2]).split()[-1:])
    closes = _shown(tokenizer, behind).strip() if opens else ""
    return Form(opens, closes, thought, thinking, kept)


def _shown(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text without tokens that are none of an answer's words."""
    ids = cast("list[int]", tokenizer(text, add_special_tokens=False)["input_ids"])
    return cast(str, tokenizer.decode(ids, skip_special_tokens=True))


def _closing(tag: str) -> str:
    return f"{tag[0]}/{tag[1:]}"


def _around(answer: str) -> tuple[str, str] | None:
    """What stands before and behind a call written as JSON; None where there is none."""
    for start, letter in enumerate(answer):
        if letter not in "[{":
            continue
        try:
            value, end = cast("tuple[object, int]", _READER.raw_decode(answer, start))
        except ValueError:
            continue
        items = cast("list[object]", value) if isinstance(value, list) else [value]
        if [c.name for c in _calls(items) or ()] == [_NAME]:
            return answer[:start], answer[end:]
    return None


def calls_in(text: str, tools: Tools = _NONE) -> list[Call] | None:
    """The calls that a text is, one after the other; None for one that is of anything else."""
    try:
        if found := _FUNCTION.fullmatch(text):
            return _marked(found[1], found[2], tools.get(found[1], {}))
        values: list[object] = []
        while text := text.lstrip(" \t\r\n,;"):
            value, end = cast("tuple[object, int]", _READER.raw_decode(text))
            values += cast("list[object]", value) if isinstance(value, list) else [value]
            text = text[end:]
        return _calls(values)
    except (ValueError, RecursionError):
        return None


def _marked(name: str, body: str, types: Mapping[str, object]) -> list[Call] | None:
    """A call whose arguments stand between marks."""
    arguments: dict[str, object] = {}
    at = 0
    while found := _PARAMETER.match(body, at):
        arguments[found[1]] = _typed(found[2], types.get(found[1]))
        at = found.end()
    return None if body[at:].strip() else [_made(name, arguments)]


def _typed(written: str, schema: object) -> object:
    """An argument's value: a text where its schema has texts, or says nothing."""
    facts = _facts(schema)
    several = facts.get("anyOf")
    among = cast("list[object]", several) if isinstance(several, list) else []
    kinds = [str(f["type"]) for f in (facts, *map(_facts, among)) if "type" in f]
    if not kinds or any("string" in kind for kind in kinds):
        return written
    try:
        return _READER.decode(_PYTHON.get(written, written))
    except ValueError:
        return written


def _facts(value: object) -> Mapping[str, object]:
    return cast("Mapping[str, object]", value) if isinstance(value, Mapping) else {}


def _refuse(name: str) -> object:
    raise ValueError(name)  # JSON has no NaN, and neither may arguments that are sent on


_READER = json.JSONDecoder(parse_constant=_refuse)


def _calls(items: Sequence[object]) -> list[Call] | None:
    made = [_call(item) for item in items]
    return [c for c in made if c is not None] if made and None not in made else None


def _call(item: object) -> Call | None:
    facts = _facts(item)
    function = _facts(facts.get("function", facts))
    name, arguments = function.get("name"), function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = cast("object", _READER.decode(arguments))
    arguments = {} if arguments is None else arguments
    if not isinstance(name, str) or not name or not isinstance(arguments, Mapping):
        return None
    return _made(name, cast("Mapping[str, object]", arguments))


def _made(name: str, arguments: Mapping[str, object]) -> Call:
    # Nine letters and digits: templates of Mistral's take no other ids back.
    made = "".join(secrets.choice(_LETTERS) for _ in range(9))
    return Call(made, mended(name), jsontext.dumps(arguments))


def _in_text(written: str) -> bool:
    """Whether a call that goes on is inside a text, where marks of calls are none."""
    if written.lstrip().startswith("<function="):
        return "</function>" not in written
    return _ESCAPED.sub("", written).count('"') % 2 == 1


class Reading:
    """An answer as it comes: its words and its calls, in order.

    What may turn out to be a call is held back until it is one or none. Space around calls is
    theirs; words without a call come as they were written.

    Args:
        form: of the calls.
        tools: the functions that the request offers.
        one: further calls, and what stands behind the first, are left out.
    """

    def __init__(self, form: Form, tools: Tools, *, one: bool = False) -> None:
        self.form, self.tools, self.one = form, tools, one
        self.calls: list[Call] = []
        self._held = ""
        self._close = ""  # what ends the thought that is being written
        self._begun = self._said = self._free = False
        self._tried = 0  # up to where the held text was seen not to end a call

    def feed(self, text: str) -> list[str | Call]:
        """What more is known with `text` that follows."""
        self._held += text
        return self._known(last=False)

    def end(self) -> list[str | Call]:
        """What is known now that nothing follows."""
        return self._known(last=True)

    def _known(self, *, last: bool) -> list[str | Call]:
        made: list[str | Call] = []
        if not self._begun and not self._begin(last=last):
            return made
        while self._held:
            before = self._held
            if self._close:
                made += self._thought(last=last)
            elif self.form.opens:
                made += self._tagged(last=last)
            else:
                made += self._whole(last=last)
            if self._held == before:
                break
        return [part for part in made if part]

    def _begin(self, *, last: bool) -> bool:
        """Whether it is known if the answer begins with a thought."""
        tag, start = self.form.thought, self._held.lstrip()
        if not (self.form.thinking or last) and len(start) < len(tag) and tag.startswith(start):
            return False
        self._begun = True
        if self.form.thinking or start.startswith(tag):
            self._close = _closing(tag)
        return True

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        self._tried = 0
        return taken

    def _words(self, text: str) -> str:
        """Words that are sent; space between a call and the first of them is not."""
        if self.calls and (self.one or not text.strip()):
            return ""
        text = text if self._said or not self.calls else text.lstrip()
        self._said = self._said or bool(text.strip())
        return text

    def _thought(self, *, last: bool) -> list[str | Call]:
        at = self._held.find(self._close)
        if at < 0:
            return [self._words(self._take(len(self._held) - (0 if last else self._part())))]
        made = self._words(self._take(at + len(self._close)))
        self._close = ""
        return [made]

    def _part(self) -> int:
        """How many letters at the end may begin the mark that is looked for."""
        mark, held = self._close or self.form.opens, self._held
        return max((k for k in range(1, len(mark)) if held.endswith(mark[:k])), default=0)

    def _tagged(self, *, last: bool) -> list[str | Call]:
        form, held = self.form, self._held
        at = held.find(form.opens)
        if at < 0:
            if last:
                return [self._words(self._take(len(held)))]
            sure = held[: len(held) - self._part()].rstrip()
            return [self._words(self._take(len(sure)))]
        if words := held[:at].rstrip():
            return [self._words(self._take(len(words)))]
        start, mark = at + len(form.opens), form.closes or form.opens
        end = held.find(mark, max(start, self._tried))
        while end >= 0:
            written = held[start:end]
            if calls := calls_in(written, self.tools):
                self._take(end + len(form.closes))
                return self._new(calls)
            if not _in_text(written):  # no call; one may begin inside it
                return [self._words(self._take(self._next(start, end + len(form.closes))))]
            self._tried = end + 1
            end = held.find(mark, self._tried)
        if not last:
            return []
        if calls := calls_in(held[start:], self.tools):  # the answer ended without the mark
            self._take(len(held))
            return self._new(calls)
        return [self._words(self._take(self._next(start, len(held))))]

    def _next(self, start: int, end: int) -> int:
        """Where words end before a call that begins from `start` on; `end` where none does."""
        at = self._held.find(self.form.opens, start, end)
        return len(self._held[:at].rstrip()) if at >= 0 else end

    def _whole(self, *, last: bool) -> list[str | Call]:
        """Where nothing marks a call: all of an answer, or none of it."""
        if self._free or self._held.lstrip()[:1] not in ("", "{", "["):
            self._free = True
            return [self._words(self._take(len(self._held)))]
        if not last:
            return []
        calls, held = calls_in(self._held, self.tools), self._take(len(self._held))
        offered = calls is not None and all(c.name in self.tools for c in calls)
        return self._new(calls or []) if offered else [self._words(held)]

    def _new(self, calls: list[Call]) -> list[str | Call]:
        if self.one:
            calls = calls[: 1 - len(self.calls)]
        self.calls += calls
        return list(calls)
