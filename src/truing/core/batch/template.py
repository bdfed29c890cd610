"""A chat template as text: messages as it writes them, and what it puts around an answer.

Where an answer begins is the end of what the template writes to ask for one (its generation
prompt), and what is generated and what is trained on go on from there. Templates of models that
think before they answer write something else there than before an answer that is given:

    Qwen3         asks with "assistant\\n", writes "assistant\\n<think>\\n\\n</think>\\n\\nHello"
    R1's distills ask with "<Assistant><think>\\n", write "<Assistant>Hello"

Both are made one: the prompt ends as an answer begins that the template writes. So Qwen3 answers,
and learns to answer, behind an empty thought, as its `enable_thinking=False` has it, and R1's
distills are free to think or not. Where a template is told to think (`tell`), the prompt ends as
the generation prompt does, and an answer brings its thought along.

Some templates put today's date into the prompt. Here it is always the same day, `DAY`, or neither
tokens nor what is kept by them would be the same tomorrow.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, cast

from truing.core.batch.encoding import INSIDE
from truing.core.batch.tool_calls import refusals, with_calls
from truing.errors import InputError
from truing.kinds import TOOLS, split_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, object]
Prompt = str | Sequence[Message]
MARK = "zqanswerqz"  # stands for an answer while the template is explored
ANY_TOOL = {  # stands for a row's own
    "type": "function",
    "function": {
        "name": MARK,
        "description": MARK,
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}
DAY = datetime(2024, 7, 26)  # what Llama 3's templates write where they are told no date
# A template's first line where it is told to think or not, under both names that templates have.
_TOLD = re.compile(
    r"\{%- set enable_thinking = (true|false) %\}\n?(\{%- set thinking = (true|false) %\})?"
)
_TAG = r"(\w+:)?(think|thinking|thought|reasoning)\|?[>\]]"
# "<think>\n", "<|think|>", "[THINK]", "<seed:think>": an opened thought.
_THOUGHT = re.compile(rf"[<\[]\|?{_TAG}\s*", re.I)
_CLOSED = re.compile(rf"([<\[]\|?)/({_TAG})\s*", re.I)  # "</think>\n\n"


@dataclass(frozen=True)
class Turn:
    """What a template puts around an assistant's words.

    Args:
        asks: what its generation prompt ends with beyond where an answer begins, "" for most.
        leads: what stands between the generation prompt and an answer, in the prompt.
        head: the same as part of the answer, which a model has to write itself.
        opened: how the prompt's end has opened a thought, "" where it has not.
        closes: what the template writes behind what it opened where nothing was thought; "" where
            it opens nothing, or does not write it again.
        tail: what ends an answer.
        before: what stands before an answer's ids.
        behind: what the template puts behind a last answer to ask for the next, unasked; "" for
            most.
    """

    asks: str
    leads: str
    head: str
    opened: str
    closes: str
    tail: str
    before: str
    behind: str = ""

    def written(self, text: str) -> str:
        """An answer's words as they follow the prompt, with what it has to write before them.

        A thought that the text brings along takes the place of an empty one, and is not opened
        again where the prompt has opened it.
        """
        if self.opened and text.startswith(tag := self.opened.rstrip()):
            return text.removeprefix(tag).removeprefix(self.opened[len(tag) :])
        in_place = _THOUGHT.match(self.head.lstrip()) is not None and self.brings_thought(text)
        return text if in_place else self.head + text

    @property
    def empty_thought(self) -> bool:
        """Whether the prompt ends with a thought that is closed: nothing is thought behind it."""
        return _closed_at_end(self.before) is not None

    @property
    def tag(self) -> str:
        """How the template opens a thought, such as "<think>"; "" where it writes none."""
        if closed := _closed_at_end(self.before):
            return closed[1] + closed[2]
        found = _THOUGHT.search(self.opened + self.asks + self.leads + self.head)
        return found[0].rstrip() if found else ""

    def brings_thought(self, text: str) -> bool:
        """Whether a text begins with a thought, by the template's tag; by any where it has none."""
        text = text.lstrip()
        return text.startswith(self.tag) if self.tag else _THOUGHT.match(text) is not None

    def leaves_open(self, text: str) -> bool:
        """Whether a text neither brings nor ends the thought that the prompt has opened."""
        if not self.opened or self.brings_thought(text):
            return False
        return all(m[1] + m[2] != self.tag for m in _CLOSED.finditer(text))


_turns: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, Turn]]
_turns = weakref.WeakKeyDictionary()
_tools: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[str, bool]]
_tools = weakref.WeakKeyDictionary()


