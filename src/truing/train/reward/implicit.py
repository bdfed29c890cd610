"""The reward that a preference-trained model implies: its log-ratio to where training began.

    r(x, y) = beta [log pi(y | x) - log pi_ref(y | x)]

Any model with an adapter or new weights, from DPO or another objective of its family, rewards in
this way without a head; r is up to a constant of the prompt the reward that it was fitted to.
Source: Direct Preference Optimization, arXiv 2305.18290.
"""

from __future__ import annotations

from truing.core.rewards import implicit_rewards
from truing.errors import InputError
from truing.method import component
from truing.models import Model, held
from truing.tables import Row


@component("reward")
def implicit_reward(
    rows: list[Row], *, model: str, reference: str = "", beta: float = 0.1
) -> list[float]:
    """The implicit reward of a preference-trained model.

    Args:
        model: key of the tuned model, as `truing.models.hold` gives it.
        reference: key of where its training began; "" takes it without its changes.
        beta: that it was trained with.
    """
    tuned = held(model)
    base = held(reference) if reference else None
    if not isinstance(tuned, Model) or not (base is None or isinstance(base, Model)):
        raise InputError("is not a model", where="reward implicit_reward", seen=model)
    if base is None and not tuned.weight_changes:
        raise InputError(
            "nothing was changed in the model, so it implies no reward",
            where="reward implicit_reward",
            seen=tuned.name,
        )
    values = implicit_rewards(tuned, base or tuned.with_changes(()), rows)
    return [beta * v for v in values]
