"""Exponentials of log-ratios that stay finite however far a model has moved.

A loss of exp(x) overflows float32 at x = 88.7, and infinity times 0 is no number. Two ways out:
`exp_up_to` and `expm1_up_to` stand still beyond a bound, where the gradient is 0; `exp_onwards`
goes on along its tangent, for losses that must still push back from there.
"""

from __future__ import annotations

import math

from torch import Tensor

MOST = 80.0  # exp of it is finite in float32, with room for a product
FARTHEST = 20.0  # a log-ratio beyond which none is followed by its exp


def exp_up_to(x: Tensor, most: float = MOST) -> Tensor:
    """min(exp(x), exp(most)), of any shape."""
    return x.clamp(max=most).exp()


def expm1_up_to(x: Tensor) -> Tensor:
    """min(exp(x), exp(MOST)) - 1, exact near 0; of any shape."""
    return x.clamp(max=MOST).expm1()


def exp_onwards(x: Tensor) -> Tensor:
    """exp(x), beyond `FARTHEST` its tangent there; of any shape."""
    near, beyond = parted(x)
    return near.exp() + math.exp(FARTHEST) * beyond


def parted(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as the sum of what lies up to `FARTHEST` and what lies beyond it."""
    return x.clamp(max=FARTHEST), (x - FARTHEST).clamp(min=0.0)
