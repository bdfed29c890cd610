"""Mergers against numbers worked out by hand, and on whole models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from truing.core.tiny import tiny_folder, tiny_model
from truing.errors import InputError
from truing.merge.linear import average, linear
from truing.merge.ties import disjoint_mean, elect, merge, ties, trim
from truing.models import Model, Prefix


def test_average_by_hand() -> None:
    theta = [torch.tensor([1.0, 2]), torch.tensor([3.0, 6]), torch.tensor([5.0, -2])]
    assert average(theta, [0.5, 0.25, 0.25]).tolist() == [2.5, 2.0]
    # RESTA: fine-tuned + (aligned - un-aligned).
    assert average(theta, [1.0, 1.0, -1.0]).tolist() == [-1.0, 10.0]


def test_trim_keeps_the_largest() -> None:
    tau = torch.tensor([[0.1, -0.5, 0.3], [-0.2, 0.0, 0.4]])
    assert trim(tau, 0.5).tolist() == torch.tensor([[0, -0.5, 0.3], [0, 0, 0.4]]).tolist()
    assert trim(tau, 1.0) is tau
    assert trim(tau, 0.1).abs().sum() == 0  # int(0.6) = 0 entries
    ties_in_size = torch.tensor([[2.0, -2.0, 2.0, -2.0, 1.0]])
    assert trim(ties_in_size, 0.6).tolist() == [[2.0, -2.0, 2.0, 0.0, 0.0]]


def test_elect_and_disjoint_mean_by_hand() -> None:
    taus = [
        torch.tensor([3.0, 1, -1, 0]),
        torch.tensor([-1.0, 1, 2, 0]),
        torch.tensor([4.0, -2, 0, 0]),
    ]
    sign = elect(taus, [1.0, 1.0, 1.0])
    assert sign.tolist() == [1, 1, 1, 1]  # second and fourth: the sum is 0, which counts as +
    assert disjoint_mean(taus, [1.0, 1.0, 1.0], sign).tolist() == [3.5, 1.0, 2.0, 0.0]
    # Weights 3, 1, 1: the sign turns where the first expert's -1 outweighs 2.
    sign = elect(taus, [3.0, 1.0, 1.0])
    assert sign.tolist() == [1, 1, -1, 1]
    assert disjoint_mean(taus, [3.0, 1.0, 1.0], sign).tolist() == [3.25, 1.0, -1.0, 0.0]


def test_ties_of_one_tensor_by_hand() -> None:
    base = torch.full((1, 4), 10.0)
    first = base + torch.tensor([[4.0, -3, 0.1, 0.2]])
    second = base + torch.tensor([[2.0, 3.5, 0.3, -5.0]])
    # k = 0.5 keeps (4, -3, 0, 0) and (0, 3.5, 0, -5); signs + + + -; means 4, 3.5, 0, -5.
    assert merge(base, [first, second], [0.5, 0.5], 0.5, 1.0).tolist() == [[14.0, 13.5, 10.0, 5.0]]
    assert merge(base, [first, second], [0.5, 0.5], 0.5, 0.5).tolist() == [[12, 11.75, 10, 7.5]]
    # A vector (norm, bias) gets the plain mean, untrimmed.
    assert torch.allclose(
        merge(base[0], [first[0], second[0]], [0.5, 0.5], 0.5, 1.0),
        torch.tensor([13.0, 10.25, 10.2, 7.6]),
    )


def test_ties_against_a_plain_loop() -> None:
    draw = np.random.default_rng(3)
    base = draw.normal(size=(7, 9)).astype(np.float32)
    experts = [base + draw.normal(size=(7, 9)).astype(np.float32) for _ in range(3)]
    weights, density, scale = [0.2, 0.3, 0.5], 0.4, 0.7
    keep = int(density * 63)
    kept = []
    for expert in experts:
        tau = (expert - base).ravel()
        largest = set(sorted(range(63), key=lambda i: -abs(tau[i]))[:keep])
        kept.append([tau[i] if i in largest else 0.0 for i in range(63)])
    expected = []
    for i in range(63):
        sign = 1.0 if sum(w * k[i] for w, k in zip(weights, kept, strict=True)) >= 0 else -1.0
        agree = [(w, k[i]) for w, k in zip(weights, kept, strict=True) if k[i] * sign > 0]
        mean = sum(w * v for w, v in agree) / sum(w for w, _ in agree) if agree else 0.0
        expected.append(base.ravel()[i] + scale * mean)
    got = merge(torch.tensor(base), [torch.tensor(e) for e in experts], weights, density, scale)
    assert np.allclose(got.numpy().ravel(), expected, atol=1e-6)


def test_experts_in_one_tensor_are_trimmed_as_one_and_kernels_are_not() -> None:
    draw = np.random.default_rng(5)
    base = draw.normal(size=(3, 16, 17)).astype(np.float32)
    size = np.array([1.0, 3.0, 0.2])[:, None, None]  # the experts have changed unevenly
    tau = (size * draw.normal(size=base.shape)).astype(np.float32)
    expert = base + tau
    tau = expert - base
    keep = int(0.25 * tau.size)
    cut = np.sort(np.abs(tau).ravel())[-keep]
    expected = base + np.where(np.abs(tau) >= cut, tau, 0.0)
    got = merge(torch.tensor(base), [torch.tensor(expert)], [1.0], 0.25, 1.0).numpy()
    assert np.allclose(got, expected, atol=1e-6)
    shares = (got != base).mean((1, 2))
    assert shares[1] > 0.5 and shares[2] == 0.0  # one cut for all of them
    for shape in ((8, 1, 4), (8, 16, 3)):  # kernels of convolutions over time get the mean
        kernel = torch.zeros(shape)
        assert torch.equal(merge(kernel, [kernel + 2.0], [1.0], 0.25, 1.0), kernel + 2.0)


def test_limits() -> None:
    base = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    up = [base + 1.0, base + 3.0]
    assert torch.allclose(
        merge(base, up, [0.5, 0.5], 1.0, 1.0), base + 2.0
    )  # equal signs: the mean
    assert torch.equal(merge(base, [base, base], [0.5, 0.5], 0.2, 1.0), base)
    third = base.to(torch.bfloat16)
    assert torch.equal(average([third] * 3, [1 / 3] * 3), third)
    assert average([third, third + 1], [0.5, 0.5]).dtype == torch.bfloat16
    counter = torch.tensor([3])
    assert average([counter, counter], [0.5, 0.5]) is counter


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Three tiny models: one base and two that differ from it by noise."""
    root = tmp_path_factory.mktemp("trio")
    base = tiny_folder(root / "base")
    for i in (1, 2):
        other = shutil.copytree(base, root / f"expert{i}")
        source = torch.Generator().manual_seed(i)
        tensors = load_file(base / "model.safetensors")
        noisy = {n: t + 0.02 * torch.randn(t.shape, generator=source) for n, t in tensors.items()}
        save_file(noisy, other / "model.safetensors", metadata={"format": "pt"})
        (other / "README.md").write_text(
            f"---\nlicense: {'mit' if i == 1 else 'cc-by-nc-4.0'}\n---"
        )
    return {name: Model.open(root / name) for name in ("base", "expert1", "expert2")}


