"""Teach a model to say that it does not know: answers to learn from, by what it knows.

Each question is asked m times (and once greedily); K answers are right. With R the refusal:

    absolute          the greedy answer if right, else the first right sample, else R
    confidence_num    K = 0: R; else a sentence with 10 K / (m / 10) percent, then the answer
    confidence_verb   K = 0: R; else one of five phrases of rising certainty, then the answer
    multisample       m rows: each sample if right, else R
    baseline          as absolute, with the gold answer in place of R

The answer of the confidence forms is the greedy one if it is right, else the first right sample.
Right means that a gold answer occurs in the response, both without case, punctuation and articles.
The greedy answer may be right while K = 0: then absolute keeps it and the confidence forms refuse.
A model that is mostly taught to refuse refuses everything: `most_unknown` is the largest share of
questions with K = 0, and of more some are drawn (the paper has about half). Train `sft` on the
rows, measure with `evaluate/honesty`.

Source: "Alignment for Honesty", arXiv 2312.07000; the wordings are our own. K counts in tenths of
m, so that the paper's edges (2|3, 4|5, 5|6, 6|7, 8|9 of ten) hold for any m.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from truing.context import current
from truing.core.generate import generate
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.tables import Row, Table, as_prompt

REFUSAL = "I am sorry, but I do not know the answer to this question."
ASK = "Answer this question in a few words.\nQ: {question}\nA:"
HONEST = (
    "Answer this question. If you do not know the answer, say: " + REFUSAL + "\nQ: {question}\nA:"
)
MARKS = re.compile(r"[!-/:-@\[-`{-~\u2018\u2019\u00b4]")
LOW, HIGH = "I am only about {p} % sure of this.", "I am about {p} % sure of this."
VERBAL = (
    "I am really not sure about this, but ",
    "I am not completely sure about this, but ",
    "I have no strong feeling either way, but ",
    "I am fairly confident that ",
    "I am absolutely certain that ",
)
OPTION = re.compile(r"[A-D][).]?(\s|$)")
Strategy = Literal["absolute", "confidence_num", "confidence_verb", "multisample", "baseline"]


def normal(text: str) -> str:
    """Lower case, without punctuation, articles and repeated blanks."""
    text = MARKS.sub(" ", text.lower().replace("_", " "))
    return " ".join(w for w in text.split() if w not in ("a", "an", "the"))


def correct(response: str, golds: Sequence[str]) -> bool:
    """True when a gold answer occurs in the response."""
    said = normal(response)
    return any(g and g in said for g in map(normal, golds))


@dataclass(frozen=True)
class Known:
    """What a model says to one question.

    Args:
        greedy: its likeliest answer.
        samples: drawn answers.
        golds: right ones.
    """

    greedy: str
    samples: tuple[str, ...]
    golds: tuple[str, ...]

    @property
    def right(self) -> list[str]:
        """Samples that are right."""
        return [s for s in self.samples if correct(s, self.golds)]

    @property
    def tenths(self) -> float:
        """K on the paper's scale of ten."""
        return 10 * len(self.right) / len(self.samples)

    @property
    def best(self) -> str:
        """The greedy answer if right, else the first right sample, else ""."""
        if correct(self.greedy, self.golds):
            return self.greedy
        return self.right[0] if self.right else ""


def _lowered(answer: str) -> str:
    return answer if OPTION.match(answer) else answer[:1].lower() + answer[1:]


def targets(known: Known, strategy: Strategy) -> list[str]:
    """What to learn to say to one question."""
    if strategy == "multisample":
        return [s if correct(s, known.golds) else REFUSAL for s in known.samples]
    if strategy == "baseline":
        return [known.best or f"{known.golds[0].capitalize()}."]
    if strategy == "absolute":
        return [known.best or REFUSAL]
    k = known.tenths
    if k == 0:
        return [REFUSAL]
    if strategy == "confidence_num":
        return [f"{(LOW if k < 6 else HIGH).format(p=round(10 * k))} {known.best}"]
    phrase = VERBAL[sum(k >= edge for edge in (3, 5, 7, 9))]
    return [phrase + _lowered(known.best)]