def tell(tokenizer: PreTrainedTokenizerBase, thinking: bool | None) -> None:
    """Let a template begin with whether to think, which `apply_chat_template` takes by keyword.

    Raises InputError for a tokenizer with several templates, of which any may be used, and for one
    without any that is to think: nothing would come of it.
    """
    template = cast("str | Mapping[str, str] | None", tokenizer.chat_template)
    if isinstance(template, str):
        tokenizer.chat_template = told(template, thinking)
    elif template and thinking is not None:
        raise InputError(
            "the model has several chat templates, and none of them can be told whether to think",
            where=str(getattr(tokenizer, "name_or_path", "")),
            seen=list(template),
            fix="Name it without ?thinking=, or with the one to use: ?template=FILE&thinking=true",
        )
    elif not template and thinking:
        raise InputError(
            "the model has no chat template, so it cannot be told to think",
            where=str(getattr(tokenizer, "name_or_path", "")),
            fix="Name it without ?thinking=true, or with a template that reads enable_thinking: "
            "?template=FILE&thinking=true",
        )


def told(template: str, thinking: bool | None) -> str:
    """A template that begins with whether to think; as it is where there is none, or no word."""
    if thinking is None or not template:
        return template
    said = str(thinking).lower()
    line = f"{{%- set enable_thinking = {said} %}}{{%- set thinking = {said} %}}"
    before = _TOLD.match(template)
    return line + template[before.end() if before else 0 :]


def told_to_think(template: str) -> bool:
    """Whether a template begins with the word to think."""
    found = _TOLD.match(template)
    return found is not None and found[1] == "true"


def _closed_at_end(text: str) -> re.Match[str] | None:
    return next((m for m in _CLOSED.finditer(text) if m.end() == len(text)), None)


def turn_of(tokenizer: PreTrainedTokenizerBase) -> Turn:
    """What the tokenizer's template, or plain text without one, has around an answer."""
    template = str(tokenizer.chat_template or "")
    if tokenizer not in _turns or _turns[tokenizer][0] != template:
        made = _explored(tokenizer, template) if template else _plain(tokenizer)
        _turns[tokenizer] = (template, made)
    return _turns[tokenizer][1]


def _plain(tokenizer: PreTrainedTokenizerBase) -> Turn:
    return Turn("", "", "", "", "", str(tokenizer.eos_token or ""), INSIDE)


def _explored(tokenizer: PreTrainedTokenizerBase, template: str) -> Turn:
    """The turn of a template, by what it writes for one answer and to ask for one."""
    user: Message = {"role": "user", "content": "u"}
    asked = chat_text(tokenizer, [user], answer=True)
    given = chat_text(tokenizer, [user, {"role": "assistant", "content": MARK}], answer=False)
    begun, mark, tail = given.partition(MARK)
    beyond, head = asked.removeprefix(begun), begun.removeprefix(asked)
    thought = asked.startswith(begun) and _THOUGHT.fullmatch(beyond) is not None
    told = told_to_think(template)
    opened = next((m[0] for m in _THOUGHT.finditer(asked) if told and m.end() == len(asked)), "")
    if not mark or not (begun.startswith(asked) or thought or opened):
        raise InputError(
            "the chat template does not put an answer where it asks for one",
            seen=given,
            fix="Its text with add_generation_prompt must be how an assistant's turn begins",
        )
    behind = _asked_anyway(tokenizer, tail, asked)
    tail = until_end(tokenizer, tail.removesuffix(behind))
    if told:
        closes = head if opened and begun.startswith(asked) else ""
        return Turn("", "", "" if opened else head, opened, closes, tail, asked, behind)
    if thought:
        return Turn(beyond, "", "", "", "", tail, begun, behind)
    if not head.strip():  # white space is a token's with the word behind it
        return Turn("", "", head, "", "", tail, asked, behind)
    return Turn("", head, "", "", "", tail, begun, behind)


def _asked_anyway(tokenizer: PreTrainedTokenizerBase, tail: str, asked: str) -> str:
    """What stands behind an answer's end where a template always asks for the next one.

    Such a template does not read `add_generation_prompt`. What it asks with would be learnt with
    the end of every answer.
    """
    ends = [tail.find(t) + len(t) for t in tokenizer.all_special_tokens if t and t in tail]
    rest = tail[min(ends) :] if ends else ""
    return rest if rest.strip() and asked.endswith(rest) else ""


