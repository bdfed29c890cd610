"""What a row is: the columns of each kind, and what it asks.

Columns and forms are those of the Hugging Face ecosystem. Answers are texts or messages (the kinds
"dialogue_..."), a pair may say what it asks in both of its answers alone ("implicit_pair"), and
steps may be called completions ("stepwise"). Older forms that many sets have are read as those who
made them read them: Alpaca's and ShareGPT's, also with a `kto_tag`, as LLaMA-Factory has them, and
the pairs of OpenAI's fine-tuning; `readings` makes rows of other kinds of them.

Two columns go with what a row asks. `system` is its first message. `tools` lists JSON schemas of
functions that the model may call, and becomes a message of the role "tools", which `core.chat`
hands to the template. Columns that ask what a text cannot, such as images, are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Sized
from typing import cast

from truing.errors import InputError
from truing.jsontext import loads_or_text

Row = dict[str, object]
Message = dict[str, str]
TOOLS = "tools"
Columns = dict[str, tuple[type, ...]]

# What each kind needs, column -> allowed types. A tuple of column sets is "any one of these".
KINDS: dict[str, tuple[Columns, ...]] = {
    "pair": ({"prompt": (str, list), "chosen": (str,), "rejected": (str,)},),
    "dialogue_pair": (
        {"prompt": (str, list), "chosen": (list,), "rejected": (list,)},
        {"chosen": (list,), "rejected": (list,)},
    ),
    "sharegpt_pair": (
        {"conversations": (list,), "chosen": (dict,), "rejected": (dict,)},
        {"messages": (list,), "chosen": (dict,), "rejected": (dict,)},
    ),
    "unpaired": ({"prompt": (str, list), "completion": (str,), "label": (bool,)},),
    "dialogue_unpaired": (
        {"prompt": (str, list), "completion": (list,), "label": (bool,)},
        {"messages": (list,), "label": (bool,)},
    ),
    "negative": ({"prompt": (str, list), "rejected": (str,)},),
    "group": ({"prompt": (str, list), "completions": (list,), "scores": (list,)},),
    "steps": ({"prompt": (str, list), "steps": (list,), "labels": (list,)},),
    "stepwise": ({"prompt": (str, list), "completions": (list,), "labels": (list,)},),
    "judgement": ({"prompt": (str, list), "completion": (str,), "score": (int, float)},),
    "trajectory": ({"turns": (list,)},),
    "example": ({"prompt": (str, list), "completion": (str,)}, {"messages": (list,)}),
    "dialogue_example": ({"prompt": (str, list), "completion": (list,)},),
    "prompt": ({"prompt": (str, list)}, {"messages": (list,)}),
    "tagged": (
        {"instruction": (str,), "output": (str,), "kto_tag": (bool,)},
        {"conversations": (list,), "kto_tag": (bool,)},
    ),
    "alpaca": ({"instruction": (str,), "output": (str,)},),
    "alpaca_pair": ({"instruction": (str,), "chosen": (str,), "rejected": (str,)},),
    "sharegpt": ({"conversations": (list,)},),
    "openai_pair": (
        {"input": (dict,), "preferred_output": (list,), "non_preferred_output": (list,)},
    ),
    "text": ({"text": (str,)},),
    "implicit_pair": ({"chosen": (str,), "rejected": (str,)},),
    "record": ({},),
}
# Columns that ask something under another name: such pairs do not say it in their answers.
QUESTIONS = {"question", "instruction", "query", "input", "problem", "context"}
# Kinds whose columns have names that others have too.
OLDER = ("tagged", "alpaca", "alpaca_pair", "sharegpt_pair", "sharegpt", "openai_pair")
# Columns of what a model of texts cannot read, and of what TRL tells the template of one row.
UNREAD = ("image", "images", "video", "videos", "audio", "audios")
KWARGS = "chat_template_kwargs"
ANSWERS = ("chosen", "rejected", "completion")  # texts in some kinds, messages in others


def infer_kind(row: Mapping[str, object]) -> str:
    """The first kind whose columns are all there, with answers of its sort: texts, or messages."""

    def fits(need: Columns) -> bool:
        if not set(need) <= set(row):
            return False
        if {"messages", "label"} <= set(need) and not isinstance(row["label"], bool):
            return False  # a class, as of texts
        return all(
            isinstance(row[name], list) == (need[name] == (list,))
            and (need[name] != (dict,) or isinstance(row[name], Mapping))
            for name in ANSWERS
            if name in need
        )

    kind = next((k for k, choices in KINDS.items() if any(map(fits, choices))), "record")
    if kind in OLDER:
        need = next(filter(fits, KINDS[kind]))
        return kind if _older(row, need) else "record"
    return "record" if kind == "implicit_pair" and QUESTIONS & set(row) else kind


def _older(row: Mapping[str, object], need: Columns) -> bool:
    """Whether columns with names that others have too hold what these forms put there."""
    if "preferred_output" in need:
        asked = row.get("input")
        return isinstance(asked, Mapping) and isinstance(
            cast("Mapping[str, object]", asked).get("messages"), list
        )
    texts = (row[name] for name, types in need.items() if types == (str,))
    turns = [row[name] for name, types in need.items() if types == (dict,)]
    if "conversations" in need:
        said = row["conversations"]
        turns += cast("list[object]", said) if isinstance(said, list) else [said]
    return all(isinstance(t, str) for t in texts) and all(map(_is_turn, turns))


def _is_turn(turn: object) -> bool:
    """Whether it is a turn of ShareGPT's, or a message under that column's name."""
    names = set(cast("Mapping[str, object]", turn)) if isinstance(turn, Mapping) else set[str]()
    return {"from", "value"} <= names or {"role", "content"} <= names


# What a row asks


def prompt_of(row: Mapping[str, object]) -> object:
    """What a row asks: its "prompt", or the "messages" that it came as, with what is `told` beside.

    An answer that the messages end with is none of it. A forced opening of the answer is given at
    the end of "prompt".
    """
    found = row["prompt"] if "prompt" in row else _before_answer(row["messages"])
    if not isinstance(found, (str, list)):
        return found
    asked = told(cast("object", found), row)
    return found if isinstance(found, str) and len(asked) == 1 else asked


def _before_answer(messages: object) -> object:
    if not isinstance(messages, list):
        return messages
    asked = cast("list[Message]", messages)
    while len(asked) > 1 and asked[-1].get("role") == "assistant":
        asked = asked[:-1]
    return asked


def as_prompt(row: Row) -> Row:
    """A row with all that it asks in "prompt", also when it came as messages."""
    rest = {name: value for name, value in row.items() if name != "system"}
    return rest | {"prompt": prompt_of(row)}


def user_text(prompt: object) -> str:
    """The text of a prompt: itself, or the last user message of a list of messages."""
    if isinstance(prompt, str):
        return prompt
    messages = cast(list[Message], prompt if isinstance(prompt, list) else [])
    users = [m.get("content", "") for m in messages if m.get("role") == "user"]
    return users[-1] if users else ""


def told(asked: object, row: Mapping[str, object]) -> list[Message]:
    """Messages, or a prompt as one, with the system text and the tools that the row has beside it.

    Raises InputError for two system texts, and what `check_texts` does.
    """
    check_texts(row)
    return with_tools(with_system(as_messages(asked), row.get("system")), tools_of(row))


def check_texts(row: Mapping[str, object]) -> None:
    """Raise InputError for a row that says more than a model of texts is told.

    By images and the like, or by words to the chat template.
    """
    for name in UNREAD:
        value = row.get(name)
        # NaN, with which pandas fills what is missing, does not equal itself.
        if len(value) if isinstance(value, Sized) else value and value == value:
            raise InputError(
                f"column {name!r} holds what a model of texts does not see",
                fix="Leave such rows out; where their texts stand alone, leave the column out",
            )
    given = row.get(KWARGS)
    words = loads_or_text(given) if isinstance(given, str) else given
    if isinstance(words, Mapping) and any(cast("Mapping[str, object]", words).values()):
        raise InputError(
            f"column {KWARGS!r} tells the chat template something of this row alone",
            seen=given,
            fix="Leave the column out; to have thoughts, name the model with ?thinking=true",
        )


def with_system(messages: list[Message], text: object) -> list[Message]:
    """Messages that begin with a system text, where there is one.

    Raises InputError where they begin with another.
    """
    if not isinstance(text, str) or not text.strip():
        return messages
    if not messages or messages[0].get("role") != "system":
        return [{"role": "system", "content": text}, *messages]
    if str(messages[0].get("content")).strip() != text.strip():
        raise InputError(
            "the row has a system message, and another text in column 'system'",
            seen=text,
            fix="Leave one of them out, or join them in the message",
        )
    return messages


def muted(message: Mapping[str, object]) -> bool:
    """Whether a turn is marked as context: by OpenAI's weight 0, or by axolotl's train false."""
    return 0 in (message.get("weight", 1), message.get("train", 1))


def tools_of(row: Mapping[str, object]) -> list[object]:
    """JSON schemas of the functions that a row offers; [] where it offers none.

    As in TRL the column may be JSON text, and fields that are null, which Parquet adds to make all
    rows alike, are left out. Raises InputError for anything but a list of objects.
    """
    given = row.get(TOOLS)
    if isinstance(given, str) and given.strip():
        found = loads_or_text(given)
    else:
        found = cast("object", given or [])
    if not isinstance(found, list) or not all(
        isinstance(t, Mapping) for t in cast("list[object]", found)
    ):
        raise InputError(
            f"column {TOOLS!r} must be a list of JSON schemas, one of each function",
            seen=given,
            fix="Rename the column if it means something else",
        )
    return [_given(tool) for tool in cast("list[object]", found)]


def _given(value: object) -> object:
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return {k: _given(v) for k, v in items if v is not None}
    return [_given(v) for v in cast("list[object]", value)] if isinstance(value, list) else value


def with_tools(prompt: object, tools: Sequence[object]) -> list[Message]:
    """A prompt as messages with one that holds the tools, unless it has one already.

    It stands before all but a system message, which others look for at the beginning.
    """
    messages = as_messages(prompt)
    if not tools or any(m.get("role") == TOOLS for m in messages):
        return messages
    told = {"role": TOOLS, "content": json.dumps(tools, ensure_ascii=False)}
    led = int(bool(messages) and messages[0].get("role") == "system")
    return [*messages[:led], told, *messages[led:]]


def split_tools(
    messages: Sequence[Mapping[str, object]],
) -> tuple[list[Mapping[str, object]], list[object]]:
    """Messages without the one that `with_tools` put there, and what it holds."""
    tools: list[object] = []
    rest: list[Mapping[str, object]] = []
    for message in messages:
        held = loads_or_text(str(message.get("content"))) if message.get("role") == TOOLS else None
        if isinstance(held, list):
            tools += cast("list[object]", held)
        else:
            rest.append(message)
    return rest, tools


def as_messages(prompt: object) -> list[Message]:
    """A prompt as messages: a text is one of the user's."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return list(cast("list[Message]", prompt))
