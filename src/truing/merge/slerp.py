"""SLERP: go from one model's weights to another's along an arc, tensor by tensor.

With Omega the angle between the two tensors of a name, each as one long vector,

    theta = sin((1 - t) Omega) / sin(Omega) theta_1  +  sin(t Omega) / sin(Omega) theta_2

A straight line between them would pass nearer to 0 than either lies; the arc keeps the length of
two vectors of one length. Where they point the same way (|cos Omega| > 0.9995), or one is 0, it is
the straight line. Animating Rotation with Quaternion Curves (Shoemake, SIGGRAPH 1985); on weights
of models as merging libraries have it: the angle is of unit vectors, the tensors themselves are
combined. In float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from truing.core.modelfiles.merging import merged
from truing.errors import InputError
from truing.method import method
from truing.models import Model

STRAIGHT = 0.9995  # |cos| above which the arc is as good as a line, and sin(Omega) near 0


def between(first: Tensor, second: Tensor, t: float) -> Tensor:
    """What lies at t, from 0 to 1, on the arc between two tensors, in the first one's dtype."""
    a, b = first.float(), second.float()
    lengths = float(a.norm()) * float(b.norm())
    cosine = float((a * b).sum()) / lengths if lengths else 1.0
    if abs(cosine) > STRAIGHT:
        return (a + t * (b - a)).to(first.dtype)
    angle = math.acos(cosine)
    parts = [math.sin(s * angle) / math.sin(angle) for s in (1 - t, t)]
    return (parts[0] * a + parts[1] * b).to(first.dtype)


@method(paper="three-h-merging", needs=("weights",), within={"t": (0, 1)})
def slerp(models: dict[str, Model], *, t: float = 0.5, keep: str = "") -> Model:
    """SLERP: go from one model's weights to another's along an arc, tensor by tensor.

    Args:
        models: two of one architecture and tokenizer; the first gives the name.
        t: how far from the first to the second; 0 is the first, 1 the second.
        keep: role whose run-time changes the result carries, where they differ.
    """
    where = "merge/slerp"
    if len(models) != 2:
        fix = "Merge more of them by merge/linear, or two at a time"
        raise InputError("goes between two models", where=where, seen=[*models], fix=fix)

    def combine(_: str, theta: Sequence[Tensor]) -> Tensor:
        first, second = theta
        return between(first, second, t)

    return merged(models, combine, keep=keep, where=where, facts=[t])
