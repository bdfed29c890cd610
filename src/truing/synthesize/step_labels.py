"""Label the steps of answers for process rewards, of what can be verified and of what cannot.

    value     V_t = r_t + mean over roll-outs of gamma^(n-t) z     n steps of the roll-out in all
    majority  1 where z > 1/2 in more than half of the roll-outs from step t on, else 0
    judged    1 where a judge finds the step itself good, else 0

z in [0, 1] is what an answer comes to at its end: a verifier's (`reward`), a judge's, or a reward
model's through a sigmoid. r_t is what `process_model` says of step t, 0 without one. From the end
of each step `rollouts` answers are drawn to the end; at the last step of a finished answer nothing
is left to draw. With `rollouts` 0 the answer itself stands for them: every step is labelled, in
hindsight, by what its own answer came to, which costs nothing beyond z. For rewards that can be
verified take "value" with roll-outs, for those that cannot "majority" where roll-outs are cheap,
"value" without roll-outs where they are not, "judged" where steps can be good in themselves.

Rows are answers (cut into steps at `separator`), rows that have `steps`, prompts, to which answers
are drawn, or dialogues that end with the assistant, whose turns are the steps: a row is made for
each turn, dialogues of one turn or with an empty one are left out, and there are no roll-outs,
which would need a user. Train on values with train/step_value, on the others with
train/process_reward.

Source: "Simultaneous Multi-objective Alignment Across Verifiable and Non-verifiable Rewards", arXiv
2510.01167; its number of roll-outs is not known, 8 is that of Math-Shepherd, arXiv 2312.08935,
whose soft labels are "value" with gamma 1. The judge's words are ours. An answer is cut before the
first step that a judge's reply says nothing of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, cast

from truing.context import Json, current
from truing.core.judging.step_rollouts import (
    WHERE,
    Drawing,
    Ending,
    Trajectory,
    answered,
    as_trajectory,
    check_local,
    check_rooms,
    expected,
    hindsight,
    judged,
    majority,
    outcomes,
)
from truing.core.passes.scoring import check_steps
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.tables import Row, Table, as_prompt, content_hash

GAMMA = 0.9
CHUNK = 16  # answers of a journal entry: what a kill can cost


@dataclass(frozen=True)
class Labelling:
    """How steps are labelled; see the module's docstring."""

    model: Model
    ending: Ending
    process_model: Model | None
    label: Literal["value", "majority", "judged"]
    rollouts: int
    gamma: float
    drawing: Drawing

    @property
    def unused(self) -> list[str]:
        """What is given and has no part in the label, as far as it differs from its default."""
        if self.label == "value":
            return []
        given = {"process_model": self.process_model is not None, "gamma": self.gamma != GAMMA}
        if self.label == "judged":
            given["reward"] = self.ending.reward is not None
            given["reward_model"] = self.ending.reward_model is not None
        return sorted(n for n, one in given.items() if one)

    def check(self) -> None:
        """Raise InputError for settings and models that do not go together."""
        if self.unused:
            raise InputError(
                f"setting 'label': {self.label} makes no use of {' and '.join(self.unused)}",
                where=WHERE,
                fix="Leave that out, or label by value",
            )
        if self.label == "judged" and self.ending.judge is None:
            text = "setting 'label': judged asks a judge, and none is given"
            raise InputError(text, where=WHERE, fix="Give one, or label by value")
        if self.label != "judged":
            self.ending.check()
            if self.rollouts:
                check_local(self.model)
        if self.process_model is not None:
            check_steps(self.process_model, f"{WHERE} input 'process_model'")

    def check_paths(self, paths: Sequence[Trajectory]) -> None:
        """Raise InputError for answers and dialogues from whose steps nothing can be drawn."""
        if self.label == "judged" or not self.rollouts:
            return
        if any(p.is_dialogue for p in paths):
            raise InputError(
                "setting 'rollouts' must be 0 for dialogues: nobody writes the user's turns",
                where=WHERE,
                seen=self.rollouts,
            )
        for path in paths:
            if not path.separator:
                raise InputError(
                    "setting 'rollouts' must be 0 for steps with nothing between them: those of a "
                    "roll-out could not be told apart",
                    where=path.place,
                    seen=self.rollouts,
                )
        check_rooms(self.model, paths)

    def name(self, _: int, paths: Sequence[Trajectory]) -> str:
        """Of a journal entry: all that its labels depend on."""
        before = self.process_model.key if self.process_model is not None else ""
        drawing = vars(self.drawing)
        how = [self.model.key, self.ending.key, before, self.label, self.rollouts, self.gamma]
        rows = [
            [p.prompts, p.steps, p.finished, p.separator, p.is_dialogue, _plain(p.row)]
            for p in paths
        ]
        return content_hash([how, drawing, rows], 8)

    def make(self, _: int, paths: Sequence[Trajectory]) -> Json:
        """[labels, mean z] of each answer, by step."""
        if self.label == "judged":
            found = judged(cast(Model, self.ending.judge), paths, self.ending.criteria)
            return cast(Json, [[labels, []] for labels in found])
        came = outcomes(self.model, paths, self.ending, self.rollouts, self.drawing)
        means = [[fmean(z for _, z in step) for step in steps] for steps in came]
        if self.label == "majority":
            return cast(Json, [[majority(c), z] for c, z in zip(came, means, strict=True)])
        before = expected(self.process_model, paths)
        values = [hindsight(r, c, self.gamma) for r, c in zip(before, came, strict=True)]
        return cast(Json, [list(both) for both in zip(values, means, strict=True)])


