"""What frozen models say of branches, computed once and kept by content.

One pass over all branches that training will need, without gradients and before anything is
trained. Answers to one prompt share a tree whatever the rows they come from, so pairs, single
answers and groups of the same texts find each other's values: a sweep over beta, or over
objectives, costs one pass. Micro-batches are the unit of the cache: a value does not depend on
what happened to be cached, so that the same run has the same bits with a full and an empty cache.

Before a process first keeps values, and again as it keeps more, the files longest unused go until
no more than `LIMIT` bytes of all runs are left. What a process measured it also has in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from truing.context import current
from truing.core.files import FILE, home, make_room_for, new_file
from truing.core.identity.code import made_by
from truing.core.logprob import measure
from truing.core.trainer import distributed
from truing.core.tree import Node, Packed, pack
from truing.tables import content_hash

if TYPE_CHECKING:
    from truing.core.trainer.frozen_view import Sight

LIMIT = 4 * 2**30  # bytes on disk, of all runs together
SWEEP = 2048  # tokens computed at once; there is no backward pass to hold memory for


def branch_key(ids: Sequence[int], loss: Sequence[bool]) -> bytes:
    """Identity of a branch: the tokens from the root to the leaf and which of them carry loss."""
    digest = hashlib.blake2b(array("q", ids).tobytes(), digest_size=16)
    digest.update(bytes(loss))
    return digest.digest()


def keys_of(tree: Node) -> list[bytes]:
    """Keys of a tree's branches, in order."""
    return [branch_key(ids, loss) for ids, loss in tree.rows()]


def gathered(trees: Iterable[Node]) -> list[Node]:
    """One tree for each root, with all answers to it once, in the order of their appearance."""
    roots: dict[tuple[object, ...], dict[Node, None]] = {}
    for tree in trees:
        children = roots.setdefault((tree.ids, tree.loss), {})
        children.update(dict.fromkeys(tree.children))
    return [
        Node(ids, loss, tuple(children))  # type: ignore[arg-type]
        for (ids, loss), children in roots.items()
    ]


class Kept(ABC):
    """Values at the loss tokens of branches under a frozen model, computed once.

    A subclass says what is measured. Values are by name, [T, ...] for each branch.

    Args:
        key: content of the weights and of what is measured.
        dtype: that the module computes in.
        sight: how the frozen model sees the trees that are trained on; None for as they are.
    """

    label = "values of the frozen model"

    def __init__(self, key: str, dtype: str, sight: Sight | None = None) -> None:
        self.key, self.dtype, self.sight = key + (sight.key if sight else ""), dtype, sight
        self._values: dict[bytes, dict[str, Tensor]] = {}
        self.computed = self.cached = 0

    @abstractmethod
    def compute(self, module: nn.Module, packed: Packed) -> dict[str, Tensor]:
        """Values of the M loss tokens of a micro-batch, [M, ...] each; no gradient is kept."""

    def sweep(
        self, module: nn.Module, trees: Iterable[Node], budget: int = SWEEP, *, keep: bool = True
    ) -> None:
        """Compute, or read from the cache, all branches of `trees` that are not there yet.

        Without `keep` nothing is written to the cache, and earlier branches are forgotten.
        """
        if not keep:
            self._values.clear()
        wanted = [t for t in gathered(trees) if any(k not in self._values for k in keys_of(t))]
        device = next(module.parameters()).device
        seen = [self.sight.tree(t) for t in wanted] if self.sight else wanted
        runs = pack(seen, budget, share=True, device=device) if wanted else []
        if keep:
            self._divide(module, runs, seen, device)
        at = 0
        for i, packed in enumerate(runs, 1):
            some, read = wanted[at : at + len(packed)], seen[at : at + len(packed)]
            at += len(packed)
            values = self._pack_values(module, packed, read, device, keep)
            for u, tree in enumerate(some):
                for k, key in enumerate(keys_of(tree)):
                    index_T = packed.index_UKT[u, k, : int(packed.mask_UKT[u, k].sum())]
                    # A copy of its own: a view would keep the whole micro-batch alive.
                    self._values[key] = {n: v[index_T] for n, v in values.items()}
            current().progress(i, len(runs), self.label)

    def _divide(
        self, module: nn.Module, runs: Sequence[Packed], trees: Sequence[Node], device: torch.device
    ) -> None:
        """Of several processes, let each fill the cache with its share, for all to read."""
        if distributed.now().size == 1:
            return
        ends = list(itertools.accumulate(len(p) for p in runs))
        here = distributed.share([len(p.ids_N) for p in runs])
        for i in range(len(runs))[here]:
            self._pack_values(
                module, runs[i], trees[ends[i] - len(runs[i]) : ends[i]], device, True
            )
        distributed.barrier()

    def _pack_values(
        self,
        module: nn.Module,
        packed: Packed,
        trees: Sequence[Node],
        device: torch.device,
        keep: bool,
    ) -> dict[str, Tensor]:
        path = self._path([k for t in trees for k in keys_of(t)], device)
        try:
            found = load_file(path) if keep else {}
            if found and all(len(v) == len(packed.target_M) for v in found.values()):
                self.cached += 1
                with contextlib.suppress(OSError):
                    path.touch()
                return found
        except (OSError, SafetensorError):
            pass  # not there yet, or damaged: made again
        with torch.no_grad(), self.sight.on() if self.sight else contextlib.nullcontext():
            made = self.compute(module, packed.to(device))
        values = {n: v.cpu().contiguous() for n, v in made.items()}
        self.computed += 1
        if not keep:
            return values
        size = max(FILE, sum(v.nbytes for v in values.values()))
        with contextlib.suppress(OSError, SafetensorError):  # what cannot be kept costs time only
            make_room_for(home() / "reference", LIMIT, size)
            with new_file(path) as partial:
                save_file(values, partial)
        return values

    def _path(self, keys: Sequence[bytes], device: torch.device) -> Path:
        # Bits may differ between devices, thread counts, releases and versions of this code.
        code = made_by("truing.core.logprob")
        how = [self.key, self.dtype, device.type, torch.get_num_threads(), code]
        name = content_hash([how, [k.hex() for k in keys]])
        return home() / "reference" / name[:2] / f"{name}.safetensors"

    def of(self, tree: Node) -> list[dict[str, Tensor]]:
        """Values of a tree's branches, in order; they must have been swept."""
        return [self._values[key] for key in keys_of(tree)]


class Reference(Kept):
    """Log-probabilities of branches under the reference.

    Args:
        key: content of the weights, `Model.weights_key`.
        dtype: that the module computes in.
        sight: see `Kept`.
    """

    label = "reference log-probabilities"

    def compute(self, module: nn.Module, packed: Packed) -> dict[str, Tensor]:
        """Log-probability of each loss token."""
        value_UKT = measure(module, packed, ("logp",), grad=False)["logp"]
        return {"logp": packed.gather(value_UKT)}

    def values(self, trees: Sequence[Node], width: int, length: int) -> Tensor:
        """Log-probabilities of the branches of `trees`, [U, width, length], 0 at padding."""
        made = torch.zeros(len(trees), width, length)
        for u, tree in enumerate(trees):
            for k, branch in enumerate(self.of(tree)):
                made[u, k, : len(branch["logp"])] = branch["logp"]
        return made
