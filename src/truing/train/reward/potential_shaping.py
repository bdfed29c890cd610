"""Tell an answer early what its steps are worth, without changing which answer is the best one.

    F_k = gamma phi(s_k) - phi(s_{k-1}),   k = 1 .. n,   phi(s_0) = start,   phi(s_n) = 0

s_k is the prompt with the first k steps of an answer, phi what a process reward model or a value
model says of step k (`step_values` of core/steps): what is to be expected from there. F_k falls on
what closes its step. The state after the last step is the end, whose potential has to be 0, so that
the model's word on a last step, which may praise itself, is not asked for. Then

    sum_k gamma^(k-1) F_k = -start

for every answer: shaping moves reward to where it is earned and adds nothing. What rewards the
whole answer is another term beside it, `rewards: {right: {use: numeric_answer}, steps: {use:
potential_shaping, model: prm}}`. The values of a state all fall by phi, so that the best action
stays the best one, for any phi, a wrong one too. `process_shaping` (train/reward/easy_to_hard) and
`step_reward` do not have this: by them more or better-liked steps are worth more in themselves.

Only methods that pay tokens can use it (ppo, reinforce_plus_plus, salmon_ppo). Those that compare
whole answers see the sum, one number for all, and learn what they learn without. Where what is paid
is whitened, by easy_to_hard_ppo and salmon_ppo with `reward_scale=0`, the best action need not stay
the best. gamma counts steps, that of these methods tokens: leave both at 1, where they agree.
Hindsight relabelling, the survey's other way to densify rewards, is not here: it needs goals that
can be told to the policy.

Source: A. Y. Ng, D. Harada and S. Russell, "Policy invariance under reward transformations", 1999;
in the list of arXiv 2507.13158.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from truing.core.bounds import check_bounds
from truing.core.judging.answer_steps import steps_of, values_where_known
from truing.core.judging.rewards import held_model
from truing.core.passes.scoring import check_steps
from truing.method import component
from truing.naming import ModelKey
from truing.own_checks import checks
from truing.tables import Row
from truing.train.reward.easy_to_hard import at_steps

WHERE = "reward potential_shaping"


def shaped(potentials: Sequence[float], gamma: float = 1.0, start: float = 0.0) -> list[float]:
    """F of each of n steps, from the potentials of all but the last one, [n - 1]."""
    before, after = [start, *potentials], [*potentials, 0.0]
    return [gamma * b - a for a, b in zip(before, after, strict=True)]


def _check(settings: Mapping[str, object]) -> None:
    """What `core.judging.scores` asks before anything is drawn."""
    check_bounds(settings, {"gamma": "(0, 1]"}, WHERE)
    check_steps(held_model(str(settings["model"]), WHERE), WHERE)


@component("reward")
@checks(_check)
def potential_shaping(
    rows: list[Row],
    *,
    model: ModelKey,
    gamma: float = 1.0,
    start: float = 0.0,
    separator: str = "\n\n",
) -> list[float]:
    """Differences of a process model's potential, where steps end: they sum to one constant.

    Args:
        model: name of the process reward or value model, or in Python its key, as
            `truing.models.hold` gives it.
        gamma: what a reward one step later is worth; 1 where the method's own is.
        start: potential of a prompt, of which the whole answer gets the opposite.
        separator: what closes a step.
    """
    check_bounds({"gamma": gamma}, {"gamma": "(0, 1]"}, WHERE)
    found = held_model(model, WHERE)
    parts = [steps_of(str(row["completion"]), separator) for row in rows]
    before = [steps[:-1] for steps in parts]
    known = values_where_known(found, rows, before, separator, where=WHERE)
    total = -start if gamma == 1 else None  # to the bit: equal rewards are found by equality
    values: list[float] = []
    for i, steps in enumerate(parts):
        rewards = shaped(known[i], gamma, start)
        text = str(rows[i]["completion"])
        values.append(at_steps(text, rewards, separator, total) if steps else rewards[0])
    return values