def _plain(row: Row) -> Row:
    """What a reward may read of a row."""
    return {k: v for k, v in row.items() if k != "lineage"}


def _mean_label(rows: Sequence[Row]) -> float:
    return fmean(v for r in rows for v in cast("list[float]", r["labels"]))


def _trajectories(how: Labelling, data: Table, answers: int, separator: str) -> list[Trajectory]:
    """All answers and dialogues that have steps; the others are counted."""
    read = [as_trajectory(r, separator, data.place(i)) for i, r in enumerate(data)]
    given = [one for one in read if one is not None]
    how.check_paths(given)  # before anything is drawn
    bare = [
        (as_prompt(r), data.place(i))
        for i, (r, one) in enumerate(zip(data, read, strict=True))
        if one is None
    ]
    drawn = answered(how.model, bare, answers, how.drawing, separator) if bare else []
    every = given + [t for items in drawn for t in items]
    single = sum(t.is_dialogue and len(t.steps) == 1 for t in every)
    mute = sum(len(t.steps) > 1 and not all(s.strip() for s in t.steps) for t in every)
    kept = [
        t
        for t in every
        if len(t.steps) > (1 if t.is_dialogue else 0) and all(s.strip() for s in t.steps)
    ]
    current().metric(
        answers=len(kept),
        left_out_without_steps=len(every) - len(kept) - single - mute,
        left_out_single_turns=single,
        left_out_empty_turns=mute,
    )
    if not kept:
        raise InputError(
            f"none of {len(every)} answers has steps",
            where=f"{WHERE} {data.source}",
            fix="Give answers with texts, and dialogues of two turns or more, none of them empty",
        )
    return kept


@method(
    paper="mah-dpo",
    needs=("generate",),
    rows={"data": ("steps", "example", "prompt")},
    within={
        "rollouts": (0, None),
        "gamma": (0, 1),
        "answers": (1, None),
        "max_tokens": (1, None),
        "temperature": "(0, inf)",
    },
    makes="steps",
)
def step_labels(
    model: Model,
    data: Table,
    judge: Model | None = None,
    reward_model: Model | None = None,
    process_model: Model | None = None,
    *,
    label: Literal["value", "majority", "judged"] = "value",
    reward: dict[str, object] | None = None,
    criteria: str = "",
    rollouts: int = 8,
    gamma: float = GAMMA,
    answers: int = 1,
    separator: str = "\n\n",
    max_tokens: int = 512,
    temperature: float = 1.0,
) -> Table:
    """Label the steps of answers for process rewards, verifiable or not.

    Args:
        label: what a step is labelled by; see the module's docstring.
        reward: verifier of whole answers, in [0, 1], such as {use: numeric_answer}.
        criteria: rules that the judge is told; "" leaves them to it.
        rollouts: M, answers drawn from each step on; 0 labels all steps by their own answer.
        gamma: what z is worth one step earlier.
        answers: drawn to each prompt that has none.
        separator: what closes a step of an answer.
        max_tokens: most tokens of an answer or roll-out that is drawn.
        temperature: of drawing.
    """
    data = data.expect("steps", "example", "prompt", where=WHERE)
    if not separator:
        raise InputError("setting 'separator' must not be empty", where=WHERE)
    context = current()
    ending = Ending(reward, judge, reward_model, criteria)
    drawing = Drawing(max_tokens, temperature, context.stream("roll-outs"))
    how = Labelling(model, ending, process_model, label, rollouts, gamma, drawing)
    how.check()
    paths = _trajectories(how, data, answers, separator)
    told: Row = {
        "generator": model.key,
        "judge": judge.key if judge is not None else "",
        "verifier": reward,
        "label": label,
        "rollouts": rollouts,
        "seed": context.seed,
        "step": context.name,
    }
    rows: list[Row] = []
    cut = 0
    for chunk, made in context.chunks("labels", paths, CHUNK, how.name, how.make, "answers"):
        for path, (labels, z) in zip(chunk, cast("list[list[list[float]]]", made), strict=True):
            id = path.row["id"]
            cut += len(path.steps) - len(labels)
            rows += path.labelled(labels, told | {"prompt": id, "parents": [id], "came_to": z})
    if not rows:
        raise InputError("no step was labelled", where=WHERE, fix="Use a judge that can be read")
    context.metric(rows=len(rows), label=_mean_label(rows), cut_steps=cut)
    return Table("steps", rows, where=f"steps of {data.source}")
