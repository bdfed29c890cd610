"""Odds-ratio preference optimisation: likelihood and preference in one step, no reference.

    nll(chosen) - beta logsigmoid(log_odds_w - log_odds_l),                     arXiv 2403.07691
    log_odds = mean_lp - log(1 - exp(mean_lp)),  mean_lp = lp(y|x) / |y|

As in the paper nll is the mean over the tokens of each chosen answer, here averaged over the
tokens of the step. log(1 - exp(a)) is computed without cancellation, and mean_lp is kept below
-1e-6, where the odds of a certain answer would be infinite.

Shapes: U pairs, K = 2 branches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from truing.core.objective import Loss, Measurements, objective, reward_metrics
from truing.train.supervised.sft import nll

CERTAIN = -1e-6


def log1m_exp(a: Tensor) -> Tensor:
    """log(1 - exp(a)) for a < 0 without loss of digits."""
    small = a > -math.log(2)
    # Both branches are evaluated, so each gets an argument that keeps its gradient finite.
    near = (-torch.expm1(torch.where(small, a, -1.0))).log()
    far = torch.log1p(-torch.exp(torch.where(small, -1.0, a)))
    return torch.where(small, near, far)


def log_odds(mean_lp: Tensor) -> Tensor:
    """log p / (1-p) of p = exp(mean_lp)."""
    a = mean_lp.clamp(max=CERTAIN)
    return a - log1m_exp(a)


@objective(paper="preference-losses", unit="pair", needs=("logp",), rows="pair")
def orpo(m: Measurements, *, beta: float = 0.1) -> Loss:
    """Odds-ratio preference optimisation: likelihood and preference in one step, no reference.

    Args:
        beta: weight of the odds-ratio term.
    """
    odds_UK = log_odds(m.mean())
    gap = Loss(-logsigmoid(odds_UK[:, 0] - odds_UK[:, 1]))
    seen = reward_metrics(*(beta * m.mean()).unbind(1))
    return Loss(gap.per_unit * beta, metrics=seen) + nll(m)
