"""What each objective and online method takes changes its loss, found in the registry.

A setting that the function itself does not read is the engine's, and listed here with the reason.
Metrics do not count: what is recorded of a setting can differ where the loss has forgotten it.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from test_objectives import OBJECTIVES, defaults, made_up
from test_objectives import spec_of as objective_of
from test_online import GROUPS, ONLINE, given, rollout, settings_of
from test_online import spec_of as online_of
from torch import Tensor

from truing.core.objective import Measurements
from truing.errors import InputError
from truing.method import methods

# Of these an online method has another default than the engine, and no more.
DRAWN = {
    "answers", "batch", "critic_rate", "minibatches", "passes", "refill", "repetition_penalty",
    "temperature", "top_p",
}  # fmt: skip
ELSEWHERE = {
    **dict.fromkeys(("train/adpa top_k", "train/dckd top_k"), "how much is kept of a teacher"),
    **dict.fromkeys(("train/gkd beta", "train/gkd_on_policy beta"), "in the statistic teacher_jsd"),
    "train/mah_dpo head_rank": "of the heads that are put on",
    "train/grpo_top_kl top_k": "in the statistic ref_top_kl",
    "train/nash_md mixture_coef": "of the opponent, when answers are drawn",
    "train/salmon_ppo missing_end": "off the reward before the function is given it",
    **dict.fromkeys(("train/salmon_ppo draw", "train/salmon_ppo always"), "told the reward model"),
    **dict.fromkeys((f"train/urpo {n}" for n in ("grades", "chunk", "criteria")), "of the pool"),
}
# What must be set beside a setting for it to count.
BESIDE: dict[str, dict[str, object]] = {
    "train/f_dpo divergence_alpha": {"divergence": "alpha"},
    "train/weak_to_strong_confidence warmup_share": {"total_steps": 10},
    "train/ppo_max critic_until": {"critic_rollouts": 10, "critic_until": 20.0},
}


def others(kind: object, value: object) -> tuple[list[object], bool]:
    """Other values of a setting, and whether each of them must count, or one of them."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = (k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        return [v for v in typing.get_args(kind) if v != value], True
    if kind is bool:
        return [not value], True
    if kind is float:
        number = float(str(value or 0.0))
        return [1.7 * number, 0.05 * number, number + 0.3], False
    if kind is int:
        return [int(str(value)) + 1], False
    return [{"a": 3.0} if typing.get_origin(kind) is dict else "other"], False


def loss_of(name: str, values: Mapping[str, object]) -> Tensor:
    """The loss of two steps, the second with what the first one kept."""
    spec = objective_of(name)
    m, state, made = made_up(spec), None, []
    known = {n: c.nan_to_num(neginf=0.4) for n, c in m.columns.items()}  # -inf: not given
    m = replace(m, columns=known)
    for _ in range(2):
        loss = spec(m, values, state)
        state = loss.state
        made.append(loss.total())
    return torch.stack(made)


def moved(m: Measurements) -> Measurements:
    """What the model says lies far from what it said when it drew the answers."""
    source = torch.Generator().manual_seed(5)
    far = {n: m[f"old_{n}"] + torch.randn(m.mask_UKT.shape, generator=source) * m.mask_UKT
           for n in ("logp", "values")}  # fmt: skip
    return m.having(**far)


def update_of(name: str, values: Mapping[str, object], shift: float = 0.0) -> Tensor:
    """The same of two rollouts; `shift` is how much likelier each token has become."""
    spec = online_of(name)
    r, state, made = rollout(spec), None, []
    for _ in range(2):
        update = spec(r, values, state)
        state = update.state
        m = moved(given(r, update, range(GROUPS)))
        m = m.having(logp=m["logp"] + shift * m.mask_UKT)
        made.append(update.loss(m).total().detach())
    return torch.stack(made)


def counts(name: str, setting: str) -> bool:
    """Whether the loss depends on the setting."""
    plain = defaults(objective_of(name)) if name in OBJECTIVES else settings_of(online_of(name))
    says = loss_of if name in OBJECTIVES else update_of
    plain |= BESIDE.get(f"{name} {setting}", {})
    first = says(name, plain)
    values, every = others(methods[name].settings[setting].type, plain[setting])
    differ: list[bool] = []
    for value in values:
        try:
            differ.append(not torch.equal(first, says(name, plain | {setting: value})))
        except InputError:  # a value that is refused says nothing of the loss
            differ.append(False)
    return all(differ) if every else any(differ)


def taken(name: str) -> set[str]:
    return set((objective_of(name) if name in OBJECTIVES else online_of(name)).settings)


@pytest.mark.parametrize("name", [n for n in (*OBJECTIVES, *ONLINE) if taken(n)])
def test_every_setting_counts(name: str) -> None:
    free = {s for s in taken(name) if f"{name} {s}" in ELSEWHERE}
    free |= DRAWN & taken(name) if name in ONLINE else set()
    assert {s for s in taken(name) if counts(name, s)} == taken(name) - free


def test_what_is_listed_is_there() -> None:
    listed = [key.split(" ") for key in (*ELSEWHERE, *BESIDE)]
    assert all(setting in taken(name) for name, setting in listed)


@pytest.mark.parametrize("name", [n for n in ONLINE if {"clip_low", "clip_high"} <= taken(n)])
def test_each_clip_is_on_its_side(name: str) -> None:
    """Where all tokens are less likely than they were, or all more."""
    plain = settings_of(online_of(name)) | {"beta": 0.0}
    for shift, side in ((-9.0, "clip_low"), (9.0, "clip_high")):
        first = update_of(name, plain, shift)
        for clip in ("clip_low", "clip_high"):
            wider = plain | {clip: 3 * float(str(plain[clip]))}
            assert torch.equal(first, update_of(name, wider, shift)) is (clip != side)
