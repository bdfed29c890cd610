"""What each objective and online method takes changes its loss, found in the registry.

A setting that the function itself does not read is read by whatever else its declaration names: a
statistic, a teacher, a pool, a reward model, the engine. One that counts only beside another
setting is tried beside each of them. Metrics do not count: what is recorded of a setting can differ
where the loss has forgotten it.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import textwrap
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

from truing import catalogue
from truing.core.bounds import check_bounds
from truing.core.logprob import STATISTICS
from truing.core.objective import WITHIN, Measurements
from truing.core.online import TOP_KL
from truing.errors import InputError
from truing.method import Method, methods


def named_by(function: object) -> set[str]:
    """Variables and texts in a function's code, but for what it raises: what it reads of settings
    is among them."""
    source = inspect.getsource(typing.cast("types.FunctionType", function))
    tree = ast.parse(textwrap.dedent(source))
    raised = {n for one in ast.walk(tree) if isinstance(one, ast.Raise) for n in ast.walk(one)}
    read = [n for n in ast.walk(tree) if n not in raised]
    texts = {n.value for n in read if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return texts | {n.id for n in read if isinstance(n, ast.Name)}


def component(kind: str, name: str) -> set[str]:
    """Settings that a component takes."""
    return set(Method(catalogue.components(kind)[name]).settings)


def elsewhere(name: str) -> set[str]:
    """Settings that something else than the method's function reads, by the declaration."""
    if name in OBJECTIVES:
        spec = objective_of(name)
        of_statistics = [named_by(STATISTICS[n]) for n in spec.needs if n in STATISTICS]
        found = {"top_k"} if "top" in spec.teachers.values() else set()
        found |= {"head_rank"} if spec.heads else set()
        return found.union(*of_statistics) & taken(name)
    online = online_of(name)
    # Those of WITHIN stand among the engine's for their words alone: functions read them.
    found = set(online.engine) - set(WITHIN) - named_by(online.update)
    found |= {"top_k"} if TOP_KL in online.needs else set()
    found |= {"mixture_coef"} if online.opponent == "mixture" else set()
    found |= component("pool", online.pools) if online.pools else set()
    found |= component("reward", online.follows) if online.follows else set()
    return found & taken(name)


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
        return [1.7 * number, 0.05 * number, number + 0.3, number + 20.0], False
    if kind is int:
        return [int(str(value)) + 1, int(str(value)) + 10], False
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


def counts(name: str, setting: str, plain: dict[str, object]) -> bool:
    """Whether the loss depends on the setting, the others being `plain`."""
    says, spec = (
        (loss_of, objective_of(name)) if name in OBJECTIVES else (update_of, online_of(name))
    )
    first = says(name, plain)
    values, every = others(methods[name].settings[setting].type, plain[setting])
    differ: list[bool] = []
    for value in values:
        try:
            check_bounds({setting: value}, spec.within)
            differ.append(not torch.equal(first, says(name, plain | {setting: value})))
        except InputError:  # a value that is refused says nothing of the loss
            differ.append(False)
    return all(differ) if every else any(differ)


def counts_beside(name: str, setting: str) -> bool:
    """The same by default, or beside another value of another setting."""
    plain = defaults(objective_of(name)) if name in OBJECTIVES else settings_of(online_of(name))
    if counts(name, setting, plain):
        return True
    for other in sorted(taken(name) - elsewhere(name) - {setting}):
        for value in others(methods[name].settings[other].type, plain[other])[0]:
            with contextlib.suppress(InputError):
                if counts(name, setting, plain | {other: value}):
                    return True
    return False


def taken(name: str) -> set[str]:
    return set((objective_of(name) if name in OBJECTIVES else online_of(name)).settings)


@pytest.mark.parametrize("name", [n for n in (*OBJECTIVES, *ONLINE) if taken(n)])
def test_every_setting_counts(name: str) -> None:
    must = taken(name) - elsewhere(name)
    assert {s for s in must if counts_beside(name, s)} == must


@pytest.mark.parametrize("name", [n for n in ONLINE if {"clip_low", "clip_high"} <= taken(n)])
def test_each_clip_is_on_its_side(name: str) -> None:
    """Where all tokens are less likely than they were, or all more."""
    plain = settings_of(online_of(name)) | {"beta": 0.0}
    for shift, side in ((-9.0, "clip_low"), (9.0, "clip_high")):
        first = update_of(name, plain, shift)
        for clip in ("clip_low", "clip_high"):
            wider = plain | {clip: 3 * float(str(plain[clip]))}
            assert torch.equal(first, update_of(name, wider, shift)) is (clip != side)