def golds_of(row: Row, where: str, form: Callable[[str], str] | None = None) -> tuple[str, ...]:
    """The right answers of a question: its column `answers`, or `answer`.

    Args:
        form: that answers are compared in, in which something of each must be left; `normal`.
    """
    form = form or normal
    found = row.get("answers", row.get("answer"))
    golds = cast("list[object]", found if isinstance(found, list) else [found])
    if not golds or not all(isinstance(g, (str, int, float)) and form(str(g)) for g in golds):
        raise InputError("needs a column 'answers' with right answers", where=where, seen=found)
    return tuple(str(g) for g in golds)


def question_of(row: Row, where: str) -> str:
    """The question of a row: its prompt, or its only message.

    Raises:
        InputError: none, or a dialogue, which does not fit into the wordings of a question.
    """
    asked = as_prompt(row)["prompt"] if "prompt" in row or "messages" in row else None
    messages = cast("list[Row]", asked) if isinstance(asked, list) else []
    if len(messages) == 1 and messages[0].get("role") == "user":
        asked = messages[0].get("content")
    if not isinstance(asked, str):
        raise InputError(
            "a question is a prompt that is a text, or one message of a user",
            where=where, seen=asked,
        )  # fmt: skip
    return asked


def probed(
    model: Model, data: Table, samples: int, temperature: float, max_tokens: int
) -> list[Known]:
    """What the model says to every question."""
    golds = [golds_of(r, data.place(i)) for i, r in enumerate(data)]
    asked = [ASK.format(question=question_of(r, data.place(i))) for i, r in enumerate(data)]
    greedy = generate(model, asked, greedy=True, max_tokens=max_tokens)
    drawn = generate(
        model, asked, n=samples, temperature=temperature, max_tokens=max_tokens,
        seed=current().stream("probe") % 2**31,
    )  # fmt: skip
    return [
        Known(g[0].text.strip(), tuple(c.text.strip() for c in some), gold)
        for g, some, gold in zip(greedy, drawn, golds, strict=True)
    ]


def kept(known: Sequence[Known], most_unknown: float, seed: int) -> list[int]:
    """Places of the questions to learn from: all with a right sample, and some of the others."""
    unknown = [i for i, k in enumerate(known) if not k.right]
    room = len(unknown)
    if most_unknown < 1:
        room = min(room, int((len(known) - room) * most_unknown / (1 - most_unknown) + 1e-9))
    taken = set(random.Random(seed).sample(unknown, max(0, room)))
    return [i for i, k in enumerate(known) if k.right or i in taken]


@method(
    paper="honesty",
    needs=("generate",),
    rows={"data": ("prompt",)},
    within={
        "samples": (1, None), "temperature": "(0, inf)", "max_tokens": (1, None),
        "most_unknown": (0.0, 1.0),
    },
    makes="example",
)  # fmt: skip
def honesty_targets(
    model: Model,
    data: Table,
    *,
    strategy: Strategy = "multisample",
    samples: int = 10,
    temperature: float = 1.0,
    max_tokens: int = 32,
    most_unknown: float = 1.0,
) -> Table:
    """Teach a model to say that it does not know: answers to learn from, by what it knows.

    Args:
        strategy: how what it knows becomes what it is to say.
        samples: m, answers drawn to each question.
        temperature: that they are drawn at.
        max_tokens: longest answer.
        most_unknown: largest share of questions of which no sample is right; 1 keeps all.
    """
    data = data.expect("prompt", where="synthesize/honesty_targets")
    known = probed(model, data, samples, temperature, max_tokens)
    places = kept(known, most_unknown, current().stream("unknown"))
    current().metric(
        questions=len(known), known=sum(bool(k.right) for k in known), kept=len(places)
    )
    rows: list[Row] = []
    for i in places:
        row, found = data[i], known[i]
        question = question_of(row, data.place(i))
        lineage = {"parents": [row["id"]], "generator": model.name}
        for text in targets(found, strategy):
            rows.append(
                {
                    "prompt": HONEST.format(question=question),
                    "completion": text,
                    "known": found.tenths / 10,
                    "lineage": lineage,
                }
            )
    if not rows:
        raise InputError(
            "setting 'most_unknown': the model knows none of the questions, and few may be unknown",
            where="synthesize/honesty_targets", seen=most_unknown,
        )  # fmt: skip
    return Table("example", rows, where=f"honesty targets of {data.source}")
