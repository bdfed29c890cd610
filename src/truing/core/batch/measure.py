"""From trees to `Measurements`: the model's values, the reference's, the rows' numbers.

Shapes: U units, K branches, T loss tokens of a branch, C rows of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from truing.core.batch.training_rows import Unit
from truing.core.logprob import Rows, statistic
from truing.core.objective import Measurements
from truing.core.tree import Node


@statistic
def ref_kl_vocab(rows: Rows, grad: bool) -> tuple[Tensor, Tensor | None]:
    """KL(reference || model) over the vocabulary; extras: "ref_logp" [C, V]."""
    ref_logp_CV = rows.extras["ref_logp"]
    p_ref_CV = ref_logp_CV.exp()
    value_C = (p_ref_CV * (ref_logp_CV - rows.logp_CV)).sum(1)
    return value_C, rows.logp_CV.exp().sub_(p_ref_CV) if grad else None


def mismatched(units: Sequence[Unit], longest: int) -> list[tuple[int, ...]]:
    """For each unit the first answer of another, to another prompt where it can be.

    The answers are shifted, in the order of the units' contents, by as many as the most units that
    share a prompt: so each is used once, and the order of the units does not matter. Where one
    prompt is that of more than half of the units, each gets that of the next one that has another
    prompt, and where all have one, the next one's. An answer is cut where prompt and answer would
    be longer than `longest` tokens.
    """
    ranks = sorted(range(len(units)), key=lambda i: units[i].content)
    count = len(ranks)
    most = max(Counter(unit.prompt for unit in units).values())
    made: dict[int, tuple[int, ...]] = {}
    for at, mine in enumerate(ranks):
        prompt = units[mine].prompt
        other = ranks[(at + most) % count]
        if 2 * most > count:
            following = [ranks[(at + k) % count] for k in range(1, count + 1)]
            other = next((j for j in following if units[j].prompt != prompt), following[0])
        made[mine] = units[other].answers[0][: longest - len(prompt)]
    return [made[i] for i in range(count)]


def columns_of(
    units: Sequence[Unit], width: int, names: Sequence[str], device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Numeric columns as [U], or [U, width] where a row has one number for each branch or step."""
    made: dict[str, Tensor] = {}
    for name in names:
        values = [u.numbers[name] for u in units]
        if any(isinstance(v, Sequence) for v in values):
            rows = [list(v) if isinstance(v, Sequence) else [v] * width for v in values]
            wide = max(width, *map(len, rows))
            padded = [r + [0.0] * (wide - len(r)) for r in rows]
            made[name] = torch.tensor(padded, dtype=torch.float32, device=device)
        else:
            made[name] = torch.tensor(values, dtype=torch.float32, device=device)
    return made


def lengths(trees: Sequence[Node]) -> Tensor:
    """Number of loss tokens of each branch, [U, K]; 0 where a branch does not exist."""
    # The first token of a row is predicted by nothing.
    found = [[sum(loss[1:]) for _, loss in tree.rows()] for tree in trees]
    width = max(map(len, found))
    return torch.tensor([row + [0] * (width - len(row)) for row in found])


def blank(
    trees: Sequence[Node], needs: Sequence[str], columns: Mapping[str, Tensor]
) -> Measurements:
    """Measurements of the right shape and mask before any model has run; each value is -1.

    Weights of a loss are asked of it, since they depend on masks and columns only.
    """
    length_UK = lengths(trees)
    place_T = torch.arange(max(1, int(length_UK.max())))
    mask_UKT = (place_T < length_UK[:, :, None]).float()
    return Measurements(mask_UKT, dict.fromkeys(needs, -mask_UKT), columns)


def fitted(value_UKT: Tensor, width: int, length: int) -> Tensor:
    """`value_UKT` padded with zeros to `width` branches and `length` tokens."""
    _, k, t = value_UKT.shape
    return torch.nn.functional.pad(value_UKT, (0, length - t, 0, width - k))


def joined(parts: Sequence[Measurements]) -> Measurements:
    """The units of all parts, detached; padded to the widest and longest."""
    width = max(p.mask_UKT.shape[1] for p in parts)
    length = max(p.mask_UKT.shape[2] for p in parts)

    def join(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([fitted(t.detach(), width, length) for t in tensors])

    def join_column(tensors: Sequence[Tensor]) -> Tensor:
        wide = [
            t if t.dim() == 1 else torch.nn.functional.pad(t, (0, width - t.shape[1]))
            for t in tensors
        ]
        return torch.cat(wide)

    return Measurements(
        join([p.mask_UKT for p in parts]),
        {n: join([p.tensors[n] for p in parts]) for n in parts[0].tensors},
        {n: join_column([p.columns[n] for p in parts]) for n in parts[0].columns},
    )
