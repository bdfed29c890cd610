"""Reward answers by a judge, a language model that is local or behind an address.

    r(x, y) = the judge's rating of y, in [0, 1]

`core.judge` asks. A local judge is read by its log-probabilities: of Yes against No, or with a
scale of K the mean of the numbers k by their probabilities, (k - 1) / (K - 1). A served one writes
a rating from 1 to K (5), which is read strictly and asked for three times. Replies are kept on the
disk, repeated, run together and kept within a budget by `core.client`.

A rating that cannot be read is never guessed, and nothing may be learnt from it: such an answer
gets the mean of those to the same prompt that were read, so that by this reward it has no advantage
in its group and does not stand out among n; 0.5 where none was read. `judged` and `unparsed` are
recorded with each call, and a step whose first call brings nothing that can be read says so. Where
over a fifth of a step's ratings, of 20 or more, cannot be read, that is an InputError: the judge
does not follow the form.

`judged_against` compares with a reference instead, such as the answer that an online method's row
brings along:

    R(x, y; y*) = mean over both orders of 1, 0 or -1: y better, neither, y* better
    R(x, y*; y*) = 0

It is GRAO's reward. The paper's judge prints `1 > 2`, `1 = 2` or `1 < 2`; here `core.judge` asks,
whose replies are `Verdict: A`, `tie` or `B`, or a local judge's chances of A and B. An order of
which no verdict can be read counts 0 (our choice).

A key for the address is that of its host in the environment, else TRUING_API_KEY. A name and
password in the address itself are refused, since settings are recorded.

Sources: G-Eval, arXiv 2303.16634, for ratings weighed by their probabilities; "Learning to Align,
Aligning to Learn", arXiv 2508.07750, for the comparison and its two criteria. Our own prompts.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from statistics import fmean
from typing import Literal, cast

from truing.context import current
from truing.core.judge import (
    FIX,
    LEAST,
    Comparison,
    Score,
    check_unread,
    compare,
    decision,
    rate,
)
from truing.core.opening import open_model
from truing.core.private import without_login
from truing.core.trainer import distributed
from truing.errors import InputError
from truing.method import component
from truing.models import Model, held, named
from truing.naming import ModelKey, found_at
from truing.own_checks import checks
from truing.tables import Row, content_hash

WHERE = "reward judged setting 'model'"
AGAINST = "reward judged_against"
# What makes the better answer, by the name of the criterion.
CRITERIA = {
    "helpful": "The better answer is more helpful: it is accurate, efficient, and adds value.",
    "harmless": "The better answer is more harmless: it keeps within ethical and safety guidelines "
    "and respects privacy.",
}


def judge_of(model: str, where: str = WHERE) -> Model:
    """The judge that a setting names, a held model's key or an address; no server is asked.

    Args:
        where: what errors name.
    """
    if model.startswith(("http://", "https://")):
        bare = without_login(model)
        if bare != model:
            raise InputError(
                "settings are recorded, so an address may hold no name and password",
                where=where,
                seen=bare,
                fix="Put the server's key into TRUING_API_KEY",
            )
        return open_model(model)
    if not any(named(model)) and found_at(model) is None:
        raise InputError(
            "no judge of that key is at hand",
            where=where,
            seen=model,
            fix="Give its address, http://host/v1#name, or in Python the key that "
            "truing.models.hold(Model.open(judge)) returns; a saved model brings its judge along",
        )
    found = held(model)  # one that is damaged says so itself
    if not isinstance(found, Model) or "generate" not in found.can:
        raise InputError(
            "is not a model that can judge",
            where=where,
            seen=model,
            fix="Give a language model, local or served",
        )
    return found


def filled(scores: Sequence[Score], prompts: Sequence[Hashable]) -> list[float]:
    """Scores with the mean of the same prompt's in place of None; 0.5 where it has none."""
    read: dict[Hashable, list[float]] = defaultdict(list)
    for value, prompt in zip(scores, prompts, strict=True):
        if value is not None:
            read[prompt].append(value)
    means = {prompt: fmean(values) for prompt, values in read.items()}
    return [
        means.get(prompt, 0.5) if value is None else value
        for value, prompt in zip(scores, prompts, strict=True)
    ]


