"""One pass over the trees of a rollout, and the answers in them that nobody drew.

Log-probabilities of drawn answers are of the distribution that they were drawn from, at its
temperature. An answer that a row brought along was drawn from none: imitating it raises its
likelihood under the model as it is, at temperature 1, as training on such answers alone does.

Shapes: U groups, K answers of a group, T tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from truing.core.batch.measure import fitted
from truing.core.rl.answers import Group
from truing.core.trainer import distributed
from truing.core.training import State
from truing.core.tree import Node, Packed, pack

Measured = Callable[[Packed, Sequence[Group]], State]


def shape(trees: Sequence[Node]) -> tuple[int, int]:
    """Branches of the widest tree, and loss tokens of the longest branch."""
    rows = [[sum(loss[1:]) for _, loss in tree.rows()] for tree in trees]
    return max(map(len, rows)), max(n for row in rows for n in row)


def swept(groups: Sequence[Group], budget: int, device: torch.device, measured: Measured) -> State:
    """Values of all groups' tokens by name, each [U, K, T]; the processes share the work.

    Args:
        groups: of a rollout.
        budget: tokens of a micro-batch.
        device: of the model.
        measured: gives the values of a micro-batch, which holds these groups.
    """
    trees = [g.tree() for g in groups]
    width, length = shape(trees)
    own = distributed.share([t.size for t in trees])
    packs = pack(trees[own], budget, share=True, device=device) if trees[own] else []
    starts = accumulate(map(len, packs), initial=own.start)
    some = [measured(p.to(device), groups[a : a + len(p)]) for p, a in zip(packs, starts)]
    found = distributed.gathered(some)
    return {n: torch.cat([fitted(f[n], width, length) for f in found]) for n in found[0]}


def undrawn(groups: Sequence[Group], packed: Packed) -> Tensor:
    """True [U, K] for answers of a micro-batch's groups that the policy did not draw."""
    made_UK = torch.zeros(packed.mask_UKT.shape[:2], dtype=torch.bool)
    for u, group in enumerate(groups):
        made_UK[u, : len(group.answers)] = torch.tensor([not a.own for a in group.answers])
    return made_UK.to(packed.mask_UKT.device)
