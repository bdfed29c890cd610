"""Upcycled models are what they were made of; routers and losses by hand and by brute force."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from objective_numbers import LOGP, mask_of, nll, padded, total
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from truing.context import Context, use
from truing.core.batch.reading import read_units
from truing.core.chat import completion_ids, prompt_ids
from truing.core.generate import generate
from truing.core.logprob import check, states
from truing.core.objective import Measurements, objective_of
from truing.core.passes.routers import (
    balance_value,
    decided,
    first_share,
    importance_value,
    moved,
    mutual_information,
    top_k_gate,
    with_room,
    z_value,
)
from truing.core.reference import Reference
from truing.core.tiny import tiny_folder
from truing.core.trainer.text_task import TextTask
from truing.core.tree import example_tree, pack
from truing.errors import InputError
from truing.merge.mixture_of_experts import mixture_of_experts
from truing.method import methods
from truing.models import Model
from truing.tables import Row, Table
from truing.train.supervised.balanced_experts import Routers, balanced_experts

IDS = torch.tensor([[1, 40, 7, 99, 200, 13, 5, 5, 81, 2]])
ROWS: list[Row] = [
    {"prompt": f"say {w}", "completion": w * (1 + i)} for i, w in enumerate(("oak", "fern", "moss"))
]


@pytest.fixture(scope="module")
def dense(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tiny_folder(tmp_path_factory.mktemp("other"))
    tensors = load_file(folder / "model.safetensors")
    source = torch.Generator().manual_seed(3)
    moved = {n: t + 0.05 * torch.randn(t.shape, generator=source) for n, t in tensors.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return Model.open(folder)


@pytest.fixture(scope="module")
def sparse(dense: Model) -> Model:
    return mixture_of_experts({"base": dense})


def logits(model: Model) -> Tensor:
    with torch.no_grad():
        return model.load_module().module(IDS).logits


def test_copies_compute_what_they_were_copied_from(dense: Model, sparse: Model) -> None:
    assert isinstance(sparse.load_module().module, MixtralForCausalLM)
    for made in (sparse, mixture_of_experts({"base": dense}, experts=8, top_k=3)):
        assert torch.allclose(logits(made), logits(dense), atol=2e-5)
    # Both in the engine's packed trees and where it samples with a cache.
    before, after = (generate(m, ["hello"], greedy=True, max_tokens=12)[0] for m in (dense, sparse))
    assert before[0].text == after[0].text


def test_stock_transformers_opens_it(sparse: Model, tmp_path: Path) -> None:
    sparse.export(tmp_path / "out")
    module, facts = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not facts["missing_keys"] and not facts["unexpected_keys"]
    assert module.lm_head.weight is module.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(module(IDS).logits, logits(sparse))
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in names
    saved = Model.load(sparse.save(tmp_path / "saved"))
    assert saved.key == sparse.key


def test_models_become_experts(dense: Model, other: Model) -> None:
    made = mixture_of_experts({"a": dense, "b": other}, experts=4).folded()
    a, b = dense.folded(), other.folded()
    moe, mlp = "model.layers.2.block_sparse_moe", "model.layers.2.mlp"
    for e, source in enumerate((a, b, a, b)):
        for kind, name in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            want = source[f"{mlp}.{name}_proj.weight"]
            assert torch.equal(made[f"{moe}.experts.{e}.{kind}.weight"], want)
    name = "model.layers.2.self_attn.q_proj.weight"
    assert torch.allclose(made[name], (a[name] + b[name]) / 2)
    assert made[f"{moe}.gate.weight"].shape == (4, 128)


def test_routers_from_prompts(dense: Model, other: Model) -> None:
    rows = [{"prompt": "aaaa", "role": "a"}, {"prompt": "zq zq", "role": "b"}]
    made = mixture_of_experts({"a": dense, "b": other}, Table("prompt", rows)).folded()
    for i in (0, 2):
        gate = made[f"model.layers.{i}.block_sparse_moe.gate.weight"]
        assert gate.norm(dim=1).tolist() == pytest.approx([1.0, 1.0])  # a row for each model
    # The first layer's state of a prompt, worked out from the module's own outputs.
    loaded = dense.load_module()
    ids = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "aaaa"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    layer = loaded.module.model.layers[0]
    found: list[Tensor] = []
    handle = layer.mlp.register_forward_pre_hook(lambda _, x: found.append(x[0][0]))
    with torch.no_grad():
        loaded.module(ids)
    handle.remove()
    want = torch.nn.functional.normalize(found[0].mean(0), dim=0)
    got = made["model.layers.0.block_sparse_moe.gate.weight"][0]
    assert torch.allclose(got, want, atol=1e-5)


def test_prompts_follow_the_roles(dense: Model, other: Model, tmp_path: Path) -> None:
    rows = Table(
        "prompt", [{"prompt": "aaaa", "role": "a"}, {"prompt": "zq zq", "role": "b"}]
    )  # the same models in the same order, each with the other's prompts
    with use(Context(folder=tmp_path)):
        one, two = (
            mixture_of_experts(dict(zip(names, (dense, other), strict=True)), rows).folded()
            for names in ("ab", "ba")
        )
    name = "model.layers.0.block_sparse_moe.gate.weight"
    assert not torch.allclose(one[name], two[name], atol=1e-3)


def test_top_k_gate_by_hand() -> None:
    z = torch.tensor([[0.0, math.log(2), math.log(5)], [1.0, 1.0, -9.0]])
    weights, index = top_k_gate(z, 2)
    assert weights.tolist()[0] == pytest.approx([5 / 7, 2 / 7]) and index.tolist()[0] == [2, 1]
    assert torch.allclose(weights.sum(1), torch.ones(2))
    every, at = top_k_gate(z, 3)  # k = E is the dense softmax mixture
    assert torch.allclose(torch.zeros(2, 3).scatter(1, at, every), z.softmax(-1))
    turned, where = top_k_gate(z[:1].flip(1), 2)
    assert torch.equal(turned, weights[:1]) and torch.equal(2 - where, index[:1])


def test_a_bias_chooses_and_does_not_weigh() -> None:
    z = torch.tensor([[0.0, math.log(2), math.log(5)]])  # p = 1/8, 2/8, 5/8
    weights, index = top_k_gate(z, 2, torch.tensor([0.6, 0.0, 0.0]))
    assert index.tolist() == [[0, 2]] and weights.tolist()[0] == pytest.approx([1 / 6, 5 / 6])
    load = torch.tensor([4.0, 1.0, 1.0, 2.0])
    assert moved(torch.tensor([0.5, 0.0, 0.25, 0.0]), load, 0.125).tolist() == pytest.approx(
        [0.375, 0.125, 0.375, 0.0]
    )


def room_by_hand(chosen: Sequence[Sequence[int]], experts: int, factor: float) -> list[list[bool]]:
    """Which choices of one row find room: a queue for each expert, tokens in their order."""
    room = math.ceil(round(factor * len(chosen) * len(chosen[0]) / experts, 9))
    queues = [0] * experts
    made: list[list[bool]] = []
    for token in chosen:
        made.append([queues[e] < room for e in token])
        for e in token:
            queues[e] += 1
    return made


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 2.0])
def test_room_by_hand(factor: float) -> None:
    source = torch.Generator().manual_seed(1)
    sizes, experts = (1, 5, 12, 8), 4
    # Experts of uneven liking, so that some queues are long.
    p = torch.tensor([8.0, 4.0, 2.0, 1.0]).expand(sum(sizes), experts)
    index = torch.multinomial(p, 2, generator=source)
    row = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    found = with_room(index, row, experts, factor)
    want: list[list[bool]] = []
    for some in index.split(list(sizes)):
        want += room_by_hand(some.tolist(), experts, factor)
    assert found.tolist() == want
    # A factor of E / k has room for all tokens at one expert; 1.2 * 10 * 2 / 4 is 6, not 7.
    assert bool(found.all()) == (factor == 2.0)
    one = torch.zeros(10, 1, dtype=torch.long)
    alone = torch.zeros(10, dtype=torch.long)
    assert int(with_room(one, alone, 2, 1.2).sum()) == 6


def test_a_choice_without_room_adds_nothing(sparse: Model) -> None:
    module = sparse.load_module().module
    check(module)  # now, since that passes through the routers too
    trees = [example_tree(ids, [True] * len(ids)) for ids in ([1, 40, 7, 99, 200, 13], [5, 81, 3])]
    (packed,) = pack(trees)
    outs: list[Tensor] = []
    layer = module.model.layers[0].mlp
    handle = layer.register_forward_hook(lambda _m, _x, out: outs.append(out[0]))
    with torch.no_grad(), decided(module, capacity=0.5) as seen:
        states(module, packed)
    with torch.no_grad(), decided(module) as free:
        whole = states(module, packed)
    handle.remove()
    first = seen[0]
    weights, index = top_k_gate(first.logits_NE, 2)
    assert torch.equal(first.index_Nk, index) and all(r.kept_Nk.all() for r in free)
    want = [room_by_hand(some.tolist(), 4, 0.5) for some in index.split([6, 3])]
    assert first.kept_Nk.tolist() == want[0] + want[1] and not first.kept_Nk.all()
    # All experts are copies: what is left of a token's output is the weight of its kept choices.
    left_N1 = (weights * first.kept_Nk).sum(1, keepdim=True)
    assert torch.allclose(outs[0], left_N1 * outs[1], atol=1e-5)
    # Rows do not take room from each other, and what follows takes none from what is before.
    for tree, at in zip(trees, (slice(0, 6), slice(6, 9)), strict=True):
        with torch.no_grad(), decided(module, capacity=0.5) as alone:
            states(module, pack([tree])[0])
        assert all(torch.equal(a.kept_Nk, b.kept_Nk[at]) for a, b in zip(alone, seen, strict=True))
    with torch.no_grad(), decided(module, capacity=2.0) as roomy:
        assert torch.allclose(states(module, packed), whole, atol=1e-5)
    assert all(r.kept_Nk.all() for r in roomy)


def test_balancing_values_by_hand() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    f, m = first_share(p.log()), p.mean(0)
    assert f.tolist() == [0.5, 0.0, 0.5]
    assert float(balance_value(p, f).mean()) == pytest.approx(3 * (0.5 * 0.3 + 0.5 * 0.45))
    cv2 = float(m.var(unbiased=False) / m.mean() ** 2)
    assert float(importance_value(p, m).mean()) == pytest.approx(cv2, abs=1e-6)
    assert float(z_value(torch.tensor([[0.0, math.log(3)]]))) == pytest.approx(math.log(4) ** 2)
    uniform = torch.full((6, 3), 1 / 3)
    assert float(balance_value(uniform, torch.full((3,), 1 / 3)).mean()) == pytest.approx(1.0)
    one = torch.tensor([[1.0, 0, 0]] * 4)
    assert float(balance_value(one, first_share(one)).mean()) == pytest.approx(3.0)


def test_importance_has_the_gradient_of_the_squared_variation() -> None:
    z = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    p = z.softmax(-1)
    importance_value(p, p.mean(0).detach()).mean().backward()
    got, z.grad = z.grad, None
    total_E = z.softmax(-1).sum(0)
    (total_E.var(unbiased=False) / total_E.mean() ** 2).backward()
    assert got is not None and z.grad is not None and torch.allclose(got, z.grad, atol=1e-6)


def test_information_by_hand() -> None:
    assert mutual_information([[3, 0], [0, 3]]) == pytest.approx(math.log(2))
    assert mutual_information([[2, 4], [1, 2]]) == pytest.approx(0.0, abs=1e-9)


def test_loss_by_hand() -> None:
    values = {"router_balance": 1.5, "router_importance": 0.25, "router_z": 4.0}
    mask = mask_of(LOGP)
    flat = {n: torch.full_like(mask, v) for n, v in values.items()}
    m = Measurements(mask, {"logp": padded(LOGP), **flat}).branches(0)
    made = balanced_experts(m, balance=0.1, importance=2.0, z=0.01)
    assert total(made) == pytest.approx(nll() + 0.15 + 0.5 + 0.04, rel=1e-6)
    with pytest.raises(InputError, match="negative"):
        balanced_experts(m, balance=-1.0)


def plain_losses(
    module: torch.nn.Module, sequences: Sequence[tuple[Sequence[int], Sequence[bool]]]
) -> Tensor:
    """(nll, balance, z) of whole rows, one at a time, from the module's own router logits."""
    losses: list[Tensor] = []
    layers: list[list[Tensor]] = []
    for ids, loss in sequences:
        out = module(torch.tensor([list(ids)]), output_router_logits=True)
        at = torch.tensor([i - 1 for i, m in enumerate(loss) if m])
        logp = out.logits[0].log_softmax(-1)[at]
        losses.append(-logp.gather(1, torch.tensor([ids[i + 1] for i in at])[:, None])[:, 0])
        layers.append([z[at] for z in out.router_logits])
    balance, square = [], []
    for one in zip(*layers, strict=True):
        z = torch.cat(list(one))
        p = z.softmax(-1)
        f = torch.bincount(p.argmax(1), minlength=4) / len(p)
        balance.append(4 * (f * p.mean(0)).sum())
        square.append(z.logsumexp(-1).square().mean())
    return torch.stack([torch.cat(losses).mean(), torch.stack(balance).mean(),
                        torch.stack(square).mean()])  # fmt: skip


