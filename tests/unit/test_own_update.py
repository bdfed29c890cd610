"""An online method of a user's own that could not train is refused before a model is fetched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from truing.core.objective import Loss, Measurements
from truing.core.online import Update, by_answer, clipped, online, online_of, weighed
from truing.core.trainer.preflight import online_training
from truing.errors import InputError

Function = Callable[..., Any]


def checked(update: Function, **settings: object) -> None:
    """What is said of it before a model is fetched."""
    online_training(online_of(online()(update)), settings)


def plain(r: Measurements) -> Update:
    return weighed(r["reward"], lambda m: by_answer(clipped(m), m))


def to_loss(made: object) -> Function:
    """An online method whose update's loss returns `made`, or what it makes of measurements."""
    return lambda r: Update({}, made if callable(made) else lambda m: made)  # type: ignore[arg-type]


def test_what_trains_is_taken() -> None:
    checked(lambda r: plain(r))
    checked(lambda r, state: plain(r))


def wrong() -> list[tuple[Function, str]]:
    """Updates and what is said of them; made in here, they are not registered by name."""
    return [
        (lambda r: None, r"must return an Update \(seen: 'NoneType'\)"),
        (lambda r: Loss(r["logp"].sum(-1)), r"must return an Update \(seen: 'Loss'\)"),
        (lambda r: r.rewards, "its function raised AttributeError: .*'rewards'"),
        (to_loss(None), r"must return a Loss \(seen: 'NoneType'\)"),
        (to_loss(lambda m: m["logp"].mean()), r"must return a Loss \(seen: 'Tensor'\)"),
        (to_loss(lambda m: Loss(m["logp"].mean())), "one value for each unit"),
        (to_loss(lambda m: Loss(m["old_logp"])), "so that nothing is learnt"),
        (to_loss(lambda m: Loss(m.logp)), "raised AttributeError: .*'logp'"),
    ]


@pytest.mark.parametrize(("update", "told"), wrong())
def test_what_an_update_returns_or_raises(update: Function, told: str) -> None:
    with pytest.raises(InputError, match=told) as error:
        checked(update)
    assert error.value.fix


def test_a_setting_without_a_star() -> None:
    def unstarred(r: Measurements, beta: float = 0.1) -> Update:
        return plain(r)

    with pytest.raises(InputError, match="unstarred: parameter 'beta' is no setting") as error:
        online()(unstarred)
    assert error.value.fix == "Write def unstarred(r, *, beta=...)"


def test_a_loss_that_only_real_rollouts_break_is_named_too() -> None:
    def picky(r: Measurements) -> Update:
        def loss(m: Measurements) -> Loss:
            raise ValueError("such rows")

        return Update({}, loss)

    checked(picky)  # what it says of made-up rows means nothing
    mask_UKT = torch.ones(2, 2, 2)
    made = online_of(online()(picky))(Measurements(mask_UKT, {"logp": -mask_UKT}), {})
    with pytest.raises(
        InputError, match="picky: the loss of its update raised ValueError: such rows"
    ) as error:
        made.loss(Measurements(mask_UKT, {"logp": -mask_UKT}))
    assert error.value.fix.startswith(f"See {__file__} line ")
