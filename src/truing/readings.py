"""Rows of one kind that read as those of another, with nothing left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from truing.errors import InputError
from truing.jsontext import loads_or_text
from truing.kinds import TOOLS, Message, Row, as_messages, muted, with_system

# Who speaks in ShareGPT's form.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def sides_of(row: Row) -> tuple[list[Message], list[list[Message]]]:
    """Messages of a dialogue pair: its prompt's, and those of either side behind them.

    Where both sides begin with the prompt themselves, as those of UltraFeedback do beside a column
    `prompt`, it counts once: there are then no messages before them.
    """
    given = as_messages(row["prompt"]) if "prompt" in row else []
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


_PLAIN = {"role", "content", "weight", "train"}


def single_answer(messages: object) -> str | None:
    """The text of messages that are one plain answer of the assistant's; None for all others."""
    items = cast("list[Message]", messages)
    if len(items) != 1 or items[0].get("role") != "assistant" or muted(items[0]):
        return None
    more = {k for k, v in items[0].items() if v} - _PLAIN  # calls of tools, say
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


def last_answer(row: Row) -> Row:
    """A dialogue that ends with a text of the assistant's, as prompt and completion.

    All before it is the prompt. Rows that have a completion, or do not end so, stay as they are.
    """
    if "completion" in row or "prompt" in row or "messages" not in row:
        return row
    messages = cast("list[object]", row["messages"])
    text = single_answer(messages[-1:])
    if text is None or len(messages) < 2:
        return row
    rest = {name: value for name, value in row.items() if name != "messages"}
    return rest | {"prompt": messages[:-1], "completion": text}


def read_completion(row: Row) -> Row:
    """A row whose completion is one message of the assistant's, with its text.

    Of messages without a completion that is the last.
    """
    if "completion" not in row:  # a prompt beside messages is what these begin with
        row = last_answer({name: value for name, value in row.items() if name != "prompt"})
    if "completion" not in row:
        raise InputError(
            "needs messages that end with an answer in words",
            seen=row["messages"],
            fix="Give its text in a column 'completion', what comes before it as 'prompt'",
        )
    answer = row["completion"]
    return row | {"completion": answer if isinstance(answer, str) else _single(answer)}


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
    given: object = row.get("history") or []
    for turn in cast("list[object]", given if isinstance(given, list) else [given]):
        pair = cast("list[object]", turn if isinstance(turn, list) else [])
        if len(pair) != 2 or not all(isinstance(t, str) for t in pair):
            fix = 'Write [["a question", "its answer"], ...]'
            said = "field 'history' must list pairs of texts, asked and said"
            raise InputError(said, seen=turn, fix=fix)
        roles = ("user", "assistant")
        before += [{"role": r, "content": str(t)} for r, t in zip(roles, pair, strict=True)]
    before = with_system(before, row.get("system"))
    return [*before, {"role": "user", "content": text}] if before else text


def read_alpaca(row: Row) -> Row:
    """A row of Alpaca's form: its instruction and input as the prompt, its output as the answer."""
    return row | {"prompt": _asked(row), "completion": row["output"]}


def read_alpaca_pair(row: Row) -> Row:
    """The same with two answers."""
    return row | {"prompt": _asked(row)}


def read_sharegpt(row: Row) -> Row:
    """A row of ShareGPT's form with its conversation as messages."""
    said = [_message(t) for t in cast("list[dict[str, object]]", row["conversations"])]
    return row | {"messages": with_system(said, row.get("system"))}


def _message(turn: dict[str, object]) -> Message:
    """A turn of ShareGPT's as a message; one that has a role already stays."""
    if "role" in turn:
        return cast("Message", turn)
    role, text = SPEAKERS.get(str(turn.get("from"))), turn.get("value")
    if role is None:
        raise InputError(
            f"field 'conversations' has turns of {turn.get('from')!r}",
            seen=turn,
            fix=f"Known: {', '.join(SPEAKERS)}; write others in a column 'messages'",
        )
    if not isinstance(text, str):
        raise InputError(
            "field 'conversations' has a turn that is no text",
            seen=turn,
            fix="Write it as {from: human, value: a text}, or in a column 'messages'",
        )
    marks = {name: turn[name] for name in ("weight", "train") if name in turn}
    if turn["from"] == "function_call":
        marks |= {"content": None, "tool_calls": _calls(text, turn)}
    return cast("Message", {"role": role, "content": text} | marks)


