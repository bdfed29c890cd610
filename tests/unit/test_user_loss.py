"""A loss of a user's own that could not train is refused with its name, before it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from truing.core.objective import Loss, Measurements, objective, objective_of
from truing.core.trainer.preflight import check_objective
from truing.errors import InputError

Function = Callable[..., Any]


def checked(loss: Function, **facts: Any) -> None:
    """What is said of it before a model is fetched."""
    check_objective(
        objective_of(objective(**{"unit": "pair", "rows": "pair", **facts})(loss)), {}, {}
    )


def gap(m: Measurements) -> torch.Tensor:
    return m.seq()[:, 0] - m.seq()[:, 1]


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (gap, r"gap: must return a Loss \(seen: 'Tensor'\)"),
        (lambda m: None, r"must return a Loss \(seen: 'NoneType'\)"),
        (lambda m: Loss(gap(m).mean()), r"one value for each unit.*seen: \(\)"),
        (lambda m: Loss(1.0), r"one value for each unit.*seen: 1.0"),
        (lambda m: Loss(m["logp"].flatten()), r"one value for each unit.*seen: \(8,\)"),
        (lambda m: Loss(gap(m)) + Loss(m["logp"].flatten()), r"one value for each unit"),
        (lambda m: Loss(gap(m), m.mask_UKT), r"weight of a loss must be of its values' shape"),
        (lambda m: Loss(gap(m).detach()), "so that nothing is learnt"),
        (lambda m: Loss(m["ref_logp"].sum(-1)), "so that nothing is learnt"),
        (lambda m: Loss(m.logp + 1), "raised AttributeError: .*'logp'"),
    ],
)
def test_what_a_loss_returns_or_raises(loss: Function, told: str) -> None:
    with pytest.raises(InputError, match=told) as error:
        checked(loss, needs=("logp", "ref_logp"))
    assert error.value.fix


def test_a_loss_that_only_real_rows_break_is_named_too() -> None:
    def picky(m: Measurements) -> Loss:
        if len(m.mask_UKT) == 2:
            raise ValueError("made-up rows")
        raise ValueError("real rows")

    checked(picky)  # what made-up rows say means nothing

    def asserts(m: Measurements) -> Loss:
        assert m["logp"].unique().numel() > 1
        return Loss(gap(m))

    checked(asserts)
    spec = objective_of(objective(unit="pair", rows="pair")(picky))
    mask_UKT = torch.ones(3, 2, 2)
    with pytest.raises(
        InputError, match="picky: its function raised ValueError: real rows"
    ) as error:
        spec(Measurements(mask_UKT, {"logp": -mask_UKT}), {})
    assert error.value.fix.startswith(f"See {__file__} line ")


def test_a_declaration_that_cannot_be_meant() -> None:
    def unstarred(m: Measurements, beta: float = 0.1) -> Loss:
        return Loss(beta * gap(m))

    with pytest.raises(InputError, match="unstarred: parameter 'beta' is no setting") as error:
        checked(unstarred)
    assert error.value.fix == "Write def unstarred(m, *, beta=...)"
    with pytest.raises(InputError, match=r"unknown kind of rows 'pairs'.*'pair'"):
        checked(lambda m: Loss(gap(m)), rows="pairs")
    with pytest.raises(InputError, match=r"unknown measurement 'log_p'.*'logp'"):
        checked(lambda m: Loss(gap(m)), needs=("log_p",))
    checked(lambda m, state: Loss(gap(m)), unit="batch")
