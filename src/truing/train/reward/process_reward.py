"""Train a reward model that scores each step of an answer, and aggregate what it says.

    loss     mean over steps of -[y_k log p_k + (1 - y_k) log(1 - p_k)],   p_k = sigmoid(s_k)
    answer   min_k p_k, prod_k p_k, mean_k p_k or p_n (the last)

s_k is a linear head on the last hidden state of the token that closes step k, y_k the step's label
in [0, 1]; all other positions are ignored. One score through a sigmoid is the two-class
cross-entropy of the usual form: its two logits count by their difference alone. A step is
tokenised together with its separator ("\\n\\n", or the row's column `separator`), so that no
separator merges with what follows.

As rewards of single steps, with a bound u and a bonus b over n steps (arXiv 2403.09472):

    min    r_k = min(0, p_k - m_{k-1}) + b/n,   m_0 = u, m_k = min(m_{k-1}, p_k)
    prod   r_k = min(P_k, u) - min(P_{k-1}, u) + b/n,   P_k = p_1 ... p_k

They telescope: their sums are min(min_k p_k, u) - u + b and min(P_n, u) - min(1, u) + b.

A value model (train/step_value) is asked in the same way: `step_values` of core/steps takes its
scores as they are, and those of a classifier through the sigmoid, so that both say of a step what
is to be expected from there.
Sources: arXiv 2305.20050, 2312.08935; labels from roll-outs may be shares, from people -1, 0, 1.

Shapes: U rows, K = 1 branch, T steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.nn.functional import logsigmoid, pad

from truing.core.judging.answer_steps import AGGREGATES, Aggregate, steps_of, values_where_known
from truing.core.judging.rewards import held_model
from truing.core.objective import Loss, Measurements, objective
from truing.core.passes.scoring import check_steps
from truing.errors import InputError
from truing.method import component
from truing.naming import ModelKey
from truing.own_checks import checks
from truing.tables import Row

WHERE = "reward step_reward"


def min_rewards(p: Sequence[float], bound: float = 0.5, bonus: float = 0.25) -> list[float]:
    """A reward for each step: what it lowers the running minimum by, and its part of the bonus."""
    made: list[float] = []
    lowest = bound
    for value in p:
        made.append(min(0.0, value - lowest) + bonus / len(p))
        lowest = min(lowest, value)
    return made


def prod_rewards(p: Sequence[float], bound: float = 0.5, bonus: float = 0.25) -> list[float]:
    """A reward for each step: what it lowers the running product by, below the bound."""
    made: list[float] = []
    product = 1.0
    for value in p:
        made.append(min(product * value, bound) - min(product, bound) + bonus / len(p))
        product *= value
    return made


def _check(settings: Mapping[str, object]) -> None:
    """What `core.judging.scores` asks before anything is drawn."""
    check_steps(held_model(str(settings["model"]), WHERE), WHERE)


@component("reward")
@checks(_check)
def step_reward(
    rows: list[Row], *, model: ModelKey, aggregate: Aggregate = "min", separator: str = "\n\n"
) -> list[float]:
    """What a process reward model says of whole answers; 0 for one without a step.

    It lies in [0, 1], but for a value model, whose values are taken as they are.

    Args:
        model: name of the model, or in Python its key, as `truing.models.hold` gives it.
        aggregate: of the steps' probabilities or values.
        separator: what closes a step.
    """
    found = held_model(model, WHERE)
    parts = [steps_of(str(row["completion"]), separator) for row in rows]
    known = values_where_known(found, rows, parts, separator)
    return [AGGREGATES[aggregate](values) if values else 0.0 for values in known]


@objective(
    paper="preference-losses",
    unit="token",
    needs=("scores",),
    rows="steps",
    columns={"labels": None},
)
def process_reward(m: Measurements, *, ratings: bool = False) -> Loss:
    """Train a reward model that scores each step of an answer.

    Args:
        ratings: labels are -1, 0 and 1, of which 0 counts as right, as in PRM800K; without it
            they are shares in [0, 1].
    """
    score_UT, mask_UT = m["scores"][:, 0], m.mask_UKT[:, 0]
    # Columns are as wide as the longest row of the step, scores as that of the micro-batch or of
    # what surrounds it; beyond a row's own steps neither counts.
    label_UT, steps = m["labels"], score_UT.shape[1]
    label_UT = pad(label_UT, (0, max(0, steps - label_UT.shape[1])))[:, :steps]
    if not ratings and bool(((label_UT < 0) | (label_UT > 1)).any()):
        raise InputError(
            "labels of steps are shares from 0 to 1",
            where="column 'labels'",
            seen=[float(label_UT.min()), float(label_UT.max())],
            fix="Set ratings=true for labels of -1, 0 and 1",
        )
    y_UT = (label_UT >= 0).float() if ratings else label_UT
    per_step = -y_UT * logsigmoid(score_UT) - (1 - y_UT) * logsigmoid(-score_UT)
    right_UT = ((score_UT > 0) == (y_UT > 0.5)).float() * mask_UT
    seen = {"accuracy": (right_UT.sum(1) / mask_UT.sum(1).clamp(min=1)).detach()}
    return Loss(per_step, mask_UT, seen)
