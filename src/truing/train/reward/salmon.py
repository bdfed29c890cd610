"""One reward model for all principles: it scores an answer by those that are written beside it.

    -logsigmoid(s(x, y_w | P) - s(x, y_l | P)),   P the principles of the row

The model reads the answer first, then the question, then the guideline with the principles, and a
stub that stops where the verdict would come; s is a linear head on the last hidden state of that
stub's last token, which so has seen the principles after the answer. Change the principles and the
same weights reward something else: a negative definition among them ("The answer is long-winded")
turns the preference round.

Rows are pairs with the optional column `principles`, a list of sentences; without it the answer is
judged as a whole; synthesize/salmon makes such rows. Swapping the two answers and the label leaves
the loss as it is. The wording of the layout is our own.

`salmon_reward` is the reward under principles that are chosen when it is asked for: sentences, or a
`Principles` from which `draw` are drawn for each prompt, one after the other with their priorities
as weights, anew at each visit to it; answers to one visit share them. A row's column `tag` makes
some 128 heavier: "reasoning" those whose id names "reason" or "numerical", "red_teaming" those with
"ethical" or "harmless". `always` are told beside them: what stops a reward from being hacked.

Source: "SALMON: Self-Alignment with Instructable Reward Models", arXiv 2310.05910. Differences: the
layout is written through the model's own chat template, and no padding exists, so the last position
is the stub's end by construction.

Shapes: U pairs, K = 2 branches.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import cast

from truing.context import current
from truing.core.objective import Loss, Measurements, objective
from truing.core.rewards import score_model
from truing.core.training import Hook, hook
from truing.errors import InputError
from truing.method import component
from truing.models import Model, held
from truing.principles import Principle, Principles
from truing.tables import Row, Table, content_hash, user_text
from truing.train.reward.bradley_terry import bradley_terry

ROLE = (
    "You review an answer that an assistant gave. Read the answer, the question and the guideline, "
    "then say how well the answer keeps to the guideline."
)
WHOLE = "The answer is helpful, honest and harmless."
TAGS = {"reasoning": ("reason", "numerical"), "red_teaming": ("ethical", "harmless")}
HEAVY = 128  # added to the weight of principles that a row's tag asks for


def reviewed(prompt: object, answer: str, principles: Sequence[str]) -> str:
    """The text that is scored: answer, question, guideline, and the stub of a verdict."""
    listed = "\n".join(f"- {p}" for p in principles or [WHOLE])
    return (
        f"Answer:\n{answer}\n\nQuestion:\n{user_text(prompt)}\n\nGuideline:\n{listed}\n\n"
        "By this guideline, the quality of the answer is"
    )


def principles_of(row: Row, where: str) -> list[str]:
    """The row's principles; an InputError unless they are a list of sentences."""
    found = row.get("principles") or []
    if not isinstance(found, list) or not all(isinstance(p, str) for p in found):
        raise InputError("column 'principles' must be a list of texts", where=where, seen=found)
    return cast("list[str]", found)


@hook("reviewed")
class Reviewed(Hook):
    """Pairs in the layout of a principle-following reward model."""

    def rows(self, data: Table) -> Table:
        """The same pairs, each answer inside its review."""
        made: list[Row] = []
        for i, row in enumerate(data, 1):
            principles = principles_of(row, f"{data.source} row {i}")
            answers = {
                name: reviewed(row["prompt"], str(row[name]), principles)
                for name in ("chosen", "rejected")
            }
            open_end = {"chosen_finished": False, "rejected_finished": False}
            made.append({**row, "prompt": ROLE, **answers, **open_end})
        return Table("pair", made, where=data.source)


@objective(
    paper="salmon",
    unit="pair",
    needs=("scores",),
    rows="pair",
    columns={"margin": 0.0},
    hook="reviewed",
)
def salmon(m: Measurements) -> Loss:
    """One reward model for all principles: it scores an answer by those written beside it."""
    return bradley_terry(m)


def draw_principles(
    principles: Sequence[Principle], count: int, tag: str, source: random.Random
) -> list[str]:
    """Texts of `count` principles drawn without replacement, by priority as weight."""
    left, texts = list(principles), list[str]()
    while left and len(texts) < count:
        asked = [any(word in p.id for word in TAGS.get(tag, ())) for p in left]
        weights = [max(p.priority, 0) + HEAVY * more for p, more in zip(left, asked, strict=True)]
        if not any(weights):
            break
        at = source.choices(range(len(left)), weights)[0]
        texts.append(left.pop(at).text)
    return texts


def _told(row: Row, principles: list[str] | Principles, count: int) -> list[str]:
    """The principles that hold for this row."""
    if isinstance(principles, Principles):
        if not count:
            return [p.text for p in principles]
        row_id = row.get("id") or content_hash(row["prompt"])
        name = f"principles/{row.get('rollout', '')}/{row_id}"
        source = random.Random(current().stream(name))
        return draw_principles(principles.items, count, str(row.get("tag", "")), source)
    return principles


@component("reward")
def salmon_reward(
    rows: list[Row],
    *,
    model: str,
    principles: str | list[str],
    draw: int = 0,
    always: list[str] | None = None,
) -> list[float]:
    """What a principle-following reward model says under these principles.

    Args:
        model: key of the model, as `truing.models.hold` gives it.
        principles: sentences that say what a good answer is like, or the key of a `Principles`.
        draw: how many of a `Principles` are drawn for each prompt; 0 takes all.
        always: sentences that are told besides.
    """
    where = "reward salmon_reward"
    found = held(model)
    if not isinstance(found, Model):
        raise InputError("is not a model", where=where, seen=model)
    rules = held(principles) if isinstance(principles, str) else principles
    if not isinstance(rules, (list, Principles)):
        raise InputError("are not principles", where=where, seen=principles)
    told = [[*_told(row, rules, draw), *(always or [])] for row in rows]
    asked: list[Row] = [
        {
            "prompt": ROLE,
            "completion": reviewed(row["prompt"], str(row["completion"]), some),
            "finished": False,
        }
        for row, some in zip(rows, told, strict=True)
    ]
    return score_model(found, asked)
