"""What a model remembers of the rows that it is writing, and the step that writes one token each.

`core.generation.prefix_cache` is the fast way; `Padded` runs any causal language model of
transformers through that library's own cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import Cache

from truing.core.passes.headed import check_words

if TYPE_CHECKING:
    from truing.core.generation.dialogue_cache import Kept


class States(Protocol):
    """Rows that are being written: B of them live."""

    def start(self) -> Tensor:
        """Read the prompts; logits [B, V] of every row's first token."""
        ...

    def step(self, ids: Sequence[int]) -> Tensor:
        """Append one token to every live row; logits [B, V] of the next."""
        ...

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Go on with these of the live rows; returns them in the order that holds from now on."""
        ...

    def kept(self) -> list[Kept | None]:
        """Once they are read, what is known of the prompts; None where nothing can be kept."""
        ...


def states_for(
    module: nn.Module,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[int],
    room: int,
    known: Sequence[Kept | None] = (),
) -> States:
    """The states that suit the architecture.

    Args:
        module: a causal language model.
        prompts: token ids.
        rows: for each row, its prompt.
        room: tokens that a row may get.
        known: what `kept` gave of the prompts' beginnings in earlier turns; () for nothing.
    """
    from truing.core.generation import prefix_cache

    check_words(module)
    if prefix_cache.fits(module, max(map(len, prompts)) + room):
        return prefix_cache.Shared(module, prompts, rows, room, known)
    return Padded(module, prompts, rows)


class Padded:
    """Rows filled up on the left, and the cache of transformers."""

    def __init__(
        self, module: nn.Module, prompts: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> None:
        self.module, self.prompts, self.rows = module, prompts, list(rows)
        self.device = next(module.parameters()).device
        known = inspect.signature(module.forward).parameters
        self.short = "logits_to_keep" in known
        # From transformers 5.24 on it is "cache", and the older name is warned about.
        self.name = "cache" if "cache" in known else "past_key_values"
        self.cache: Cache | None = None
        self.mask_BT = torch.empty(0)

    def _forward(self, ids_BT: Tensor) -> Tensor:
        position_BT = (self.mask_BT.cumsum(1) - 1).clamp_min(0)[:, -ids_BT.shape[1] :]
        made = self.module(
            input_ids=ids_BT,
            attention_mask=self.mask_BT,
            position_ids=position_BT,
            use_cache=True,
            **{self.name: self.cache},
            **({"logits_to_keep": 1} if self.short else {}),
        )
        self.cache = cast(Cache, getattr(made, self.name))
        return cast(Tensor, made.logits)[:, -1]

    def start(self) -> Tensor:
        """See `States`."""
        width = max(map(len, self.prompts))
        ids = [[0] * (width - len(p)) + list(p) for p in self.prompts]
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in self.prompts]
        self.mask_BT = torch.tensor(mask, device=self.device)
        logits_BV = self._forward(torch.tensor(ids, device=self.device))
        self.keep(self.rows)
        return logits_BV[torch.tensor(self.rows, device=self.device)]

    def step(self, ids: Sequence[int]) -> Tensor:
        """See `States`."""
        self.mask_BT = torch.nn.functional.pad(self.mask_BT, (0, 1), value=1)
        return self._forward(torch.tensor(ids, device=self.device)[:, None])

    def keep(self, rows: Sequence[int]) -> list[int]:
        """See `States`."""
        index_B = cast(torch.LongTensor, torch.tensor(rows, device=self.device))
        cast(Cache, self.cache).reorder_cache(index_B)
        self.mask_BT = self.mask_BT[index_B]
        return list(rows)

    def kept(self) -> list[Kept | None]:
        """See `States`."""
        return [None] * len(self.prompts)