@pytest.mark.parametrize("budget", [30, 10**6])
def test_a_step_is_the_plain_loss_over_the_whole_step(sparse: Model, budget: int) -> None:
    loaded = sparse.load_module(fresh=True)
    spec, hook = objective_of(balanced_experts), Routers()
    units, _ = read_units(spec, loaded, Table("example", ROWS), 256, hook)
    weights = {"balance": 0.5, "importance": 0.0, "z": 0.25}
    task = TextTask(
        spec, weights, hook, units, loaded.module, Reference("", "float32"), budget=budget
    )
    parts = list(task.parts(range(3), 0))
    assert (len(parts) > 1) == (budget == 30)
    value = sum(float(p.loss.detach()) for p in parts) / 3
    for part in parts:
        (part.loss / 3).backward()
    plain = sparse.load_module(fresh=True).module
    losses = plain_losses(plain, [next(iter(u.tree().rows())) for u in units])
    want = losses[0] + 0.5 * losses[1] + 0.25 * losses[2]
    assert value == pytest.approx(float(want.detach()), rel=1e-4)
    want.backward()
    ours = dict(loaded.module.named_parameters())
    for name in ("gate.weight", "experts.down_proj"):
        slope = plain.get_parameter(f"model.layers.1.mlp.{name}").grad
        got = ours[f"model.layers.1.mlp.{name}"].grad
        assert slope is not None and got is not None and float(slope.norm()) > 0
        assert torch.allclose(got, slope, atol=1e-4 * float(slope.norm()))


