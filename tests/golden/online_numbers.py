"""Two groups of two answers with made-up numbers, as tensors and as plain lists.

The expected values of the golden tests are worked out from the plain numbers with `math` alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from truing.core.objective import Loss, Measurements
from truing.core.online import Update

OLD = [([-0.5, -1.25, -2.0], [-1.5, -0.75]), ([-3.0], [-0.25, -0.5, -1.0, -2.5])]
NEW = [([-0.3, -1.5, -2.0], [-1.75, -0.5]), ([-2.5], [-0.5, -0.25, -1.125, -2.0])]
REF = [([-0.75, -1.5, -1.0], [-1.0, -1.0]), ([-4.5], [-0.5, -1.0, -0.25, -0.25])]
VALUE = [([0.5, 0.25, 1.0], [-0.5, 0.75]), ([0.125], [1.0, 0.5, -0.25, 2.0])]
ENTROPY = [([1.2, 0.3, 2.0], [0.3, 1.5]), ([0.9], [2.0, 0.1, 0.7, 1.1])]
REWARD = [[1.0, 3.0], [0.5, -1.0]]
Rows = list[tuple[list[float], list[float]]]
ANSWERS = [(u, k) for u in range(2) for k in range(2)]


def tensor(rows: Rows, fill: float = 9.0) -> Tensor:
    """[2, 2, 4] with `fill` at padding, which nothing may look at."""
    return torch.tensor([[y + [fill] * (4 - len(y)) for y in row] for row in rows])


def ones(rows: Rows = OLD) -> Tensor:
    return torch.tensor([[[1.0] * len(y) + [0.0] * (4 - len(y)) for y in row] for row in rows])


def rollout(
    own: list[list[float]] | None = None, **columns: list[list[float]] | list[float]
) -> Measurements:
    """What a method is given."""
    tensors = {"logp": tensor(OLD), "ref_logp": tensor(REF), "values": tensor(VALUE)}
    tensors["old_entropy"] = tensor(ENTROPY)
    found = {"reward": REWARD, "finished": [[1.0, 1.0], [0.0, 1.0]]} | columns
    found["own"] = own or [[1.0, 1.0], [1.0, 1.0]]
    return Measurements(ones(), tensors, {n: torch.tensor(c) for n, c in found.items()})


def loss_of(update: Update, r: Measurements, now: Rows = NEW, **tensors: Tensor) -> Loss:
    """The update's loss where the model says `now`; its `logp` takes gradients."""
    fixed = {n: t for n, t in update.tensors.items() if t.dim() == 3}
    numbers = {n: t for n, t in update.tensors.items() if t.dim() < 3}
    fixed |= {"old_logp": r["logp"], "old_values": r["values"], "ref_logp": r["ref_logp"]}
    moved = {"logp": tensor(now).requires_grad_(), "values": tensor(VALUE), **tensors}
    given = Measurements(r.mask_UKT, {**fixed, **moved}, {**r.columns, **numbers})
    made = update.loss(given)
    object.__setattr__(made, "given", given)
    return made


def gradient(loss: Loss) -> Tensor:
    """d loss / d logp, [2, 2, 4]."""
    logp: Tensor = loss.given["logp"]  # type: ignore[attr-defined]
    loss.total().backward()
    assert logp.grad is not None
    return logp.grad


def total(loss: Loss) -> float:
    return float(loss.total().detach())


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def std(values: list[float]) -> float:
    """With n - 1."""
    m = mean(values)
    return math.sqrt(sum((v - m) ** 2 for v in values) / (len(values) - 1))


# GRPO's advantages; in a group of two the mean is in the middle: +-(half the gap) / (std + 1e-4).
A = [[(r - mean(g)) / (std(g) + 1e-4) for r in g] for g in REWARD]


def ratio(u: int, k: int, t: int) -> float:
    return math.exp(NEW[u][k][t] - OLD[u][k][t])


def surrogate(x: float, a: float, low: float, high: float) -> float:
    return -min(x * a, min(max(x, 1 - low), 1 + high) * a)


def k3(u: int, k: int, t: int, now: Rows = NEW) -> float:
    gap = REF[u][k][t] - now[u][k][t]
    return math.exp(gap) - gap - 1


def tokens(u: int, k: int) -> range:
    return range(len(OLD[u][k]))
