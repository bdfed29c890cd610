"""Products of float32 by either library are those of PyTorch, alone and inside training."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch

from truing import methods
from truing.core.passes import products
from truing.models import Model
from truing.tables import Table

SHAPES = ((1, 8, 8), (8, 16, 24), (40, 128, 384), (300, 128, 384))


@pytest.fixture(params=[0, 1 << 40], ids=["onednn", "mkl"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "WORK", request.param)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_they_are_pytorchs(shape: tuple[int, int, int], turned: bool, library: None) -> None:
    n, i, o = shape
    make = torch.Generator().manual_seed(0)
    x, w = torch.randn(n, i, generator=make), torch.randn(o, i, generator=make)
    bias, plus = torch.randn(o, generator=make), torch.randn(n, o, generator=make)
    w = w.t().contiguous().t() if turned else w
    before, wide = plus.clone(), (x.double() @ w.double().t())
    found = [
        (products.times_t(x, w), wide),
        (products.times_t(x, w, bias), wide + bias),
        (products.times_t_plus(x, w, None, plus), wide + plus),
        (products.times_t_plus(x, w, bias, plus), wide + bias + plus),
        (products.times(x, w.t()), wide),
        (products.times(x, w.t(), plus), wide + plus),
        (products.logits(x, w, bias), wide + bias),
    ]
    for made, expected in found:
        assert torch.allclose(made.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(plus, before)  # what is added is not written to


def test_small_ones_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_ONEDNN", True)
    x, w = torch.zeros(64, 256), torch.zeros(256, 256)
    assert products._fits(x, w) and not products._fits(x[:63], w)
    assert not products._fits(torch.zeros(7, 1024), torch.zeros(4096, 1024))
    assert not products._fits(x.double(), w)


@pytest.mark.parametrize("rank", [0, 2])
def test_training_is_the_same(
    rank: int, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("a fern", "an oak", "a tall old oak by the river", "moss")
    rows = [{"prompt": f"say {w}", "chosen": w, "rejected": f"no {w}"} for w in words]
    made: list[Model] = []
    for work in (0, 1 << 40):
        monkeypatch.setattr(products, "WORK", work)
        made.append(
            methods["dpo"](
                Model.open(tiny_path), Table("pair", rows), rank=rank, steps=2, batch=2, lr=1e-3,
                dtype="float32", seed=0,
            )
        )  # fmt: skip
    one, two = (cast(Model, m).folded() for m in made)
    start = Model.open(tiny_path).folded()
    apart = sum(float((one[n] - two[n]).square().sum()) for n in one)
    moved = sum(float((one[n] - start[n]).square().sum()) for n in one)
    assert moved > 0 and (apart / moved) ** 0.5 < 1e-2
