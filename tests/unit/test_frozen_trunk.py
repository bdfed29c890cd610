"""Top blocks alone: kept states give the plain numbers, bounds hold, files go round."""

from __future__ import annotations

import resource
import string
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from truing.changes import Adapter
from truing.context import Context, Json, use
from truing.core.logprob import measure, states
from truing.core.objective import objective_of
from truing.core.passes import frozen_trunk
from truing.core.passes.frozen_trunk import PLACE, FrozenTrunk, attach, keys_of
from truing.core.training import TextTraining
from truing.core.tree import Node, group_tree, pack
from truing.core.trunk import blocks_of
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.tables import Table

WORDS = "lime oak rain stone river cloud".split()
PAIRS = [{"prompt": f"say {w}", "chosen": f"{w}!", "rejected": f"{w}, no?"} for w in WORDS]
TREES = [group_tree([5, 6, i], [[7, 8, i], [9, 10]]) for i in range(20, 30)]


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(frozen_trunk, "home", lambda: tmp_path / "home")


def trunk_of(tiny_path: Path, layers: int = 1) -> FrozenTrunk:
    loaded = Model.open(tiny_path).load_module(fresh=True)
    attach(loaded.module, TextTraining(rank=0, layers=layers), 0)
    return FrozenTrunk(loaded.module, layers, "weights", "float32")


def below(trunk: FrozenTrunk) -> list[int]:
    """Counts how often the frozen blocks are computed, from now on."""
    calls: list[int] = []
    plain = blocks_of(trunk.module)[0].self_attn
    plain.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_values_and_gradients_are_those_of_the_whole_model(tiny_path: Path) -> None:
    trunk = trunk_of(tiny_path)
    module, count = trunk.module, len(blocks_of(trunk.module))
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for kept in (False, True):
        if kept:
            trunk.sweep(TREES, budget=40)  # other micro-batches than those below
        calls = below(trunk)
        module.zero_grad()
        made = measure(module, pack(TREES, 64)[0], ("logp", "entropy"))
        (made["logp"].sum() + made["entropy"].square().sum()).backward()
        grads = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
        found.append((made["logp"].detach(), grads))
        assert bool(calls) != kept
    (plain, grads), (played, again) = found
    assert torch.allclose(plain, played, atol=1e-5) and set(grads) == set(again)
    assert all(f"layers.{count - 1}." in n for n in grads) and len(grads) > 6
    for name, grad in grads.items():
        assert torch.allclose(grad, again[name], atol=1e-5 * float(grad.abs().max()) + 1e-6), name


def test_keys_are_of_tokens_and_branches() -> None:
    def keys(trees: Sequence[Node]) -> list[str]:
        return [k for packed in pack(trees, 1000) for k, _, _ in keys_of(packed)]

    one = group_tree([5, 6], [[7, 8], [9]])
    other = [group_tree([5, 6], [[7], [8, 9]]), group_tree([5, 6, 7], [[8], [9]])]
    assert keys([one, *other, one])[0] == keys([*other, one])[2]
    assert len(set(keys([one, *other]))) == 3
    (packed,) = pack([other[0], one], 1000)
    assert [(a, b) for _, a, b in keys_of(packed)] == [(0, 5), (5, 10)]


