"""Judging by a model: single answers, pairs in both orders, panels of judges and their agreement.

A local model does not write its verdict: it is read from the log-probabilities of the options,
which on a small model say more than the words that it would sample,

    chance of an option = P(option | prompt) / sum over the options o of P(o | prompt)

(`core.generation.options`). A served model writes, and the last line that it was asked for is read
strictly: a reply that lacks it, or holds two that differ, is asked for again, then counted as
unparsed. It is never guessed.

Judges favour a place: of a pair, both orders are always asked, and their mean counts (position
bias: Judging LLM-as-a-Judge, arXiv 2306.05685). How strong the bias was is reported. A judge's own
changes are in force: edits, prefix and rewriter on a local one, on a served one its decoder, too.

A judge may be a panel (`core.modelfiles.panel`). Its members are asked one after the other, and its
verdict on an answer, of a pair on each order of it, is the mean of theirs, or 1 or 0 where more
than half of them decide so and else 0.5. What could not be read of a member is left out and warned
of. More than a fifth of all that a member was asked in a step is an error, once that is enough to
tell: without it the panel is another than was asked for. How far they agree is recorded with each
call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from statistics import fmean
from typing import cast

import torch

from truing.context import Json, current
from truing.core.generate import generate
from truing.core.generation.options import option_logps
from truing.core.journaled import kept
from truing.core.judging.agreement import Agreement, agreement
from truing.core.judging.judge_form import (
    ASK_GRADE,
    ASK_ONE,
    ASK_TWO,
    ONE,
    RATE_ONE,
    RATE_TWO,
    SCALE,
    TWO,
    Score,
    checked,
    parse_rating,
    parse_verdict,
    render,
    shown,
)
from truing.core.modelfiles.panel import Panel, Rule
from truing.errors import InputError
from truing.models import Model
from truing.tables import Row

TIE = 1e-5  # chances so near to one half are no preference
ATTEMPTS = 3  # replies asked for before a verdict counts as unparsed
CHUNK = 256  # prompts of a local judge that a kill can cost
WORDS = 1024  # tokens that a served judge may write
UNPARSED = 0.2  # beyond this share the numbers would be about the parser
LEAST = 20  # verdicts asked of a panel's member before that share says something of it
FIX = "Use a judge that follows the form, or a local one"


@dataclass(frozen=True)
class Comparison:
    """One judge's view of pairs.

    Args:
        shown_first: for each pair, the chance that ours is better, ours shown first; None where no
            verdict could be read.
        shown_second: the same with ours shown second.
        members: of a panel, the view of each judge.
        agreement: of their decisions.
        equal: places of the pairs of equal answers, a tie of which nothing was asked.
    """

    shown_first: list[Score]
    shown_second: list[Score]
    members: Mapping[str, Comparison] = field(default_factory=dict[str, "Comparison"])
    agreement: Agreement | None = None
    equal: frozenset[int] = frozenset()

    @cached_property
    def chances(self) -> list[Score]:
        """Chance that ours is better, the mean of both orders; None unless both were read."""
        return [
            None if a is None or b is None else (a + b) / 2
            for a, b in zip(self.shown_first, self.shown_second, strict=True)
        ]

    @property
    def decisions(self) -> list[Score]:
        """1 where ours is better, 0 where theirs is, 0.5 for neither."""
        return [decision(c) for c in self.chances]

    @property
    def unparsed(self) -> int:
        """Pairs without a verdict."""
        return sum(c is None for c in self.chances)

    def asked(self, of_all: Sequence[Score]) -> list[Score]:
        """What stands for the pairs that the judge was asked of, which tell how it judges."""
        return [one for i, one in enumerate(of_all) if i not in self.equal]

    @property
    def read(self) -> list[tuple[float, float]]:
        """Chances of the pairs that were asked of and read, ours shown first and second."""
        pairs = zip(self.asked(self.shown_first), self.asked(self.shown_second), strict=True)
        return [(a, b) for a, b in pairs if a is not None and b is not None]

    @property
    def position_bias(self) -> float:
        """Mean chance given to the answer shown first, less one half; 0 when order is nothing."""
        both = self.read
        return fmean((a + 1 - b) / 2 for a, b in both) - 0.5 if both else 0.0

    @property
    def consistent(self) -> float:
        """Share of pairs that get the same decision in both orders."""
        both = self.read
        return fmean(float(decision(a) == decision(b)) for a, b in both) if both else 0.0


def decision(chance: Score) -> Score:
    """1 above one half, 0 below, 0.5 within `TIE` of it; None stays None."""
    if chance is None:
        return None
    return 0.5 if abs(chance - 0.5) <= TIE else float(chance > 0.5)


def pointwise(judge: Model, rows: Sequence[Row], *, criteria: str = "") -> list[float]:
    """How good each answer is, in [0, 1].

    Args:
        judge: local: the probability of Yes against No; served: a rating from 1 to 5, rescaled.
        rows: with "prompt" and "completion".
        criteria: rules that a good answer keeps, such as `Principles.as_text()`.

    Unparsed replies are warned of, recorded, and stand at 0.5, as neither good nor bad; more than
    a fifth of them are an InputError. `rate` leaves them None.
    """
    return _filled(rate(judge, rows, criteria=criteria), judge)


def rate(
    judge: Model, rows: Sequence[Row], *, criteria: str = "", template: str = "", scale: int = 0
) -> list[Score]:
    """Like `pointwise`, with None for replies from which no rating could be read.

    Args:
        template: Jinja text in place of ours, over `prompt`, `completion` and `criteria`; what to
            reply is said after it.
        scale: asks for a number from 1 to it, at most 9 ("10" begins as "1" does); a local judge
            then gives the mean by the numbers' probabilities. 0 asks as `pointwise` does.
    """
    told = {"criteria": criteria, "template": template}
    if isinstance(judge.base, Panel):
        scores = _rated(judge, lambda one: rate(one, rows, **told, scale=scale))
    else:
        prompts = [
            render(template or ONE, prompt=shown(r), completion=r["completion"], criteria=criteria)
            for r in checked(rows)
        ]
        scores = _asked(judge, prompts, scale)
    current().metric(judge=judge.name, judged=len(rows), unparsed=scores.count(None))
    return scores


def _asked(judge: Model, prompts: Sequence[str], scale: int) -> list[Score]:
    """Scores of a single judge."""
    if judge.is_served:
        top = scale or SCALE
        parse = partial(parse_rating, top=top)
        return _written(judge, prompts, RATE_ONE.format(scale=top), parse)
    if scale:
        worth = {str(k): (k - 1) / (scale - 1) for k in range(1, scale + 1)}
        return _read(judge, prompts, ASK_GRADE.format(scale=scale), worth)
    return _read(judge, prompts, ASK_ONE, {"Yes": 1.0, "No": 0.0})


def compare(
    judge: Model, ours: Sequence[Row], theirs: Sequence[Row], *, criteria: str = ""
) -> Comparison:
    """Every pair in both orders; equal answers are a tie without asking.

    Args:
        judge: local: the probability of A against B; served: a verdict, A, B or a tie. One that
            prefers the same place in both orders decides for neither.
        ours: rows with "prompt" and "completion".
        theirs: answers to the same prompts, in order.
        criteria: rules that a good answer keeps, such as `Principles.as_text()`.

    Unparsed pairs are None there; `check_compared` refuses too many.
    """
    if len(ours) != len(theirs):
        raise InputError("the two sides differ in length", seen=(len(ours), len(theirs)))
    if isinstance(judge.base, Panel):
        made = _compared(judge, lambda one: compare(one, ours, theirs, criteria=criteria))
        return _recorded(judge, made)
    pairs = list(zip(checked(ours), checked(theirs), strict=True))
    asked = [i for i, (a, b) in enumerate(pairs) if a["completion"] != b["completion"]]
    prompts: list[str] = []
    for i in asked:
        for a, b in (pairs[i], pairs[i][::-1]):
            texts = {"first": a["completion"], "second": b["completion"], "criteria": criteria}
            prompts.append(render(TWO, prompt=shown(pairs[i][0]), **texts))
    if judge.is_served:
        chances = _written(judge, prompts, RATE_TWO, parse_verdict)
    else:
        chances = _read(judge, prompts, ASK_TWO, {"A": 1.0, "B": 0.0})
    first: list[Score] = [0.5] * len(pairs)
    second: list[Score] = [0.5] * len(pairs)
    for place, i in enumerate(asked):
        first[i], other = chances[2 * place], chances[2 * place + 1]
        second[i] = None if other is None else 1 - other
    equal = frozenset(range(len(pairs))) - {*asked}
    return _recorded(judge, Comparison(first, second, equal=equal))


def _recorded(judge: Model, made: Comparison) -> Comparison:
    current().metric(
        judge=judge.name,
        judged=len(made.chances) - len(made.equal),
        unparsed=made.unparsed,
        position_bias=made.position_bias,
        consistent=made.consistent,
    )
    return made


def writes(judge: Model) -> bool:
    """True where verdicts are written or voted: 1, 0.5 or 0, and no chances that have odds."""
    if isinstance(judge.base, Panel):
        return judge.base.rule == "majority" or any(map(writes, judge.base.judges.values()))
    return judge.is_served


def combined(verdicts: Sequence[Sequence[Score]], rule: Rule) -> list[Score]:
    """Verdict of a panel on each item, from those of its members, [member][item]."""
    combine = fmean if rule == "mean" else _majority
    read = ([s for s in column if s is not None] for column in zip(*verdicts, strict=True))
    return [combine(scores) if scores else None for scores in read]


def _majority(scores: Sequence[float]) -> float:
    decided = [decision(s) for s in scores]
    return next((v for v in (0.0, 1.0) if decided.count(v) * 2 > len(decided)), 0.5)


def agreed(judge: Model, by_judge: Mapping[str, Sequence[Score]]) -> Agreement:
    """Agreement of a panel's members in what they decide, recorded; each must have been read.

    Args:
        by_judge: verdicts of each member on the same items, None where none could be read.

    Warns of members that were not read everywhere; too many verdicts that one lacks in a step are
    an InputError.
    """
    unread: list[Json] = [scores.count(None) for scores in by_judge.values()]
    found = agreement([[decision(s) for s in scores] for scores in by_judge.values()])
    many = len(next(iter(by_judge.values())))
    how_far = {"raw_agreement": found.raw, "kappa": found.kappa}
    current().metric(panel=list(by_judge), asked=many, unread=unread, **how_far)
    _check_members(judge, list(by_judge))
    return found


def _check_members(judge: Model, names: list[str]) -> None:
    """Warn of a panel's members that were not read just now; raise where that is their rule."""
    told = [m for m in current().metrics if m.get("panel") == names]
    counts = [cast("list[int]", m["unread"]) for m in told]
    asked = sum(cast(int, m["asked"]) for m in told)
    for name, last, unread in zip(names, counts[-1], map(sum, zip(*counts, strict=True))):
        said = f"of its judge {name} no verdict could be read in {unread} of {asked} cases"
        check_unread(unread, asked, said, judge.name, least=LEAST)
        if last:
            warnings.warn(f"{judge.name}: {said}; there the others' count", stacklevel=5)


