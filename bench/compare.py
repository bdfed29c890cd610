"""Whether two sides computed the same, and how the last line reports it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LOSS_AGREES, NORM_AGREES, COSINE_AGREES = 1e-4, 1e-3, 0.999
TINY = 1e-12


def largest_difference(
    ours: Sequence[float], theirs: Sequence[float], *, least: float = TINY
) -> float:
    """Largest |a - b| / max(|b|, least) over the steps; infinite when their numbers differ."""
    if len(ours) != len(theirs) or not ours:
        return math.inf
    return max(abs(a - b) / max(abs(b), least) for a, b in zip(ours, theirs, strict=True))


def cosine(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    start: Mapping[str, Tensor] | None = None,
) -> float:
    """Cosine between two sets of tensors, or between their changes since `start`."""
    if set(ours) != set(theirs):
        raise ValueError(f"not the same tensors: {sorted(set(ours) ^ set(theirs))[:4]}")
    dot = first = second = 0.0
    for name, a in ours.items():
        b = theirs[name].double()
        a = a.double()
        if start is not None:
            a, b = a - start[name].double(), b - start[name].double()
        dot += float((a * b).sum())
        first += float((a * a).sum())
        second += float((b * b).sum())
    return dot / math.sqrt(first * second) if first and second else 0.0


def agree(line: Mapping[str, object]) -> bool:
    """Whether the row counts: losses, gradient norms and final adapters are the same."""

    def number(name: str) -> float:
        return float(line[name])  # type: ignore[arg-type]

    return (
        number("max_loss_rel_diff") <= LOSS_AGREES
        and number("max_gradnorm_rel_diff") <= NORM_AGREES
        and number("adapter_cosine") >= COSINE_AGREES
    )


def fastest(runs: Mapping[str, Mapping[str, object]]) -> str:
    """Name of the run that took least time; a ValueError when none ended."""
    times = {n: float(r["seconds"]) for n, r in runs.items() if "seconds" in r}  # type: ignore[arg-type]
    if not times:
        raise ValueError("no run ended: " + "; ".join(str(r.get("error")) for r in runs.values()))
    return min(times, key=times.__getitem__)


def rounded(line: Mapping[str, object]) -> dict[str, object]:
    """The line with six digits of each number."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()}