def test_merged_model_is_whole(trio: dict[str, Model], tmp_path: Path) -> None:
    experts = {"a": trio["expert1"], "b": trio["expert2"]}
    merged = linear(experts, weights={"a": 1.0, "b": 3.0})
    one, two = (m.folded() for m in experts.values())
    for name, tensor in merged.folded().items():
        assert torch.allclose(tensor, 0.25 * one[name] + 0.75 * two[name], atol=1e-6)
    module = merged.load_module().module
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert merged.licence == "cc-by-nc-4.0"
    merged.save(tmp_path / "saved")
    assert Model.load(tmp_path / "saved").key == merged.key
    merged.export(tmp_path / "plain")
    exported = load_file(tmp_path / "plain" / "model.safetensors")
    assert set(exported) == set(load_file(trio["base"].folder / "model.safetensors"))


def test_equal_inputs_come_back(trio: dict[str, Model]) -> None:
    expert, base = trio["expert1"], trio["base"]
    assert linear({"a": expert, "b": expert, "c": expert}).weights_key == expert.weights_key
    assert ties(base, {"a": base, "b": base}).weights_key == base.weights_key


def test_order_of_experts_does_not_matter(trio: dict[str, Model]) -> None:
    a, b, base = trio["expert1"], trio["expert2"], trio["base"]
    weights = {"a": 1.0, "b": 2.0}
    for forward, backward in (
        (
            ties(base, {"a": a, "b": b}, weights=weights),
            ties(base, {"b": b, "a": a}, weights=weights),
        ),
        (linear({"a": a, "b": b}, weights=weights), linear({"b": b, "a": a}, weights=weights)),
    ):
        other = backward.folded()
        assert all(torch.allclose(t, other[n], atol=1e-6) for n, t in forward.folded().items())