def check_read(judge: Model, lacks: str, of: str, where: str, fix: str) -> None:
    """Raise InputError when too much of what this step asked of the judge could not be read.

    Of too little to say so, a warning where it is all that was asked so far.

    Args:
        lacks: what could not be done, such as "score could be read for"; of: what of.
    """
    told = [m for m in current().metrics if m.get("judge") == judge.name]
    asked, unread = (sum(cast(int, m[name]) for m in told) for name in ("judged", "unparsed"))
    said = f"no {lacks} {unread} of {asked} {of}"
    check_unread(unread, asked, said, f"{where} {judge.name}", fix, least=LEAST)
    if len(told) == 1 and asked and unread == asked and distributed.leads():
        print(
            f"{where}: warning: {said} of {judge.name}, which tells no answer from another. {fix}",
            file=sys.stderr,
        )


def _check(settings: Mapping[str, object]) -> None:
    """What `core.judging.rewards` asks before anything is drawn."""
    judge_of(str(settings["model"]))


@component("reward")
@checks(_check)
def judged(
    rows: list[Row],
    *,
    model: ModelKey,
    criteria: str = "",
    scale: Literal[0, 2, 3, 4, 5, 6, 7, 8, 9] = 0,
) -> list[float]:
    """How good a judge, local or served, finds each answer, in [0, 1].

    Args:
        model: name of the judge, its address, such as http://host/v1#name, or in Python its key,
            as `truing.models.hold` gives it.
        criteria: rules that a good answer keeps; "" leaves them to the judge.
        scale: rate from 1 to this; 0 is Yes or No for a local judge, 1 to 5 for a served one.
    """
    if not rows:
        return []
    judge = judge_of(model)
    scores = rate(judge, rows, criteria=criteria, scale=scale)
    check_read(judge, "rating could be read from", "replies", "reward judged", FIX)
    return filled(scores, [content_hash(row["prompt"]) for row in rows])


def verdicts(made: Comparison) -> list[float]:
    """R of each pair: the mean over both orders of 1, 0 and -1; 0 where none could be read."""
    orders = zip(made.shown_first, made.shown_second, strict=True)
    return [
        fmean(2 * d - 1 if (d := decision(c)) is not None else 0.0 for c in both) for both in orders
    ]


def _check_against(settings: Mapping[str, object]) -> None:
    """What `core.judging.rewards` asks before anything is drawn."""
    judge_of(str(settings["model"]), f"{AGAINST} setting 'model'")


@component("reward")
@checks(_check_against)
def judged_against(
    rows: list[Row], *, model: ModelKey, criterion: str = "helpful", column: str = "given"
) -> list[float]:
    """Whether a judge prefers each answer to a reference: 1, 0 or -1, the mean of both orders.

    Args:
        model: name of the judge, its address, such as http://host/v1#name, or in Python its key,
            as `truing.models.hold` gives it.
        criterion: helpful, harmless, or in words what makes the better answer.
        column: of the reference; online methods give the row's own answer as `given`.
    """
    if not rows:
        return []
    for i, row in enumerate(rows, 1):
        if not isinstance(row.get(column), str):
            raise InputError(
                f"needs a reference answer in column {column!r}",
                where=f"{AGAINST} row {i}",
                seen=row.get(column),
                fix="Give rows with a completion, or name the column of the references",
            )
    judge = judge_of(model, f"{AGAINST} setting 'model'")
    theirs: list[Row] = [{**row, "completion": row[column]} for row in rows]
    made = compare(judge, rows, theirs, criteria=CRITERIA.get(criterion, criterion))
    check_read(judge, "verdict could be read of", "pairs", AGAINST, FIX)
    return verdicts(made)
