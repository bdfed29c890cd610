"""Equivalences between methods, on made-up inputs: what one is in the limit of another."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import pytest
import torch
from online_numbers import OLD, gradient, loss_of, rollout
from torch import Tensor

from truing.core.objective import Loss, Measurements
from truing.core.online import advantages, online_of
from truing.method import methods
from truing.train.preference.aot import aot
from truing.train.preference.apo import apo_down, apo_zero
from truing.train.preference.bco import bco_pair
from truing.train.preference.dpo import cdpo, dpo, dpo_norm, hinge, robust_dpo
from truing.train.preference.exo import exo
from truing.train.preference.ld_dpo import ld_dpo
from truing.train.preference.nca import nca
from truing.train.preference.simpo import alphapo, simpo
from truing.train.preference.sppo import sppo

Objective = Callable[[Measurements], Loss]


def drawn(seed: int) -> Measurements:
    """Six pairs of answers of one to seven tokens."""
    source = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (6, 2), generator=source)
    mask = (torch.arange(7) < lengths[..., None]).float()
    values = [-3 * torch.rand(6, 2, 7, generator=source) * mask for _ in range(2)]
    tensors = {"logp": values[0].requires_grad_(), "ref_logp": values[1]}
    return Measurements(
        mask, tensors, {"win_chosen": torch.ones(6), "win_rejected": torch.zeros(6)}
    )


def found(objective: Objective, m: Measurements) -> tuple[Tensor, Tensor]:
    """Loss of the step and its gradient in the log-probabilities."""
    leaf = m.logp_UKT.detach().clone().requires_grad_()
    total = objective(m.having(logp=leaf)).total()
    (slope,) = torch.autograd.grad(total, leaf)
    return total.detach(), slope


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(
            partial(cdpo, beta=0.4, label_smoothing=0.0), partial(dpo, beta=0.4), id="cdpo"
        ),
        pytest.param(
            partial(robust_dpo, beta=0.4, label_smoothing=0.0), partial(dpo, beta=0.4), id="robust"
        ),
        pytest.param(partial(ld_dpo, beta=0.4, alpha=1.0), partial(dpo, beta=0.4), id="ld_dpo"),
        pytest.param(
            partial(alphapo, beta=1.5, gamma=0.3, alpha=0.0),
            partial(simpo, beta=1.5, gamma=0.3),
            id="alphapo",
        ),
    ],
)
def test_one_is_the_other(one: Objective, other: Objective, seed: int) -> None:
    m = drawn(seed)
    for a, b in zip(found(one, m), found(other, m), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_sorting_one_pair_changes_nothing() -> None:
    m = drawn(5)
    for i in range(6):
        alone = Measurements(m.mask_UKT[[i]], {n: t[[i]] for n, t in m.tensors.items()})
        for a, b in zip(found(aot, alone), found(dpo, alone), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("loss", [dpo, cdpo, robust_dpo, hinge, exo])
def test_only_the_difference_of_both_answers_counts(loss: Objective) -> None:
    assert torch.allclose(loss(drawn(6)).total(), loss(shifted(drawn(6))).total(), atol=1e-5)


@pytest.mark.parametrize("loss", [nca, bco_pair, apo_zero, apo_down, sppo, dpo_norm])
def test_a_shift_of_both_answers_counts(loss: Objective) -> None:
    loss = partial(loss, beta=1.0)
    here, there = (found(loss, m)[0] for m in (drawn(6), shifted(drawn(6))))
    assert (here - there).abs() > 1e-2


def shifted(m: Measurements) -> Measurements:
    """The same with both answers of each pair likelier by the same factor."""
    shift = torch.zeros_like(m.logp_UKT)
    shift[:, :, 0] = 2.5
    return m.having(logp=m.logp_UKT + shift)


# Policy gradients


SURROGATES = [
    n
    for n in methods
    if methods[n].entry.kind == "online" and hasattr(methods[n].module, "clipped")
]


def test_the_surrogates_are_found() -> None:
    names = {methods[n].name for n in SURROGATES}
    assert {"grpo", "dr_grpo", "dapo", "gdpo", "gspo", "ppo", "reinforce_plus_plus"} <= names


@pytest.mark.parametrize("name", SURROGATES)
def test_at_ratio_one_the_gradient_is_reinforce(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clipped surrogate against -A log pi with the same advantages and the same averages."""
    method = methods[name]
    spec = online_of(method.declared)
    values = {n: p.default for n, p in spec.settings.items()} | {"beta": 0.0, "critic_rollouts": 0}
    values |= {"clip_ratio": 0.2} if "clip_ratio" in values else {}
    none = [[0.0, 0.0], [0.0, 0.0]]
    r = rollout(sort=none, unread=none, **{"reward/a": [[1.0, 3.0], [0.5, -1.0]]})
    r = r.having(entropy=torch.zeros_like(r.mask_UKT), greedy=torch.tensor([0.5, 0.25]))

    def slope() -> Tensor:
        return gradient(loss_of(spec(r, values), r, now=OLD, entropy=r["entropy"]))

    surrogate = slope()

    def plain(m: Measurements, *_: object, **__: object) -> Tensor:
        return -advantages(m) * m.logp_UKT

    monkeypatch.setattr(importlib.import_module(method.entry.module), "clipped", plain)
    assert surrogate.abs().sum() > 0
    assert torch.allclose(surrogate, slope(), atol=1e-6)