def test_kept_by_content_on_disk_within_bounds(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = trunk_of(tiny_path), trunk_of(tiny_path)
    first.sweep(TREES, budget=32)
    second.sweep(TREES, budget=32)
    assert first.computed and not second.computed and second.cached == first.computed
    (packed,) = pack(TREES, 1000)
    with torch.no_grad():
        want = states(first.module, packed)
        files = list((tmp_path / "home" / "trunk").glob("*.safetensors"))
        files[0].unlink()  # another run needed the room
        files[1].write_bytes(b"damaged")
        assert torch.equal(states(second.module, packed), want) and second.computed == 2
    # Room for some trees only: the others are computed from the start.
    monkeypatch.setattr(frozen_trunk, "LIMIT", 2 * 128 * 4 * 40)
    third = trunk_of(tiny_path, layers=1)
    third.how = ["another"]
    with use(Context(folder=tmp_path)) as context:
        third.sweep(TREES, budget=40)
    (facts,) = (m for m in context.metrics if "rows_kept" in m)
    assert facts["rows_kept"] == 5 and facts["rows_not_kept"] == 5
    assert facts["trunk_bytes"] == 40 * 128 * 4
    with torch.no_grad():
        assert torch.allclose(states(third.module, packed), want, atol=1e-5)


def test_states_that_cannot_be_kept_are_computed_again(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "trunk").write_text("no folder can be made here")
    trunk = trunk_of(tiny_path)
    (packed,) = pack(TREES, 1000)
    with torch.no_grad():
        want = states(trunk.module, packed)
        trunk.sweep(TREES, budget=32)
        assert trunk.computed == 1 and "has no room for states" in capsys.readouterr().err
        assert torch.allclose(states(trunk.module, packed), want, atol=1e-5)
        assert trunk.computed == 1  # not a whole micro-batch for each of its trees


def test_a_disk_that_fills_up_while_training_lasts(tiny_path: Path, tmp_path: Path) -> None:
    trunk = trunk_of(tiny_path)
    trunk.sweep(TREES)
    folder = tmp_path / "home" / "trunk"
    (path,) = folder.iterdir()
    path.unlink()  # another run needed the room
    (packed,) = pack(TREES, 1000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
    try:
        with torch.no_grad():
            states(trunk.module, packed)
            computed = trunk.computed
            states(trunk.module, packed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert trunk.computed == computed  # from the start, once it was seen that none can be kept
    assert not any(folder.iterdir())  # nothing half-written takes up the last bytes


def run(
    name: str, tiny_path: Path, folder: Path, keep: bool, **settings: object
) -> tuple[Model, list[dict[str, Json]]]:
    spec = objective_of(methods[name].declared)
    rows = PAIRS if spec.rows == "pair" else [
        {"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0}
        for i, r in enumerate(PAIRS)
    ]  # fmt: skip
    small = {"steps": 3, "batch": 4, "layers": 1, "lr": 1e-3, **settings}
    with pytest.MonkeyPatch.context() as patch, use(Context(seed=2, folder=folder)) as context:
        if not keep:
            patch.setattr(FrozenTrunk, "sweep", lambda *_: None)
        made = methods[name](Model.open(tiny_path), Table(spec.rows, rows), **small)
    assert isinstance(made, Model)
    return made, [m for m in context.metrics if "loss" in m]


@pytest.mark.parametrize(
    ("name", "rank"), [("dpo", 0), ("dpo", 4), ("kto", 4), ("aot", 0), ("bradley_terry", 4),
                       ("tdpo1", 4)],
)  # fmt: skip
def test_training_is_the_same_with_and_without_what_is_kept(
    name: str, rank: int, tiny_path: Path, tmp_path: Path
) -> None:
    kept, with_it = run(name, tiny_path, tmp_path / "a", True, rank=rank)
    plain, without = run(name, tiny_path, tmp_path / "b", False, rank=rank)
    for a, b in zip(with_it, without, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3, abs=1e-5)
    before = Model.open(tiny_path).folded()
    count = len(blocks_of(Model.open(tiny_path).load_module().module))
    moved = {n for n in before if not torch.equal(before[n], kept.folded()[n])}
    assert moved and all(f"layers.{count - 1}." in n for n in moved)
    for name in moved:
        assert torch.allclose(kept.folded()[name], plain.folded()[name], atol=2e-4)
    if rank:
        assert isinstance(kept.weight_changes[0], Adapter)


def test_what_changes_from_step_to_step_is_not_kept(tiny_path: Path, tmp_path: Path) -> None:
    made, _ = run("neftune", tiny_path, tmp_path, True)
    assert isinstance(made, Model) and not (tmp_path / "home").exists()


def test_online_methods_and_faults(tiny_path: Path, tmp_path: Path) -> None:
    model = Model.open(tiny_path)
    loaded = model.load_module(fresh=True)
    blocks = blocks_of(loaded.module)
    adapters = attach(loaded.module, TextTraining(rank=2, layers=1), 0)
    assert adapters is not None
    assert {n.split(".")[2] for n in adapters.adapters} == {str(len(blocks) - 1)}
    with pytest.raises(InputError, match=f"has {len(blocks)} blocks"):
        attach(loaded.module, TextTraining(layers=len(blocks) + 1), 0)
    assert PLACE not in vars(loaded.module)
    with use(Context(folder=tmp_path)):
        made = methods["grpo"](
            model, Table("prompt", [{"prompt": w} for w in WORDS]), layers=1, rank=0, steps=1,
            batch=2, answers=2, max_tokens=4, lr=1e-3,
            rewards={"printed": {"use": "share_of", "letters": string.printable}},
        )  # fmt: skip
    assert isinstance(made, Model)
    moved = {n for n in model.folded() if not torch.equal(model.folded()[n], made.folded()[n])}
    assert moved and all(f"layers.{len(blocks) - 1}." in n for n in moved)
