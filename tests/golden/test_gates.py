"""Switch and sigmoid gates by hand, in a model, through training, and what balances them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from truing.context import Context, use
from truing.core.passes.routers import (
    balance_value,
    first_share,
    gate_of,
    routers,
    shares,
    top_k_gate,
)
from truing.errors import InputError
from truing.merge.mixture_of_experts import mixture_of_experts
from truing.method import methods
from truing.models import Model
from truing.tables import Row, Table

IDS = torch.tensor([[1, 40, 7, 99, 200, 13, 5, 5, 81, 2]])
ROWS: list[Row] = [
    {"prompt": f"say {w}", "completion": w * (1 + i)} for i, w in enumerate(("oak", "fern", "moss"))
]
GATES = ("softmax", "switch", "sigmoid")


@pytest.fixture(scope="module")
def dense(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


def upcycled(dense: Model, gate: str, **settings: object) -> Model:
    made = methods["mixture_of_experts"]({"base": dense}, gate=gate, **settings)
    assert isinstance(made, Model)
    return made


def drawn(seed: int = 0) -> Tensor:
    return 2 * torch.randn(9, 5, generator=torch.Generator().manual_seed(seed))


def test_weights_by_hand() -> None:
    z = torch.tensor([[0.0, math.log(2), math.log(5)]])  # p = 1/8, 2/8, 5/8; s = 1/2, 2/3, 5/6
    weights, index = top_k_gate(z, 1, gate="switch")
    assert index.tolist() == [[2]] and weights.tolist()[0] == pytest.approx([5 / 8])
    weights, index = top_k_gate(z, 2, gate="sigmoid")
    assert index.tolist() == [[2, 1]] and weights.tolist()[0] == pytest.approx([5 / 9, 4 / 9])
    assert shares(z, "sigmoid").tolist()[0] == pytest.approx([1 / 4, 1 / 3, 5 / 12])
    # A bias takes part in the choice alone: 1/2 + 0.4 is more than 2/3.
    weights, index = top_k_gate(z, 2, torch.tensor([0.4, 0.0, 0.0]), gate="sigmoid")
    assert index.tolist() == [[0, 2]] and weights.tolist()[0] == pytest.approx([3 / 8, 5 / 8])
    weights, index = top_k_gate(z, 1, torch.tensor([0.6, 0.0, 0.0]), gate="switch")
    assert index.tolist() == [[0]] and weights.tolist()[0] == pytest.approx([1 / 8])
    tiny = torch.full((1, 4), -200.0)
    assert top_k_gate(tiny, 2, gate="sigmoid")[0].tolist() == [[0.5, 0.5]]


def test_gates_are_one_another_where_they_should_be() -> None:
    z = drawn()
    p, s = z.softmax(-1), z.sigmoid()
    # Kept as a whole, either is the dense mixture by its own shares.
    for gate, dense in (("softmax", p), ("sigmoid", s / s.sum(-1, keepdim=True))):
        every, at = top_k_gate(z, 5, gate=gate)  # type: ignore[arg-type]
        assert torch.allclose(torch.zeros(9, 5).scatter(1, at, every), dense, atol=1e-6)
        kept, _ = top_k_gate(z, 3, gate=gate)  # type: ignore[arg-type]
        assert torch.allclose(kept.sum(-1), torch.ones(9))
    # A switch sends tokens where softmax does, and its weight times 1/p is softmax's 1.
    weights, at = top_k_gate(z, 1, gate="switch")
    ones, same = top_k_gate(z, 1)
    assert torch.equal(at, same) and torch.allclose(weights / p.gather(1, at), ones)
    # All gates follow the experts where these are exchanged.
    turned = torch.randperm(5, generator=torch.Generator().manual_seed(1))
    for gate, k in (("switch", 1), ("sigmoid", 2)):
        weights, at = top_k_gate(z, k, gate=gate)  # type: ignore[arg-type]
        other, there = top_k_gate(z[:, turned], k, gate=gate)  # type: ignore[arg-type]
        assert torch.allclose(other, weights) and torch.equal(turned[there], at)


@pytest.mark.parametrize("gate", GATES)
def test_balance_is_one_at_even_and_e_at_collapsed_routing(gate: str) -> None:
    even = shares(torch.zeros(8, 4), gate)  # type: ignore[arg-type]
    assert float(balance_value(even, torch.full((4,), 1 / 4)).mean()) == pytest.approx(1.0)
    far = torch.full((8, 4), -60.0)
    far[:, 2] = 60.0
    p = shares(far, gate)  # type: ignore[arg-type]
    assert float(balance_value(p, first_share(p)).mean()) == pytest.approx(4.0)


def layer(model: Model) -> tuple[Tensor, Tensor]:
    """(states in, states out) of the first feed-forward layer, [T, D]."""
    found: list[tuple[Tensor, Tensor]] = []
    module = model.load_module().module
    handle = module.model.layers[0].mlp.register_forward_hook(
        lambda _m, x, out: found.append((x[0][0], out[0]))
    )
    with torch.no_grad():
        module(IDS)
    handle.remove()
    return found[0]


def test_copies_are_weighed_by_the_gate(dense: Model, tmp_path: Path) -> None:
    with use(Context(folder=tmp_path)):
        _, plain = layer(dense)
        made = {gate: upcycled(dense, gate) for gate in GATES}
        assert len({m.key for m in made.values()}) == 3
        assert [len(m.changes) for m in made.values()] == [0, 1, 1]
    for gate in ("softmax", "sigmoid"):  # kept weights sum to 1
        assert torch.allclose(layer(made[gate])[1], plain, atol=1e-5)
    states, out = layer(made["switch"])
    router = made["switch"].folded()["model.layers.0.block_sparse_moe.gate.weight"]
    largest = (states @ router.T).softmax(-1).max(-1).values
    assert torch.allclose(out, largest[:, None] * plain, atol=1e-5)
    # It stays with the model, which no plain folder can hold.
    saved = Model.load(made["switch"].save(tmp_path / "saved"))
    assert saved.key == made["switch"].key
    assert {gate_of(r) for r in routers(saved.load_module().module)} == {"switch"}
    assert torch.equal(layer(saved)[1], out)
    with pytest.raises(InputError, match="further tensors"):
        saved.export(tmp_path / "plain")


@pytest.mark.parametrize(
    ("gate", "top_k"), [("softmax", 1), ("sigmoid", 1), ("switch", 2), ("sigmoid", 5)]
)
def test_what_no_router_could_learn_from_is_refused(dense: Model, gate: str, top_k: int) -> None:
    with pytest.raises(InputError, match="top_k from 2 to their number, or 1 for a switch"):
        mixture_of_experts({"base": dense}, gate=gate, top_k=top_k)  # type: ignore[arg-type]


def slope_of_router(model: Model) -> Tensor:
    """Gradient of the task alone in the first layer's router, [E, D]."""
    module = model.load_module(fresh=True).module
    logp = module(IDS).logits[0, :-1].log_softmax(-1)
    (-logp.gather(1, IDS[0, 1:, None]).mean()).backward()
    (first, *_) = routers(module)
    assert isinstance(first.weight, torch.nn.Parameter) and first.weight.grad is not None
    return first.weight.grad


