"""What a row is: the columns of each kind, what it asks, and rows of one kind that read as another.

Columns and forms are those of the Hugging Face ecosystem. Answers are texts or messages (the kinds
"dialogue_..."), a pair may say what it asks in both of its answers alone ("implicit_pair"), and
steps may be called completions ("stepwise"). Two older forms that many sets have are read as
LLaMA-Factory reads them: Alpaca's and ShareGPT's. A column `tools` lists JSON schemas of functions
that the model may call. It goes with what the row asks, as a message of the role "tools", which
`core.chat` hands to the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
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
    "unpaired": ({"prompt": (str, list), "completion": (str,), "label": (bool,)},),
    "dialogue_unpaired": ({"prompt": (str, list), "completion": (list,), "label": (bool,)},),
    "negative": ({"prompt": (str, list), "rejected": (str,)},),
    "group": ({"prompt": (str, list), "completions": (list,), "scores": (list,)},),
    "steps": ({"prompt": (str, list), "steps": (list,), "labels": (list,)},),
    "stepwise": ({"prompt": (str, list), "completions": (list,), "labels": (list,)},),
    "judgement": ({"prompt": (str, list), "completion": (str,), "score": (int, float)},),
    "trajectory": ({"turns": (list,)},),
    "example": ({"prompt": (str, list), "completion": (str,)}, {"messages": (list,)}),
    "dialogue_example": ({"prompt": (str, list), "completion": (list,)},),
    "prompt": ({"prompt": (str, list)}, {"messages": (list,)}),
    "alpaca": ({"instruction": (str,), "output": (str,)},),
    "alpaca_pair": ({"instruction": (str,), "chosen": (str,), "rejected": (str,)},),
    "sharegpt": ({"conversations": (list,)},),
    "text": ({"text": (str,)},),
    "implicit_pair": ({"chosen": (str,), "rejected": (str,)},),
    "record": ({},),
}
# Columns that ask something under another name: such pairs do not say it in their answers.
QUESTIONS = {"question", "instruction", "query", "input", "problem", "context"}
# Who speaks in ShareGPT's form.
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
            "system": "system"}  # fmt: skip
ANSWERS = ("chosen", "rejected", "completion")  # texts in some kinds, messages in others


def infer_kind(row: Mapping[str, object]) -> str:
    """The first kind whose columns are all there, with answers of its sort: texts, or messages."""

    def fits(need: Columns) -> bool:
        return set(need) <= set(row) and all(
            isinstance(row[name], list) == (need[name] == (list,))
            for name in ANSWERS
            if name in need
        )

    kind = next((k for k, choices in KINDS.items() if any(map(fits, choices))), "record")
    if kind in ("alpaca", "alpaca_pair", "sharegpt") and not _older(row, kind):
        return "record"
    return "record" if kind == "implicit_pair" and QUESTIONS & set(row) else kind


def _older(row: Mapping[str, object], kind: str) -> bool:
    """Whether columns with names that others have too hold what Alpaca or ShareGPT puts there."""
    if kind != "sharegpt":
        return all(isinstance(row[name], str) for name in KINDS[kind][0])
    turns = row["conversations"]
    return isinstance(turns, list) and all(
        isinstance(t, Mapping) and {"from", "value"} <= set(cast("Mapping[str, object]", t))
        for t in cast("list[object]", turns)
    )


# What a row asks


def prompt_of(row: Mapping[str, object]) -> object:
    """What a row asks: its "prompt", or the "messages" that it came as, with its tools."""
    found = row["prompt"] if "prompt" in row else row["messages"]
    tools = tools_of(row)
    return with_tools(found, tools) if tools else found


def as_prompt(row: Row) -> Row:
    """A row with "prompt", also when it came as messages; the prompt tells its tools."""
    return row if "prompt" in row and not row.get(TOOLS) else row | {"prompt": prompt_of(row)}


def user_text(prompt: object) -> str:
    """The text of a prompt: itself, or the last user message of a list of messages."""
    if isinstance(prompt, str):
        return prompt
    messages = cast(list[Message], prompt if isinstance(prompt, list) else [])
    users = [m.get("content", "") for m in messages if m.get("role") == "user"]
    return users[-1] if users else ""


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
    messages = _messages(prompt)
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


def _messages(prompt: object) -> list[Message]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return list(cast("list[Message]", prompt))


# Rows that read as others


def sides_of(row: Row) -> tuple[list[Message], list[list[Message]]]:
    """Messages of a dialogue pair: its prompt's, and those of either side behind them.

    Where both sides begin with the prompt themselves, as those of UltraFeedback do beside a column
    `prompt`, it counts once: there are then no messages before them.
    """
    given = _messages(row["prompt"]) if "prompt" in row else []
    sides = [list(cast("list[Message]", row[name])) for name in ("chosen", "rejected")]
    return ([] if given and all(_begins(side, given) for side in sides) else given), sides


def _begins(side: list[Message], given: list[Message]) -> bool:
    """Whether a side begins with messages, but for a system message that it may have before."""
    led = side[:1] and side[0].get("role") == "system" and given[0].get("role") != "system"
    side = side[1:] if led else side
    return len(side) > len(given) and all(
        m.get("role") == g.get("role")
        and str(m.get("content")).strip() == str(g.get("content")).strip()
        for m, g in zip(side, given, strict=False)
    )


def parting(chosen: Sequence[object], rejected: Sequence[object]) -> int:
    """How many items both begin with alike; each keeps one of its own."""
    most = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(most) if chosen[i] != rejected[i]), max(most, 0))


def single_answer(messages: object) -> str | None:
    """The text of messages that are one plain answer of the assistant's; None for all others."""
    items = cast("list[Message]", messages)
    if len(items) != 1 or items[0].get("role") != "assistant":
        return None
    more = {k for k, v in items[0].items() if v} - {"role", "content"}  # calls of tools, say
    content: object = items[0].get("content")
    return content if isinstance(content, str) and not more else None


