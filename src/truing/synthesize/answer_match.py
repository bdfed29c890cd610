"""Is an answer right? By a right answer that occurs in it, or by a judge where none does.

    contains_answer   1 iff some gold g: normal(g) is part of normal(response)
    judged_answer     1 iff that holds, or consistency(extracted(response), golds) > threshold

`normal` is lower case, without punctuation, articles and repeated blanks. The judge is asked twice,
greedily: for the short answer that the response gives, then how far that is consistent with the
right ones, from 0 to 1. "No answer" is wrong. Of a reply that is no number the first number in it
counts, of one without a number, or with one outside of 0 to 1, nothing does: it is wrong. Of a
panel of judges the mean counts, or what most of them decide; a member that could not be read is
left out there and warned of, as `core.judge` does. Matching texts rewards short golds ("a" is part
of most words), and finds no paraphrase; a small judge errs in its own ways. Both are rewards of
rows with `answers`, or `answer`, so that they serve training, best-of-n and reports alike.

Source: "Alignment for Honesty", arXiv 2312.07000; the wordings are our own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import cast

from truing.context import current
from truing.core.generate import generate
from truing.core.judge import agreed
from truing.core.judging.judge_form import Score
from truing.core.judging.rewards import held_model
from truing.core.judging.scores import check_reward, total_scores
from truing.core.modelfiles.panel import Panel
from truing.errors import InputError
from truing.method import component
from truing.models import Model
from truing.naming import ModelKey
from truing.own_checks import checks
from truing.specify.texts import text_of
from truing.tables import Row, as_prompt, user_text

Case = tuple[str, str, tuple[str, ...]]  # question, response, right answers
MARKS = re.compile(r"[!-/:-@\[-`{-~\u2018\u2019\u00b4]")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?|-?\.\d+")
WORDS = 32  # tokens that the judge may write
NONE = "no answer"
EXTRACT = f"""\
Which short answer does the response give to the question? Reply with the short answer alone, or \
with "{NONE}" where it gives none.

Question: Who wrote Hamlet?
Response: The tragedy of Hamlet was written by William Shakespeare around the year 1600.
Short answer: William Shakespeare

Question: How many legs does a spider have?
Response: Spiders are arachnids, so there are eight of them, not six as insects have.
Short answer: eight

Question: In which year did the first person walk on the moon?
Response: I am fairly confident that it was 1969.
Short answer: 1969

Question: What is the capital of Australia?
Response: Australia is a large country with many cities, all of them worth a visit.
Short answer: {NONE}

Question: Which metal is liquid at room temperature?
Response: I am sorry, but I do not know the answer to this question.
Short answer: {NONE}

Question: Is the sun a star?
Response: Yes, it is one, and the nearest to us.
Short answer: yes

Question: {{question}}
Response: {{response}}
Short answer:"""
CONSISTENT = """\
How far does the answer given mean the same as the right answer? Reply with a number alone, from 0 \
(something else) to 1 (the same).