def test_training_it_whole_moves_experts_apart(sparse: Model, tmp_path: Path) -> None:
    with use(Context(folder=tmp_path)) as context:
        made = methods["balanced_experts"](
            sparse,
            Table("example", ROWS),
            rank=0,
            steps=4,
            lr=1e-3,
            batch=3,
            balance=0.1,
            noise=0.1,
        )
    assert isinstance(made, Model)
    folded = made.folded()
    assert set(folded) == set(sparse.folded())
    first, second = (
        folded[f"model.layers.0.block_sparse_moe.experts.{e}.w1.weight"] for e in (0, 1)
    )
    assert not torch.equal(first, second)
    losses = [m for m in context.metrics if "loss" in m]
    assert float(str(losses[-1]["loss"])) < float(str(losses[0]["loss"]))
    assert {"router_balance", "router_z"} <= set(losses[0])
    assert not torch.allclose(logits(made), logits(sparse), atol=1e-3)


def tuned(model: Model, folder: Path, **settings: object) -> tuple[Model, list[dict[str, object]]]:
    values = {"rank": 0, "steps": 4, "lr": 1e-3, "batch": 3, "warmup": 0.0, **settings}
    with use(Context(folder=folder)) as context:
        made = methods["balanced_experts"](model, Table("example", ROWS), **values)
    assert isinstance(made, Model)
    return made, [dict(m) for m in context.metrics if "loss" in m]


