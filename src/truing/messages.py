"""Messages of a dialogue as every chat template reads them: a role and a text each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from truing.errors import InputError, nearest
from truing.kinds import TOOLS, split_tools

SAYS = ("system", "user", "assistant")
# Who speaks in a dialogue, as templates know them. Any other name may be a template's own.
ROLES = (
    *SAYS,
    "tool",
    "tool_call",
    "tool_result",
    "tool_results",
    "developer",
    "function",
    "ipython",
    "observation",
    "environment",
    "document",
    "documents",
    "context",
    "control",
)
# What other forms call them.
CALLED = {
    "human": "user",
    "prompter": "user",
    "customer": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "instruction": "system",
    "function_call": "assistant",
    "function_response": "tool",
    "tool_response": "tool",
    "tools": "tool",
}


def plain_messages(messages: list[object], where: str, field: str) -> list[object]:
    """Messages whose contents are texts; what else a message has, such as calls of tools, stays.

    A content in parts, as OpenAI's protocol has it, becomes the text of its parts with nothing
    between them: so do templates write them that know parts. Others, such as those of Llama 3 and
    Gemma 2, would write the list as Python shows it. A content that is null or left out stands
    beside calls of tools only.

    Args:
        messages: what a row has in `field`; it is left as it is.
        where: the row, for errors.

    Raises InputError for an empty list, for what is no message, for a role by another name than
    templates have for it, for calls in their older form, and for any other content.
    """
    if not messages:
        fix = "Leave the row out"
        raise InputError(f"field {field!r} is an empty list", where=where, fix=fix)
    return [_plain(message, where, field) for message in messages]


def _plain(message: object, where: str, field: str) -> object:
    given = cast("Mapping[str, object]", message) if isinstance(message, Mapping) else {}
    calls = given.get("tool_calls")
    if given.get("function_call"):
        raise InputError(
            f"field {field!r} has a message with 'function_call', the older form of a call",
            where=where,
            seen=message,
            fix="Write it as tool_calls: [{type: function, function: {name, arguments}}]",
        )
    if not isinstance(given.get("role"), str) or ("content" not in given and not calls):
        raise InputError(
            f"field {field!r} must be a list of {{role, content}} messages",
            where=where,
            seen=message,
            fix='Write each as {"role": "user", "content": "a text"}',
        )
    _known(given, where, field)
    content = given.get("content")
    if isinstance(content, str) or (content is None and calls and "content" in given):
        return message
    if content is None and calls:
        return {**given, "content": None}
    if not isinstance(content, list) or not content:
        raise InputError(
            f"field {field!r} has a message whose content is no text",
            where=where,
            seen=message,
            fix="Null stands beside 'tool_calls' only; an empty answer is an empty text",
        )
    return {**given, "content": _joined(cast("list[object]", content), where, field)}


def _known(message: Mapping[str, object], where: str, field: str) -> None:
    """Raise InputError for a role whose right name is certain; others are the template's to take.

    Schemas of tools stand in a message of their own role, as `kinds.with_tools` puts them there.
    """
    role = str(message["role"])
    if role in ROLES or (role == TOOLS and _schemas(message)):
        return
    low = role.strip().lower()
    near = nearest(low, SAYS) if low.isalpha() else None  # "user_2" is a speaker's name
    meant = CALLED.get(low) or (low if low in ROLES else near)
    if meant:
        raise InputError(
            f"field {field!r} has a message of the unknown role {role!r}",
            where=where,
            fix=f"Did you mean {meant!r}?",
        )


def _schemas(message: Mapping[str, object]) -> bool:
    """Whether a message lists functions, and nothing else; what one gave may be a list too."""
    rest, tools = split_tools([message])
    named = [{"type", "function", "name"} & set(t) for t in tools if isinstance(t, Mapping)]
    return not rest and len(named) == len(tools) > 0 and all(named)


def _joined(parts: Sequence[object], where: str, field: str) -> str:
    texts: list[str] = []
    for part in parts:
        held = cast("Mapping[str, object]", part) if isinstance(part, Mapping) else {}
        text = held.get("text")
        if held.get("type", "text") != "text" or not isinstance(text, str):
            raise InputError(
                f"field {field!r} has a message with a part that is no text",
                where=where,
                seen=part,
                fix="Models read texts here: leave out rows with images and other parts",
            )
        texts.append(text)
    return "".join(texts)
