"""Several output heads on one trunk: each a low-rank change of the vocabulary's own head.

    logits_i = W (h + U_i V_i h) = W (I + U_i V_i) h        U_i [D, r] zero at first, V_i [r, D]

W is the model's own head, which may be tied to its embeddings and is left as it is, so a head costs
2 r D numbers in place of V D and all heads agree before training. Logits are linear in the heads:
those of a blend are those of the one head W (I + sum_i w_i U_i V_i). A blend is a change of H
numbers, w, laid over the heads: the one head is made of them where the model is read, in memory or
for a folder of its own, and other weights are one more such change in its place.

Shapes: H heads, M loss tokens, D hidden size, r rank, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from truing.changes import Weights
from truing.core.files import new_folder
from truing.core.modelfiles.patches import BLEND
from truing.core.modelfiles.patches import HEADS as NAME
from truing.core.modelfiles.reach import width_of
from truing.core.weights import open_weights
from truing.errors import InputError
from truing.models import Loaded, Model


class VocabHeads(nn.Module):
    """H low-rank heads; all the model's own at first.

    Args:
        count: H.
        width: D.
        rank: r.
        seed: of V's draw.
    """

    def __init__(self, count: int, width: int, rank: int, seed: int = 0) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(seed)
        drawn = torch.empty(count, rank, width).uniform_(-1, 1, generator=source)
        self.down = nn.Parameter(drawn / math.sqrt(width))
        self.up = nn.Parameter(torch.zeros(count, width, rank))

    def forward(self, rows_MD: Tensor, head_M: Tensor) -> Tensor:
        """The states that the vocabulary's head is to see, [M, D]."""
        made_MD = rows_MD.clone()
        for i in range(len(self.up)):
            at = (head_M == i).nonzero()[:, 0]
            low = (rows_MD[at].float() @ self.down[i].T) @ self.up[i].T
            made_MD = made_MD.index_add(0, at, low.to(rows_MD.dtype))
        return made_MD

    def added_to(self, model: Model, folder: Path) -> Model:
        """`model` with these heads in `folder`; what already lies there is taken as it is."""
        if not folder.is_dir():
            with new_folder(folder) as partial:
                tensors = {n: p.detach().cpu().contiguous() for n, p in self.named_parameters(NAME)}
                save_file(tensors, partial / f"{NAME}.safetensors")
        return model.adding(Weights(folder))


def heads_of(model: Model, where: str) -> tuple[Tensor, Tensor]:
    """(up [H, D, r], down [H, r, D]) of a model that has such heads."""
    extra = model.folded().extra
    if f"{NAME}.up" not in extra:
        raise InputError(
            "the model has no heads to choose from",
            where=where,
            seen=model.name,
            fix="Train one with mah_dpo",
        )
    return extra[f"{NAME}.up"].float(), extra[f"{NAME}.down"].float()


def new_heads(loaded: Loaded, count: int, rank: int, seed: int) -> VocabHeads:
    """Heads for a model in memory that has none."""
    if f"{NAME}.up" in loaded.extra:
        raise InputError(
            "the model has such heads already, which its reference would have to keep",
            seen=loaded.model.name,
            fix="Make one head of them by blend_heads, or begin where they began",
        )
    if count < 1 or rank < 1:
        raise InputError("there must be a head, of rank 1 at least", seen=(count, rank))
    width = width_of(loaded.module)
    return VocabHeads(count, width, rank, seed).to(loaded.device)


def blended(model: Model, weights: Sequence[float], folder: Path, where: str) -> Model:
    """A model whose one head is the blend of its heads with these weights.

    Args:
        model: with heads, or with a blend of them, whose weights are then these.
        weights: of each head; they sum to 1.
        folder: of the change; what already lies there is taken as it is.
    """
    place = _blend_in(model)
    before = model.changes if place is None else model.changes[:place]
    up_HDr, _ = heads_of(model.with_changes(before), where)
    if len(weights) != len(up_HDr):
        raise InputError(f"the model has {len(up_HDr)} heads", where=where, seen=list(weights))
    if not folder.is_dir():
        with new_folder(folder) as partial:
            save_file({BLEND: torch.tensor(weights)}, partial / f"{NAME}.safetensors")
    if place is None:
        return model.adding(Weights(folder))
    return model.with_changes([*before, Weights(folder), *model.changes[place + 1 :]])


def _blend_in(model: Model) -> int | None:
    """Place of the last blend among a model's changes; None where heads are still to be blended."""
    if f"{NAME}.up" in model.folded().extra:
        return None
    found = [
        i
        for i, change in enumerate(model.changes)
        if isinstance(change, Weights) and BLEND in open_weights(change.path)
    ]
    return found[-1] if found else None