BIAS: dict[str, object] = {"balance": 0.0, "z": 0.0, "bias_step": 0.125}


def chosen_by_hand(model: Model) -> list[Tensor]:
    """How many answer tokens choose each of 4 experts, two each, [E] of each layer."""
    loaded = model.load_module()
    counts = [torch.zeros(4)] * 3
    for row in ROWS:
        head = prompt_ids(loaded.tokenizer, str(row["prompt"]))
        answer = completion_ids(loaded.tokenizer, str(row["completion"]))
        with torch.no_grad():
            found = loaded.module(torch.tensor([head + answer]), output_router_logits=True)
        for i, z_TE in enumerate(found.router_logits):
            at = z_TE[len(head) - 1 : -1].topk(2).indices
            counts[i] = counts[i] + torch.bincount(at.flatten(), minlength=4)
    return counts


def test_biases_move_by_the_loads_and_stay_with_the_model(
    dense: Model, sparse: Model, tmp_path: Path
) -> None:
    made, seen = tuned(sparse, tmp_path / "a", steps=1, **BIAS)
    held = made.folded().extra
    loads = chosen_by_hand(sparse)
    for i, load in enumerate(loads):
        want = [0.125 * ((load.mean() > n).int() - (load.mean() < n).int()) for n in load]
        name = f"model.layers.{i}.block_sparse_moe.gate.bias"
        assert held[name].tolist() == pytest.approx([float(b) for b in want])
    assert len(held) == 3 and any(b.abs().sum() for b in held.values())
    largest = sum(float(load.max() / load.sum()) for load in loads) / len(loads)
    assert seen[0]["router_max_load"] == pytest.approx(largest, rel=1e-5)
    # It acts wherever the model is loaded, saved or not, and in the choice alone.
    loaded = Model.load(made.save(tmp_path / "saved")).load_module()
    with torch.no_grad(), decided(loaded.module) as routed:
        loaded.module(IDS)
    for i, r in enumerate(routed):
        p = r.logits_NE.softmax(-1) + held[f"model.layers.{i}.block_sparse_moe.gate.bias"]
        assert torch.equal(r.index_Nk, p.topk(2).indices)
    assert any(not torch.equal(r.index_Nk, r.logits_NE.topk(2).indices) for r in routed)
    with pytest.raises(InputError, match="head"):
        made.export(tmp_path / "plain")
    # Further training, by another method too, begins with the biases and hands them on.
    with use(Context(folder=tmp_path / "b")):
        again = methods["sft"](made, Table("example", ROWS), rank=0, steps=1, lr=1e-4, batch=3)
    assert isinstance(again, Model)
    assert all(torch.equal(again.folded().extra[n], b) for n, b in held.items())
    further, _ = tuned(made, tmp_path / "c", steps=1, **BIAS)
    steps = [further.folded().extra[n] - b for n, b in held.items()]
    assert {float(s) for b in steps for s in b} <= {-0.125, 0.0, 0.125}
    assert any(s.abs().sum() for s in steps)
    assert not tuned(sparse, tmp_path / "d", steps=1)[0].folded().extra


