"""The reward that a preference-trained model implies: its log-ratio to where training began.

    r(x, y) = beta [log pi(y | x) - log pi_ref(y | x)]

Any model with an adapter or new weights, from DPO or another objective of its family, rewards in
this way without a head; r is up to a constant of the prompt the reward that it was fitted to.
Source: Direct Preference Optimization, arXiv 2305.18290.
"""

from __future__ import annotations

from collections.abc import Mapping

from truing.core.batch.same_tokenizer import same_tokens
from truing.core.judging.rewards import held_model, implicit_rewards
from truing.core.passes.scoring import has_head
from truing.errors import InputError
from truing.method import component
from truing.models import Model
from truing.naming import ModelKey
from truing.own_checks import checks
from truing.remedies import SERVED_REWARD
from truing.tables import Row

WHERE = "reward implicit_reward"


def _models(model: str, reference: str) -> tuple[Model, Model]:
    """The tuned model, and where its training began."""
    tuned = held_model(model, WHERE)
    began = held_model(reference, WHERE) if reference else tuned.with_changes(())
    for one in (tuned, began):
        if one.is_served:
            raise InputError(
                "a served model shows no probabilities to reward by",
                where=WHERE,
                seen=one.name,
                fix=SERVED_REWARD,
            )
    if has_head(tuned) or "logprob" not in tuned.can:
        raise InputError(
            "the model scores by a head, so that its words imply no reward",
            where=WHERE,
            seen=tuned.name,
            fix="Reward by what it scores, {use: reward_model, model: ...} or, of steps, "
            "{use: step_reward, model: ...}; or give one whose training began without a head",
        )
    if reference:
        same_tokens({"model": tuned, "reference": began}, where=WHERE)
    elif not tuned.weight_changes:
        raise InputError(
            "nothing was changed in the model, so it implies no reward",
            where=WHERE,
            seen=tuned.name,
            fix="Give a trained model, or as reference the one that its training began with",
        )
    return tuned, began


def _check(settings: Mapping[str, object]) -> None:
    """What `core.judging.scores` asks before anything is drawn."""
    _models(str(settings["model"]), str(settings.get("reference", "")))


@component("reward")
@checks(_check)
def implicit_reward(
    rows: list[Row], *, model: ModelKey, reference: ModelKey = "", beta: float = 0.1
) -> list[float]:
    """The implicit reward of a preference-trained model.

    Args:
        model: name of the tuned model, or in Python its key, as `truing.models.hold` gives it.
        reference: of where its training began; "" takes it without its changes.
        beta: that it was trained with.
    """
    return [beta * v for v in implicit_rewards(*_models(model, reference), rows)]
