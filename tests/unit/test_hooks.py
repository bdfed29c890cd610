"""Reading and editing activations by site name, on several architectures."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from truing.core.hooks import Edit, applied, capture, edit, find, load, save
from truing.core.logprob import measure
from truing.core.sampling import SamplingSettings, sample
from truing.core.tiny import tiny_model
from truing.core.tree import group_tree, pack
from truing.errors import InputError
from truing.models import Edits, Model

ROW = [5, 77, 130, 9, 201, 33, 4]


def llama() -> nn.Module:
    return tiny_model(blocks=6)[0]


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    return GPT2LMHeadModel(config).eval()


def neox() -> nn.Module:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).eval()


def logits(module: nn.Module, ids: list[int] = ROW) -> Tensor:
    with torch.no_grad():
        return module(torch.tensor([ids])).logits[0]


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.mark.parametrize("make", [llama, gpt2, neox])
def test_what_is_read_is_what_transformers_reports(make: object) -> None:
    module = make()  # type: ignore[operator]
    with torch.no_grad():
        hidden = module(torch.tensor([ROW]), output_hidden_states=True).hidden_states
    sites = ["embedding", "layers.0.residual", "layers.1.residual"]
    left = hooks_of(module)  # of transformers itself
    read = capture(module, sites, [ROW[:3], ROW], [(0, 3), (0, 7)])
    for site, states in zip(sites, hidden, strict=False):
        if site == "embedding" and make is gpt2:
            continue  # its learnt positions are added behind the embedding
        assert torch.allclose(read[site][1], states[0], atol=1e-5), site
        assert torch.allclose(read[site][0], states[0, :3], atol=1e-5), site
    assert hooks_of(module) == left


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_parts_of_a_block_add_up(make: object) -> None:
    module = make()  # type: ignore[operator]
    names = ["layers.0.residual", "layers.1.attn", "layers.1.mlp", "layers.1.residual"]
    read = [capture(module, [n], [ROW], [(0, 7)])[n][0] for n in names]
    assert torch.allclose(read[0] + read[1] + read[2], read[3], atol=1e-4)


@pytest.mark.parametrize("make", [llama, gpt2, neox])
def test_heads_lie_side_by_side(make: object) -> None:
    module = make()  # type: ignore[operator]
    sites = ["layers.1.heads", *(f"layers.1.head.{k}" for k in range(4))]
    read = capture(module, sites, [ROW], [(2, 5)])
    assert torch.equal(torch.cat([read[s][0] for s in sites[1:]], 1), read[sites[0]][0])
    out = find(module, sites[0]).module
    with torch.no_grad():
        made = capture(module, ["layers.1.attn"], [ROW], [(2, 5)])["layers.1.attn"][0]
        assert torch.allclose(out(read[sites[0]][0]), made, atol=1e-5)


def test_only_the_layers_asked_for_are_computed() -> None:
    module = llama()
    seen: list[int] = []
    for i, layer in enumerate(module.model.layers):
        layer.register_forward_pre_hook(lambda _, __, i=i: seen.append(i))
    capture(module, ["layers.2.residual"], [ROW])
    assert seen == [0, 1, 2]


def test_what_is_kept_of_a_batch_is_no_more_than_was_asked_for() -> None:
    module = llama()
    rows = [ROW, ROW[:4], ROW[2:]]
    site = "layers.1.residual"
    read = capture(module, [site], rows, [(5, 7), (0, 1), (1, 3)])[site]
    assert [h.shape[0] for h in read] == [2, 1, 2]
    for h in read:  # and holds nothing of the rest of the batch
        assert h.untyped_storage().nbytes() == h.numel() * 4
    means = capture(module, [site], rows, [(5, 7), (0, 1), (1, 3)], mean=True)[site]
    for h_TD, mean_D in zip(read, means, strict=True):
        assert torch.equal(mean_D, h_TD.mean(0)) and mean_D.untyped_storage().nbytes() == 4 * 128


def test_batches_do_not_change_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    module = llama()
    rows = [[i + 3] * (i + 1) + ROW for i in range(6)]
    together = capture(module, ["layers.3.residual"], rows)["layers.3.residual"]
    monkeypatch.setattr("truing.core.hooks.BATCH", 1)
    alone = capture(module, ["layers.3.residual"], rows)["layers.3.residual"]
    for a, b in zip(together, alone, strict=True):
        assert a.shape == (1, 128) and torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("op", ["add", "ablate"])
@pytest.mark.parametrize("make", [llama, gpt2, neox])
def test_edits_do_what_their_equations_say(make: object, op: str) -> None:
    module = make()  # type: ignore[operator]
    size = 128 if make is llama else 32
    torch.manual_seed(1)
    v = torch.randn(size)
    change = Edit("layers.1.residual", v, op, 0.7)  # type: ignore[arg-type]
    before = capture(module, ["layers.1.residual"], [ROW], [(0, 7)])["layers.1.residual"][0]
    with edit(module, [change]):
        after = capture(module, ["layers.1.residual"], [ROW], [(0, 7)])["layers.1.residual"][0]
    u = v / v.norm()
    want = before + 0.7 * v if op == "add" else before - 0.7 * (before @ u)[:, None] * u
    assert torch.allclose(after, want, atol=1e-5)
    assert hooks_of(module) == 0
    if op == "ablate":
        whole = Edit("layers.1.residual", v, "ablate")
        assert float((whole(before) @ u).abs().max()) < 1e-5


def test_one_head_is_edited_and_no_other() -> None:
    module = llama()
    change = Edit("layers.1.head.2", torch.ones(32))
    before = capture(module, ["layers.1.heads"], [ROW], [(0, 7)])["layers.1.heads"][0]
    with edit(module, [change]):
        after = capture(module, ["layers.1.heads"], [ROW], [(0, 7)])["layers.1.heads"][0]
    moved = (after - before).abs().amax(0)
    assert torch.allclose(moved[64:96], torch.ones(32), atol=1e-5)
    assert not moved[:64].any() and not moved[96:].any()


def test_edits_act_alike_in_every_layout() -> None:
    """Padded, packed and one token at a time: a token is changed by itself."""
    module = llama()
    edits = [
        Edit("layers.1.residual", torch.linspace(-1, 1, 128), skip_first=True),
        Edit("layers.3.mlp", torch.linspace(1, -1, 128), "ablate", 0.5),
    ]
    answers = [[3, 8, 1], [60, 4]]
    with edit(module, edits):
        packed = measure(module, pack([group_tree(ROW, answers)])[0], grad=False)["logp"]
        for k, answer in enumerate(answers):
            logp = logits(module, ROW + answer)[len(ROW) - 1 : -1].log_softmax(-1)
            alone = logp.gather(1, torch.tensor(answer)[:, None])[:, 0]
            assert torch.allclose(packed[0, k, : len(answer)], alone, atol=1e-4)
        (drawn,) = sample(module, [ROW], SamplingSettings(max_tokens=4, stop_ids=(), n=2))
        for made in drawn:
            logp = logits(module, ROW + made.ids)[len(ROW) - 1 : -1].log_softmax(-1)
            alone = logp.gather(1, torch.tensor(made.ids)[:, None])[:, 0]
            assert torch.allclose(torch.tensor(made.logprobs), alone, atol=1e-4)


def test_the_first_token_is_left_alone_when_asked() -> None:
    module = llama()
    site = "layers.1.residual"
    before = capture(module, [site], [ROW], [(0, 7)])[site][0]
    with edit(module, [Edit(site, torch.ones(128), skip_first=True)]):
        after = capture(module, [site], [ROW], [(0, 7)])[site][0]
    assert torch.equal(after[0], before[0])
    assert torch.allclose(after[1:], before[1:] + 1, atol=1e-6)


def test_order_and_removal_after_an_error() -> None:
    module = llama()
    site, v = "layers.1.residual", torch.ones(128)
    before = capture(module, [site], [ROW])[site][0]
    with edit(module, [Edit(site, v), Edit(site, v, "ablate")]):
        after = capture(module, [site], [ROW])[site][0]
    assert float((after @ v).abs().max()) < 1e-3 and (before @ v).abs().max() > 1e-3
    plain = logits(module)
    with pytest.raises(ZeroDivisionError), edit(module, [Edit(site, v, skip_first=True)]):
        _ = 1 / 0
    assert hooks_of(module) == 0 and torch.equal(logits(module), plain)


def test_a_gradient_flows_through_an_edit() -> None:
    module = llama()
    with edit(module, [Edit("layers.1.residual", torch.ones(128), "ablate", 0.5)]):
        module(torch.tensor([ROW])).logits.sum().backward()
    assert module.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0


def test_saved_and_loaded(tmp_path: Path) -> None:
    edits = [
        Edit("layers.1.residual", torch.randn(128), "add", 0.25, True),
        Edit("layers.2.head.1", torch.randn(32), "ablate", -1.5),
    ]
    path = save(tmp_path / "deep" / "edits.safetensors", edits)
    for a, b in zip(load(path), edits, strict=True):
        assert (a.site, a.op, a.strength, a.skip_first) == (b.site, b.op, b.strength, b.skip_first)
        assert torch.equal(a.vector_D, b.vector_D)
    module = llama()
    with applied(module, [Edits(path, 2.0)]):
        twice = logits(module)
    doubled = [Edit(e.site, e.vector_D, e.op, 2 * e.strength, e.skip_first) for e in edits]
    with edit(module, doubled):
        assert torch.equal(logits(module), twice)


def test_mistakes_are_named(tmp_path: Path) -> None:
    module = llama()
    for site, text in {
        "layers.1.nose": "no such site",
        "layers.6.mlp": "6 layers",
        "layers.0.head.4": "4 heads",
    }.items():
        with pytest.raises(InputError, match=text):
            find(module, site)
    with (
        edit(module, [Edit("layers.1.residual", torch.ones(64))]),
        pytest.raises(InputError, match="the site 128 numbers"),
    ):
        logits(module)
    with pytest.raises(InputError, match="no tokens there"):
        capture(module, ["embedding"], [ROW], [(3, 9)])
    other = tmp_path / "weights.safetensors"
    save_file({"x": torch.ones(2)}, other)
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    for path in (other, tmp_path / "torn.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(InputError):
            load(path)


def test_other_threads_wait_until_edits_are_gone(tiny_path: Path, tmp_path: Path) -> None:
    base = Model.open(tiny_path)
    edits = [Edit("layers.2.residual", torch.linspace(-4, 4, 128))]
    steered = base.adding(Edits(save(tmp_path / "edits.safetensors", edits)))
    assert steered.load_module().module is base.load_module().module

    def read(model: Model) -> Tensor:
        with model.load_module().run_time():
            return logits(model.load_module().module)

    plain, entered, leave = read(base), threading.Event(), threading.Event()

    def hold() -> None:
        with steered.load_module().run_time():
            entered.set()
            assert leave.wait(60)
            assert not torch.equal(read(steered), plain)  # the same thread may go in again

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(hold)
        assert entered.wait(60)
        second = pool.submit(read, base)
        try:
            with pytest.raises(TimeoutError):
                second.result(0.2)
        finally:
            leave.set()
        first.result(60)
        assert torch.equal(second.result(60), plain)
