"""How a step is divided among processes, and that one process is left as it is."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

from truing.core import together
from truing.core.trainer import distributed
from truing.core.trainer.distributed import Processes, shares

Several = Callable[[int, int], None]


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> Several:
    return lambda rank, size: monkeypatch.setattr(distributed, "_now", Processes(rank, size))


def cut(sizes: list[int]) -> list[list[int]]:
    return [sizes[s] for s in shares(sizes)]


def test_runs_of_equal_size_by_hand(several: Several) -> None:
    several(1, 2)
    assert cut([1, 1, 1, 1]) == [[1, 1], [1, 1]]
    assert cut([9, 1, 1, 1]) == [[9], [1, 1, 1]]
    assert cut([1, 1, 1, 9]) == [[1, 1, 1], [9]]
    assert cut([5]) == [[], [5]] and cut([]) == [[], []]  # shares may be empty
    assert distributed.share([1, 1, 1, 1]) == slice(2, 4)
    several(0, 3)
    assert cut([2, 2, 2, 2, 2, 2]) == [[2, 2], [2, 2], [2, 2]]
    assert cut([4, 4]) == [[4], [], [4]]


def test_every_row_once_and_no_share_far_above_its_part(several: Several) -> None:
    source = random.Random(0)
    for _ in range(200):
        count = source.randint(1, 9)
        several(0, count)
        sizes = [source.randint(1, 50) for _ in range(source.randint(0, 40))]
        parts = cut(sizes)
        assert len(parts) == count and [s for part in parts for s in part] == sizes
        assert max(map(sum, parts)) <= sum(sizes) / count + max(sizes, default=0)


def test_one_process_is_left_as_it_is() -> None:
    module = nn.Linear(3, 2)
    module(torch.ones(1, 3)).sum().backward()
    before = [p.grad.clone() for p in module.parameters()]
    parameters = list(module.parameters())
    distributed.sum_gradients(parameters)
    distributed.shard(module)
    assert all(torch.equal(p.grad, b) for p, b in zip(parameters, before, strict=True))
    assert distributed.norm(before) == torch.nn.utils.get_total_norm(before)
    assert not distributed.is_sharded(module) and distributed.leads()
    assert distributed.everyone("a") == ["a"] and distributed.agree("a") == "a"
    with together.together() as processes:
        assert processes == Processes(0, 1)
    assert together.joint(abs)(-2) == 2
