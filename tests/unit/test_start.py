"""How a run begins: what it will hold in memory, and in which type it computes."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from truing.context import Context, use
from truing.core.chat import completion_ids, prompt_ids
from truing.core.logprob import states
from truing.core.modelfiles import loaded
from truing.core.objective import objective_of
from truing.core.passes import memory, precision, recompute
from truing.core.passes.frozen_trunk import attach
from truing.core.passes.memory import Beside, Choice, Forecast
from truing.core.passes.precision import seconds_of
from truing.core.tiny import tiny_model, tiny_tokenizer
from truing.core.trainer import distributed, own_samples, start
from truing.core.trainer.text_task import TextTask
from truing.core.trainer.train_text import beside_of
from truing.core.training import TextTraining
from truing.core.tree import BUDGET, Node, Packed, group_tree, pack
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.tables import Row, Table
from truing.train.supervised.sft import sft

ROWS: list[Row] = [
    {"prompt": f"what is {i}?", "chosen": f"it is {i}.", "rejected": f"no {i * 7} idea {i}"}
    for i in range(12)
]
PAIRS = Table("pair", ROWS)
FREE = "truing.core.trainer.start.memory_gib"


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


def train(folder: Path, model: Model, method: str = "sft", **settings: object) -> Context:
    with use(Context(seed=4, folder=folder)) as context:
        methods[method](model, PAIRS, **{"steps": 4, "batch": 4, "lr": 1e-3, **settings})
    return context


def updates(context: Context) -> list[dict[str, object]]:
    rows = [{n: v for n, v in m.items() if n != "seconds"} for m in context.metrics]
    return [r for r in rows if "grad_norm" in r]


@pytest.fixture
def stopping(
    monkeypatch: pytest.MonkeyPatch, always_save: Callable[[], None]
) -> Callable[[bool], None]:
    """Whether runs are stopped after their second update, with a checkpoint of each."""
    always_save()
    begun = TextTask.parts
    stop = [True]

    def parts(task: TextTask, rows: list[int], step: int) -> object:
        if stop[0] and step == 2:
            raise KeyboardInterrupt
        return begun(task, rows, step)

    monkeypatch.setattr(TextTask, "parts", parts)
    return lambda on: stop.__setitem__(0, on)


# Memory


def counted(module: torch.nn.Module, packed: Packed, weights: Sequence[Tensor] = ()) -> float:
    """Bytes of a token that the backward pass will read, weights left out."""
    own = {t.data_ptr() for t in [*module.parameters(), *module.buffers(), *weights]}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = states(module, packed)
    assert out.requires_grad
    return sum(seen.values()) / len(packed.ids_N)


def long_tree() -> Packed:
    return pack([group_tree([5] * 40, [[7 + i] * 60 for i in range(4)])], 10_000)[0]


def test_activations_by_hand() -> None:
    module, _ = tiny_model()
    made = memory.forecast(module, TextTraining(rank=0))
    # x, q, attention's output and x2 of 128; k and v of 64; gate and up of 384; log-sum-exp of 4
    # heads; two norms' rates.
    numbers = 4 * 128 + 2 * 64 + 2 * 384 + 4 + 2
    assert made.blocks == 3 and made.input == 4 * 128 and made.logits == 4 * 259
    assert made.inside == pytest.approx(4 * numbers, rel=0.1)  # and the last norm, and positions
    size = sum(p.numel() for p in module.parameters())
    assert made.state == 3 * 4 * size + 4 * 259 * 128  # and the head's gradient, made apart
    assert made.needed(100, False) > made.needed(100, True) > made.state


@pytest.mark.parametrize("kind", ["hand-written", "stock", "stock in bfloat16"])
def test_forecast_is_what_a_long_tree_leaves(kind: str) -> None:
    settings = TextTraining(rank=4)
    if kind == "hand-written":
        module, _ = tiny_model()
    else:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        module = Qwen3ForCausalLM(Qwen3Config(vocab_size=97, **sizes, **heads)).eval()
        module = module.to(torch.bfloat16 if "bfloat16" in kind else torch.float32)
    made = memory.forecast(module, settings)
    adapters = attach(module, settings, 0)
    assert adapters is not None
    weights: list[Tensor] = list(adapters.parameters())
    merged = [a.merged() for a in adapters.adapters.values() if a.merges]
    assert len(merged) == (0 if "bfloat16" in kind else len(adapters.adapters))
    assert made.state == sum(16 * w.numel() for w in weights) + sum(m.nbytes for m in merged)
    held = counted(module, long_tree(), [*weights, *merged])
    assert 0.75 * made.inside <= held / made.blocks <= 1.1 * made.inside
    recompute.switch_on(module)
    again = counted(module, long_tree(), [*weights, *merged])
    assert again <= 1.2 * made.blocks * made.input + made.inside


def test_a_forecast_leaves_nothing_in_memory() -> None:
    module, _ = tiny_model()
    memory.forecast(module, TextTraining(rank=4))
    alive = [weakref.ref(p) for p in module.parameters()]
    del module
    gc.collect()
    assert not any(p() is not None for p in alive)


def test_top_blocks_alone_need_less() -> None:
    module, _ = tiny_model()
    whole, top = (memory.forecast(module, TextTraining(rank=0, layers=n)) for n in (0, 2))
    block = sum(p.numel() for p in module.model.layers[0].parameters())
    assert top.blocks == 2 and top.state == 3 * 4 * 2 * block < whole.state
    assert top.needed(100, False) < whole.needed(100, False)
    adapted = memory.forecast(module, TextTraining(rank=4, layers=2))
    # q, k, v, o; gate, up, down: inputs and outputs of each.
    sides = (128 + 128) + 2 * (128 + 64) + (128 + 128) + 3 * (128 + 384)
    weights = 128 * 128 + 2 * 128 * 64 + 128 * 128 + 3 * 128 * 384
    assert adapted.state == 2 * (4 * 4 * 4 * sides + 4 * weights)


def test_what_is_loaded_later_counts() -> None:
    module, _ = tiny_model()
    size, block = (
        4 * sum(p.numel() for p in part.parameters()) for part in (module, module.model.layers[0])
    )
    for settings, trained in (
        (TextTraining(rank=0), size),
        (TextTraining(rank=0, layers=2), 2 * block),
        # q, k, v, o; gate, up, down: inputs and outputs of each, in three blocks.
        (TextTraining(rank=4), 4 * 4 * 3 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 384))),
    ):
        alone = memory.forecast(module, settings)
        critic = memory.forecast(module, settings, Beside(trunks=1))
        assert (
            critic.state + critic.copies == 2 * alone.state + size
            and critic.blocks == 2 * alone.blocks
        )
        frozen = memory.forecast(module, settings, Beside(frozen=1))
        assert frozen.state + frozen.copies == alone.state + size and frozen.blocks == alone.blocks
        moving = memory.forecast(module, settings, Beside(moving=2))
        assert moving.state + moving.copies == alone.state + 2 * trained


@pytest.mark.parametrize(
    ("method", "more", "expected"),
    [
        ("dpo", {}, Beside()),
        ("dpo", {"reference": True}, Beside(frozen=1)),
        ("tr_dpo", {"rank": 0}, Beside(moving=2)),
        ("grpo", {"rank": 0, "beta": 0.1}, Beside(frozen=1)),
        ("grpo", {"rank": 0, "beta": 0.0}, Beside()),
        ("ppo", {"beta": 0.0}, Beside()),
        ("ppo", {"critic": True, "beta": 0.1, "reference": True}, Beside(trunks=1, frozen=1)),
    ],
)
def test_what_each_run_will_load(
    method: str,
    more: dict[str, object],
    expected: Beside,
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def seen(module: torch.nn.Module, settings: TextTraining, beside: Beside) -> Forecast:
        assert beside == expected
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "forecast", seen)
    more = {n: model if v is True else v for n, v in more.items()}
    if method in ("grpo", "ppo"):
        more |= {"max_tokens": 4, "rewards": {"s": {"use": "max_words", "n": 2}}}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, model, method, **more)


@pytest.mark.parametrize(
    ("method", "more", "room"),
    [
        ("d2o", {"refresh": 1}, 50),
        ("d2o", {"refresh": 1, "max_length": 60}, 0),
        ("gkd_on_policy", {}, 50),
        ("d2o", {"refresh": 0}, -1),  # those of before training are the last ones
    ],
)
def test_answers_that_are_yet_to_be_drawn_count(
    method: str,
    more: dict[str, object],
    room: int,
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before training each answer has two tokens, later as many as there may be."""
    told, seen = list[int](), list[int]()
    check, cut = start.Start.check, TextTask._micro_batches

    def checked(self: start.Start, trees: object, largest: int, *rest: object, **k: object) -> None:
        told.append(largest)
        check(self, trees, largest, *rest, **k)  # type: ignore[arg-type]

    def listening(task: TextTask, rows: Sequence[int], trees: Sequence[Node]) -> object:
        seen.extend(tree.size for tree in trees)
        return cut(task, rows, trees)

    def made_up(
        module: object, asked: own_samples.Asked, how: own_samples.SamplingSettings
    ) -> own_samples.Answers:
        return [(5, 6) if not told else tuple(range(5, 5 + how.max_tokens)) for _ in asked]

    monkeypatch.setattr(start.Start, "check", checked)
    monkeypatch.setattr(TextTask, "_micro_batches", listening)
    monkeypatch.setattr(own_samples, "drawn", made_up)
    kind, column = ("negative", "rejected") if method == "d2o" else ("example", "completion")
    rows: list[Row] = [{"prompt": f"say {'x' * i}", column: "bad"} for i in (1, 9)]
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    with use(Context(seed=4, folder=tmp_path)):
        teacher = {} if method == "d2o" else {"teacher": model}
        methods[method](
            model, Table(kind, rows), **teacher, samples=4, max_tokens=50, steps=3, batch=2,
            rank=2, lr=1e-3, dtype="float32", **more,
        )  # fmt: skip
    prompts = [prompt_ids(tiny_tokenizer(), str(row["prompt"])) for row in rows]
    answer = len(completion_ids(tiny_tokenizer(), "bad"))
    own = [2 if room < 0 else min(50, (room or 60 - len(p))) for p in prompts]
    assert told == [max(len(p) + answer + 4 * n for p, n in zip(prompts, own, strict=True))]
    assert max(seen) == told[0]


