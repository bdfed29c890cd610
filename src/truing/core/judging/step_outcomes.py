"""What answers come to at their end, from each of their steps: what step labels are made of.

The parts of synthesize/step_labels that are not about tables; see there for the equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import cast

from truing.core.judge import check_unread, pointwise, rate
from truing.core.judging.answer_steps import step_values
from truing.core.judging.rewards import check_reward_model, probabilities
from truing.core.judging.scores import check_reward, total_scores
from truing.core.judging.trajectories import Drawing, Trajectory, continued
from truing.core.passes.scoring import check_logits
from truing.errors import InputError
from truing.models import Model
from truing.tables import Row

WHERE = "synthesize/step_labels"
Outcomes = Sequence[tuple[int, float]]  # of each roll-out: its steps in all, and z
JUDGE = """\
You judge one step of an answer to a request.
{% if criteria %}
A good step keeps these rules:
{{ criteria }}
{% endif %}
<request>
{{ prompt }}
</request>

<answer>
{{ completion }}
</answer>
"""


def hindsight(r: Sequence[float], outcomes: Sequence[Outcomes], gamma: float) -> list[float]:
    """V_t of each step, from r_t and what the roll-outs from there came to."""
    return [
        r_t + fmean(gamma ** (n - t) * z for n, z in found)
        for t, (r_t, found) in enumerate(zip(r, outcomes, strict=True), 1)
    ]


def majority(outcomes: Sequence[Outcomes]) -> list[float]:
    """1 for each step from which more than half of the roll-outs come to something good."""
    return [float(2 * sum(z > 0.5 for _, z in found) > len(found)) for found in outcomes]


@dataclass(frozen=True)
class Ending:
    """What whole answers come to: z of each."""

    reward: dict[str, object] | None
    judge: Model | None
    reward_model: Model | None
    criteria: str

    def check(self) -> None:
        """Raise InputError unless there is just one that says z."""
        given = {"reward": self.reward, "judge": self.judge, "reward_model": self.reward_model}
        named = [n for n, one in given.items() if one is not None]
        if len(named) != 1:
            raise InputError(
                "what an answer comes to is said by one of reward, judge and reward_model",
                where=WHERE,
                seen=named,
                fix="Give just one of them",
            )
        if self.reward is not None:
            check_reward(self.reward, where=f"{WHERE} setting 'reward'")
        if self.reward_model is not None:
            check_reward_model(self.reward_model, WHERE)
            check_logits(self.reward_model, f"{WHERE} input 'reward_model'")

    @property
    def key(self) -> list[object]:
        """All that z depends on."""
        models = [m.key if m is not None else "" for m in (self.judge, self.reward_model)]
        return [self.reward, *models, self.criteria]

    def __call__(self, rows: list[Row]) -> list[float]:
        """z of each row; an InputError for one that is not in [0, 1]."""
        if not rows:
            return []
        if self.reward_model is not None:
            return probabilities(self.reward_model, rows, WHERE)
        if self.judge is not None:
            return pointwise(self.judge, rows, criteria=self.criteria)
        reward = cast("dict[str, object]", self.reward)
        found = total_scores(reward, rows, where=f"{WHERE} setting 'reward'")
        for i, z in enumerate(found, 1):
            if not 0 <= z <= 1:
                raise InputError(
                    "what an answer comes to lies in [0, 1]",
                    where=f"{WHERE} setting 'reward' row {i}",
                    seen=z,
                    fix="Give a reward model as the input reward_model, which takes its sigmoid",
                )
        return found


def outcomes(
    model: Model, paths: Sequence[Trajectory], ending: Ending, rollouts: int, how: Drawing
) -> list[list[Outcomes]]:
    """[answer][step] -> what the roll-outs from there came to, or the answer itself.

    It stands for them where it ended, or was cut at the end of the context.
    """
    places = [(p, k) for p in paths if rollouts for k in range(1, len(p.steps) + 1)
              if k < len(p.steps) or not p.finished]  # fmt: skip
    drawn = continued(model, places, rollouts, how) if places else []
    both = list(zip(places, drawn, strict=True))
    rows = [p.outcome_row(k, text, ended) for (p, k), items in both for text, ended in items]
    z = iter(ending(rows))
    found: dict[tuple[int, int], Outcomes] = {}
    for (p, k), items in both:
        if items:
            found[id(p), k] = [(k + p.longer(text), next(z)) for text, _ in items]
    # At the last step something is drawn from answers that were cut, and at all others if at any.
    alone = [p for p in paths if (id(p), len(p.steps)) not in found]
    own = iter(ending([p.outcome_row(len(p.steps), finished=p.finished) for p in alone]))
    ends: dict[int, Outcomes] = {id(p): [(len(p.steps), next(own))] for p in alone}
    return [[found.get((id(p), k)) or ends[id(p)] for k in range(1, len(p.steps) + 1)]
            for p in paths]  # fmt: skip


def judged(judge: Model, paths: Sequence[Trajectory], criteria: str) -> list[list[float]]:
    """1 or 0 for each step that a judge finds good or not, up to the first unread.

    Raises:
        InputError: so many replies cannot be read that `pointwise` would refuse them, too.
    """
    rows: list[Row] = [
        {"prompt": q, "completion": s} for p in paths for q, s in zip(p.prompts, p.steps)
    ]
    found = rate(judge, rows, criteria=criteria, template=JUDGE)
    unread = found.count(None)
    told = f"no verdict could be read from {unread} of {len(found)} replies on steps"
    check_unread(unread, len(found), told, judge.name)
    read = iter(found)
    made: list[list[float]] = []
    for path in paths:
        scores = [next(read) for _ in path.steps]
        kept = scores.index(None) if None in scores else len(scores)
        made.append([float(cast(float, s) > 0.5) for s in scores[:kept]])
    return made


def expected(process_model: Model | None, paths: Sequence[Trajectory]) -> list[list[float]]:
    """r_t of every step; the process model is asked once for each separator."""
    if process_model is None:
        return [[0.0] * len(p.steps) for p in paths]
    by_separator: dict[str, list[tuple[int, Row]]] = {}
    for i, path in enumerate(paths):
        rows = [(i, row) for row in path.labelled([0.0] * len(path.steps), {})]
        by_separator.setdefault(path.separator, []).extend(rows)
    made: list[list[float]] = [[] for _ in paths]
    for separator, asked in by_separator.items():
        found = step_values(process_model, [row for _, row in asked], separator, where=WHERE)
        for (i, _), values in zip(asked, found, strict=True):
            made[i] += values
    return made
