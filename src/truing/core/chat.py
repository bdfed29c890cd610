"""Chat templates as token ids, with the marks of what carries loss, and the receipt of it.

A row is tokenised in the pieces in which a model meets it: the prompt up to where the answer
begins, then the answer with the token that ends the turn. So what is trained on has the tokens that
generation sees, and a dialogue of one turn is `prompt_ids + completion_ids`.

Where an answer begins, also that of a model that thinks first, is in `core.batch.template`. Its end
is the template's own: what it puts after an assistant's words, up to its last special token
("<|im_end|>" of "<|im_end|>\\n"), else the tokenizer's end token. A tokenizer without a template
continues plain text.

A message of the role "tools" (`kinds.with_tools`) is none of the dialogue: the template is given
the functions that it lists. One that leaves them out is refused, since a model would learn, or be
asked, to call functions that it has not been told of.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

from truing.core.batch.encoding import INSIDE, decode_inside, encode, space_added
from truing.core.batch.template import DAY as DAY
from truing.core.batch.template import (
    MARK,
    Message,
    Prompt,
    asking_text,
    check_written,
    told_to_think,
    until_end,
)
from truing.core.batch.template import chat_text as chat_text
from truing.core.batch.template import no_template as no_template
from truing.core.batch.template import turn_of as turn_of
from truing.core.batch.template import writes_tools as writes_tools
from truing.core.batch.tool_calls import check_calls
from truing.core.modelfiles.reach import check_ids
from truing.errors import InputError, shorten
from truing.kinds import TOOLS, muted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from truing.core.tree import Node


def messages_of(prompt: Prompt, prefix: Sequence[Message] = ()) -> list[Message]:
    """`prefix` and the prompt as one list of messages; a string is one message of the user.

    Of two system messages one is made, since templates know one and have it first.
    """
    own = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if prefix and own and prefix[0].get("role") == own[0].get("role") == "system":
        text = f"{prefix[0]['content']}\n\n{own[0]['content']}"
        return [{**prefix[0], "content": text}, *prefix[1:], *own[1:]]
    return [*prefix, *own]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Ids of a prompt up to where the answer begins.

    Args:
        prompt: the user's words, or messages with "role" and "content". Where the last message is
            the assistant's, it is the answer's forced opening: what is generated goes on from it.

    Raises InputError where messages meet a tokenizer without a template, or one that leaves out
    what a message says.
    """
    if not tokenizer.chat_template:
        if not isinstance(prompt, str):
            raise no_template(tokenizer)
        return encode(tokenizer, prompt, special=True)
    messages = messages_of(prompt)
    if len(messages) > 1 and messages[-1].get("role") == "assistant":
        begun = messages[-1]["content"]
        if not isinstance(begun, str):
            raise InputError(
                "a prompt ends with a call of a tool, to which nothing has been answered",
                seen=messages[-1],
                fix="Give what the tool said as the last message",
            )
        opening = completion_ids(tokenizer, begun, end=False)
        return [*prompt_ids(tokenizer, messages[:-1]), *opening]
    text = asking_text(tokenizer, messages)
    check_written(tokenizer, messages, text)
    return encode(tokenizer, text)


def completion_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, end: bool = True) -> list[int]:
    """Ids of an answer as they follow `prompt_ids`, with the token that ends the turn.

    Args:
        text: the answer's words.
        end: False leaves the ending token out, for an answer that goes on.
    """
    turn = turn_of(tokenizer)
    whole = turn.written(text) + (turn.tail if end else "")
    return encode(tokenizer, whole, before=turn.before)