def test_biases_of_frozen_blocks_stay(sparse: Model, tmp_path: Path) -> None:
    made, seen = tuned(sparse, tmp_path / "top", steps=1, layers=2, **BIAS)
    whole, too = tuned(sparse, tmp_path / "whole", steps=1, **BIAS)
    held, every = made.folded().extra, whole.folded().extra
    assert set(held) == {f"model.layers.{i}.block_sparse_moe.gate.bias" for i in (1, 2)}
    assert all(torch.equal(bias, every[name]) for name, bias in held.items())
    names = ("router_balance", "router_z", "router_max_load")  # of all blocks all the same
    assert [seen[0][n] for n in names] == pytest.approx([too[0][n] for n in names], rel=1e-5)


def test_biases_alone_even_out_the_loads(sparse: Model, tmp_path: Path) -> None:
    even: dict[str, object] = {**BIAS, "bias_step": 0.01, "lr": 1e-9, "steps": 20}
    _, seen = tuned(sparse, tmp_path, **even)
    loads = [float(str(m["router_max_load"])) for m in seen]
    # Two of four experts each: an even share is 1/4.
    assert loads[0] > 0.28 and min(loads[-4:]) - 0.25 < 0.6 * (loads[0] - 0.25)


def test_biases_are_resumed(
    sparse: Model,
    tmp_path: Path,
    always_save: Callable[[], None],
    interrupted: Callable[[type, int], AbstractContextManager[None]],
) -> None:
    always_save()
    whole, _ = tuned(sparse, tmp_path / "whole", **BIAS)
    with interrupted(TextTask, 3):
        tuned(sparse, tmp_path / "cut", **BIAS)
    resumed, seen = tuned(sparse, tmp_path / "cut", **BIAS)
    assert len(seen) == 4 and resumed.key == whole.key


