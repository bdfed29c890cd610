"""URPO: one model answers and grades; pairs, sums and open requests train it in one GRPO loop.

    reasoning   rows with `answer`: reward 1 where the final number is the gold one, else 0
    referee     rows with `completions` and `scores`: the model grades N candidates in a drawn
                order; reward (tau + 1) / 2, tau = (concordant - discordant) / (N (N - 1) / 2);
                0 where no N scores from 1 to 10 can be read, which is counted as `unread`
    open        other rows: the answers are graded by the same weights as they are now, in chunks of
                `chunk`, shuffled, the mean of `grades` gradings; no gradient reaches the grading
    A = (R - mean_g) / (std_g + 1e-4),  then GRPO's clipped loss                  arXiv 2507.17515

The table's own mix of rows is the mix of the pools. Begin with a table without open rows where the
referee is still a random one: evaluate/referee_accuracy says on held-out rows when it is none any
more, and the reward `referee` lets the trained model grade for other methods. An open group whose
grading cannot be read, or does not fit, is asked once more, then left out and counted; so are rows
of a single candidate or of equal scores, which no order can be learnt from. Differences, the
paper's code not being public: candidates are shuffled once for each visit to a row, not for each
answer, so that a group shares its prompt; the score is read from text alone; a chunk of one answer
joins the one before it, and no answers are graded in two chunks to make their scales comparable;
the warm-up does not end by itself. Weights and mix are ours.

Shapes: U groups, K answers.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import cast

from truing.core.chat import Prompt
from truing.core.judging.judge_form import shown
from truing.core.judging.referee import (
    graded,
    kendall,
    ranked,
    read_scores,
    referee_prompt,
    unranked,
)
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
)
from truing.core.rl.advantages import group_advantage
from truing.core.rl.collect import Pool, Say
from truing.errors import InputError
from truing.method import component
from truing.tables import Row
from truing.train.reward.rules import gold_number, numeric_answer

REASONING, REFEREE, OPEN = 0, 1, 2
RANKED = ("completions", "scores")  # columns that make a row the referee's


def sort_of(row: Row) -> int:
    """Which pool a row belongs to."""
    if row.get("answer") is not None:
        return REASONING
    return REFEREE if all(row.get(n) for n in RANKED) else OPEN


class Players:
    """How rows of the three pools are asked and rewarded."""

    def __init__(self, grades: int, chunk: int, criteria: str) -> None:
        self.grades, self.chunk, self.criteria = grades, chunk, criteria

    def check(self, row: Row) -> str:
        """See `Pool.check`."""
        sort = sort_of(row)
        if sort == REASONING:
            try:
                gold_number(row, "answer", "")
            except InputError as error:
                error.fix = "Give a number; rows of the other pools have no value there"
                raise
        given = [n for n in RANKED if row.get(n)]
        if sort == OPEN and given:
            raise InputError(
                f"column {given[0]!r} is there alone",
                seen=row[given[0]],
                fix=f"Candidates to be graded have both of {', '.join(RANKED)}, open requests none",
            )
        return unranked(*ranked(row)) if sort == REFEREE else ""

    def facts(self, row: Row) -> dict[str, float]:
        """The number of the row's pool, and 1 where its referee's scores cannot be read."""
        sort = sort_of(row)
        unread = sort == REFEREE and self._read(row) is None
        return {"sort": float(sort), "unread": float(unread)}

    def prompt(self, row: Row, seed: int) -> tuple[Prompt, Row]:
        """The row's own prompt, or the referee's, with the gold scores in its order."""
        if sort_of(row) != REFEREE:
            return cast(Prompt, row["prompt"]), {}
        texts, gold = ranked(row)
        order = random.Random(seed).sample(range(len(texts)), len(texts))
        asked = referee_prompt(shown(row), [texts[i] for i in order], self.criteria)
        return asked, {"gold": [gold[i] for i in order]}

    def score(
        self, groups: Sequence[Sequence[Row]], seed: int, say: Say
    ) -> list[list[float] | None]:
        """Rewards of each group's answers."""
        opens = {u: rows for u, rows in enumerate(groups) if sort_of(rows[0]) == OPEN}
        found = self._graded(opens, seed, say) if opens else {}
        made: list[list[float] | None] = []
        for u, rows in enumerate(groups):
            if u in found:
                made.append(found[u])
            elif sort_of(rows[0]) == REASONING:
                made.append(numeric_answer(list(rows)))
            else:
                made.append([self._agreement(row) for row in rows])
        return made

    def _read(self, row: Row) -> list[float] | None:
        return read_scores(str(row["completion"]), len(cast("list[float]", row["gold"])))

    def _agreement(self, row: Row) -> float:
        found = self._read(row)
        return 0.0 if found is None else (kendall(found, cast("list[float]", row["gold"])) + 1) / 2

    def _graded(
        self, groups: Mapping[int, Sequence[Row]], seed: int, say: Say
    ) -> dict[int, list[float] | None]:
        """Mean score of each answer; None for a group with a grading that cannot be read twice."""
        asked = [
            (shown(rows[0]), [str(row["completion"]) for row in rows]) for rows in groups.values()
        ]
        made = graded(
            asked,
            lambda prompts: [text for text, *_ in say(prompts, 1)],
            [random.Random(f"{seed}/{u}") for u in groups],
            grades=self.grades,
            chunk=self.chunk,
            criteria=self.criteria,
        )
        return dict(zip(groups, made, strict=True))


@component("pool", name="urpo")
def players(*, grades: int = 1, chunk: int = 4, criteria: str = "") -> Pool:
    """Rows of three pools: sums, candidates to be graded, open requests graded by the model."""
    return Players(grades, chunk, criteria)


@online(
    paper="urpo",
    needs=("ref_logp",),
    least=2,
    pools="urpo",
    within={"grades": (1, None), "chunk": (2, None)},
)
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
        data: rows with `answer` are sums, those with `completions` and `scores` candidates to be
            graded, all others open requests.
        beta: strength of the pull towards the reference (k3, in the loss); 0 does without one.
        grades: gradings of each open group, each in an order of its own.
        chunk: most answers that are graded together.
        criteria: what a good answer is, as the referee is told.
    """

    def loss(m: Measurements) -> Loss:
        per_UKT = clipped(m, clip_ratio, clip_ratio)
        if beta:
            per_UKT = per_UKT + beta * kl_loss(m)
        fraction_UK = clip_fraction(m, clip_ratio, clip_ratio)
        return watched(by_answer(per_UKT, m), clip_fraction=fraction_UK)

    update = weighed(group_advantage(r["reward"], r.there_UK), loss, beta=beta)
    seen = cast("dict[str, object]", update.metrics)
    for name, sort in (("reasoning", REASONING), ("referee", REFEREE), ("open", OPEN)):
        seen[name] = r["reward"][r["sort"] == sort]
    seen["unread"] = r["unread"][r["sort"] == REFEREE]
    return update
