"""One rollout of the online loop, and what is recorded of it.

Shapes: U groups, K answers of a group, T tokens of an answer.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from truing.core.advantages import kl_tokens
from truing.core.collect import Group
from truing.core.objective import Measurements
from truing.core.online import Update
from truing.errors import Diverged

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
        # What the method itself watches goes before: its divergence may be another estimate.
        made |= {n: (v.float().sum(), float(v.numel())) for n, v in update.metrics.items()}
        return {n: (v.detach().cpu(), w) for n, (v, w) in made.items()}

    def check(self, where: str) -> None:
        """Raise Diverged where what the rollout teaches is not finite."""
        for name, tensor in self.update.tensors.items():
            if not tensor.isfinite().all():
                raise Diverged(
                    f"{name} of the rollout is not finite",
                    where=where,
                    seen={"reward": self.r["reward"].tolist()},
                    fix="Look at the rewards, or lower the learning rate",
                )

    def warn(self, name: str) -> bool:
        """Say on stderr that a monitor of the method `name` raises an alarm; False where none does.

        Its metric "alarm" is not 0 then.
        """
        seen = self.update.metrics
        if "alarm" not in seen or not bool(seen["alarm"].any()):
            return False
        facts = {n: float(s) / w for n, (s, w) in self.facts().items() if n in ("kl", "length")}
        told = f"{facts['length']:.4g} tokens an answer"
        told += f", KL {facts['kl']:.3g} nats a token" if "kl" in facts else ""
        print(
            f"{name}: warning: rollout {self.number + 1} looks like collapse ({told}): answers "
            "have left the reference or grown long, whatever the reward says",
            file=sys.stderr,
        )
        return True
