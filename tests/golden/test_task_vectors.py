"""Task arithmetic, DARE and SLERP against plain loops over numbers, and on whole models."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from truing.context import Context, use
from truing.core.tiny import tiny_folder
from truing.errors import InputError
from truing.merge.dare import dare_linear, dare_ties, dropped, elected
from truing.merge.slerp import between, slerp
from truing.merge.task_arithmetic import added, task_arithmetic
from truing.models import Model

PROJECTION, NORM = "model.layers.2.mlp.up_proj.weight", "model.norm.weight"


def test_task_arithmetic_by_hand() -> None:
    base = torch.tensor([10.0, 10.0, 10.0])
    taus = [torch.tensor([1.0, 2.0, -3.0]), torch.tensor([4.0, -2.0, 0.5])]
    assert added(base, taus, [1.0, 1.0], 1.0).tolist() == [15.0, 10.0, 7.5]
    assert added(base, taus, [1.0, 1.0], 0.5).tolist() == [12.5, 10.0, 8.75]
    # An analogy, a - b, and taking away.
    assert added(base, taus, [1.0, -1.0], 1.0).tolist() == [7.0, 14.0, 6.5]
    assert added(base, taus[:1], [1.0], -1.0).tolist() == [9.0, 8.0, 13.0]
    assert added(base.bfloat16(), taus, [1.0, 1.0], 0.5).dtype == torch.bfloat16


def test_elected_signs_by_hand() -> None:
    taus = [torch.tensor([3.0, 1.0, -1.0, 0.0]), torch.tensor([-1.0, 1.0, 2.0, 0.0])]
    # Sums 2, 2, 1, 0: all count as +.
    assert [t.tolist() for t in elected(taus, [1.0, 1.0])] == [[3, 1, 0, 0], [0, 1, 2, 0]]
    # With weights 1 and 4 the sums are -1, 5, 7, 0.
    assert [t.tolist() for t in elected(taus, [1.0, 4.0])] == [[0, 1, 0, 0], [-1, 1, 2, 0]]


def test_dropping_keeps_a_share_and_the_expectation() -> None:
    tau = torch.linspace(-2, 3, 400).view(20, 20)
    made = dropped(tau, 0.3, torch.Generator().manual_seed(0))
    assert bool(((made == 0) | (made == tau / 0.3)).all())
    assert 0.2 < float((made != 0).float().mean()) < 0.4
    draws = torch.Generator().manual_seed(1)
    mean = torch.stack([dropped(tau, 0.3, draws) for _ in range(4000)]).mean(0)
    # A draw's variance is tau^2 (1 - k) / k: five standard errors of the mean.
    error = tau.abs() * math.sqrt(0.7 / 0.3 / 4000)
    assert bool(((mean - tau).abs() <= 5 * error + 1e-6).all())
    assert torch.equal(dropped(tau, 1.0, draws), tau)


def test_slerp_by_a_plain_loop() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(3, 5)), 3 * draw.normal(size=(3, 5)) + 1
    cosine = sum(x * y for x, y in zip(a.ravel(), b.ravel(), strict=True))
    cosine /= math.sqrt(sum(x * x for x in a.ravel())) * math.sqrt(sum(y * y for y in b.ravel()))
    angle = math.acos(cosine)
    one, two = torch.tensor(a).float(), torch.tensor(b).float()
    for t in (0.0, 0.3, 0.5, 1.0):
        p, q = (math.sin(s * angle) / math.sin(angle) for s in (1 - t, t))
        want = [p * x + q * y for x, y in zip(a.ravel(), b.ravel(), strict=True)]
        assert np.allclose(between(one, two, t).numpy().ravel(), want, atol=1e-5)
        assert torch.allclose(between(one, two, t), between(two, one, 1 - t), atol=1e-5)
    # A right angle at its middle: both by 1 / sqrt(2), of the length that they have.
    half = between(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0]), 0.5)
    assert torch.allclose(half, torch.tensor([math.sqrt(2), math.sqrt(2)]))


def test_slerp_without_an_angle_is_a_straight_line() -> None:
    one = torch.tensor([1.0, 2.0, 3.0])
    assert torch.allclose(between(one, 2 * one, 0.25), 1.25 * one)
    assert torch.allclose(between(one, -one, 0.25), 0.5 * one)
    assert torch.allclose(between(torch.zeros(3), one, 0.25), 0.25 * one)


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    """A tiny base and two that differ from it by noise."""
    root = tmp_path_factory.mktemp("trio")
    base = tiny_folder(root / "base")
    tensors = load_file(base / "model.safetensors")
    for i in (1, 2):
        source = torch.Generator().manual_seed(i)
        other = shutil.copytree(base, root / f"expert{i}")
        noisy = {n: t + 0.02 * torch.randn(t.shape, generator=source) for n, t in tensors.items()}
        save_file(noisy, other / "model.safetensors", metadata={"format": "pt"})
    return [Model.open(root / name) for name in ("base", "expert1", "expert2")]


def tensors_of(model: Model, name: str) -> Tensor:
    return model.folded()[name].double()


def test_whole_models(trio: list[Model], tmp_path: Path) -> None:
    base, one, two = trio
    experts = {"one": one, "two": two}
    with use(Context(folder=tmp_path, seed=3)):
        summed = task_arithmetic(base, experts, scale=0.7, weights={"one": 1.0, "two": -0.5})
        whole = dare_linear(base, experts, density=1.0, scale=0.7, weights={"one": 1, "two": -0.5})
        thin, signs = (m(base, experts, density=0.4) for m in (dare_linear, dare_ties))
        arc = slerp(experts, t=0.25)
    for name in (PROJECTION, NORM):
        zero, a, b = (tensors_of(m, name) for m in trio)
        want = zero + 0.7 * ((a - zero) - 0.5 * (b - zero))
        assert torch.allclose(tensors_of(summed, name), want, atol=1e-6)
        assert torch.equal(tensors_of(whole, name), tensors_of(summed, name))
        cosine = float((a * b).sum() / a.norm() / b.norm())
        angle = math.acos(min(cosine, 1.0))
        if cosine <= 0.9995:
            p, q = (math.sin(s * angle) / math.sin(angle) for s in (0.75, 0.25))
        else:
            p, q = 0.75, 0.25
        assert torch.allclose(tensors_of(arc, name), p * a + q * b, atol=1e-5)
    zero, a, b = (tensors_of(m, PROJECTION) for m in trio)
    # Each entry is the base with what is left of none, one or both experts, divided by 0.4.
    left = [x * (a - zero) / 0.4 + y * (b - zero) / 0.4 for x in (0, 1) for y in (0, 1)]
    moved = tensors_of(thin, PROJECTION) - zero
    gaps = torch.stack([(moved - candidate).abs() for candidate in left])
    assert float(gaps.min(0).values.max()) < 1e-5
    kept = [float((gaps.argmin(0) == i).float().mean()) for i in range(4)]
    assert kept == pytest.approx([0.36, 0.24, 0.24, 0.16], abs=0.03)
    # By signs: where both are left and differ in sign, the larger one alone.
    apart = (gaps.argmin(0) == 3) & ((a - zero) * (b - zero) < 0)
    larger = torch.where((a - zero).abs() > (b - zero).abs(), a - zero, b - zero) / 0.4
    by_sign = tensors_of(signs, PROJECTION) - zero
    assert bool(apart.any()) and torch.allclose(by_sign[apart], larger[apart], atol=1e-5)
    assert torch.allclose(by_sign[~apart], moved[~apart], atol=1e-5)
    norm = [tensors_of(m, NORM) for m in trio]
    assert bool(((norm[1] - norm[0]) * (norm[2] - norm[0]) < 0).any())  # no sign is elected
    for made in (thin, signs):
        assert torch.allclose(tensors_of(made, NORM), norm[1] + norm[2] - norm[0], atol=1e-6)


def test_experts_in_one_tensor_are_dropped_from_and_kernels_are_not(tmp_path: Path) -> None:
    source = torch.Generator().manual_seed(6)
    zero = {"e": torch.randn(4, 16, 17, generator=source), "k": torch.ones(8, 1, 4)}
    folders: list[Model] = []
    for name, shift in (("base", 0.0), ("expert", 0.5)):
        folder = tiny_folder(tmp_path / name)
        tensors = {n: t + shift for n, t in zero.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        folders.append(Model.open(folder))
    with use(Context(folder=tmp_path / "made")):
        made = dare_linear(folders[0], {"a": folders[1]}, density=0.25)
    moved = tensors_of(made, "e") - zero["e"].double()
    left = moved.abs() > 1e-6
    assert torch.allclose(moved[left], torch.tensor(2.0).double(), atol=1e-5)  # 0.5 / 0.25
    assert float(left.double().mean()) == pytest.approx(0.25, abs=0.05)
    assert torch.equal(tensors_of(made, "k"), torch.full((8, 1, 4), 1.5).double())


def test_the_seed_decides_what_is_dropped(trio: list[Model], tmp_path: Path) -> None:
    keys: list[str] = []
    for seed in (0, 0, 1):
        with use(Context(folder=tmp_path / str(len(keys)), seed=seed)):
            keys.append(dare_linear(trio[0], {"a": trio[1]}).key)
    assert keys[0] == keys[1] != keys[2]


def test_what_cannot_be_merged(trio: list[Model], tmp_path: Path) -> None:
    base, one, two = trio
    with use(Context(folder=tmp_path)):
        with pytest.raises(InputError, match="goes between two models"):
            slerp({"a": base, "b": one, "c": two})
        with pytest.raises(InputError, match="none of them called 'base'"):
            task_arithmetic(base, {})
        with pytest.raises(InputError, match="one weight for each model"):
            dare_ties(base, {"a": one, "b": two}, weights={"a": 1.0})
