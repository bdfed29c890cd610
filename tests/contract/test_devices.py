"""All that computes does so on a GPU: with one that is only pretended (`pretended`), found by name.

What holds of the CPU is not tested again: that everything lies on one device, whatever comes from
files, tables, random numbers and checkpoints, and that it comes to what it comes to on the CPU.
With TRUING_TEST_GPU set (`make test-gpu`) it is a GPU that is there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pretended import GPU, Mixed, held, lies_there, masked, pretended
from test_decoders import DECODERS
from test_decoders import rewarded as decoding
from test_edits import STEERS, steer
from test_mergers import MERGERS
from test_mergers import _inputs as merged_of
from test_objectives import OBJECTIVES, drawing, fitting, made_up, table_for
from test_objectives import defaults as defaults_of
from test_objectives import spec_of as objective_of
from test_online import GROUPS, ONLINE, RULE, given, rollout, settings_of
from test_online import spec_of as online_of
from test_online import table_for as prompts_for
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaForCausalLM

from truing.context import Context, use
from truing.core import embed
from truing.core.generate import generate
from truing.core.generation.dialogue_cache import Past
from truing.core.generation.prefix_levels import Own
from truing.core.logprob import STATISTICS, Rows, measure
from truing.core.modelfiles import loaded, lora
from truing.core.modelfiles.loaded import forget
from truing.core.modelfiles.stock import quiet
from truing.core.objective import Measurements
from truing.core.passes import memory, precision, scoring
from truing.core.passes.attention import by_kernel
from truing.core.passes.master_weights import Masters
from truing.core.passes.products import scores
from truing.core.passes.scoring import answer_logps
from truing.core.sampling import SamplingSettings, next_logps, sample
from truing.core.tiny import fill, tiny_config, tiny_tokenizer
from truing.core.trainer.text_task import TextTask
from truing.core.training import TextTraining
from truing.core.tree import Packed, group_tree, pack
from truing.doctor import matrix_speed
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.tables import Row, Table

REAL = bool(os.environ.get("TRUING_TEST_GPU"))
pytestmark = [pytest.mark.gpu] if REAL else []
PAIRS: list[Row] = [
    {"prompt": f"say {w}", "chosen": f"{w} is good", "rejected": f"no {w}"}
    for w in ("lime", "oak", "rain", "stone")
]


def folder_of(path: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """A folder of two blocks whose four heads share two, in the type that GPUs compute in."""
    config = tiny_config()
    config.hidden_size, config.num_hidden_layers, config.intermediate_size = 64, 2, 96
    config.head_dim = 16
    module = LlamaForCausalLM(config)
    fill(module, 0.08, seed)
    module.tie_weights()
    with quiet():
        module.to(dtype).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.open(folder_of(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.open(folder_of(tmp_path_factory.mktemp("other"), seed=1))


@pytest.fixture(scope="module", autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    forget()


@pytest.fixture
def gpu() -> Iterator[None]:
    with nullcontext() if REAL else pretended():
        yield


@pytest.fixture
def pretence() -> Iterator[None]:
    with pretended():
        yield


# The GPU that is not there refuses what CUDA refuses


def on_gpu(*shape: int) -> Tensor:
    return torch.ones(*shape, device="cuda")


REFUSED: dict[str, Callable[[], object]] = {
    "added": lambda: on_gpu(3) + torch.ones(3),
    "chosen by a mask": lambda: torch.where(torch.ones(3) > 0, on_gpu(3), on_gpu(3)),
    "joined": lambda: torch.cat([torch.empty(0), on_gpu(3)]),
    "stacked": lambda: torch.stack([on_gpu(3).sum(), torch.zeros(())]),
    "indices of the GPU": lambda: torch.ones(3)[on_gpu(2).long()],
    "gathered": lambda: on_gpu(3).gather(0, torch.zeros(2, dtype=torch.long)),
    "embedded": lambda: torch.nn.functional.embedding(torch.tensor([0]), on_gpu(3, 2)),
    "product": lambda: on_gpu(3, 3) @ torch.ones(3, 3),
    "written": lambda: torch.zeros(()).add_(on_gpu(3).sum()),
    "entries put": lambda: on_gpu(3).index_put_((torch.tensor([0, 1]),), torch.ones(2)),
    "array": lambda: on_gpu(3).numpy(),
    "drawn": lambda: on_gpu(3).uniform_(generator=torch.Generator()),
    "drawn there": lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
    "gradient": lambda: setattr(on_gpu(3).requires_grad_(), "grad", torch.ones(3)),
    "kernel": lambda: torch.ops.mkldnn._linear_pointwise.default(
        on_gpu(9, 3), on_gpu(2, 3), None, "none", [], ""
    ),
    "attention kernel": lambda: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *[on_gpu(1, 2, 3, 4)] * 3
    ),
    "shared heads under a mask": lambda: torch.nn.functional.scaled_dot_product_attention(
        on_gpu(1, 4, 3, 8), on_gpu(1, 2, 3, 8), on_gpu(1, 2, 3, 8), on_gpu(3, 3), enable_gqa=True
    ),
    "in a backward pass": lambda: _Careless.apply(on_gpu(3).requires_grad_()).sum().backward(),
}


class _Careless(torch.autograd.Function):
    """A function whose gradient is made on the CPU."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, up: Tensor) -> Tensor:
        return up * torch.full(up.shape, 2.0)


