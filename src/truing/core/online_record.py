"""One rollout of the online loop, and what is recorded of it.

Shapes: U groups, K answers of a group, T tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from truing.core.advantages import kl_tokens
from truing.core.collect import Group
from truing.core.objective import Measurements
from truing.core.online import Update

Sums = dict[str, tuple[Tensor, float]]


@dataclass(frozen=True)
class Rollout:
    """A finished rollout: its groups, all that is known of them, and what they teach."""

    number: int
    groups: Sequence[Group]
    r: Measurements
    update: Update
    counts: Mapping[str, tuple[float, float]]

    def facts(self) -> Sums:
        """What to record of it: sums over the policy's own answers, or over their tokens."""
        r, update = self.r, self.update
        own_UK, mask_UKT = r["own"], r.mask_UKT * r["own"][..., None]
        answers, tokens = float(own_UK.sum()), float(mask_UKT.sum())
        made: Sums = {
            "reward": ((r["reward"] * own_UK).sum(), answers),
            "length": (mask_UKT.sum(), answers),
            "finished": ((r["finished"] * own_UK).sum(), answers),
            "empty": ((r["empty"] * own_UK).sum(), answers),
            "entropy": (-(r["logp"] * mask_UKT).sum(), tokens),
        }
        made |= {
            n: ((c * own_UK).sum(), answers) for n, c in r.columns.items() if n[:7] == "reward/"
        }
        if "turns" in r:
            made["turns"] = ((r["turns"] * own_UK).sum(), answers)
        if "ref_logp" in r.tensors:
            kl_UKT = kl_tokens(r["logp"], r["ref_logp"]) * mask_UKT
            made["kl"] = (kl_UKT.sum(), tokens)
        flat = sum(g.flat for g in self.groups)
        skipped = 0 if update.active_U is None else int((~update.active_U.bool()).sum())
        made["flat"] = (torch.tensor(float(flat)), float(len(self.groups)))
        made["skipped"] = (torch.tensor(float(skipped)), float(len(self.groups)))
        made |= {n: (torch.tensor(a), b) for n, (a, b) in self.counts.items() if a}
        made |= {n: (v.float().sum(), float(v.numel())) for n, v in update.metrics.items()}
        return {n: (v.detach().cpu(), w) for n, (v, w) in made.items()}
