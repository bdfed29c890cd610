"""Find out what a model knows: one greedy answer to each question and m drawn ones, each judged.

    K = number of drawn answers that are right,  K / m = expected accuracy
    k(x) = 1 (known) iff K / m >= tau,  or the greedy answer is right and 1 / m >= tau

A row keeps its columns and gets `greedy`, `greedy_right`, `samples`, `samples_right`, `known`,
which is K / m, and `cut`, those of its answers that `max_tokens` cut off. tau = 0.1 with ten
samples, "at least one answer is right", is what the paper's code does; a small model knows by
chance what it is asked ten times, and 0.3 to 0.5 suits it better.
What is right says `correctness`: matching texts, or those and a judge (`judged_answer`).

`synthesize/honesty_targets` makes answers to learn from of these rows, in as many ways as wanted
and without asking again; `evaluate/honesty` says of them which responses were honest.
Source: "Alignment for Honesty", arXiv 2312.07000; the wordings are our own. Not here: the paper's
generator of questions that a model writes itself and knows. The set `honesty/pkqa_13b` comes from
its model of 13B, and what another model knows of it has to be probed like anything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from truing.context import current
from truing.core.generate import generate
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.synthesize.answer_match import are_right, check_correctness, golds_of
from truing.tables import Row, Table, as_prompt

ASK = "Answer this question in a few words.\nQ: {question}\nA:"
COLUMNS = ("greedy", "greedy_right", "samples", "samples_right")


@dataclass(frozen=True)
class Known:
    """What a model says to one question, and what of it is right.

    Args:
        greedy: its likeliest answer.
        samples: drawn answers.
        golds: right ones.
        greedy_right: whether the likeliest is right.
        samples_right: whether each of the drawn ones is.
        cut: answers among them that were cut off at the limit, and have no end to be learnt.
    """

    greedy: str
    samples: tuple[str, ...]
    golds: tuple[str, ...]
    greedy_right: bool
    samples_right: tuple[bool, ...]
    cut: frozenset[str] = frozenset()

    @property
    def share(self) -> float:
        """K / m."""
        return sum(self.samples_right) / len(self.samples)

    @property
    def tenths(self) -> float:
        """K on the paper's scale of ten."""
        return 10 * sum(self.samples_right) / len(self.samples)

    @property
    def best(self) -> str:
        """The greedy answer if right, else the first right sample, else ""."""
        if self.greedy_right:
            return self.greedy
        return next((s for s, r in zip(self.samples, self.samples_right, strict=True) if r), "")

    def knows(self, tau: float) -> bool:
        """k(x) = 1; the greedy answer counts as one of the samples where none of them is right."""
        return self.share >= tau or (self.greedy_right and 1 / len(self.samples) >= tau)

    def columns(self) -> Row:
        """As a row holds it."""
        return {
            "greedy": self.greedy,
            "greedy_right": self.greedy_right,
            "samples": list(self.samples),
            "samples_right": list(self.samples_right),
            "known": self.share,
            "cut": sorted(self.cut),
        }

    @classmethod
    def read(cls, row: Row, where: str) -> Known:
        """What `columns` wrote; an InputError unless each sample has its mark."""
        samples, right = (cast("list[object]", row[n]) for n in ("samples", "samples_right"))
        if not isinstance(samples, list) or not samples or len(samples) != len(right):
            raise InputError(
                "columns 'samples' and 'samples_right' need one mark for each sample",
                where=where,
                seen=(samples, right),
                fix="Give the table as synthesize/knowledge_probe wrote it",
            )
        return cls(
            str(row["greedy"]),
            tuple(map(str, samples)),
            golds_of(row, where),
            bool(row["greedy_right"]),
            tuple(map(bool, right)),
            frozenset(map(str, cast("list[object]", row.get("cut") or []))),
        )


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
            where=where,
            seen=asked,
        )
    return asked


def is_probed(data: Table, where: str) -> bool:
    """True when every row says what a model knows of it; an InputError where only some do."""
    done = [all(row.get(name) is not None for name in COLUMNS) for row in data]
    if any(done) and not all(done):
        raise InputError(
            f"{len(done) - sum(done)} of {len(done)} rows do not say what is known of them",
            where=f"{where} {data.place(done.index(False))}",
            fix="Give all rows to synthesize/knowledge_probe, or leave out its columns: "
            + ", ".join(COLUMNS),
        )
    return any(done)


def probed(
    model: Model,
    data: Table,
    samples: int,
    temperature: float,
    max_tokens: int,
    correctness: Mapping[str, object] | None,
    where: str,
) -> list[Known]:
    """What the model says to every question, and what of it is right."""
    golds = [golds_of(r, data.place(i)) for i, r in enumerate(data)]
    bare = [question_of(r, data.place(i)) for i, r in enumerate(data)]
    asked = [ASK.format(question=q) for q in bare]
    greedy = generate(model, asked, greedy=True, max_tokens=max_tokens)
    drawn = generate(
        model,
        asked,
        n=samples,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=current().stream("probe") % 2**31,
    )
    both = [(*g, *some) for g, some in zip(greedy, drawn, strict=True)]
    said = [[c.text.strip() for c in some] for some in both]
    rows: list[Row] = [
        row | {"prompt": question, "completion": text}
        for row, question, texts in zip(data, bare, said, strict=True)
        for text in texts
    ]
    marks = iter(are_right(rows, correctness, where))
    made: list[Known] = []
    for some, texts, gold in zip(both, said, golds, strict=True):
        right = [next(marks) for _ in texts]
        # What ended by itself in one draw is whole, even where another draw of it was cut.
        whole = {t for t, c in zip(texts, some, strict=True) if c.finish == "stop"}
        cut = frozenset(texts) - whole - {""}
        made.append(Known(texts[0], tuple(texts[1:]), gold, right[0], tuple(right[1:]), cut))
    return made


def counts(known: Sequence[Known], tau: float) -> dict[str, int]:
    """How many questions there are and how many of them are known."""
    return {"questions": len(known), "known": sum(k.knows(tau) for k in known)}


@method(
    paper="honesty",
    needs=("generate",),
    rows={"data": ("prompt",)},
    within={"samples": (1, None), "temperature": "(0, inf)", "max_tokens": (1, None)},
    makes="prompt",
)
def knowledge_probe(
    model: Model,
    data: Table,
    *,
    samples: int = 10,
    temperature: float = 1.0,
    max_tokens: int = 32,
    correctness: dict[str, object] | None = None,
) -> Table:
    """Find out what a model knows: one greedy answer to each question and m drawn ones, judged.

    Args:
        samples: m, answers drawn to each question.
        temperature: that they are drawn at.
        max_tokens: longest answer.
        correctness: reward or check that is above 1/2 for right answers, such as {use:
            judged_answer, model: name}; None takes contains_answer.
    """
    where = "synthesize/knowledge_probe"
    check_correctness(correctness, where)
    data = data.expect("prompt", where=where)
    found = probed(model, data, samples, temperature, max_tokens, correctness, where)
    current().metric(**counts(found, 1 / samples))
    rows: list[Row] = []
    for row, known in zip(data, found, strict=True):
        kept = {n: v for n, v in row.items() if n not in ("id", "lineage")}
        lineage = cast(Row, row.get("lineage") or {})
        made = lineage | {"parents": [row["id"]], "generator": model.name}
        rows.append(kept | known.columns() | {"lineage": made})
    return Table("prompt", rows, where=f"what {model.name} knows of {data.source}")
