"""The first blocks of a causal language model: states of last tokens, gradients through them.

Works on stock transformers models: a forward hook on the last block wanted ends the pass there, so
that neither later blocks nor the head are computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn

from truing.core.modelfiles.reach import check_ids, vocab_of
from truing.errors import InputError

Batch = Sequence[Sequence[int]]


class _Reached(Exception):
    """Ends the forward pass; no error."""


@contextlib.contextmanager
def stopped_after(block: nn.Module) -> Generator[list[object]]:
    """A pass inside the `with` ends when `block` has been computed; the list holds its output."""
    seen: list[object] = []

    def stop(block: nn.Module, inputs: object, output: object) -> None:
        seen.append(output)
        raise _Reached

    handle = block.register_forward_hook(stop)
    try:
        yield seen
    except _Reached:
        pass
    finally:
        handle.remove()


def block_list(backbone: nn.Module) -> nn.ModuleList:
    """The language model's list of blocks: the longest ModuleList, the outermost among equals."""
    words = cast(nn.Module, getattr(backbone, "language_model", backbone))  # beside one of images
    lists = {n: m for n, m in words.named_modules() if isinstance(m, nn.ModuleList)}
    if not lists:
        raise InputError("the model has no list of blocks")
    return lists[max(lists, key=lambda n: (len(lists[n]), -n.count(".")))]


def backbone_of(module: nn.Module) -> nn.Module:
    """What of a causal language model stands below its head."""
    return cast(nn.Module, getattr(module, "base_model", module))


def blocks_of(module: nn.Module) -> nn.ModuleList:
    """The blocks of a causal language model."""
    return block_list(backbone_of(module))


def _exact(value: Tensor) -> Tensor:
    half = value.bfloat16()
    return half if torch.equal(half.to(value.dtype), value) else value


def share_of(module: nn.Module, share: float) -> Trunk:
    """That share of a module's blocks, from the first on; one at least."""
    return Trunk(module, max(1, int(share * len(blocks_of(module)))))


class Trunk:
    """The first `depth` blocks of `module`."""

    def __init__(self, module: nn.Module, depth: int) -> None:
        self.module, self.depth = module, depth
        self.backbone = backbone_of(module)
        self.layers = block_list(self.backbone)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Weights of these blocks by the module's names, norms left out."""
        prefix = next(name for name, m in self.module.named_modules() if m is self.layers)
        return {
            name: parameter
            for name, parameter in self.module.named_parameters()
            if name.startswith(f"{prefix}.")
            and int(name.removeprefix(f"{prefix}.").split(".")[0]) < self.depth
            and not any("norm" in part or part.startswith("ln") for part in name.split("."))
        }

    def values(self) -> dict[str, Tensor]:
        """Values of `parameters`, in bfloat16 where that holds them exactly."""
        return {n: _exact(p.detach()) for n, p in self.parameters().items()}

    def states(self, batch: Batch) -> Tensor:
        """Hidden states [B, D] (float32) of the last tokens after the last block, before any norm.

        Rows are filled up on the right, which under a causal mask no earlier token can see.
        """
        check_ids(chain.from_iterable(batch), vocab_of(self.module))
        width = max(map(len, batch))
        ids_BT = torch.tensor([[*ids, *[ids[-1]] * (width - len(ids))] for ids in batch])
        ends_B = torch.tensor([len(ids) - 1 for ids in batch])
        device = next(self.module.parameters()).device
        with stopped_after(self.layers[self.depth - 1]) as seen:
            self.backbone(input_ids=ids_BT.to(device), use_cache=False)
        output = seen[0]
        states_BTD = cast(Tensor, output[0] if isinstance(output, tuple) else output)
        return states_BTD[torch.arange(len(batch), device=device), ends_B.to(device)].float()

    def mean_state(self, batches: Sequence[Batch]) -> Tensor:
        """Mean last-token state [D] over all rows of all batches."""
        with torch.no_grad():
            return torch.cat([self.states(b) for b in batches]).mean(0)

    def add_gradients(self, batches: Sequence[Batch], loss: Callable[[Tensor], Tensor]) -> float:
        """Add the gradient of `loss(states_BD)` of each batch to `.grad`; the mean loss."""
        total = 0.0
        for batch in batches:
            value = loss(self.states(batch))
            value.backward()
            total += float(value.detach())
        return total / len(batches)