def _calls(text: str, turn: object) -> list[object]:
    """Calls of tools that a turn writes as JSON: one, or a list of them."""
    found = loads_or_text(text)
    calls = cast("list[object]", found if isinstance(found, list) else [found])
    if not calls or not all(
        isinstance(c, Mapping) and "name" in cast("Mapping[str, object]", c) for c in calls
    ):
        raise InputError(
            "field 'conversations' has a call of a tool that is no JSON",
            seen=turn,
            fix='Write {"name": "f", "arguments": {...}}, or a list of such calls',
        )
    return [{"type": "function", "function": call} for call in calls]


def read_sharegpt_pair(row: Row) -> Row:
    """A conversation, or messages, that two answers follow, as LLaMA-Factory has it."""
    answers = {
        name: _single([_message(cast("dict[str, object]", row[name]))])
        for name in ("chosen", "rejected")
    }
    if "messages" in row:
        rest = {name: value for name, value in row.items() if name != "messages"}
        return rest | {"prompt": row["messages"]} | answers
    return row | {"prompt": read_sharegpt(row)["messages"]} | answers


def read_tagged(row: Row) -> Row:
    """A row of either form whose `kto_tag` says whether its answer is good."""
    if "instruction" in row:
        made = read_alpaca(row)
    else:
        made = read_completion(read_sharegpt(row))
    return made | {"label": row["kto_tag"]}


def read_openai_pair(row: Row) -> Row:
    """A preference as OpenAI's fine-tuning has it: what was asked, and two outputs."""
    asked = cast("dict[str, object]", row["input"])
    sides = {"chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
    answers = {name: _single(side) for name, side in sides.items()}
    gone = ("input", "preferred_output", "non_preferred_output")
    rest = {name: value for name, value in row.items() if name not in gone}
    offered = {TOOLS: asked[TOOLS]} if asked.get(TOOLS) else {}
    return rest | {"prompt": asked["messages"]} | answers | offered


_TEXTS = "single answers of dialogues as texts"
_ASKED = "instruction and input as the prompt"
_PAIRED = "conversations as prompts"
_PREFERRED = "preferred outputs as chosen answers"
_TAGGED = "tagged answers as good and bad ones"
# What a row of one kind is as one of another, with nothing left out.
READINGS: dict[tuple[str, str], tuple[str, Callable[[Row], Row]]] = {
    ("dialogue_pair", "pair"): (_TEXTS, read_pair),
    ("implicit_pair", "pair"): ("what both answers begin with as the prompt", read_implicit),
    ("dialogue_unpaired", "unpaired"): (_TEXTS, read_completion),
    ("dialogue_example", "example"): (_TEXTS, read_completion),
    ("stepwise", "steps"): ("completions as steps", read_steps),
    ("tagged", "unpaired"): (_TAGGED, read_tagged),
    ("tagged", "prompt"): (_TAGGED, read_tagged),
    ("alpaca", "example"): (_ASKED, read_alpaca),
    ("alpaca", "prompt"): (_ASKED, read_alpaca),
    ("alpaca_pair", "pair"): (_ASKED, read_alpaca_pair),
    ("sharegpt_pair", "pair"): (_PAIRED, read_sharegpt_pair),
    ("sharegpt_pair", "prompt"): (_PAIRED, read_sharegpt_pair),
    ("sharegpt", "example"): ("conversations as messages", read_sharegpt),
    ("sharegpt", "prompt"): ("conversations as messages", read_sharegpt),
    ("openai_pair", "pair"): (_PREFERRED, read_openai_pair),
    ("openai_pair", "prompt"): (_PREFERRED, read_openai_pair),
}
