"""URPO: one model answers and grades; pairs, sums and open requests train it in one GRPO loop.

    reasoning   rows with `answer`: reward 1 where the final number is the gold one, else 0
    referee     rows with `completions` and `scores`: the model grades N candidates in a drawn
                order; reward (tau + 1) / 2, tau = (concordant - discordant) / (N (N - 1) / 2);
                0 where no N scores can be read
    open        other rows: the answers are graded by the same weights as they are now, in chunks of
                `chunk`, shuffled, the mean of `grades` gradings; no gradient reaches the grading
    A = (R - mean_g) / (std_g + 1e-4),  then GRPO's clipped loss                  arXiv 2507.17515

The table's own mix of rows is the mix of the pools; begin with a table without open rows where the
referee is still a random one. An open group whose grading cannot be read, or does not fit, is asked
once more, then left out and counted. Differences, the paper's code not being public: candidates are
shuffled once for each visit to a row, not for each answer, so that a group shares its prompt; the
score is read from text alone; a chunk of one answer joins the one before it. Weights and mix are
ours.

Shapes: U groups, K answers.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import cast

from truing.core.advantages import group_advantage
from truing.core.chat import Prompt
from truing.core.collect import Pool, Say
from truing.core.objective import Loss, Measurements
from truing.core.online import (
    Update,
    by_answer,
    clip_fraction,
    clipped,
    kl_loss,
    online,
    watched,
    weighed,
)  # fmt: skip
from truing.core.referee import kendall, read_scores, referee_prompt
from truing.method import component
from truing.tables import Row, user_text
from truing.train.reward.rules import numeric_answer

REASONING, REFEREE, OPEN = 0, 1, 2


def sort_of(row: Row) -> int:
    """Which pool a row belongs to."""
    if row.get("answer") is not None:
        return REASONING
    return REFEREE if row.get("completions") and row.get("scores") else OPEN


def chunks(n: int, size: int) -> list[range]:
    """0 .. n - 1 in runs of at most `size`; a last one of one joins the run before it."""
    cuts = [range(a, min(a + size, n)) for a in range(0, n, size)]
    if len(cuts) > 1 and len(cuts[-1]) == 1:
        cuts[-2:] = [range(cuts[-2].start, n)]
    return cuts


class Players:
    """How rows of the three pools are asked and rewarded."""

    def __init__(self, grades: int, chunk: int, criteria: str) -> None:
        self.grades, self.chunk, self.criteria = grades, chunk, criteria

    def sort(self, row: Row) -> int:
        """See `sort_of`."""
        return sort_of(row)

    def prompt(self, row: Row, seed: int) -> tuple[Prompt, Row]:
        """The row's own prompt, or the referee's, with the gold scores in its order."""
        if sort_of(row) != REFEREE:
            return cast(Prompt, row["prompt"]), {}
        texts, gold = cast("list[str]", row["completions"]), cast("list[float]", row["scores"])
        order = random.Random(seed).sample(range(len(texts)), len(texts))
        shown = referee_prompt(user_text(row["prompt"]), [texts[i] for i in order], self.criteria)
        return shown, {"gold": [gold[i] for i in order]}

    def score(
        self, groups: Sequence[Sequence[Row]], seed: int, say: Say
    ) -> list[list[float] | None]:
        """Rewards of each group's answers."""
        opens = {u: rows for u, rows in enumerate(groups) if sort_of(rows[0]) == OPEN}
        graded = self._graded(opens, seed, say) if opens else {}
        made: list[list[float] | None] = []
        for u, rows in enumerate(groups):
            if u in graded:
                made.append(graded[u])
            elif sort_of(rows[0]) == REASONING:
                made.append(numeric_answer(list(rows)))
            else:
                made.append([self._agreement(row) for row in rows])
        return made

    def _agreement(self, row: Row) -> float:
        gold = cast("list[float]", row["gold"])
        found = read_scores(str(row["completion"]), len(gold))
        return 0.0 if found is None else (kendall(found, gold) + 1) / 2

    def _graded(
        self, groups: Mapping[int, Sequence[Row]], seed: int, say: Say
    ) -> dict[int, list[float] | None]:
        """Mean score of each answer; None for a group with a grading that cannot be read twice."""
        places: list[tuple[int, list[int]]] = []
        prompts: list[Prompt] = []
        for u, rows in groups.items():
            source = random.Random(f"{seed}/{u}")
            for _ in range(self.grades):
                order = source.sample(range(len(rows)), len(rows))
                for run in chunks(len(rows), self.chunk):
                    some = [order[i] for i in run]
                    texts = [str(rows[i]["completion"]) for i in some]
                    places.append((u, some))
                    asked = user_text(rows[0]["prompt"])
                    prompts.append(referee_prompt(asked, texts, self.criteria))
        total: dict[int, list[float] | None] = {u: [0.0] * len(r) for u, r in groups.items()}
        scores = _scores(say, prompts, [len(some) for _, some in places])
        for (u, some), found in zip(places, scores, strict=True):
            sums = total[u]
            if sums is None or found is None:
                total[u] = None
                continue
            for i, value in zip(some, found, strict=True):
                sums[i] += value / self.grades
        return total


def _scores(say: Say, prompts: Sequence[Prompt], counts: Sequence[int]) -> list[list[float] | None]:
    """What the referee says to each prompt; those that cannot be read are asked once more."""
    found: list[list[float] | None] = [None] * len(prompts)
    for _ in range(2):
        left = [i for i, scores in enumerate(found) if scores is None]
        if left:
            for i, (text, *_) in zip(left, say([prompts[i] for i in left], 1), strict=True):
                found[i] = read_scores(text, counts[i])
    return found


@component("pool", name="urpo")
def players(*, grades: int = 1, chunk: int = 4, criteria: str = "") -> Pool:
    """Rows of three pools: sums, candidates to be graded, open requests graded by the model."""
    return Players(grades, chunk, criteria)


@online(paper="urpo", needs=("ref_logp",), least=2, pools="urpo")
def urpo(
    r: Measurements,
    *,
    beta: float = 0.001,
    clip_ratio: float = 0.2,
    grades: int = 1,
    chunk: int = 4,
    criteria: str = "",
) -> Update:
    """URPO: one model answers and grades, in one GRPO loop over three pools of rows.

    Args:
        beta: strength of the pull towards the reference (k3, in the loss); 0 does without one.
        grades: gradings of each open group, each in an order of its own.
        chunk: most answers that are graded together.
        criteria: what a good answer is, as the referee is told.
        data: rows with `answer` are sums, those with `completions` and `scores` candidates to be
            graded, all others open requests.
    """

    def loss(m: Measurements) -> Loss:
        per_UKT = clipped(m, clip_ratio, clip_ratio)
        if beta:
            per_UKT = per_UKT + beta * kl_loss(m)
        fraction_UK = clip_fraction(m, clip_ratio, clip_ratio)
        return watched(by_answer(per_UKT, m), clip_fraction=fraction_UK)

    update = weighed(group_advantage(r["reward"], r.there_UK), loss, beta=beta)
    for name, sort in (("reasoning", REASONING), ("referee", REFEREE), ("open", OPEN)):
        cast("dict[str, object]", update.metrics)[name] = r["reward"][r["sort"] == sort]
    return update