@pytest.mark.parametrize("what", REFUSED)
def test_what_cuda_refuses_is_refused(what: str, pretence: None) -> None:
    with pytest.raises(Mixed):
        REFUSED[what]()


def test_what_cuda_computes_is_computed(gpu: None) -> None:
    x = torch.arange(4.0, device="cuda")
    assert x.device == GPU and x.is_cuda and x.sum().device == GPU and torch.cuda.is_available()
    assert (x + torch.tensor(1.0)).tolist() == [1, 2, 3, 4]  # a number without dimensions
    assert x[torch.tensor([2, 0])].tolist() == [2, 0] and x[x > 2].is_cuda
    here = torch.zeros(4)
    assert here.copy_(x).device.type == "cpu" and here.tolist() == [0, 1, 2, 3]
    assert torch.equal(x.cpu(), here) and not x.to("cpu", torch.float64).is_cuda
    assert here.to(x).is_cuda and here.to("cuda").bfloat16().view(2, 2).is_cuda
    assert x.new_zeros(2).is_cuda and not torch.zeros_like(x, device="cpu").is_cuda
    leaf = x.clone().requires_grad_()
    (leaf.cpu() * torch.ones(4)).sum().backward()
    assert leaf.grad is not None and leaf.grad.is_cuda
    layer = torch.nn.Linear(4, 2)
    assert layer.to("cuda").weight.is_cuda and layer(x).is_cuda
    torch.optim.AdamW(layer.parameters(), fused=True)


def test_what_is_there_does_not_outlive_it() -> None:
    """Storages of others that get the address of one that was there are not taken for it."""
    with pretended():
        for _ in range(3):
            assert on_gpu(1000).is_cuda
            assert not any(lies_there(torch.zeros(1000)) for _ in range(50))
    assert torch.cuda.is_available() is REAL and torch.ones(2).device.type == "cpu"


# Losses and what they are given


def leaves_of(m: Measurements) -> dict[str, Tensor]:
    return {n: t.clone().requires_grad_() for n, t in m.tensors.items()}