def given_answer(
    tokenizer: PreTrainedTokenizerBase, text: str, where: str = "", *, end: bool = True
) -> str:
    """An answer that is given, to be learnt: `text`, behind what ends a thought opened for it.

    One that was drawn there is what it is, and so is one without its `end`, which may lie in its
    thought.

    Raises InputError for a thought where the prompt ends with an empty one, and for none where the
    prompt has opened one and the template does not say how it ends.
    """
    turn = turn_of(tokenizer)
    if turn.empty_thought and turn.brings_thought(text):
        fix = "Name the model with ?thinking=true behind it, or leave the thought out"
        if told_to_think(str(tokenizer.chat_template)):
            fix = "Leave the thought out: this template always puts an empty one"
        raise InputError(
            "the answer brings a thought, and the chat template has put an empty one before it",
            where=where,
            seen=shorten(text),
            fix=fix,
        )
    if not end or not turn.leaves_open(text):
        return text
    if not turn.closes:
        raise InputError(
            "the answer brings no thought, and the chat template has opened one before it",
            where=where,
            seen=shorten(text),
            fix="Name the model without ?thinking=true, or give the answer with its thought",
        )
    return turn.closes + text


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a whole text, which no template writes, with the tokenizer's beginning and end."""
    ids, eos = encode(tokenizer, text, special=True), cast("int | None", tokenizer.eos_token_id)
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Words of an answer as it was drawn, which `completion_ids` would give the same ids."""
    if not tokenizer.chat_template and space_added(tokenizer):
        return decode_inside(tokenizer, list(ids))
    return cast(str, tokenizer.decode(list(ids), skip_special_tokens=True))


def reply_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], answer: Sequence[int]
) -> list[int]:
    """Ids of what stands between an answer and the next one: its end where it has none, the reply.

    `prompt_ids`, an answer as it was drawn, these ids and the next answer are one row: what a model
    has drawn is never tokenised anew.

    Args:
        messages: the dialogue with that answer as its last message of the assistant, and after it
            what was replied.
        answer: its ids.
    """
    at = max(i for i, m in enumerate(messages) if m.get("role") == "assistant")
    told: list[Message] = [*messages[:at], {"role": "assistant", "content": MARK}]
    text = asking_text(tokenizer, [*told, *messages[at + 1 :]])
    before, mark, after = text.rpartition(MARK)
    tail = turn_of(tokenizer).tail
    begun = asking_text(tokenizer, messages[:at]) + turn_of(tokenizer).head
    if not mark or before != begun or not after.startswith(tail):
        raise InputError(
            "the chat template rewrites earlier turns, so one row cannot hold several",
            where=f"message {at}",
            seen=shorten(text),
            fix="Name the model with a template that leaves earlier turns as they are, "
            "NAME?template=FILE, or ask for one turn",
        )
    ended = len(answer) > 0 and answer[-1] in _turn_ends(tokenizer)
    if ended:
        return encode(tokenizer, after[len(tail) :], before=tail)
    return encode(tokenizer, after, before=INSIDE)


def step_ids(
    tokenizer: PreTrainedTokenizerBase, steps: Sequence[str], separator: str
) -> list[list[int]]:
    """Ids of each step of an answer with the separator that closes it.

    Steps are tokenised one by one, so that a separator never merges with the step after it.
    """
    made = [completion_ids(tokenizer, step + separator, end=False) for step in steps[:1]]
    inside = separator or INSIDE
    return made + [encode(tokenizer, step + separator, before=inside) for step in steps[1:]]


def opening(messages: Sequence[Message]) -> int:
    """How many messages stand before the first to which anything can be an answer.

    An assistant's that opens the dialogue is among them: nothing has been asked before it. A system
    message may ask.
    """
    told = int(bool(messages) and messages[0].get("role") == TOOLS)
    begun = next((i for i, m in enumerate(messages[told:]) if m.get("role") != "assistant"), None)
    return len(messages) if begun is None else told + begun


def says(message: Message) -> bool:
    """Whether an answer has words, or calls of tools."""
    return bool(message.get("tool_calls") or str(message.get("content") or "").strip())


def answers_of(messages: Sequence[Message], asked: int = 0) -> list[int]:
    """Which messages are answers: the assistant's behind the first `asked`, which are the prompt.

    Without a prompt, those behind what opens the dialogue. Those that are muted are context, and
    those that say nothing are none beside others that do.
    """
    given = any(m.get("role") != TOOLS for m in messages[:asked])
    first = asked if given else opening(messages)
    said = (i for i, m in enumerate(messages) if i >= first and m.get("role") == "assistant")
    found = [i for i in said if not muted(messages[i])]
    return [i for i in found if says(messages[i])] or found


def example_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, asked: int = 0
) -> tuple[list[int], list[bool]]:
    """Ids of a dialogue and, for each, whether it carries loss: the assistant's words and ends.

    The first `asked` messages are the prompt and carry none, and neither does an assistant's that
    opens the dialogue: it answers nothing. The last one must be the assistant's. One that says
    nothing carries none beside others that do, and is left out where it is the last.
    Raises InputError when there is none, when the template does not write what a message says, or
    when the template rewrites earlier turns, so that no one sequence holds what the model sees at
    each.
    """
    answers = answers_of(messages, asked)
    if not answers or messages[-1].get("role") != "assistant":
        raise InputError(
            "a dialogue to learn from ends with a message of the assistant",
            seen=[m.get("role") for m in messages],
            fix="Leave out what follows its last message" if answers else "Add its answer",
        )
    ids: list[int] = []
    loss: list[bool] = []
    done = ""
    for i in answers:
        before = asking_text(tokenizer, messages[:i])
        answer = _said(tokenizer, messages[: i + 1], before)
        if not before.startswith(done) or answer is None:
            raise InputError(
                "the chat template rewrites earlier turns, so they cannot be learnt in one row",
                where=f"message {i}",
                seen=messages[i].get("content"),
                fix="Give each turn as a row of its own: the messages before it as the prompt",
            )
        for text, stood, carries in ((before[len(done) :], done, False), (answer, before, True)):
            piece = encode(tokenizer, text, before=stood)
            ids += piece
            loss += [carries] * len(piece)
        done = before + answer
    check_written(tokenizer, messages[: answers[-1]], done)
    return ids, loss


def _said(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], before: str
) -> str | None:
    """The last message as an answer to `before`, with its end; None where it does not follow it.

    Templates leave thoughts out of the answers that they are given, or write them in a form of
    their own. Such an answer is learnt as it stands.
    """
    turn, whole = turn_of(tokenizer), chat_text(tokenizer, messages, answer=False)
    words = messages[-1].get("content")
    follows = whole.startswith(before)
    if follows:
        whole = whole.removesuffix(turn.behind)
        check_calls(messages[-1], whole[len(before) :])
    if isinstance(words, str) and not messages[-1].get("tool_calls"):
        learnt = given_answer(tokenizer, words)
        kept = follows and words.strip() in whole[len(before) :]
        if not kept and (turn.opened or turn.brings_thought(words)):
            return turn.written(learnt) + turn.tail
    return until_end(tokenizer, whole[len(before) :]) if follows else None


def _turn_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the template puts after an answer's words to end it."""
    found = encode(tokenizer, turn_of(tokenizer).tail, before=INSIDE)
    special = set(tokenizer.all_special_ids)
    return [i for i in found if i in special] or found[-1:]


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: those after its words, and the tokenizer's end token."""
    eos = cast("int | None", tokenizer.eos_token_id)
    ends = _turn_ends(tokenizer)
    return list(dict.fromkeys([*ends, *([eos] if eos is not None else [])]))