def _rated(judge: Model, ask: Callable[[Model], list[Score]]) -> list[Score]:
    """Scores of a panel."""
    panel = cast(Panel, judge.base)
    by_judge = {name: ask(one) for name, one in panel.judges.items()}
    agreed(judge, by_judge)
    return combined(list(by_judge.values()), panel.rule)


def _compared(judge: Model, ask: Callable[[Model], Comparison]) -> Comparison:
    """Verdicts of a panel on pairs: of a member, both orders count or none."""
    panel = cast(Panel, judge.base)
    members = {name: ask(one) for name, one in panel.judges.items()}
    sides: list[list[Score]] = []
    for side in ("shown_first", "shown_second"):
        read = [
            [None if c is None else s for s, c in zip(getattr(m, side), m.chances, strict=True)]
            for m in members.values()
        ]
        sides.append(combined(read, panel.rule))
    found = agreed(judge, {name: m.asked(m.decisions) for name, m in members.items()})
    equal = next(iter(members.values())).equal
    return Comparison(sides[0], sides[1], members, found, equal)


def _written(
    judge: Model, prompts: Sequence[str], how: str, parse: Callable[[str], Score]
) -> list[Score]:
    """Verdicts that a served judge writes: greedy at first, then drawn for those not read."""
    scores: list[Score] = [None] * len(prompts)
    for attempt in range(ATTEMPTS):
        left = [i for i, s in enumerate(scores) if s is None]
        if not left:
            break
        asked, greedy = [f"{prompts[i]}\n{how}" for i in left], attempt == 0
        drawn = generate(
            judge, asked, max_tokens=WORDS, greedy=greedy, temperature=0.7, seed=attempt
        )
        for i, items in zip(left, drawn, strict=True):
            scores[i] = parse(items[0].text)
    return scores