def _single(messages: object) -> str:
    text = single_answer(messages)
    if text is None:
        raise InputError(
            "needs single answers, not dialogues",
            seen=messages,
            fix="Give the turns before the last as the prompt, the last answer as text",
        )
    return text


def _no_prompt(seen: object) -> InputError:
    return InputError(
        "chosen and rejected begin with nothing alike, so they do not tell what was asked",
        seen=seen,
        fix="Give it in a column 'prompt'",
    )


def read_completion(row: Row) -> Row:
    """A row whose completion is one message of the assistant's, with its text."""
    return row | {"completion": _single(row["completion"])}


def read_pair(row: Row) -> Row:
    """A pair of dialogues that part at their last answers, with these as texts.

    What both sides begin with alike goes to the prompt.
    """
    given, (chosen, rejected) = sides_of(row)
    same = parting(chosen, rejected)
    answers = {"chosen": _single(chosen[same:]), "rejected": _single(rejected[same:])}
    asked: object = row.get("prompt") if given and not same else [*given, *chosen[:same]]
    if not asked:
        raise _no_prompt(chosen)
    return {**row, "prompt": asked, **answers}


_ASSISTANT = re.compile(r"\n\nAssistant:")  # opens an answer in Anthropic's transcripts


def read_implicit(row: Row) -> Row:
    """A pair of texts without a prompt, which is what both begin with.

    It ends where the last answer of a transcript opens ("\\n\\nAssistant:"), else between two
    words: never within one, of which the answers may share letters by chance. As in TRL a space
    goes to the answers, so that prompt and answer together are the text as it was.
    """
    chosen, rejected = str(row["chosen"]), str(row["rejected"])
    if chosen == rejected:
        return {**row, "prompt": ""}  # prefers nothing, and is left out for that
    most = min(len(chosen), len(rejected))
    same = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    opened = list(_ASSISTANT.finditer(chosen, 0, same))
    # Both answers keep at least a character, so a word on which one of them ends is theirs.
    spaces = [i + 1 for i in range(min(same, most - 1)) if chosen[i].isspace()]
    cut = opened[-1].end() if opened else max(spaces, default=0)
    cut -= chosen[cut - 1 : cut] == " "
    if not chosen[:cut].strip():
        raise _no_prompt(chosen)
    return {**row, "prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


def read_steps(row: Row) -> Row:
    """A row whose steps are called completions, as TRL has them."""
    return {n: v for n, v in row.items() if n != "completions"} | {"steps": row["completions"]}


def _asked(row: Row) -> object:
    """What a row of Alpaca's form asks: instruction and input, behind system text and history."""
    text = "\n".join(str(row[n]) for n in ("instruction", "input") if row.get(n))
    before: list[Message] = []
    if row.get("system"):
        before.append({"role": "system", "content": str(row["system"])})
    given: object = row.get("history") or []
    for turn in cast("list[object]", given if isinstance(given, list) else [given]):
        pair = cast("list[object]", turn if isinstance(turn, list) else [])
        if len(pair) != 2 or not all(isinstance(t, str) for t in pair):
            fix = 'Write [["a question", "its answer"], ...]'
            said = "field 'history' must list pairs of texts, asked and said"
            raise InputError(said, seen=turn, fix=fix)
        roles = ("user", "assistant")
        before += [{"role": r, "content": str(t)} for r, t in zip(roles, pair, strict=True)]
    return [*before, {"role": "user", "content": text}] if before else text


def read_alpaca(row: Row) -> Row:
    """A row of Alpaca's form: its instruction and input as the prompt, its output as the answer."""
    return row | {"prompt": _asked(row), "completion": row["output"]}


def read_alpaca_pair(row: Row) -> Row:
    """The same with two answers."""
    return row | {"prompt": _asked(row)}


def read_sharegpt(row: Row) -> Row:
    """A row of ShareGPT's form with its conversation as messages."""
    said: list[Message] = []
    if row.get("system"):
        said.append({"role": "system", "content": str(row["system"])})
    for turn in cast("list[dict[str, object]]", row["conversations"]):
        role = SPEAKERS.get(str(turn.get("from")))
        if role is None:
            raise InputError(
                f"field 'conversations' has turns of {turn.get('from')!r}",
                seen=turn,
                fix=f"Known: {', '.join(SPEAKERS)}; write others in a column 'messages'",
            )
        if not isinstance(turn["value"], str):
            raise InputError(
                "field 'conversations' has a turn that is no text",
                seen=turn,
                fix="Write it as {from: human, value: a text}, or in a column 'messages'",
            )
        said.append({"role": role, "content": str(turn["value"])})
    return row | {"messages": said}


_TEXTS = "single answers of dialogues as texts"
# What a row of one kind is as one of another, with nothing left out.
READINGS: dict[tuple[str, str], tuple[str, Callable[[Row], Row]]] = {
    ("dialogue_pair", "pair"): (_TEXTS, read_pair),
    ("implicit_pair", "pair"): ("what both answers begin with as the prompt", read_implicit),
    ("dialogue_unpaired", "unpaired"): (_TEXTS, read_completion),
    ("dialogue_example", "example"): (_TEXTS, read_completion),
    ("stepwise", "steps"): ("completions as steps", read_steps),
    ("alpaca", "example"): ("instruction and input as the prompt", read_alpaca),
    ("alpaca", "prompt"): ("instruction and input as the prompt", read_alpaca),
    ("alpaca_pair", "pair"): ("instruction and input as the prompt", read_alpaca_pair),
    ("sharegpt", "example"): ("conversations as messages", read_sharegpt),
    ("sharegpt", "prompt"): ("conversations as messages", read_sharegpt),
}