def test_ties_equals_its_parts_on_a_model(trio: dict[str, Model]) -> None:
    merged = ties(
        trio["base"], {"a": trio["expert1"], "b": trio["expert2"]}, density=0.3, scale=0.8
    )
    name = "model.layers.2.mlp.down_proj.weight"
    base, a, b = (trio[n].folded()[name] for n in ("base", "expert1", "expert2"))
    assert torch.equal(merged.folded()[name], merge(base, [a, b], [0.5, 0.5], 0.3, 0.8))


def test_run_time_changes_are_carried_on(trio: dict[str, Model]) -> None:
    brief = Prefix([{"role": "system", "content": "Be brief."}])
    one, two = trio["expert1"].adding(brief), trio["expert2"]
    with pytest.raises(InputError, match="different run-time changes"):
        linear({"a": one, "b": two})
    assert linear({"a": one, "b": two}, keep="a").run_time_changes == (brief,)
    assert linear({"a": two, "b": one}, keep="a").run_time_changes == ()


def test_other_tokenizer_is_refused(trio: dict[str, Model], tmp_path: Path) -> None:
    folder = shutil.copytree(trio["base"].folder, tmp_path / "other")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(InputError, match="tokenizer or chat template"):
        linear({"a": trio["base"], "b": Model.open(folder)})
    tokens = json.loads((trio["base"].folder / "tokenizer.json").read_text())
    tokens["padding"] = None  # no part of what a token means
    folder = shutil.copytree(trio["base"].folder, tmp_path / "same")
    (folder / "tokenizer.json").write_text(json.dumps(tokens, indent=4))
    linear({"a": trio["base"], "b": Model.open(folder)})


def test_other_shape_is_refused(trio: dict[str, Model], tmp_path: Path) -> None:
    folder = shutil.copytree(trio["base"].folder, tmp_path / "wide")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.zeros(300, 128)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="embed_tokens"):
        ties(trio["base"], {"a": Model.open(folder)})


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"a": 1.0}, "one weight for each"), ({"a": 1.0, "b": -1.0}, "sum to zero")],
)
def test_bad_weights(trio: dict[str, Model], weights: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        linear({"a": trio["expert1"], "b": trio["expert2"]}, weights=weights)


def test_ties_takes_positive_weights_alone(trio: dict[str, Model]) -> None:
    for weights in ({"a": -1.0, "b": -1.0}, {"a": 3.0, "b": -1.0}, {"a": 1.0, "b": 0.0}):
        with pytest.raises(InputError, match="weights must be positive"):
            ties(trio["base"], {"a": trio["expert1"], "b": trio["expert2"]}, weights=weights)


def test_merged_tiny_still_computes(trio: dict[str, Model]) -> None:
    merged = ties(trio["base"], {"a": trio["expert1"]}, density=1.0)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        got = merged.load_module().module(input_ids=ids).logits
        expected = trio["expert1"].load_module().module(input_ids=ids).logits
        assert torch.allclose(got, expected, atol=1e-4)
        assert not torch.allclose(got, tiny_model()[0](input_ids=ids).logits, atol=1e-2)
