"""Three pairs with made-up token log-probabilities, as tensors and as plain numbers.

The expected values of the golden tests are worked out from the plain numbers with `math` alone.
"""

from __future__ import annotations

import math

import torch

from truing.core.objective import Loss, Measurements

# pair -> (chosen, rejected) -> token log-probabilities
LOGP = [
    ([-0.5, -1.25, -2.0], [-1.5, -0.75]),
    ([-3.0], [-0.25, -0.5, -1.0, -2.5]),
    ([-1.0, -1.0, -0.125, -0.375], [-2.0, -4.0, -0.625]),
]
REF = [
    ([-0.75, -1.5, -1.0], [-1.0, -1.0]),
    ([-4.5], [-0.5, -1.0, -0.25, -0.25]),
    ([-1.125, -0.5, -0.25, -2.0], [-1.0, -1.5, -1.125]),
]
OTHER = [
    ([0.02, 0.5, 0.11], [0.3, 0.07]),
    ([0.9], [0.6, 0.15, 0.33, 0.04]),
    ([0.2, 0.01, 0.7, 0.05], [0.12, 0.4, 0.08]),
]


def padded(rows: list[tuple[list[float], ...]]) -> torch.Tensor:
    """[U, K, T] with 7.0 at padding, which no loss may look at."""
    width = max(len(y) for row in rows for y in row)
    return torch.tensor([[y + [7.0] * (width - len(y)) for y in row] for row in rows])


def mask_of(rows: list[tuple[list[float], ...]]) -> torch.Tensor:
    width = max(len(y) for row in rows for y in row)
    return torch.tensor([[[1.0] * len(y) + [0.0] * (width - len(y)) for y in row] for row in rows])


def pairs(**columns: list[float]) -> Measurements:
    """The three pairs; `logp` takes gradients."""
    mask = mask_of(LOGP)
    tensors = {
        "logp": padded(LOGP).requires_grad_(),
        "ref_logp": padded(REF),
        "sum_p2": padded(OTHER),
        "ref_kl_vocab": padded(OTHER),
    }
    return Measurements(mask, tensors, {n: torch.tensor(c) for n, c in columns.items()})


def singles(labels: list[float], **columns: list[float]) -> Measurements:
    """The chosen answers alone, as rows with a label."""
    mask = mask_of(LOGP)
    tensors = {"logp": padded(LOGP).requires_grad_(), "ref_logp": padded(REF)}
    columns = {"label": labels, **columns}
    one = Measurements(mask, tensors, {n: torch.tensor(c) for n, c in columns.items()})
    return one.branches(0)


def at_reference() -> Measurements:
    """Policy equal to reference."""
    m = pairs()
    return m.having(logp=m.ref_logp_UKT.clone().requires_grad_())


def r(i: int, k: int) -> float:
    """lp - lp_ref of branch k of pair i."""
    return sum(LOGP[i][k]) - sum(REF[i][k])


def lp(i: int, k: int) -> float:
    return sum(LOGP[i][k])


def mean(i: int, k: int) -> float:
    return sum(LOGP[i][k]) / len(LOGP[i][k])


D = [r(i, 0) - r(i, 1) for i in range(3)]


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softminus(x: float) -> float:
    """-log sigmoid(x)."""
    return math.log1p(math.exp(-x))


def nll(k: int = 0) -> float:
    """Token mean over all answers of branch k."""
    return -sum(sum(row[k]) for row in LOGP) / sum(len(row[k]) for row in LOGP)


def values(loss: Loss) -> list[float]:
    return loss.per_unit.detach().tolist()


def total(loss: Loss) -> float:
    return float(loss.total().detach())
