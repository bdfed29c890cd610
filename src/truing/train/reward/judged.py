"""Reward answers by a judge, a language model that is local or behind an address.

    r(x, y) = the judge's rating of y, in [0, 1]

`core.judge` asks. A local judge is read by its log-probabilities: of Yes against No, or with a
scale of K the mean of the numbers k by their probabilities, (k - 1) / (K - 1). A served one writes
a rating from 1 to K (5), which is read strictly and asked for three times. Replies are kept on the
disk, repeated, run together and kept within a budget by `core.client`.

A rating that cannot be read is never guessed, and nothing may be learnt from it: such an answer
gets the mean of those to the same prompt that were read, so that by this reward it has no advantage
in its group and does not stand out among n; 0.5 where none was read. `judged` and `unparsed` are
recorded with each call. Where over a fifth of a step's ratings, of 20 or more, cannot be read, that
is an InputError: the judge does not follow the form.

A key for the address is taken from TRUING_API_KEY. A name and password in the address itself are
refused, since settings are recorded.

Source: G-Eval, arXiv 2303.16634, for ratings weighed by their probabilities; our own prompt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from statistics import fmean
from typing import Literal, cast

from truing.context import current
from truing.core.judge import UNPARSED, Score, rate
from truing.core.private import without_login
from truing.errors import InputError
from truing.method import component
from truing.models import Model, held, named
from truing.naming import ModelKey, found_at
from truing.tables import Row, content_hash

LEAST = 20  # ratings before their unread share says something of the judge
WHERE = "reward judged setting 'model'"


def judge_of(model: str) -> Model:
    """The judge that a setting names, a held model's key or an address; no server is asked."""
    if model.startswith(("http://", "https://")):
        bare = without_login(model)
        if bare != model:
            raise InputError(
                "settings are recorded, so an address may hold no name and password",
                where=WHERE,
                seen=bare,
                fix="Put the server's key into TRUING_API_KEY",
            )
        return Model.open(model)
    if not any(named(model)) and found_at(model) is None:
        raise InputError(
            "no judge of that key is at hand",
            where=WHERE,
            seen=model,
            fix="Give its address, http://host/v1#name, or in Python the key that "
            "truing.models.hold(Model.open(judge)) returns; a saved model brings its judge along",
        )
    found = held(model)  # one that is damaged says so itself
    if not isinstance(found, Model) or "generate" not in found.can:
        raise InputError("is not a model that can judge", where=WHERE, seen=model)
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

    Args:
        lacks: what could not be done, such as "score could be read for"; of: what of.
    """
    told = [m for m in current().metrics if m.get("judge") == judge.name]
    asked, unread = (sum(cast(int, m[name]) for m in told) for name in ("judged", "unparsed"))
    if asked >= LEAST and unread > UNPARSED * asked:
        raise InputError(
            f"no {lacks} {unread} of {asked} {of}", where=f"{where} {judge.name}", fix=fix
        )


@component("reward")
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
    fix = "Use a judge that follows the form, or a local one"
    check_read(judge, "rating could be read from", "replies", "reward judged", fix)
    return filled(scores, [content_hash(row["prompt"]) for row in rows])


def _check(settings: Mapping[str, object]) -> None:
    """What `core.rewards` asks before anything is drawn."""
    judge_of(str(settings["model"]))


judged.__dict__["__truing_check__"] = _check