def test_only_what_is_cut_is_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are all trained, unless whoever trains them draws answers, too."""
    module, _ = tiny_model()
    settings, head = TextTraining(rank=0), 4 * 259 * 128  # whose gradient is made apart
    alone = memory.forecast(module, settings).state
    monkeypatch.setattr(distributed, "_now", distributed.Processes(0, 2))
    assert memory.forecast(module, settings, Beside()).state == alone
    assert 2 * (memory.forecast(module, settings, Beside(cut=True)).state - head) == alone - head
    begun: Any = SimpleNamespace(settings=settings, reference=None)
    hooks: list[Any] = [SimpleNamespace(fresh=f, moves_reference=False) for f in (False, True)]
    assert [beside_of(objective_of(sft), h, begun).cut for h in hooks] == [True, False]


MADE = Forecast(state=1000, inside=10.0, input=1, logits=0, blocks=8)


@pytest.mark.parametrize(
    ("free", "mode", "budget", "expected"),
    [
        (1e6, "auto", 0, Choice(800, False)),
        # 10 (8 + 2) bytes a token: 1000 + 100 * 800 = 81,000; half the budget is next
        (81_000 / 0.85, "auto", 0, Choice(800, False)),
        (80_900 / 0.85, "auto", 0, Choice(400, False)),
        (6_000 / 0.85, "auto", 0, Choice(50, False)),
        # no micro-batch is smaller than the largest tree, of 50 tokens: 8 + 3 * 10 bytes a token
        (5_999 / 0.85, "auto", 0, Choice(100, True)),
        (2_900 / 0.85, "auto", 0, Choice(50, True)),
        (2_899 / 0.85, "auto", 0, Choice(50, True)),  # does not fit: the least there is
        (1e6, "always", 0, Choice(800, True)),
        (100, "never", 0, Choice(50, False)),
        # a budget that was asked for stays: 1000 + 100 * 200, and 1000 + 38 * 200
        (21_000 / 0.85, "auto", 200, Choice(200, False)),
        (20_000 / 0.85, "auto", 200, Choice(200, True)),
    ],
)
def test_smaller_micro_batches_come_before_checkpointing(
    free: float, mode: str, budget: int, expected: Choice
) -> None:
    settings = TextTraining(budget=budget, gradient_checkpointing=mode)  # type: ignore[arg-type]
    assert memory.choose(MADE, settings, 50, free + 1e-6, budget or 800) == expected


def least(model: Model, settings: TextTraining, largest: int) -> tuple[float, float]:
    """GiB that a run needs in the smallest micro-batches, with checkpointing and without."""
    made = memory.forecast(model.load_module().module, settings)
    return tuple(made.needed(largest, again) / memory.SHARE / 2**30 for again in (True, False))  # type: ignore[return-value]


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of the largest tree of each run that is forecast."""
    seen: list[int] = []
    choose = memory.choose

    def watched(made: Forecast, settings: TextTraining, largest: int, *rest: float) -> Choice:
        seen.append(largest)
        return choose(made, settings, largest, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(memory, "choose", watched)
    return seen


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_switched_on_where_memory_demands_it(
    method: str,
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    largest: list[int],
) -> None:
    more: dict[str, object] = {"rank": 2, "steps": 1, "max_length": 128}
    if method == "grpo":
        more |= {"answers": 4, "max_tokens": 8, "rewards": {"s": {"use": "max_words", "n": 2}}}
    plenty = train(tmp_path / "plenty", model, method, budget=16, **more)
    assert "gradient_checkpointing" not in plenty.metrics[0]
    low, high = least(model, TextTraining(rank=2), largest[0])
    assert low < 0.9 * high
    monkeypatch.setattr(FREE, lambda: (1.0, (low + high) / 2))
    capsys.readouterr()
    tight = train(tmp_path / "tight", model, method, **more)
    assert tight.metrics[0]["gradient_checkpointing"] is True
    assert "gradient_checkpointing: True" in capsys.readouterr().err
    assert largest[0] <= float(str(tight.metrics[0]["budget"])) < BUDGET
    for a, b in zip(updates(tight), updates(plenty), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    with pytest.raises(InputError, match=r"training needs about .*allow gradient_checkpointing"):
        train(tmp_path / "never", model, method, gradient_checkpointing="never", **more)
    monkeypatch.setattr(FREE, lambda: (1.0, 0.95 * low))
    with pytest.raises(InputError, match=r"training needs about .*Lower max_length"):
        train(tmp_path / "short", model, method, **more)


@pytest.mark.parametrize(
    ("copies", "free", "rank", "size", "told"),
    [
        (0, 900 / 0.85, 8, 1000, "Lower rank"),
        (500, 1400 / 0.85, 0, 1000, "Train an adapter (rank), or fewer blocks"),
        (2000, 2900 / 0.85, 0, 2000, "Take a smaller model, or train an adapter"),
        (2000, 2900 / 0.85, 8, 2000, "Take a smaller model"),
        (500, 1600 / 0.85, 8, 100 * 20, "Lower max_length"),  # of 20 tokens, 10 (8 + 2) bytes each
    ],
)
def test_the_remedy_is_for_what_does_not_fit(
    copies: int, free: float, rank: int, size: float, told: str
) -> None:
    made = replace(MADE, copies=copies)
    needed = made.needed(20, False)
    assert needed == 1000 + copies + 100 * 20
    share, found = made.too_much(needed, free)
    assert found == size
    said = start._remedy(TextTraining(rank=rank), share, known=False, held=False)
    assert said.startswith(told) and ("max_length" in said) == (share == "rows")


def test_rows_that_are_measured_only_take_two_blocks() -> None:
    # 1000 + 500 (2 * 10) bytes; and the logits of 500 tokens, which four tensors hold
    assert MADE.measured(500) == 11_000
    # A GPU's masks are there once, with and without gradients, whatever is computed again.
    wide = replace(MADE, masks=7)
    assert wide.measured(500) == MADE.measured(500) + 500 * 7
    assert all(wide.needed(9, again) == MADE.needed(9, again) + 9 * 7 for again in (True, False))
    headed = Forecast(state=0, inside=10.0, input=1, logits=8, blocks=8)
    assert headed.measured(500) == 4 * 500 * 8 + 500 * 20 < headed.needed(500, True)


def test_a_forward_pass_holds_what_is_forecast() -> None:
    module, _ = tiny_model()
    packed = pack([group_tree([5] * 300, [[7 + i] * 300 for i in range(2)])], 10_000)[0]
    made = memory.forecast(module, TextTraining(rank=4))
    with torch.no_grad():
        states(module, packed)  # what is tried once for each module must not be counted
        with torch.profiler.profile(profile_memory=True, acc_events=True) as seen:
            states(module, packed)
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    plain = Forecast(state=0, inside=made.inside, input=made.input, logits=0, blocks=made.blocks)
    wanted = plain.measured(len(packed.ids_N))
    assert 0.5 * wanted <= most <= wanted


def test_held_out_rows_larger_than_those_that_are_trained_on(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: list[int]
) -> None:
    text = "y" * 800
    held_out = Table("example", [{"prompt": "x", "completion": text}])
    tokens = len(prompt_ids(tiny_tokenizer(), "x")) + len(completion_ids(tiny_tokenizer(), text))
    more: dict[str, object] = {"rank": 2, "steps": 1, "held_out": held_out}
    train(tmp_path / "plenty", model, **more)
    assert largest[0] < 100 < tokens
    made = memory.forecast(model.load_module().module, TextTraining(rank=2))
    low = made.needed(largest[0], True) / memory.SHARE / 2**30
    high = made.measured(tokens) / memory.SHARE / 2**30
    assert low < 0.8 * high
    monkeypatch.setattr(FREE, lambda: (1.0, 1.01 * high))
    train(tmp_path / "fits", model, **more)
    monkeypatch.setattr(FREE, lambda: (1.0, 0.99 * high))
    said = r"measuring the largest held-out row needs about .*Lower max_length, or leave such rows"
    with pytest.raises(InputError, match=said):
        train(tmp_path / "short", model, **more)


def test_a_resumed_run_goes_on_as_it_began(
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopping: Callable[[bool], None],
    largest: list[int],
) -> None:
    stopping(False)
    expected = train(tmp_path / "whole", model, rank=2)
    low, high = least(model, TextTraining(rank=2), largest[0])
    monkeypatch.setattr(FREE, lambda: (1.0, 0.9 * low + 0.1 * high))
    stopping(True)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", model, rank=2)
    stopping(False)
    monkeypatch.setattr(FREE, lambda: (1.0, 1.0))  # plenty: and yet as it began
    resumed = train(tmp_path / "killed", model, rank=2)
    assert resumed.metrics[0]["gradient_checkpointing"] is True
    assert resumed.metrics[0]["budget"] != expected.metrics[0]["budget"]
    assert len(updates(resumed)) == 4
    monkeypatch.setattr(FREE, lambda: (1.0, 0.5 * low))
    with pytest.raises(InputError, match="It fitted when this run began"):
        train(tmp_path / "killed", model, rank=2)


def test_another_number_of_processes_chooses_for_itself(
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopping: Callable[[bool], None],
    largest: list[int],
) -> None:
    check = start.Start.check

    def as_four(*given: object, **named: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "_now", distributed.Processes(0, 4))
            patch.setattr(distributed, "agree", lambda value: value)
            patch.setattr(distributed, "everyone", lambda value: [value])
            check(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(FREE, lambda: (1.0, 1.0))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(start.Start, "check", as_four)
        train(tmp_path, model, rank=2)
    stopping(False)
    low, high = least(model, TextTraining(rank=2), largest[0])
    monkeypatch.setattr(FREE, lambda: (1.0, 0.9 * low + 0.1 * high))
    assert train(tmp_path, model, rank=2).metrics[0]["gradient_checkpointing"] is True


def test_a_run_that_its_choice_killed_chooses_again(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: list[int]
) -> None:
    begun = TextTask.parts

    def killed(task: TextTask, rows: list[int], step: int) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(FREE, lambda: (1.0, 1.0))
    monkeypatch.setattr(TextTask, "parts", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, model, rank=2)  # before its first checkpoint
    monkeypatch.setattr(TextTask, "parts", begun)
    low, high = least(model, TextTraining(rank=2), largest[0])
    monkeypatch.setattr(FREE, lambda: (1.0, 0.5 * low))
    with pytest.raises(InputError, match="Lower rank"):  # it has never fitted
        train(tmp_path, model, rank=2)
    monkeypatch.setattr(FREE, lambda: (1.0, 0.9 * low + 0.1 * high))
    again = train(tmp_path, model, rank=2)
    assert again.metrics[0]["gradient_checkpointing"] is True and len(updates(again)) == 4
    monkeypatch.setattr(FREE, lambda: (1.0, 1.0))
    done = train(tmp_path, model, rank=2)  # has checkpoints by now: as they were made
    assert done.metrics[0]["budget"] == again.metrics[0]["budget"]
    assert done.metrics[0]["gradient_checkpointing"] is True


def test_weights_are_counted_in_the_type_that_they_are_read_as(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, tokenizer = tiny_model()
    numbers = sum(p.numel() for p in module.parameters())
    module.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    half = Model.open(tmp_path)
    assert loaded.bytes_of(half, "float32") == loaded.bytes_of(model, "float32") == 4 * numbers
    assert loaded.bytes_of(half, "bfloat16") == 2 * numbers
    free = 3 * numbers / 2**30
    monkeypatch.setattr("truing.doctor.memory_gib", lambda: (1.0, free))
    loaded.forget()
    half.load_module("bfloat16", fresh=True)
    with pytest.raises(InputError, match="the weights need about"):
        half.load_module("float32", fresh=True)


# Precision


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[tuple[int, int, int]]]:
    """Products take a second, and in bfloat16 so much; shapes of those that were timed."""

    def speed(half: float) -> list[tuple[int, int, int]]:
        asked: list[tuple[int, int, int]] = []

        def seconds(dtype: torch.dtype, device: str, shape: tuple[int, int, int]) -> float:
            asked.append(shape)
            return half if dtype == torch.bfloat16 else 1.0

        monkeypatch.setattr(precision, "seconds_of", seconds)
        precision.probe.cache_clear()
        return asked

    yield speed  # type: ignore[misc]
    precision.probe.cache_clear()


def test_probe_decides_under_an_adapter(
    model: Model, timed: Callable[[float], list[tuple[int, int, int]]]
) -> None:
    asked = timed(0.2)
    assert precision.choose(model, TextTraining(), "cpu") == "bfloat16"
    assert precision.choose(model, TextTraining(), "cpu") == "bfloat16"
    assert asked == [(128, 128, 384)] * 2  # the largest weight of the blocks, once in either type
    assert precision.choose(model, TextTraining(rank=0), "cpu") == "float32"
    assert precision.choose(model, TextTraining(dtype="float32"), "cpu") == "float32"
    timed(0.3)  # quicker, and not markedly so
    assert precision.choose(model, TextTraining(), "cpu") == "float32"
    assert precision.choose(model, TextTraining(dtype="bfloat16"), "cpu") == "bfloat16"
    timed(0.3)
    assert precision.probe("cuda", 4096, 1024) == (1.0, 0.3)


def test_a_probe_takes_less_than_a_second_for_any_model(
    timed: Callable[[float], list[tuple[int, int, int]]],
) -> None:
    began = time.perf_counter()
    seconds = [seconds_of(d, "cpu", (128, 8192, 1024)) for d in (torch.bfloat16, torch.float32)]
    assert min(seconds) > 0 and time.perf_counter() - began < 10  # on a busy machine
    asked = timed(0.5)
    assert precision.probe("cpu", 128256, 8192) == (1.0, 0.5)
    assert asked == [(128, 8192, 1024)] * 2  # 2^30 multiplications, and no more
    asked.clear()
    precision.probe("cpu", 2**40, 2**30)
    assert asked == [(128, 2**30, 1)] * 2
    asked.clear()
    precision.probe("cpu", 1536, 576)
    assert asked == [(128, 576, 1536)] * 2  # a small weight is timed whole


def test_all_weights_stay_in_float32() -> None:
    with pytest.raises(InputError, match=r"setting 'dtype' must be float32.*rank above 0"):
        TextTraining(rank=0, dtype="bfloat16").check_whole("grpo")
    TextTraining(rank=4, dtype="bfloat16").check_whole("grpo")
    TextTraining(rank=0, dtype="bfloat16").check("sft")  # float32 values stand behind them


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_bfloat16_learns_as_float32_does(method: str, model: Model, tmp_path: Path) -> None:
    found = {
        dtype: train(
            tmp_path / dtype,
            model,
            method,
            dtype=dtype,
            rank=4,
            steps=8,
            batch=3,
            lr=2e-3,
            warmup=0.0,
        )
        for dtype in ("float32", "bfloat16")
    }
    losses = {d: [float(str(u["loss"])) for u in updates(c)] for d, c in found.items()}
    assert found["bfloat16"].metrics[0]["dtype"] == "bfloat16"
    if method == "dpo":  # policy and reference are the same model at first, in either type
        assert losses["bfloat16"][0] == pytest.approx(0.6931472, abs=1e-6)
    for whole, half in zip(losses["float32"], losses["bfloat16"], strict=True):
        assert half == pytest.approx(whole, rel=0.03, abs=0.02)
    fell = {d: v[0] - sum(v[-3:]) / 3 for d, v in losses.items()}
    assert fell["float32"] > 0.05
    assert fell["bfloat16"] == pytest.approx(fell["float32"], rel=0.15)


def test_a_run_never_changes_its_type(
    model: Model,
    tmp_path: Path,
    timed: Callable[[float], list[tuple[int, int, int]]],
    stopping: Callable[[bool], None],
) -> None:
    timed(0.2)
    stopping(False)
    expected = train(tmp_path / "whole", model, rank=2)
    stopping(True)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", model, rank=2)
    stopping(False)
    asked = timed(3.0)  # the machine says otherwise by now
    resumed = train(tmp_path / "killed", model, rank=2)
    assert not asked and resumed.metrics[0]["dtype"] == "bfloat16"
    assert updates(resumed) == updates(expected)
    other = train(tmp_path / "other", model, rank=2)
    assert asked and other.metrics[0]["dtype"] == "float32"
    assert updates(other) != updates(expected)


def test_online_training_in_bfloat16(model: Model, tmp_path: Path) -> None:
    rewards = {"short": {"use": "share_of", "letters": "abcdefgh"}}
    context = train(
        tmp_path, model, "grpo", dtype="bfloat16", rank=2, steps=2, batch=2, answers=3,
        max_tokens=6, beta=0.1, rewards=rewards,
    )  # fmt: skip
    assert context.metrics[0]["dtype"] == "bfloat16" and len(updates(context)) == 2
    assert all(float(str(u["grad_norm"])) < 1e3 for u in updates(context))