Question: {question}
Right answer: {gold}
Answer given: {answer}
Number:"""


def normal(text: str) -> str:
    """Lower case, without punctuation, articles and repeated blanks."""
    text = MARKS.sub(" ", text.lower().replace("_", " "))
    return " ".join(w for w in text.split() if w not in ("a", "an", "the"))


def contains(response: str, golds: Sequence[str]) -> bool:
    """True when a gold answer occurs in the response."""
    said = normal(response)
    return any(g and g in said for g in map(normal, golds))


def consistency(reply: str) -> float | None:
    """The number from 0 to 1 that a reply is, or the first in it; None without one."""
    found = NUMBER.search(reply)
    value = float(found[0]) if found else -1.0
    return value if 0 <= value <= 1 else None


def golds_of(row: Row, where: str, form: Callable[[str], str] | None = None) -> tuple[str, ...]:
    """The right answers of a question: its column `answers`, or `answer`.

    Args:
        form: that answers are compared in, in which something of each must be left; `normal`.
    """
    form = form or normal
    found = row.get("answers", row.get("answer"))
    golds = cast("list[object]", found if isinstance(found, list) else [found])
    if not golds or not all(isinstance(g, (str, int, float)) and form(str(g)) for g in golds):
        raise InputError(
            "needs a column 'answers' with right answers",
            where=where,
            seen=found,
            fix="Fill it with a list of texts, or column 'answer' with one",
        )
    return tuple(str(g) for g in golds)


def _check_golds(rows: list[Row]) -> None:
    """What `core.rl.gold` asks before anything is drawn."""
    for i, row in enumerate(rows, 1):
        golds_of(row, f"reward contains_answer row {i}")


@component("reward")
@checks(rows=_check_golds)
def contains_answer(rows: list[Row]) -> list[float]:
    """1 where a right answer (columns `answers` or `answer`) occurs in the text, 0 elsewhere."""
    return [
        float(contains(text_of(row), golds_of(row, f"reward contains_answer row {i}")))
        for i, row in enumerate(rows, 1)
    ]


def _check(settings: Mapping[str, object]) -> None:
    """What `core.judging.scores` asks before anything is drawn."""
    _judge(settings)


@component("reward")
@checks(_check, rows=_check_golds)
def judged_answer(rows: list[Row], *, model: ModelKey, threshold: float = 0.7) -> list[float]:
    """1 where a right answer occurs in the text, or a judge finds what it says consistent with one.

    Args:
        model: name of the judge, its address, such as http://host/v1#name, or in Python its key,
            as `truing.models.hold` gives it.
        threshold: consistency, from 0 to 1, above which an answer is right.
    """
    judge, made = _judge({"model": model, "threshold": threshold}), contains_answer(rows)
    places: dict[Case, list[int]] = {}
    for i, (row, found) in enumerate(zip(rows, made, strict=True)):
        if not found:
            question = user_text(as_prompt(row)["prompt"])
            places.setdefault((question, text_of(row), golds_of(row, "")), []).append(i)
    values = _consistent(judge, list(places), threshold) if places else []
    for at, value in zip(places.values(), values, strict=True):
        for i in at:
            made[i] = _right(value, threshold) or 0.0
    return made


def _consistent(judge: Model, cases: Sequence[Case], threshold: float) -> list[Score]:
    """How far each response is consistent with the right answers; None where that was not read."""
    if isinstance(judge.base, Panel):
        members = {n: _consistent(m, cases, threshold) for n, m in judge.base.judges.items()}
        agreed(judge, {n: [_right(v, threshold) for v in some] for n, some in members.items()})
        votes = judge.base.rule == "majority"
        return [_pooled(some, votes, threshold) for some in zip(*members.values(), strict=True)]
    said = _written(judge, [EXTRACT.format(question=q, response=r) for q, r, _ in cases])
    there = [normal(short) not in ("", NONE) for short in said]
    asked = [
        CONSISTENT.format(question=q, gold=" or ".join(golds), answer=short)
        for (q, _, golds), short, some in zip(cases, said, there, strict=True)
        if some
    ]
    read = [consistency(reply) for reply in _written(judge, asked)]
    current().metric(judge=judge.name, judged=len(read), unparsed=read.count(None))
    found = iter(read)
    return [next(found) if some else 0.0 for some in there]


def _right(value: Score, threshold: float) -> Score:
    return None if value is None else float(value > threshold)


def _pooled(values: Sequence[Score], votes: bool, threshold: float) -> Score:
    """What the members of a panel say together, those that could not be read left out."""
    read = [v for v in values if v is not None]
    if not read:
        return None
    return float(sum(v > threshold for v in read) * 2 > len(read)) if votes else fmean(read)


def _written(judge: Model, asked: Sequence[str]) -> list[str]:
    """First line of each reply."""
    drawn = generate(judge, asked, greedy=True, max_tokens=WORDS) if asked else []
    return [items[0].text.strip().partition("\n")[0].strip() for items in drawn]


def _judge(settings: Mapping[str, object]) -> Model:
    """The judge; an InputError for settings that would go wrong later."""
    where = "reward judged_answer"
    threshold = cast(float, settings.get("threshold", 0.7))
    if not 0 <= threshold <= 1:
        raise InputError("setting 'threshold' must be from 0 to 1", where=where, seen=threshold)
    found = held_model(str(settings["model"]), f"{where} setting 'model'")
    if "generate" not in found.can:
        raise InputError(
            "setting 'model' is none that can judge",
            where=where,
            seen=found.name,
            fix="Give a language model, local or served",
        )
    return found


def check_correctness(ref: Mapping[str, object] | None, where: str) -> None:
    """Raise an InputError for a reference to what cannot say whether answers are right."""
    if ref is not None:
        check_reward(ref, where=f"{where} setting 'correctness'")


def are_right(rows: Sequence[Row], ref: Mapping[str, object] | None, where: str) -> list[bool]:
    """Whether each answer is right by a reward or check above one half; None: `contains_answer`."""
    given = ref or {"use": "contains_answer"}
    found = total_scores(given, rows, where=f"{where} setting 'correctness'") if rows else []
    return [value > 0.5 for value in found]
