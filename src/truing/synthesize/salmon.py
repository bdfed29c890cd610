"""Preference pairs under drawn principles, each principle judged by a model's own odds.

    s_12 = log P(A) - log P(B), y_1 shown as A;   s_21 = log P(B) - log P(A), y_2 shown as A
    S_d = (s_12 + s_21) / (2 v_d) where both have one sign, else 0;   v_d = variance of d's s

Above 0 speaks for y_1. The model answers each prompt twice, and a judge compares the two under one
principle d at a time, in both orders, without sampling. Then, in each of several passes, m
principles are drawn (m geometric, drawn again above `most`), each turned into its `negative` with
probability 1/2 and S_d with it. The one with the largest |S_d| decides; a pair whose largest is 0
is skipped. A row holds the drawn sentences as `principles`, as train/salmon reads them.

Rules come before the principles: of two answers the one in the prompt's language, none if neither
is; with probability 1/2 the one without "As an AI language model". Labels are flipped with
probability `noise`, those by a rule with `rule_noise`.

Source: "SALMON: Self-Alignment with Instructable Reward Models", arXiv 2310.05910; the division by
the variance is its code's. Differences: the judge's chat template and our wording ask for A or B; a
judge that is served, or a panel that votes, gives no odds, so its verdicts 1, 0 and -1 stand for
them; prompts too long for the judge are an error, not cut; a principle without a `negative` is
never turned; sides are not swapped, since a pair has none. Small judges favour a place:
`consistent` reports the share of S that are not 0.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from truing.context import Json, current
from truing.core.generate import generate
from truing.core.judge import compare, writes
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.principles import Principle, Principles
from truing.synthesize.salmon_labels import (
    Decided,
    Odds,
    Shown,
    agreed,
    dominant,
    drawn,
    log_odds,
    ruled,
)
from truing.tables import Row, Table, as_prompt, content_hash, user_text

WHERE = "synthesize/salmon"
CHUNK = 64  # prompts, or pairs under one principle, of a journal entry: what a kill can cost


@dataclass(frozen=True)
class Two:
    """Two answers to one prompt, each with whether it came to its end."""

    prompt: Row
    texts: tuple[str, str]
    finished: tuple[bool, bool]


def _answered(model: Model, prompts: Table, n: int, draw: dict[str, float]) -> list[Two]:
    """n pairs of answers to every prompt."""
    context = current()

    def name(start: int, chunk: Sequence[Row]) -> str:
        asked = [r["prompt"] for r in chunk]
        return content_hash([model.key, n, draw, context.seed, start, asked], 8)

    def make(start: int, chunk: Sequence[Row]) -> Json:
        found = generate(
            model,
            [r["prompt"] for r in chunk],
            n=2 * n,
            max_tokens=int(draw["max_tokens"]),
            temperature=draw["temperature"],
            seed=context.stream(f"answers/{name(start, chunk)}"),
        )
        return [[[c.text.strip(), c.finish == "stop"] for c in items] for items in found]

    rows = [as_prompt(r) for r in prompts]
    made: list[Two] = []
    for chunk, found in context.chunks("answers", rows, CHUNK, name, make, "pairs of answers"):
        for row, items in zip(chunk, cast("list[list[tuple[str, bool]]]", found), strict=True):
            for (a, a_end), (b, b_end) in zip(items[::2], items[1::2], strict=True):
                made.append(Two(row, (a, b), (a_end, b_end)))
    return made


def _judged(judge: Model, pairs: Sequence[Two], principle: Principle) -> list[Odds]:
    """(s_12, s_21) of every pair under one principle."""

    def name(_: int, chunk: Sequence[Two]) -> str:
        asked = [[two.prompt["prompt"], *two.texts] for two in chunk]
        return content_hash([judge.key, principle.text, asked], 8)

    def make(_: int, chunk: Sequence[Two]) -> Json:
        ours, theirs = (
            [{"prompt": t.prompt["prompt"], "completion": t.texts[i]} for t in chunk]
            for i in (0, 1)
        )
        found = compare(judge, ours, theirs, criteria=principle.text)
        both = zip(found.shown_first, found.shown_second, strict=True)
        return cast(Json, [[log_odds(c, written=writes(judge)) for c in p] for p in both])

    label = f"pairs judged by {principle.id}"
    found = current().chunks("odds", pairs, CHUNK, name, make, label)
    return [(a, b) for _, odds in found for a, b in cast("list[Odds]", odds)]


def pair_row(two: Two, decided: Decided, shown: Shown, facts: Row, flip: bool) -> Row:
    """A pair under the principles shown, with the lineage that `truing why` reads."""
    first = (decided.sign > 0) != flip
    chosen, rejected = (0, 1) if first else (1, 0)
    lineage = facts | {
        "prompt": two.prompt["id"],
        "parents": [two.prompt["id"]],
        "principle": decided.principle,
        "negated": [p.id for p, negated in shown if negated],
        "rule": decided.rule,
        "flipped": flip,
    }
    return {
        "prompt": two.prompt["prompt"],
        "chosen": two.texts[chosen],
        "rejected": two.texts[rejected],
        "chosen_finished": two.finished[chosen],
        "rejected_finished": two.finished[rejected],
        "principles": [p.negative if negated else p.text for p, negated in shown],
        "principle": decided.principle,
        "lineage": lineage,
    }


def _labelled(
    pairs: Sequence[Two],
    principles: Principles,
    odds: Mapping[str, Sequence[Odds]],
    turn: int,
    how_many: tuple[float, int],
    noise: tuple[float, float],
) -> list[Row]:
    """The rows of one pass: each pair under principles of its own draw."""
    scores = {id: agreed(found) for id, found in odds.items()}
    rows: list[Row] = []
    for i, two in enumerate(pairs):
        source = random.Random(current().stream(f"principles/{turn}/{i}"))
        shown = drawn(list(principles), source, *how_many)
        decided = dominant({id: found[i] for id, found in scores.items()}, shown)
        if decided.sign:
            decided = ruled(user_text(two.prompt["prompt"]), two.texts, decided, source)
        flip = source.random() < noise[bool(decided.rule)]
        if decided.sign:
            facts: Row = {"odds": {p.id: list(odds[p.id][i]) for p, _ in shown}}
            facts["scores"] = {p.id: scores[p.id][i] for p, _ in shown}
            rows.append(pair_row(two, decided, shown, facts, flip))
    return rows


def _check(shares: Mapping[str, float], counts: tuple[int, int, int]) -> None:
    """Raise InputError for shares and for n, passes and most that make no sense."""
    for name, value in shares.items():
        if not 0 <= value < 1 or (name == "rate" and not value):
            raise InputError("is a share below 1", where=f"{WHERE} setting {name!r}", seen=value)
    if min(counts) < 1:
        raise InputError("must be at least 1", where=f"{WHERE} n, passes, most", seen=counts)


@method(
    paper="salmon",
    needs=("generate",),
    rows={"prompts": ("prompt",)},
    within={
        "n": (1, None),
        "max_tokens": (1, None),
        "temperature": "(0, inf)",
        "least_characters": (0, None),
        "passes": (1, None),
        "rate": "(0, 1)",
        "most": (1, None),
        "noise": "[0, 1)",
        "rule_noise": "[0, 1)",
    },
    makes="pair",
)
def salmon(
    model: Model,
    prompts: Table,
    principles: Principles,
    judge: Model | None = None,
    *,
    n: int = 1,
    max_tokens: int = 128,
    temperature: float = 0.7,
    least_characters: int = 16,
    passes: int = 4,
    rate: float = 0.2,
    most: int = 8,
    noise: float = 0.1,
    rule_noise: float = 0.25,
) -> Table:
    """Preference pairs under drawn principles, each principle judged by a model's own odds.

    Args:
        n: pairs of answers drawn for each prompt.
        max_tokens: length limit of an answer; the paper's is 768.
        temperature: of sampling.
        least_characters: pairs with a shorter answer are left out.
        passes: times that principles are drawn for each pair.
        rate: of the geometric distribution of how many are drawn; its mean is 1 / rate.
        most: principles drawn at once.
        noise: share of labels that are flipped.
        rule_noise: share of labels by a rule that are flipped.
    """
    _check({"rate": rate, "noise": noise, "rule_noise": rule_noise}, (n, passes, most))
    prompts = prompts.expect("prompt", where=WHERE)
    context, judge = current(), judge or model
    draw = {"max_tokens": float(max_tokens), "temperature": temperature}
    answered = _answered(model, prompts, n, draw)
    pairs = [
        t
        for t in answered
        if min(map(len, t.texts)) >= least_characters and t.texts[0] != t.texts[1]
    ]
    odds = {p.id: _judged(judge, pairs, p) for p in principles}
    rows: list[Row] = []
    for turn in range(passes):
        rows += _labelled(pairs, principles, odds, turn, (rate, most), (noise, rule_noise))
    scores = [s for found in odds.values() for s in agreed(found)]
    share = sum(s != 0 for s in scores) / max(1, len(scores))
    context.metric(drawn=len(answered), pairs=len(pairs), consistent=share, rows=len(rows))
    if not rows:
        raise InputError(
            f"no principle tells the two answers to any of {len(prompts)} prompts apart in both "
            f"orders; {len(answered) - len(pairs)} of {len(answered)} pairs were too short or same",
            where=WHERE,
            fix="Use a better judge, more prompts or pairs (n), or longer answers (max_tokens)",
        )
    told = {"generator": model.key, "judge": judge.key, "seed": context.seed, "step": context.name}
    return Table("pair", rows, where="salmon").with_lineage(**told)