def plain_losses(model: Model, gate: str) -> tuple[float, float]:
    """(balance, z) of the answers of ROWS, mean over rows and layers, by the paper's formulas."""
    from truing.core.chat import completion_ids, prompt_ids

    loaded = model.load_module()
    layers: list[list[Tensor]] = []
    for row in ROWS:
        head = prompt_ids(loaded.tokenizer, str(row["prompt"]))
        answer = completion_ids(loaded.tokenizer, str(row["completion"]))
        with torch.no_grad():
            found = loaded.module(torch.tensor([head + answer]), output_router_logits=True)
        layers.append([z_TE[len(head) - 1 : -1] for z_TE in found.router_logits])
    balance = square = 0.0
    for one in zip(*layers, strict=True):
        every = torch.cat(list(one))
        f = torch.bincount(every.argmax(1), minlength=4) / len(every)
        for z in one:  # what is recorded is the mean over rows of their tokens' means
            s = z.sigmoid() if gate == "sigmoid" else z.exp()
            p = s / s.sum(1, keepdim=True)
            share = len(layers) * len(layers[0])
            balance += 4 * float((f * p.mean(0)).sum()) / share
            square += float(z.exp().sum(1).log().square().mean()) / share
    return balance, square


@pytest.mark.parametrize("gate", ["switch", "sigmoid"])
def test_routers_learn_from_the_task_and_are_balanced(
    dense: Model, gate: str, tmp_path: Path
) -> None:
    with use(Context(folder=tmp_path)):
        model = upcycled(dense, gate)
    if gate == "switch":  # copies differ in nothing but their weight, which the task can tell
        assert float(slope_of_router(model).norm()) > 0
    how = {"rank": 0, "steps": 3, "lr": 1e-3, "batch": 3, "warmup": 0.0}
    with use(Context(folder=tmp_path)) as context:
        made = methods["balanced_experts"](
            model, Table("example", ROWS), bias_step=0.125, balance=0.1, **how
        )
    seen = [m for m in context.metrics if "loss" in m]
    balance, square = plain_losses(model, gate)
    assert seen[0]["router_balance"] == pytest.approx(balance, rel=1e-4)
    assert seen[0]["router_z"] == pytest.approx(square, rel=1e-4)
    assert float(str(seen[-1]["loss"])) < float(str(seen[0]["loss"]))
    # The gate outlives a training of all weights, beside the biases, and acts.
    assert isinstance(made, Model)
    extra = made.folded().extra
    assert len(extra) == 6 and {gate_of(r) for r in routers(made.load_module().module)} == {gate}
    assert len(made.changes) == 2  # all weights with gates and biases, and the biases since moved
    with use(Context(folder=tmp_path)):
        later = methods["sft"](made, Table("example", ROWS), rank=0, steps=1, lr=1e-3)
    assert isinstance(later, Model) and len(later.changes) == 1
    kept = later.folded().extra
    assert set(kept) == set(extra) and all(torch.equal(kept[n], t) for n, t in extra.items())
    name = "model.layers.0.block_sparse_moe.gate"
    before = model.folded()[f"{name}.weight"]
    assert not torch.equal(made.folded()[f"{name}.weight"], before)
    (router, *_) = routers(made.load_module().module)
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z, weights, index = router(x)
    liked = (z.sigmoid() if gate == "sigmoid" else z.softmax(-1)) + extra[f"{name}.bias"]
    assert torch.equal(index, liked.topk(index.shape[1]).indices)
    kept = (z.sigmoid() if gate == "sigmoid" else z.softmax(-1)).gather(1, index)
    want = kept / kept.sum(1, keepdim=True) if gate == "sigmoid" else kept
    assert index.shape[1] == (1 if gate == "switch" else 2)
    assert torch.allclose(weights, want, atol=1e-6)
