"""Rows in buckets: cut where it pays, and what they compute does not depend on the cuts."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truing.core.generation import prefix_cache
from truing.core.generation.prefix_cache import Shared
from truing.core.generation.prefix_levels import buckets
from truing.core.generation.row_cache import Padded
from truing.core.passes.attention import by_kernel
from truing.core.passes.tried import Tried
from truing.core.tiny import tiny_model


def cost(parts: list[list[int]], lengths: list[int], apart: int) -> int:
    """Tokens that rows see when they are filled up, and what buckets cost."""
    return sum(apart + max(lengths[i] for i in part) * len(part) for part in parts)


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.lists(st.integers(0, 5), min_size=1, max_size=8),
    st.integers(0, 60),
)
def test_no_other_cut_costs_less(lengths: list[int], picks: list[int], apart: int) -> None:
    """Against every way to cut; the rows of a prompt stay together, and all keep their order."""
    rows = [i % len(lengths) for i in picks]
    made = buckets(lengths, rows, apart)
    assert [i for part in made for i in part] == rows
    found: list[int] = []
    for many in range(len(rows)):
        for ends in combinations(range(1, len(rows)), many):
            edges = [0, *ends, len(rows)]
            parts = [rows[a:b] for a, b in pairwise(edges)]
            if sum(len(set(part)) for part in parts) == len(set(rows)):
                found.append(cost(parts, lengths, apart))
    assert cost(made, lengths, apart) == min(found)


@pytest.mark.parametrize("common", [0, 20])
def test_rows_in_buckets_have_the_logits_of_padded_rows(
    common: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without a common beginning, while rows end in every bucket until one is empty."""
    monkeypatch.setattr(prefix_cache, "APART_CPU", 4)
    module = tiny_model()[0].eval()
    vocab = module.config.vocab_size
    begin = [(3 * i + 1) % vocab for i in range(common)]
    prompts = [[*begin, *((7 * i + n) % vocab for i in range(n))] for n in (40, 3, 9, 41, 4)]
    rows = [1, 1, 4, 4, 2, 0, 0, 3]
    with torch.inference_mode():
        one, other = Shared(module, prompts, rows, 6), Padded(module, prompts, rows)
        assert len(one.buckets) == 3
        torch.testing.assert_close(one.start(), other.start(), atol=1e-4, rtol=0)
        names = ([*range(8)], [*range(8)])
        for step, left in enumerate(([0, 1, 2, 3, 4, 5, 6, 7], [1, 3, 4, 5, 7], [3, 5, 7], [7])):
            made: list[torch.Tensor] = []
            for side, (states, own) in enumerate(zip((one, other), names, strict=True)):
                if step:
                    order = states.keep([k for k, name in enumerate(own) if name in left])
                    names[side][:] = [own[k] for k in order]
                logits = states.step([(5 * name + step) % vocab for name in names[side]])
                made.append(logits[torch.tensor(names[side]).argsort()])
            assert sorted(names[0]) == sorted(names[1]) == left
            torch.testing.assert_close(*made, atol=1e-4, rtol=0)
        assert len(one.buckets) == 1


def test_other_values_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "by_kernel", lambda *given: 1.5 * by_kernel(*given))
    monkeypatch.setattr(prefix_cache, "_fits", Tried())
    told = r"Llama.* the slower way: its logits of up to .* are off"
    with torch.inference_mode(), pytest.warns(UserWarning, match=told):
        assert not prefix_cache.fits(tiny_model()[0].eval(), 9)
