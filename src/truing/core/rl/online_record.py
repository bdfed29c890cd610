"""One rollout of the online loop, and what is recorded of it.

Shapes: U groups, K answers of a group, T tokens of an answer.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from truing.core.objective import Measurements
from truing.core.online import GREEDY, Update
from truing.core.rl.advantages import DROPPED, kl_tokens
from truing.core.rl.answers import Group
from truing.core.rl.swept import shape
from truing.errors import Diverged

Sums = dict[str, tuple[Tensor, float]]


def known(
    groups: Sequence[Group], given: Mapping[str, Tensor], *, pooled: bool, played: bool
) -> Measurements:
    """The groups of a rollout as their method sees them, on the CPU.

    Args:
        given: what was measured of them besides, [U, K, T] each.
        pooled: their terms are a pool's, which are facts about rows and not parts of a reward.
        played: their answers are episodes.
    """
    width, length = shape([g.tree() for g in groups])
    mask_UKT = torch.zeros(len(groups), width, length)
    logp_UKT, paid_UKT = torch.zeros_like(mask_UKT), torch.zeros_like(mask_UKT)
    for u, group in enumerate(groups):
        for k, answer in enumerate(group.answers):
            n = len(answer.logprobs)  # replies between several turns have none
            mask_UKT[u, k, :n] = 1.0
            logp_UKT[u, k, :n] = torch.tensor(answer.logprobs)
            paid_UKT[u, k, : len(answer.paid)] = torch.tensor(answer.paid)
    answers = [g.answers for g in groups]
    of = "" if pooled else "reward/"
    columns: dict[str, Sequence[object]] = {
        "reward": [list(g.reward) for g in groups],
        "finished": [[float(a.finished) for a in some] for some in answers],
        "own": [[float(a.own) for a in some] for some in answers],
        "empty": [[float(not a.text) for a in some] for some in answers],
        **{of + n: [list(g.terms[n]) for g in groups] for n in groups[0].terms},
    }
    if played:
        columns["turns"] = [[float(a.turns) for a in some] for some in answers]
    if groups[0].greedy is not None:
        columns[GREEDY] = [g.greedy for g in groups]
    tensors = {"logp": logp_UKT, **given}
    if any(a.paid for some in answers for a in some):
        tensors["token_reward"] = paid_UKT
    return Measurements(mask_UKT, tensors, {n: torch.tensor(c) for n, c in columns.items()})


def flat(r: Measurements) -> Tensor:
    """1.0 for groups in which all answers of the policy have one reward, a greedy one too, [U]."""
    own_UK = r["own"] > 0
    most_U = r["reward"].masked_fill(~own_UK, -torch.inf).amax(1)
    least_U = r["reward"].masked_fill(~own_UK, torch.inf).amin(1)
    if GREEDY in r:
        most_U, least_U = most_U.maximum(r[GREEDY]), least_U.minimum(r[GREEDY])
    return (most_U == least_U).float()


def observed(r: Measurements) -> Sums:
    """What is recorded of answers: sums over the policy's own, or over their tokens."""
    own_UK, mask_UKT = r["own"], r.mask_UKT * r["own"][..., None]
    answers, tokens = float(own_UK.sum()), float(mask_UKT.sum())
    made: Sums = {
        "reward": ((r["reward"] * own_UK).sum(), answers),
        "length": (mask_UKT.sum(), answers),
        "finished": ((r["finished"] * own_UK).sum(), answers),
        "empty": ((r["empty"] * own_UK).sum(), answers),
        "entropy": (-(r["logp"] * mask_UKT).sum(), tokens),
    }
    made |= {n: ((c * own_UK).sum(), answers) for n, c in r.columns.items() if n[:7] == "reward/"}
    if "turns" in r:
        made["turns"] = ((r["turns"] * own_UK).sum(), answers)
    if "ref_logp" in r.tensors:
        kl_UKT = kl_tokens(r["logp"], r["ref_logp"]) * mask_UKT
        made["kl"] = (kl_UKT.sum(), tokens)
    return made