def receipt(tokenizer: PreTrainedTokenizerBase, trees: Sequence[Node], n: int = 3) -> str:
    """The first `n` trees as text for a person, what carries loss between >>> and <<<."""
    lines: list[str] = []
    for i, tree in enumerate(trees[:n]):
        rows = list(tree.rows())
        for k, (ids, loss) in enumerate(rows):
            lines.append(f"row {i}, branch {k}: {len(ids)} tokens, {sum(loss)} with loss")
            lines.append("  " + _marked(tokenizer, ids, loss).replace("\n", "\n  "))
    return "\n".join(lines)


def _marked(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], loss: Sequence[bool]) -> str:
    text, start = "", 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or loss[i] != loss[start]:
            part = cast(str, tokenizer.decode(list(ids[start:i]), skip_special_tokens=False))
            text += f">>>{part}<<<" if loss[start] else part
            start = i
    return text


def check_receipt(
    tokenizer: PreTrainedTokenizerBase,
    trees: Sequence[Node],
    *,
    vocab: int | None = None,
    stops: Iterable[int] = (),
    ended: bool = False,
    where: str = "",
) -> None:
    """Raise InputError for masks and templates that would train the wrong thing.

    Args:
        trees: what will be trained on.
        vocab: rows of the model's embedding; ids beyond it mean a tokenizer of another model.
        stops: ids at which the model's own settings end an answer.
        ended: True where no answer needs an end, such as those that are only scored.

    A row without loss tokens, answers none of which ends with a trained stop token, and a template
    whose end of turn is not one of `stops` are errors.
    """
    stops = set(stops)
    ends = set(stop_ids(tokenizer))
    taught = set(_turn_ends(tokenizer))
    if stops and not stops & taught:
        raise InputError(
            "the chat template ends a turn with a token at which the model does not stop",
            where=where,
            seen=(tokens := tokenizer.convert_ids_to_tokens(sorted(taught))),
            fix=f"Let it stop there, by the model's name: NAME?end={tokens[-1]}; or use the "
            "tokenizer that belongs to the model",
        )
    for i, tree in enumerate(trees):
        for ids, loss in tree.rows():
            if not any(loss[1:]):
                raise InputError(
                    "no token of the row carries loss",
                    where=f"{where} row {i}".strip(),
                    seen=shorten(tokenizer.decode(list(ids))),
                    fix="Give it an answer, or leave the row out",
                )
            if vocab is not None:
                check_ids(ids, vocab, f"{where} row {i}".strip())
            ended = ended or (loss[-1] and ids[-1] in ends)
    if not ended:
        raise InputError(
            "no answer ends with a stop token that carries loss: the model would never stop",
            where=where,
            fix="Answers end with the template's end of turn (completion_ids with end=True)",
        )