def kept(state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """A state as a checkpoint gives it back."""
    return None if state is None else {n: t.cpu().clone() for n, t in state.items()}


def same(one: Tensor, two: Tensor) -> bool:
    """Whether one on the GPU has the values of the other, which one that is there rounds."""
    here, there = one.detach().cpu(), two.detach()
    alike = torch.allclose(here, there, 1e-4, 1e-5) if REAL else torch.equal(here, there)
    return one.is_cuda and alike


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_computes_where_its_measurements_lie(name: str, gpu: None) -> None:
    spec = objective_of(name)
    m = made_up(spec)
    state_here = state_there = None
    for _ in range(2):  # once with what the first step kept
        here, there = leaves_of(m), leaves_of(m.to("cuda"))
        plain = spec(m.having(**here), defaults_of(spec), state_here)
        loss = spec(m.to("cuda").having(**there), defaults_of(spec), state_there)
        plain.total().backward()
        loss.total().backward()
        assert same(loss.total(), plain.total())
        for n, leaf in there.items():
            if (grad := leaf.grad) is not None:
                expected = here[n].grad
                assert expected is not None and same(grad, expected), n
        state_here, state_there = kept(plain.state), kept(loss.state)
        assert set(loss.sums()) == set(plain.sums())


@pytest.mark.parametrize("name", ONLINE)
def test_an_online_method_computes_where_its_rollout_lies(name: str, gpu: None) -> None:
    spec = online_of(name)
    r, settings = rollout(spec), settings_of(spec)
    state_here = state_there = None
    for _ in range(2):
        plain, update = spec(r, settings, state_here), spec(r.to("cuda"), settings, state_there)
        assert set(update.tensors) == set(plain.tensors)
        assert all(same(t, plain.tensors[n]) for n, t in update.tensors.items())
        fixed = given(r, plain, range(GROUPS))
        m = fixed.to("cuda")
        leaf = m["logp"].detach().requires_grad_()
        loss = update.loss(m.having(logp=leaf))
        assert same(loss.total(), plain.loss(fixed).total())
        loss.total().backward()
        assert leaf.grad is not None and leaf.grad.is_cuda
        state_here, state_there = kept(plain.state), kept(update.state)


SPECS, PLAYED = [objective_of(n) for n in OBJECTIVES], [online_of(n) for n in ONLINE]
LIKELIEST = {n for s in SPECS if "top" in s.teachers.values() for n in s.needs}


def chunk(name: str, device: str) -> Rows:
    """Five rows of nine tokens, and whatever a statistic reads beside them."""
    source = torch.Generator().manual_seed(0)
    logp_CV, other_CV = torch.randn(2, 5, 9, generator=source).log_softmax(2).to(device)
    logp_Ck, id_Ck = other_CV.topk(3)
    extras = {
        **dict.fromkeys(("other_logp", "ref_logp"), other_CV),
        **dict.fromkeys(("ref_top_logp", "teacher_reference_logp"), logp_Ck),
        **dict.fromkeys(("ref_ids", "teacher_ids", "teacher_reference_ids"), id_Ck),
        "teacher_logp": logp_Ck if name in LIKELIEST else other_CV,
        "beta": torch.tensor(0.3),  # a setting
    }
    return Rows(logp_CV, torch.tensor([0, 3, 8, 8, 2], device=device), extras)


@pytest.mark.parametrize("name", sorted(STATISTICS))
def test_a_statistic_computes_where_its_rows_lie(name: str, gpu: None) -> None:
    for one, two in zip(*(STATISTICS[name](chunk(name, d), True) for d in ("cuda", "cpu"))):
        assert one is not None and two is not None and same(one, two)


# Passes through a model


def trees() -> Packed:
    """Two prompts with two answers each, of several lengths."""
    first = group_tree([1, 50, 60, 70], [[80, 90, 91], [100]])
    second = group_tree(list(range(20, 40)), [list(range(40, 60)), [7, 8, 9, 10, 2]])
    return pack([first, second])[0]


def pass_of(model: Model, dtype: str, how: str, device: str) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities and gradients of what is trained, in main memory."""
    loaded = model.load_module("float32" if how == "all" else dtype, device, fresh=True)
    module = loaded.module
    if how == "adapter":
        parameters = list(lora.attach(module, 4, 8.0, seed=1).parameters())
        with torch.no_grad():
            parameters[1].fill_(0.01)
    else:
        masters = Masters(module) if dtype != "float32" else None
        if masters is not None:
            masters.listen()
        source = module if masters is None else masters
        parameters = [p for _, p in source.named_parameters()]
    needs = ("logp", "entropy", "sum_p2", "kl_vocab")
    packed = trees().to(device)
    other_logp = torch.full((len(packed.target_M), 259), -5.5, device=device)
    made = measure(module, packed, needs, extras={"other_logp": other_logp})
    sum(made[n].square().sum() for n in needs).backward()  # type: ignore[union-attr]
    grads = [p.grad for p in parameters if p.grad is not None]
    assert all(g.device == p.device for g, p in zip(grads, parameters, strict=False))
    assert made["logp"].dtype == torch.float32 and all(g.dtype == torch.float32 for g in grads)
    return made["logp"].detach().cpu(), [g.cpu() for g in grads]


@pytest.mark.parametrize("how", ["adapter", "all"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pass_and_its_gradients_are_those_of_the_cpu(
    how: str, dtype: str, small: Model, gpu: None
) -> None:
    logp, grads = pass_of(small, dtype, how, "cuda")
    plain, slopes = pass_of(small, dtype, how, "cpu")
    loose = 1e-4 if dtype == "float32" else 5e-2
    assert torch.allclose(logp, plain, atol=loose * float(plain.abs().max()))
    assert len(grads) == len(slopes)
    for one, two in zip(grads, slopes, strict=True):
        assert float((one - two).norm()) <= loose * max(float(two.norm()), 1e-2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_that_share_keys_do_not_hold_all_scores(
    dtype: torch.dtype, masked: bool, gpu: None
) -> None:
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 6, 8, generator=source).to(dtype) for n in (4, 2, 2))
    mask = torch.full((6, 6), -torch.inf, dtype=dtype).triu(1) if masked else None
    held.clear()
    there = None if mask is None else mask.cuda()
    made = by_kernel(q.cuda(), k.cuda(), v.cuda(), there, 0.3)
    assert not held
    assert torch.allclose(made.cpu(), by_kernel(q, k, v, mask, 0.3), atol=2e-2)


WAYS: dict[str, dict[str, object]] = {
    "plain": {"temperature": 0.8},
    "nucleus": {"top_p": 0.9, "min_p": 0.01},
    "candidates": {"top_k": 5},
    "greedy": {"greedy": True},
    "shaped": {"repetition_penalty": 1.2, "banned": (5, 6), "min_tokens": 3, "tempered": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_those_of_the_cpu(way: str, small: Model, gpu: None) -> None:
    same_start = list(range(60, 80))
    prompts = [[1, 50, 60], [*same_start, 7], [*same_start, 8, 9]]
    how = SamplingSettings(n=2, max_tokens=3, seed=3, **WAYS[way])  # type: ignore[arg-type]
    here, there = (small.load_module("float32", d).module for d in ("cpu", "cuda"))
    some = prompts if way == "plain" else prompts[1:]  # which have a common beginning
    assert sample(there, some, how) == [
        [replace(s, logprobs=pytest.approx(s.logprobs, abs=1e-4)) for s in items]
        for items in sample(here, some, how)
    ]
    if way != "plain":
        return
    logp_BV = next_logps(there, prompts)
    assert torch.allclose(logp_BV.cpu(), next_logps(here, prompts), atol=1e-4)
    # A turn later, with what is known of the first.
    past = Past([None] * 3)
    sample(there, prompts, how, past=past)
    later = [[*p, 90, 91] for p in prompts]
    fresh = [[s.ids for s in items] for items in sample(there, later, how)]
    assert [[s.ids for s in items] for items in sample(there, later, how, past=past)] == fresh


# Whole methods


def unlike(names: list[str], facts: Callable[[str], object]) -> list[str]:
    """The first of those that the engine does the same for."""
    return list({repr(facts(n)): n for n in reversed(names)}.values())[::-1]


def done_for(name: str) -> object:
    """What the engine does for an objective beside its loss and statistics."""
    spec = objective_of(name)
    odd = {n for n in spec.needs if n in ("scores", "mismatched")}
    return spec.hook, sorted(spec.teachers.values())[:1], spec.heads, odd, spec.unit == "batch"


@pytest.mark.parametrize("name", unlike(OBJECTIVES, done_for))
def test_an_objective_is_trained(
    name: str, small: Model, other: Model, tmp_path: Path, gpu: None
) -> None:
    """In half precision, as a GPU does, each sort of measurement once."""
    spec = objective_of(name)
    more: dict[str, object] = {**dict.fromkeys(spec.teachers, other), **drawing(spec)}
    more |= {"max_tokens": 6} if "max_tokens" in more else {}
    with pytest.MonkeyPatch.context() as patch, use(Context(folder=tmp_path)) as context:
        # So that answers come to their end soon, whose end is looked at.
        patch.setattr("truing.core.generation.stops.stop_ids", lambda _: range(3, 200))
        made = methods[name](
            fitting(small, spec), table_for(spec, 4), batch=4, steps=1, dtype="bfloat16", **more
        )
    assert isinstance(made, Model)
    facts = [m for m in context.metrics if "device" in m]
    assert [(m["device"], m["dtype"]) for m in facts] == [("cuda", "bfloat16")]
    assert any(float(str(m["grad_norm"])) > 0 for m in context.metrics if "grad_norm" in m)


HOW: dict[str, dict[str, object]] = {
    "all weights": {"rank": 0, "dtype": "bfloat16"},
    "running mean": {"dtype": "float32"},
    "top block": {"rank": 0, "layers": 1, "dtype": "bfloat16"},
    "adapter on the top block": {"layers": 1, "dtype": "bfloat16"},
    "as probed": {"mix": {"sft": 0.5}},
    "checkpointing": {"gradient_checkpointing": "always", "dtype": "bfloat16"},
}
NAMES = {"running mean": "train/bco"}


def run(how: str, model: Model, folder: Path, steps: int) -> Model:
    """Trained so on rows that are measured as held-out ones, too."""
    name = NAMES.get(how, "train/dpo")
    data = table_for(objective_of(name), 4)
    watch = {"held_out": data, "eval_every": 1, "keep_best": True}
    with use(Context(folder=folder, seed=1)):
        made = methods[name](model, data, batch=2, steps=steps, **watch, **HOW[how])
    assert isinstance(made, Model) and made.weights_key != model.weights_key
    return made


@pytest.mark.parametrize("how", list(HOW)[2:])
def test_a_run_goes(how: str, small: Model, tmp_path: Path, gpu: None) -> None:
    run(how, small, tmp_path, 1)


@pytest.mark.parametrize("how", list(HOW)[:2])
def test_a_run_that_was_cut_off_goes_on(
    how: str,
    small: Model,
    tmp_path: Path,
    gpu: None,
    always_save: Callable[[], None],
    interrupted: Callable[[type, int], AbstractContextManager[None]],
) -> None:
    """To the same, from checkpoints, which lie in main memory."""
    whole = run(how, small, tmp_path / "whole", 2)
    always_save()
    with interrupted(TextTask, 2):
        run(how, small, tmp_path / "cut", 2)
    assert list((tmp_path / "cut").glob("checkpoints-*/step-*"))
    assert run(how, small, tmp_path / "cut", 2).weights_key == whole.weights_key


def played(name: str) -> object:
    spec = online_of(name)
    return "values" in spec.needs, spec.opponent, spec.given


@pytest.mark.parametrize("name", unlike([n for n in ONLINE if not online_of(n).pools], played))
def test_an_online_method_is_trained(name: str, small: Model, tmp_path: Path, gpu: None) -> None:
    spec = online_of(name)
    more = {"beta": 0.1} if "beta" in spec.settings else {}
    with use(Context(folder=tmp_path, seed=2)) as context:
        made = methods[name](
            small, prompts_for(spec), steps=1, passes=2, batch=2, minibatches=1, answers=2,
            max_tokens=4, rewards=RULE, dtype="bfloat16", **more,
        )  # fmt: skip
    assert isinstance(made, Model)
    assert any(float(str(m["grad_norm"])) > 0 for m in context.metrics if "grad_norm" in m)


@pytest.mark.parametrize("name", STEERS)
def test_a_model_is_steered(name: str, small: Model, tmp_path: Path, gpu: None) -> None:
    made = steer(name, small, tmp_path)
    if made is None:
        pytest.skip("takes more than a model and a table")
    assert generate(made, ["hello"], n=2, max_tokens=4)[0][0].ids


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_writes(name: str, small: Model, gpu: None) -> None:
    made = decoding(name, small)
    assert all(len(items) == 2 for items in generate(made, ["hello", "why?"], n=2, max_tokens=4))


@pytest.mark.parametrize("name", MERGERS)
def test_a_merged_model_says_something(
    name: str, small: Model, other: Model, tmp_path: Path, gpu: None
) -> None:
    with use(Context(folder=tmp_path)):
        made = methods[name](**merged_of(name, small, other))
    assert isinstance(made, Model)
    assert generate(made, ["hello"], max_tokens=3)[0][0].ids


def test_weights_are_restored(small: Model, other: Model, tmp_path: Path, gpu: None) -> None:
    asked = Table("prompt", [{"prompt": p["prompt"], "completion": p["chosen"]} for p in PAIRS])
    with use(Context(folder=tmp_path)):
        made = methods["recover/weight_restore"](
            other, small, asked, asked, steps=3, warmup=1, save_every=1, batch=2, rate=0.01
        )
    assert isinstance(made, Model) and made.weights_key != other.weights_key


REPORTS: dict[str, dict[str, object]] = {
    "ability": {
        "texts": Table("text", [{"text": "a river and a stone"}]),
        "questions": Table("prompt", [{"prompt": "is it", "choices": ["yes", "no"], "answer": 0}]),
    },
    "preference": {"data": Table("pair", PAIRS)},
    "divergence": {"data": Table("pair", PAIRS), "answers": 2, "max_tokens": 4},
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_model_is_measured(
    name: str, small: Model, other: Model, tmp_path: Path, gpu: None
) -> None:
    """With an adapter beside weights of half precision, as it stands on a GPU."""
    with use(Context(folder=tmp_path)):
        tuned = methods["train/sft"](small, Table("pair", PAIRS), steps=1, batch=2, lr=1e-3)
        assert isinstance(tuned, Model)
        loaded = tuned.load_module()
        assert {p.dtype for p in loaded.module.parameters()} == {torch.bfloat16}
        both = {"reference": other} if "reference" in methods[f"evaluate/{name}"].inputs else {}
        made = methods[f"evaluate/{name}"](tuned, **both, **REPORTS[name])
    assert made.measures  # type: ignore[attr-defined]


# What a GPU is good at, and what it has room for


def test_attention_does_without_plans_for_each_shape(
    small: Model, tmp_path: Path, pretence: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 9}
    config = BertConfig(num_hidden_layers=1, num_attention_heads=1, **sizes)
    with quiet():
        BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr("truing.core.modelfiles.fetch.fetch", lambda _: tmp_path)
    for load in (small.load_module, embed.encoder.__wrapped__):
        torch.backends.cuda.enable_cudnn_sdp(True)
        load()
        assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("generation", [(7, 5), (8, 0)])
def test_older_gpus_do_not_hold_all_scores_either(
    generation: tuple[int, int], pretence: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: generation)
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 6, 8, generator=source).half() for n in (4, 2, 2))
    held.clear()
    made = by_kernel(q.cuda(), k.cuda(), v.cuda(), None, 0.3)
    assert not held and torch.allclose(made.cpu(), by_kernel(q, k, v, None, 0.3), atol=2e-2)


def test_what_follows_a_common_beginning_is_read_in_pieces(
    small: Model, pretence: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("truing.core.generation.prefix_cache.READ", 8)
    begin = list(range(60, 80))
    prompts = [[*begin, *range(90, 130)], [*begin, 7]]
    masked.clear()
    there, here = (
        next_logps(small.load_module("float32", d).module, prompts) for d in ("cuda", "cpu")
    )
    assert torch.allclose(there.cpu(), here, atol=1e-4)
    # Those of the two query heads that share keys below one another; of padded rows they are 4-D.
    read = [m for m in masked if len(m) == 2]
    assert (2 * 8, 60) in read and max(rows for rows, _ in read) == 2 * 8


def test_scores_are_not_rounded(pretence: None) -> None:
    source = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, n, 8, generator=source).bfloat16() for n in (4, 1))
    own = Own(2, 5)
    for own.length in (1, 2):
        own.take(0, k[:, :, 0].cuda(), k[:, :, 0].cuda())
    made = own.scores(0, q.cuda())
    assert made.dtype == torch.float32
    assert torch.equal(made.cpu(), q.float() @ k.float().expand(-1, -1, 2, -1).mT)
    assert torch.equal(scores(q, k), q @ k.mT)


def test_the_start_of_a_library_is_not_timed(
    small: Model, pretence: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def slow_at_first(*given: object) -> None:
        asked.append(given)
        time.sleep(0.4 if len(asked) == 1 else 0.01)

    monkeypatch.setattr(precision, "times_t", slow_at_first)
    assert precision.probe.__wrapped__("cuda", 4, 4)[0] < 0.3
    # A GPU that only emulates bfloat16 is slower with it.
    monkeypatch.setattr(precision, "probe", lambda *_: (1.0, 0.1))
    assert precision.choose(small, TextTraining(), "cuda") == "bfloat16"
    emulates = lambda including_emulation=True: including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulates)
    assert precision.choose(small, TextTraining(), "cuda") == "float32"


def test_main_memory_need_not_hold_what_is_mapped(
    small: Model, pretence: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("truing.doctor.memory_gib", lambda: (1.0, 1e-5))
    forget()
    small.load_module("bfloat16", "cuda")
    for dtype, device in (("float32", "cuda"), ("bfloat16", "cpu")):
        with pytest.raises(InputError, match="the weights need about"):
            small.load_module(dtype, device)


def cached(model: Model) -> bool:
    return any(key[0] == model.weights_key for key in loaded._cache)


def test_what_nobody_uses_leaves_the_gpu(
    small: Model, other: Model, tmp_path: Path, pretence: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget()
    module = small.load_module().module
    prompts, how = [[1, 50, 60]], SamplingSettings(max_tokens=2)
    other.load_module()
    sample(module, prompts, how)
    assert cached(other)  # where there is room it stays
    with monkeypatch.context() as patch:
        patch.setattr("truing.core.generation.waves.free_on", lambda _: 0)
        sample(module, prompts, how)
    assert not cached(other) and small.load_module().module is module
    other.load_module()
    run("top block", small, tmp_path, 1)
    assert not cached(other)


def test_masks_are_forecast(
    small: Model, tmp_path: Path, pretence: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    choose = memory.choose

    def watched(made: memory.Forecast, how: TextTraining, largest: int, *rest: float) -> object:
        seen.append((made.masks, largest))
        return choose(made, how, largest, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(memory, "choose", watched)
    run("checkpointing", small, tmp_path, 1)
    ((masks, largest),) = seen
    assert masks == 2 * 2 * largest  # two query heads on each key head, two bytes, tokens seen


def test_a_gpu_is_given_more_at_once(
    small: Model, pretence: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Row] = [{"prompt": f"say {i}", "completion": "x" * 100} for i in range(20)]
    made: list[int] = []
    cut = scoring.pack

    def counted(*given: object, **named: object) -> list[Packed]:
        made.append(len(packs := cut(*given, **named)))  # type: ignore[arg-type]
        return packs

    monkeypatch.setattr(scoring, "pack", counted)
    there, here = (
        answer_logps(small.load_module("float32", d), rows, mean=True) for d in ("cuda", "cpu")
    )
    assert there == pytest.approx(here, abs=1e-4) and made[0] == 1 < made[1]


def test_a_gpu_is_timed_on_large_products(pretence: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def product(a: Tensor, b: Tensor) -> Tensor:
        asked.append(tuple(a.shape))
        return a

    monkeypatch.setattr(torch, "randn", lambda *shape, **_: torch.empty(shape, device="meta"))
    monkeypatch.setattr(torch, "mm", product)
    matrix_speed(seconds=0.0)
    assert set(asked) == {(8192, 8192)}