@dataclass(frozen=True)
class Rollout:
    """A finished rollout: its groups, all that is known of them, and what they teach."""

    number: int
    groups: Sequence[Group]
    r: Measurements
    update: Update
    counts: Mapping[str, tuple[float, float]]

    def facts(self) -> Sums:
        """What to record of it: of its answers, of its groups, and what the method watches."""
        r, update = self.r, self.update
        made = observed(r)
        skipped = 0 if update.active_U is None else int((~update.active_U.bool()).sum())
        if GREEDY in r or bool((r["own"].sum(1) > 1).any()):  # there is something to compare with
            made["flat"] = (flat(r).sum(), float(len(self.groups)))
        made["skipped"] = (torch.tensor(float(skipped)), float(len(self.groups)))
        made |= {n: (torch.tensor(a), b) for n, (a, b) in self.counts.items() if a}
        # What the method itself watches goes before: its divergence may be another estimate.
        made |= {n: (v.float().sum(), float(v.numel())) for n, v in update.metrics.items()}
        return {n: (v.detach().cpu(), w) for n, (v, w) in made.items()}

    def given(self, at: Sequence[int], fresh: Measurements, reused: bool) -> Measurements:
        """What a loss sees: `fresh` values of the groups `at` beside everything fixed about them.

        Args:
            reused: several updates are made with it, so that the policy moves on from its answers.
        """
        r, index = self.r, torch.tensor(list(at), device=fresh.mask_UKT.device)
        _, width, length = fresh.mask_UKT.shape
        fixed = {n: t for n, t in self.update.tensors.items() if t.dim() == 3}
        numbers = {n: t for n, t in self.update.tensors.items() if t.dim() < 3}
        fixed |= {n: r.tensors[n] for n in ("ref_logp",) if n in r.tensors}
        if "values" in r.tensors:
            fixed["old_values"] = r["values"]
        if reused:
            fixed["old_logp"] = r["logp"]
        cut = {n: t[index, :width, :length] for n, t in fixed.items()}
        cut.setdefault("old_logp", fresh["logp"].detach())
        columns = {n: c[index] for n, c in {**r.columns, **numbers}.items()}
        columns = {n: c[:, :width] if c.dim() > 1 else c for n, c in columns.items()}
        return Measurements(fresh.mask_UKT, {**fresh.tensors, **cut}, columns)

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

    def warn(self, name: str, known: set[str]) -> None:
        """Say on stderr what is wrong with a rollout of the method `name`, each thing once.

        Its metric "alarm" is not 0 where the answers look like collapse, "dropped" 1 throughout
        where none of them is learnt from; no group is active where none has an advantage.

        Args:
            known: metrics whose warnings have been said; these here are added.
        """
        seen, said = self.update.metrics, dict[str, str]()
        if "alarm" in seen and bool(seen["alarm"].any()):
            said["alarm"] = self._collapsed()
        if DROPPED in seen and bool(seen[DROPPED].all()):
            said[DROPPED] = self._cut_off()
        elif self.update.active_U is not None and not bool(self.update.active_U.any()):
            said["skipped"] = self._equal()
        for metric, text in said.items():
            if metric not in known:
                print(f"{name}: warning: {text}", file=sys.stderr)
        known.update(said)

    def _collapsed(self) -> str:
        facts = {n: float(s) / w for n, (s, w) in self.facts().items() if n in ("kl", "length")}
        told = f"{facts['length']:.4g} tokens an answer"
        told += f", KL {facts['kl']:.3g} nats a token" if "kl" in facts else ""
        return (
            f"rollout {self.number + 1} looks like collapse ({told}): answers have left the "
            "reference or grown long, whatever the reward says"
        )

    def _equal(self) -> str:
        own = self.r["reward"][self.r["own"] > 0]
        least, most = float(own.min()), float(own.max())
        each = f"{least:.4g}" if least == most else f"{least:.4g} to {most:.4g}"
        why = "all answers of a group have one reward" if flat(self.r).all() else "no advantage"
        return (
            f"nothing is learnt from rollout {self.number + 1} ({why}; rewards are {each}): use a "
            "reward that tells answers apart, more answers, or prompts that some of them get right"
        )

    def _cut_off(self) -> str:
        count = self.update.metrics[DROPPED].numel()
        answers = (a for group in self.groups for a in group.answers)
        limits = Counter(a.limit for a in answers if not a.finished)
        return (
            f"all {count} answers of rollout {self.number + 1} were cut off and drop_unfinished "
            "leaves such out: nothing is learnt from it; raise "
            + " and ".join(name for name, _ in limits.most_common())
        )