def test_what_has_no_room_is_counted(sparse: Model, tmp_path: Path) -> None:
    loaded = sparse.load_module()
    units, _ = read_units(objective_of(balanced_experts), loaded, Table("example", ROWS), 256)
    check(loaded.module)  # now, since that passes through the routers too
    lost = total_of = 0
    for unit in units:  # each row by itself
        with torch.no_grad(), decided(loaded.module, capacity=0.75) as seen:
            states(loaded.module, pack([unit.tree()])[0])
        lost += sum(int((~r.kept_Nk).sum()) for r in seen)
        total_of += sum(r.kept_Nk.numel() for r in seen)
    assert 0 < lost < total_of / 2
    found = [
        tuned(sparse, tmp_path / str(budget), steps=1, capacity=0.75, budget=budget)[1][0]
        for budget in (30, 4000)
    ]
    assert all(m["router_dropped"] == pytest.approx(lost / total_of, rel=1e-5) for m in found)
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
    assert found[0]["grad_norm"] == pytest.approx(found[1]["grad_norm"], rel=1e-3)
    (free,) = tuned(sparse, tmp_path / "free", steps=1, capacity=2.0)[1]
    assert free["router_dropped"] == 0.0 and free["loss"] != found[0]["loss"]
    assert "router_dropped" not in tuned(sparse, tmp_path / "none", steps=1)[1][0]


def test_noise_moves_the_choice_and_not_the_logits(sparse: Model) -> None:
    module = sparse.load_module().module
    torch.manual_seed(0)
    with torch.no_grad(), decided(module) as quiet:
        module(IDS)
    with torch.no_grad(), decided(module, noise=5.0) as loud:
        out = module(IDS).logits
    assert torch.equal(quiet[0].logits_NE, loud[0].logits_NE) and len(quiet) == 3
    assert torch.allclose(out, logits(sparse), atol=2e-5)  # copies: any choice computes the same


def test_mistakes(dense: Model, sparse: Model) -> None:
    with pytest.raises(InputError, match="top_k from 2"):
        mixture_of_experts({"base": dense}, top_k=1)
    with pytest.raises(InputError, match="an expert for each model"):
        mixture_of_experts(dict.fromkeys("abc", dense), experts=2)
    with pytest.raises(InputError, match="only models of type llama or mistral"):
        mixture_of_experts({"base": sparse})
    asked = Table("prompt", [{"prompt": "x", "role": "y"}])
    with pytest.raises(InputError, match="must name the model"):
        mixture_of_experts({"a": dense, "b": dense}, asked)
    for names, experts in (("ab", 4), ("abc", 4), ("a", 0), ("a", 4)):  # before roles are read
        with pytest.raises(InputError, match="each model is one expert"):
            mixture_of_experts(dict.fromkeys(names, dense), asked, experts=experts)
    with pytest.raises(InputError, match="has no prompt"):
        mixture_of_experts(
            {"a": dense, "b": dense}, Table("prompt", [{"prompt": "x", "role": "a"}])
        )
    with (
        pytest.raises(InputError, match="no mixture of experts"),
        decided(dense.load_module().module),
    ):
        pass
    with pytest.raises(InputError, match="noise"):
        Routers(noise=-1.0)
    with pytest.raises(InputError, match="capacity"):
        Routers(capacity=-1.0)
    with pytest.raises(InputError, match="bias_step"):
        Routers(bias_step=float("nan"))