def _read(judge: Model, prompts: Sequence[str], how: str, worth: dict[str, float]) -> list[Score]:
    """Mean of what the options are worth, by their log-probabilities."""

    def read(some: Sequence[tuple[int, str]]) -> list[Score]:
        asked = [f"{p}\n{how}" for _, p in some]
        logp_NK = option_logps(judge, asked, tuple(worth), some[0][0])
        worth_K = torch.tensor(list(worth.values()), dtype=logp_NK.dtype)
        return (torch.softmax(logp_NK, 1) * worth_K).sum(1).tolist()

    return kept("judged", [judge.key, how, worth], list(enumerate(prompts, 1)), CHUNK, read)


def check_unread(
    unread: int, asked: int, told: str, where: str, fix: str = FIX, *, least: int = 0
) -> None:
    """Raise an InputError that says `told` where more than a fifth of verdicts were not read.

    Args:
        least: verdicts asked for before the share says something of the judge.
    """
    if asked >= least and unread > UNPARSED * asked:
        raise InputError(told, where=where, fix=fix)


def check_compared(made: Comparison, where: str) -> None:
    """The same of pairs: of those that the judge was asked of."""
    asked = len(made.chances) - len(made.equal)
    told = f"no verdict could be read of {made.unparsed} of {asked} pairs"
    check_unread(made.unparsed, asked, told, where)


def _filled(scores: Sequence[Score], judge: Model) -> list[float]:
    """Scores with 0.5 for the unparsed, of which there must be few."""
    unparsed, asked = scores.count(None), len(scores)
    if unparsed:
        told = f"no verdict could be read from {unparsed} of {asked} replies"
        check_unread(unparsed, asked, told, judge.name)
        warnings.warn(f"{judge.name}: {told}; they count as neither", stacklevel=3)
    return [0.5 if s is None else s for s in scores]
