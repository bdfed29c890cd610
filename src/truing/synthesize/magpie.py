"""Instructions from nothing: an aligned chat model completes an empty user turn.

The chat template is rendered up to the marker that opens a user message, and nothing after it (the
pre-query); what the model writes next is an instruction. Sampling stops at a control token of the
template and at the first newline (many models begin to answer after it); what follows the word
"assistant" is cut, since the model has then run into the next header. With `respond` the model also
answers, greedily, and `turns` > 1 repeats both on the growing dialogue.
Magpie: Alignment Data Synthesis from Scratch, arXiv 2406.08464.

Differences: an instruction cut off by the length limit is dropped (the paper's limit is 2,048
tokens, ours is smaller), as are answers without an end, and texts that end in ":", which the paper
drops in its filter. Its variant that bans marks of headings as the first token is left out.
Duplicates, tags and filters are steps of their own: select/near_duplicates,
synthesize/magpie_tags, select/magpie_filter; preference data, the best against the worst of several
answers by a reward, is synthesize/objective_pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

from truing.context import Json, current
from truing.core.chat import chat_text
from truing.core.drawing import continued
from truing.core.generate import generate
from truing.core.sampling import SamplingSettings
from truing.errors import InputError
from truing.method import method
from truing.models import Loaded, Model
from truing.synthesize.magpie_text import clean, keep
from truing.tables import Message, Row, Table, content_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 128  # instructions per journal entry
GROUP = 16  # dialogues per journal entry
_MARK = "\u241ftruing\u241f"  # stands for the user's words while the template is cut
FOLLOW_UP = (
    "This is a conversation of several rounds. The user asks follow-up questions that build on "
    "what was said before."
)


def pre_query(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message] = ()) -> str:
    """The template up to and including the marker that opens the next user message.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        messages: what comes before, such as a system message or earlier turns.
    """
    dialogue = [*messages, {"role": "user", "content": _MARK}]
    rendered = chat_text(tokenizer, dialogue, answer=False)
    head, found, _ = rendered.partition(_MARK)
    if not found:
        raise InputError(
            "the chat template does not show the user's message as written",
            where="synthesize/magpie",
            fix="Take a model whose template places the user's words after a fixed marker",
        )
    return head


def _continue(
    loaded: Loaded,
    heads: Sequence[str],
    n: int,
    draw: dict[str, float],
    stops: Sequence[str],
    seed: int,
) -> list[list[tuple[str, bool]]]:
    """n continuations of each head as (text, whether it ended by itself)."""
    # The template already holds the start token: no special tokens are added.
    ids = [cast(list[int], loaded.tokenizer.encode(h, add_special_tokens=False)) for h in heads]
    sampling = SamplingSettings(
        n=n,
        max_tokens=int(draw["max_tokens"]),
        temperature=draw["temperature"],
        top_p=draw["top_p"],
        stop=tuple(stops),
        seed=seed,
        first_temperature=draw["flaming"],
    )
    drawn = continued(loaded, ids, sampling)
    return [[(c.text, c.finish == "stop") for c in items] for items in drawn]


def _drawn(
    model: Model,
    loaded: Loaded,
    head: str,
    n: int,
    draw: dict[str, float],
    stops: Sequence[str],
) -> Iterator[tuple[str, bool]]:
    """`n` continuations of one head, from the journal where they are there."""
    context = current()
    drawn_as = content_hash([model.key, head, draw, list(stops), n, context.seed], 8)

    def name(start: int, _: Sequence[int]) -> str:
        return f"{drawn_as}/{start}"

    def make(start: int, chunk: Sequence[int]) -> Json:
        seed = context.stream(f"instructions/{start}")
        return cast(Json, _continue(loaded, [head], len(chunk), draw, stops, seed)[0])

    for _, made in context.chunks("instructions", range(n), CHUNK, name, make, "instructions"):
        yield from cast("list[tuple[str, bool]]", made)


def _answers(model: Model, prompts: Sequence[object], max_tokens: int) -> list[str]:
    """Greedy answers; "" where the answer has no end, since small models loop."""
    drawn = generate(model, list(prompts), n=1, max_tokens=max_tokens, greedy=True, seed=0)
    return [d[0].text.strip() if d[0].finish == "stop" else "" for d in drawn]


@method(
    paper="magpie",
    needs=("generate", "weights"),
    within={
        "n": (1, None),
        "temperature": "(0, inf)",
        "top_p": "(0, 1]",
        "max_tokens": (1, None),
        "flaming": "(0, inf)",
        "min_words": (0, None),
        "response_tokens": (1, None),
        "turns": (1, None),
    },
    makes={"prompt": {"respond": False, "turns": 1}, "example": {}},
)
def magpie(
    model: Model,
    *,
    n: int = 200,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_tokens: int = 128,
    system: str = "",
    one_line: bool = True,
    flaming: float = 1.0,
    sanitiser: bool = False,
    min_words: int = 1,
    respond: bool = False,
    response_tokens: int = 256,
    turns: int = 1,
) -> Table:
    """Instructions from nothing: an aligned chat model completes an empty user turn.

    Args:
        n: continuations to sample; fewer instructions remain.
        temperature: of sampling; the released sets mix 1.0 to 1.25.
        top_p: nucleus of sampling.
        max_tokens: length limit of an instruction.
        system: a system message that steers the domain of what is asked; "" leaves the template's
            own. Neither answers nor rows have it.
        one_line: stop at the first newline; turn it off for code.
        flaming: divides the logits of the first token; the paper uses 1.2.
        sanitiser: clean instructions that leak labels or answers by the paper's rules.
        min_words: drop shorter instructions; empty ones are dropped in any case.
        respond: answer each instruction greedily, which makes rows of kind example.
        response_tokens: length limit of an answer.
        turns: rounds of a dialogue; more than 1 answers each and gives rows with messages.
    """
    loaded = model.load_module()
    context = current()
    lead: list[Message] = [{"role": "system", "content": system}] if system else []
    head = pre_query(loaded.tokenizer, lead)
    stops = ("\n", "assistant", "Assistant") if one_line else ("assistant", "Assistant")
    sampling = {"temperature": temperature, "top_p": top_p, "flaming": flaming}
    draw = {"max_tokens": float(max_tokens), **sampling}
    texts: list[str] = []
    for text, finished in _drawn(model, loaded, head, n, draw, stops):
        text = clean(text, one_line=one_line, rules=sanitiser)
        if keep(text, finished, min_words):
            texts.append(text)
    dialogues: list[list[Message]] = [[{"role": "user", "content": t}] for t in texts]
    if respond or turns > 1:
        dialogues = _dialogues(model, loaded, dialogues, turns, draw, stops, response_tokens)
    facts = {
        "generator": model.key,
        "seed": context.seed,
        "step": context.name,
        "pre_query": head,
        "sampling": sampling,
    }
    rows = [_row(d, turns) for d in dialogues]
    kind = "prompt" if not (respond or turns > 1) else "example"
    return Table(kind, rows, where="magpie").with_lineage(**facts)


def _row(dialogue: list[Message], turns: int) -> Row:
    """What was said, without the line that steers questions: no answer has seen it."""
    if turns > 1:
        return {"messages": dialogue}
    row: Row = {"prompt": dialogue[0]["content"]}
    if len(dialogue) > 1:
        row["completion"] = dialogue[1]["content"]
    return row


def _asked_on(
    loaded: Loaded,
    dialogues: Sequence[list[Message]],
    draw: dict[str, float],
    stops: Sequence[str],
    seed: int,
) -> list[list[Message]]:
    """The dialogues with the user's next question, without those whose question fails.

    It is drawn under a system message that announces several rounds, which no answer sees.
    """
    announced: Message = {"role": "system", "content": FOLLOW_UP}
    heads = [pre_query(loaded.tokenizer, [announced, *d]) for d in dialogues]
    drawn = [d[0] for d in _continue(loaded, heads, 1, draw, stops, seed)]
    asked = [clean(t, one_line="\n" in stops, rules=False) for t, _ in drawn]
    return [
        [*d, {"role": "user", "content": text}]
        for d, text, (_, finished) in zip(dialogues, asked, drawn, strict=True)
        if text and finished
    ]


def _dialogues(
    model: Model,
    loaded: Loaded,
    dialogues: list[list[Message]],
    turns: int,
    draw: dict[str, float],
    stops: Sequence[str],
    response_tokens: int,
) -> list[list[Message]]:
    """Dialogues of `turns` rounds; one whose answer or next question fails is dropped."""
    context = current()
    for turn in range(turns):

        def name(_: int, group: Sequence[list[Message]], turn: int = turn) -> str:
            return f"{turn}/{content_hash([model.key, list(group), draw, response_tokens], 8)}"

        def make(start: int, group: Sequence[list[Message]], turn: int = turn) -> Json:
            if turn > 0:
                seed = context.stream(f"turn/{turn}/{start}")
                group = _asked_on(loaded, group, draw, stops, seed)
            texts = _answers(model, group, response_tokens) if group else []
            both = zip(group, texts, strict=True)
            return cast(Json, [[*d, {"role": "assistant", "content": t}] for d, t in both if t])

        label = f"answers, round {turn + 1}"
        found = context.chunks("dialogues", dialogues, GROUP, name, make, label)
        dialogues = [d for _, said in found for d in cast("list[list[Message]]", said)]
    return dialogues
