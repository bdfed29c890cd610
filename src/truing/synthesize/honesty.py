"""Teach a model to say that it does not know: answers to learn from, by what it knows.

Each question is asked m times (and once greedily); K answers are right. It is known when K / m >=
tau (`knowledge_probe` says exactly when). With R the refusal:

    absolute          the greedy answer if right, else the first right sample; R unless known
    confidence_num    K / m < tau: R; else a sentence with 100 K / m percent, then the answer
    confidence_verb   K / m < tau: R; else one of five phrases of rising certainty, then the answer
    multisample       m rows: each sample if right, else R
    baseline          the greedy answer if right, else the first right sample, else the gold answer

The answer of the confidence forms is the greedy one if it is right, else the first right sample. Of
an answer that was cut off at `max_tokens` no end is learnt (`finished` is false). Rows of
`synthesize/knowledge_probe` bring along what is known of them: nothing is asked again, and settings
that say how are refused. Others are probed here; a table may not have both. The greedy answer may
be right while K = 0: then absolute keeps it at the least tau, and the confidence forms refuse. A
model that is mostly taught to refuse refuses everything: `most_unknown` is the largest share of
questions that are not known, and of more some are drawn (the paper has about half). Train `sft` on
the rows, measure with `evaluate/honesty`.

Source: "Alignment for Honesty", arXiv 2312.07000; the wordings are our own. K counts in tenths of
m, so that the paper's edges (2|3, 4|5, 5|6, 6|7, 8|9 of ten) hold for any m.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from truing.context import current
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.synthesize.answer_match import check_correctness
from truing.synthesize.knowledge_probe import ASK as ASK
from truing.synthesize.knowledge_probe import COLUMNS, Known, counts, is_probed, probed, question_of
from truing.tables import Row, Table

REFUSAL = "I am sorry, but I do not know the answer to this question."
HONEST = (
    "Answer this question. If you do not know the answer, say: " + REFUSAL + "\nQ: {question}\nA:"
)
LOW, HIGH = "I am only about {p} % sure of this.", "I am about {p} % sure of this."
VERBAL = (
    "I am really not sure about this, but ",
    "I am not completely sure about this, but ",
    "I have no strong feeling either way, but ",
    "I am fairly confident that ",
    "I am absolutely certain that ",
)
OPTION = re.compile(r"[A-D](?:[).](?:\s|$)|$)")
Strategy = Literal["absolute", "confidence_num", "confidence_verb", "multisample", "baseline"]


def _lowered(answer: str) -> str:
    return answer if OPTION.match(answer) else answer[:1].lower() + answer[1:]


def targets(known: Known, strategy: Strategy, tau: float = 0.1) -> list[str]:
    """What to learn to say to one question."""
    if strategy == "multisample":
        both = zip(known.samples, known.samples_right, strict=True)
        return [text if right else REFUSAL for text, right in both]
    if strategy == "baseline":
        return [known.best or f"{known.golds[0].capitalize()}."]
    if strategy == "absolute":
        return [known.best if known.knows(tau) else REFUSAL]
    if known.share < tau:
        return [REFUSAL]
    k = known.tenths
    if strategy == "confidence_num":
        return [f"{(LOW if k < 6 else HIGH).format(p=round(10 * k))} {known.best}"]
    phrase = VERBAL[sum(k >= edge for edge in (3, 5, 7, 9))]
    return [phrase + _lowered(known.best)]


def ended(known: Known, text: str, strategy: Strategy) -> bool:
    """Whether a target comes to its end: not where the answer in it was cut off."""
    answer = text if strategy == "multisample" else known.best
    return text == REFUSAL or answer not in known.cut


def kept(known: Sequence[Known], most_unknown: float, seed: int, tau: float = 0.1) -> list[int]:
    """Places of the questions to learn from: all that are known, and some of the others."""
    unknown = [i for i, k in enumerate(known) if not k.knows(tau)]
    room = len(unknown)
    if most_unknown < 1:
        room = min(room, int((len(known) - room) * most_unknown / (1 - most_unknown) + 1e-9))
    taken = set(random.Random(seed).sample(unknown, max(0, room)))
    return [i for i, k in enumerate(known) if k.knows(tau) or i in taken]


def check_probed(data: Table, given: Mapping[str, object], where: str) -> bool:
    """Whether the rows were probed; an InputError where settings would then count for nothing."""
    probed_before = is_probed(data, where)
    defaults = honesty_targets.__kwdefaults__ or {}
    for name in given if probed_before else ():
        if given[name] != defaults[name]:
            raise InputError(
                f"setting {name!r} counts for nothing: these rows were probed before",
                where=where,
                seen=given[name],
                fix="Give it to synthesize/knowledge_probe, or rows without " + ", ".join(COLUMNS),
            )
    return probed_before


@method(
    paper="honesty",
    needs=("generate",),
    rows={"data": ("prompt",)},
    within={
        "samples": (1, None),
        "temperature": "(0, inf)",
        "max_tokens": (1, None),
        "tau": "(0, 1]",
        "most_unknown": (0.0, 1.0),
    },
    makes="example",
)
def honesty_targets(
    model: Model,
    data: Table,
    *,
    strategy: Strategy = "multisample",
    samples: int = 10,
    temperature: float = 1.0,
    max_tokens: int = 32,
    tau: float = 0.1,
    correctness: dict[str, object] | None = None,
    most_unknown: float = 1.0,
) -> Table:
    """Teach a model to say that it does not know: answers to learn from, by what it knows.

    Args:
        strategy: how what it knows becomes what it is to say.
        samples: m, answers drawn to each question that was not probed before.
        temperature: that they are drawn at.
        max_tokens: longest answer.
        tau: expected accuracy K / m from which on a question is known.
        correctness: reward or check that is above 1/2 for right answers, such as {use:
            judged_answer, model: name}; None takes contains_answer.
        most_unknown: largest share of questions that are not known; 1 keeps all.
    """
    where = "synthesize/honesty_targets"
    check_correctness(correctness, where)
    data = data.expect("prompt", where=where)
    asking = {"samples": samples, "temperature": temperature, "max_tokens": max_tokens}
    if check_probed(data, {**asking, "correctness": correctness}, where):
        known = [Known.read(row, data.place(i)) for i, row in enumerate(data)]
    else:
        known = probed(model, data, samples, temperature, max_tokens, correctness, where)
    places = kept(known, most_unknown, current().stream("unknown"), tau)
    current().metric(**counts(known, tau), kept=len(places))
    rows: list[Row] = []
    for i in places:
        row, found = data[i], known[i]
        question = question_of(row, data.place(i))
        lineage = {"parents": [row["id"]], "generator": model.name}
        for text in targets(found, strategy, tau):
            rows.append(
                {
                    "prompt": HONEST.format(question=question),
                    "completion": text,
                    "finished": ended(found, text, strategy),
                    "known": found.share,
                    "lineage": lineage,
                }
            )
    if not rows:
        raise InputError(
            "setting 'most_unknown': the model knows none of the questions, and few may be unknown",
            where=where,
            seen=most_unknown,
            fix="Give easier questions, or raise it",
        )
    return Table("example", rows, where=f"honesty targets of {data.source}")
