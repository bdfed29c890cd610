"""Rows through the model's own cache, whatever it is called: sums that are known by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from truing.core.generation.row_cache import Padded

SIZE = 7  # of the vocabulary


class Sums:
    """A cache that keeps a number for each row."""

    def __init__(self, sum_B: Tensor) -> None:
        self.sum_B = sum_B

    def reorder_cache(self, index_B: Tensor) -> None:
        self.sum_B = self.sum_B[index_B]


class Model(nn.Module):
    """Says next what all tokens so far are together, modulo the vocabulary's size."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def read(self, ids_BT: Tensor, mask_BT: Tensor, cache: Sums | None) -> tuple[Tensor, Sums]:
        sum_B = (ids_BT * mask_BT[:, -ids_BT.shape[1] :]).sum(1)
        kept = Sums(sum_B + (0 if cache is None else cache.sum_B))
        logits_BV = nn.functional.one_hot(kept.sum_B % SIZE, SIZE) * self.scale
        return logits_BV[:, None], kept


class Older(Model):
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor,
        past_key_values: Sums | None = None, use_cache: bool = False,
    ) -> SimpleNamespace:  # fmt: skip
        assert use_cache
        logits, kept = self.read(input_ids, attention_mask, past_key_values)
        return SimpleNamespace(logits=logits, past_key_values=kept)


class Newer(Model):
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor,
        cache: Sums | None = None, use_cache: bool = False,
    ) -> SimpleNamespace:  # fmt: skip
        assert use_cache
        logits, kept = self.read(input_ids, attention_mask, cache)
        return SimpleNamespace(logits=logits, cache=kept)


@pytest.mark.parametrize("model", [Older, Newer])
def test_the_cache_goes_by_the_models_own_name_for_it(model: type[Model]) -> None:
    states = Padded(model(), [[1, 2], [3, 3, 5]], [1, 0, 1])
    assert states.start().argmax(-1).tolist() == [4, 3, 4]  # 11, 3 and 11 modulo 7
    assert states.step([4, 3, 2]).argmax(-1).tolist() == [1, 6, 6]  # 15, 6 and 13
    assert states.keep([0, 2]) == [0, 2]
    assert states.step([1, 6]).argmax(-1).tolist() == [2, 5]  # 16 and 19