def asking_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """Messages as the template writes them, up to where an answer begins."""
    turn = turn_of(tokenizer)
    return chat_text(tokenizer, messages, answer=True).removesuffix(turn.asks) + turn.leads


def until_end(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """`text` up to its last special token; with the end token where it holds none."""
    ends = [text.rfind(t) + len(t) for t in tokenizer.all_special_tokens if t in text]
    return text[: max(ends)] if ends else text.rstrip() + str(tokenizer.eos_token or "")


def chat_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, answer: bool
) -> str:
    """Messages as the template writes them.

    Args:
        messages: with "role" and "content"; tools as `kinds.with_tools` puts them there.
        answer: True goes on to where an answer begins.
    """
    told, tools = split_tools(messages)
    if tools and not writes_tools(tokenizer):
        raise InputError(
            "the chat template does not write tools, so the model would not be told of them",
            where=str(getattr(tokenizer, "name_or_path", "")),
            seen=tools,
            fix="Take a model whose template does, or put them into the system message and leave "
            "out the column 'tools'",
        )
    return _rendered(tokenizer, told, tools, answer)


def check_written(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str
) -> None:
    """Raise InputError where `text`, written for messages, lacks what one of them says.

    Templates write tools in a form of their own, and may leave thoughts out of answers. They may
    change other words too, so those that are not found are tried with a mark in their place.
    """
    for i, message in enumerate(messages):
        words = message.get("content")
        known = message.get("role") in ("assistant", TOOLS) or not isinstance(words, str)
        if known or cast(str, words).strip() in text:
            continue
        tried = [*messages[:i], {**message, "content": MARK}, *messages[i + 1 :]]
        try:
            found = MARK in chat_text(tokenizer, tried, answer=False)
        except InputError:
            continue  # a form that the mark does not have
        if not found:
            raise InputError(
                f"the chat template does not write what {message.get('role')!r} says",
                seen=message,
                fix="Give it in a role that the template writes, or leave it out",
            )


def writes_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template tells the model of its tools."""
    template = str(tokenizer.chat_template or "")
    if tokenizer not in _tools or _tools[tokenizer][0] != template:
        user: list[Message] = [{"role": "user", "content": "u"}]
        try:
            found = bool(template) and MARK in _rendered(tokenizer, user, [ANY_TOOL], True)
        except InputError:
            found = False
        _tools[tokenizer] = (template, found)
    return _tools[tokenizer][1]


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[object],
    answer: bool,
) -> str:
    if not tokenizer.chat_template:
        raise no_template(tokenizer)
    if not messages:
        raise InputError(
            "nothing is asked before the answer",
            fix="Give what was asked as a message of the user before it, or in a column 'prompt'",
        )
    given = cast("list[dict[str, object]]", list(tools)) or None
    template = tokenizer.get_chat_template(tools=given)
    if any(m.get("tool_calls") for m in messages):
        messages = with_calls(tokenizer, messages, template)
    try:
        made = tokenizer.apply_chat_template(
            cast("list[dict[str, str]]", [dict(m) for m in messages]),
            tools=given,  # pyright: ignore[reportArgumentType]
            chat_template=_clock() + template if "strftime_now" in template else template,
            tokenize=False,
            add_generation_prompt=answer,
        )
    except refusals() as error:
        raise InputError(
            f"the chat template refuses these messages: {error}",
            seen=[m.get("role") for m in messages],
            fix="Give messages that it takes, or another template: ?template=FILE behind the "
            "model's name",
        ) from None
    return cast(str, made)


def no_template(tokenizer: PreTrainedTokenizerBase) -> InputError:
    """Says that a model of plain text alone was given messages."""
    return InputError(
        "the tokenizer has no chat template, so it cannot write messages as text",
        where=str(getattr(tokenizer, "name_or_path", "")),
        fix="Give prompts and answers as plain text, or name the model with a template: "
        "NAME?template=FILE, and &end=TOKEN for the token that ends an answer there",
    )


@functools.cache
def _clock() -> str:
    """A macro that stands before a template and hides transformers' `strftime_now`.

    Templates are given plain data alone, so that no function of our own can be handed to them.
    """
    codes = [f"%-{c}" for c in "dHIjmMSy"] + [f"%{c}" for c in "aAbBcdFHIjmMpSTuwxXyYzZ"]
    parts = "".join(f".replace({c!r}, {DAY.strftime(c)!r})" for c in codes)
    # "+": the template's first line break is its own, and stays.
    return f"{{% macro strftime_now(format) %}}{{{{ format{parts} }}}}{{% endmacro +%}}"
