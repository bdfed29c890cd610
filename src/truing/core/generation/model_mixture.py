"""Sampling from a mixture of two models: the second one keeps pace with what the first writes.

    y_t ~ softmax((1 - c) z + c z_other),   z: logits

which is the geometric mixture of their distributions.

Shapes: B live rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from truing.core.generation.row_cache import States, states_for
from truing.core.sampling import Row


class Alongside:
    """A logits hook that mixes in another model's logits, reading each token once.

    Args:
        module: the other model; it may be the first under another setting.
        setting: entered whenever it computes, such as adapters being off.
        mix: its share c.
        room: tokens that an answer may get.
    """

    def __init__(
        self,
        module: nn.Module,
        setting: Callable[[], AbstractContextManager[object]],
        mix: float,
        room: int,
    ) -> None:
        self.module, self.setting, self.mix, self.room = module, setting, mix, room
        self.states: States | None = None
        self.order: list[tuple[int, int]] = []

    def __call__(self, rows: Sequence[Row], logits_BV: Tensor) -> Tensor:
        """Mixed logits of the live rows."""
        wanted = {(row.prompt, row.draw): row for row in rows}
        with self.setting():
            other_BV = self._start(rows) if not rows[0].ids else self._step(wanted)
        place = {name: i for i, name in enumerate(self.order)}
        index_B = torch.tensor([place[name] for name in wanted], device=logits_BV.device)
        return torch.lerp(logits_BV, _as_wide(other_BV[index_B].float(), logits_BV), self.mix)

    def _start(self, rows: Sequence[Row]) -> Tensor:
        used = list(dict.fromkeys(row.prompt for row in rows))
        prompts = {row.prompt: row.prompt_ids for row in rows}
        place = {prompt: i for i, prompt in enumerate(used)}
        self.order = [(row.prompt, row.draw) for row in rows]
        self.states = states_for(
            self.module, [prompts[p] for p in used], [place[row.prompt] for row in rows], self.room
        )
        return self.states.start()

    def _step(self, wanted: dict[tuple[int, int], Row]) -> Tensor:
        assert self.states is not None
        live = [i for i, name in enumerate(self.order) if name in wanted]
        if len(live) < len(self.order):
            self.order = [self.order[i] for i in self.states.keep(live)]
        return self.states.step([wanted[name].ids[-1] for name in self.order])


def _as_wide(other_BV: Tensor, logits_BV: Tensor) -> Tensor:
    """The other's logits of the first one's outputs; embeddings may be padded to different sizes.

    An output that the other lacks is no token: no mixture with it draws that.
    """
    vocab = logits_BV.shape[1]
    if other_BV.shape[1] == vocab:
        return other_BV
    wide_BV = torch.full_like(logits_BV, torch.finfo(logits_BV.dtype).min)
    shared = min(vocab, other_BV.shape[1])
    wide_BV[:, :shared] = other_BV[:, :shared]
    return wide_BV
