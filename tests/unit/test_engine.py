"""The loop on a module of three numbers: accumulation, clipping, schedules, NaN, checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from truing.context import Context, use
from truing.core.batch.parts import Part
from truing.core.engine import Order, Trained, train
from truing.core.plain_task import PlainTask
from truing.core.trainer.checkpoint import Checkpoints
from truing.core.training import Training
from truing.errors import InputError, Stopped

X = torch.linspace(-1, 1, 33).reshape(11, 3)
Y = X @ torch.tensor([1.0, -2.0, 3.0]) + 0.5


def task(micro: int = 64, dropout: float = 0.0, bad_row: int = -1) -> PlainTask:
    torch.manual_seed(7)
    module = nn.Sequential(nn.Dropout(dropout), nn.Linear(3, 1))

    def losses(rows: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        at = list(rows)
        error = (module(X[at])[:, 0] - Y[at]) ** 2
        wrong = torch.tensor([float("nan") if r == bad_row else 1.0 for r in rows])
        return error * wrong, {"error": error.detach().sqrt()}

    names = [f"id{r}" for r in range(11)]
    return PlainTask("line", module, 11, losses, micro=micro, row_names=names)


def run(folder: Path, one: PlainTask, settings: Training) -> tuple[Trained, dict[str, Tensor]]:
    with use(Context(seed=3, folder=folder)):
        done = train(one, settings)
    return done, {n: p.detach().clone() for n, p in one.trained().items()}


def test_micro_batches_do_not_change_the_result(tmp_path: Path) -> None:
    settings = Training(steps=12, lr=0.05, batch=5)
    whole = run(tmp_path / "a", task(), settings)
    for micro in (1, 2, 3):
        split = run(tmp_path / str(micro), task(micro), settings)
        for name in whole[1]:
            assert torch.allclose(whole[1][name], split[1][name], atol=1e-6)
        for a, b in zip(whole[0].history, split[0].history):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert a["error"] == pytest.approx(b["error"], rel=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_a_plain_loop(tmp_path: Path, decay: float) -> None:
    plain = Training(steps=6, lr=0.1, batch=4, schedule="linear", warmup=0, clip=0.3)
    done, ours = run(tmp_path, task(2), replace(plain, weight_decay=decay))
    other = task()
    parameters = list(other.module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=decay)
    order = Order(11, 4, Context(seed=3))
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (6 - step) / 6
        at = order.step(step, 24)
        loss = ((other.module(X[at])[:, 0] - Y[at]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        assert done.history[step]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert done.history[step]["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    for name, parameter in other.trained().items():
        assert torch.allclose(parameter, ours[name], atol=1e-6)


def test_every_row_once_an_epoch() -> None:
    order = Order(10, 4, Context(seed=1))
    seen = [order.step(s, 20) for s in range(5)]
    flat = [order._epoch(e)[i] for e in range(2) for i in range(10)]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert [r for rows in seen[:2] for r in rows] == flat[:8]
    assert seen[2] == list(dict.fromkeys(flat[8:12]))
    assert order.step(4, 18) == list(dict.fromkeys(flat[16:18]))
    assert Order(10, 4, Context(seed=1)).step(3, 20) == seen[3]
    assert Order(10, 4, Context(seed=2)).step(0, 20) != seen[0]
    assert Order(3, 8, Context()).batch == 3


def test_steps_have_as_many_rows_of_each_group() -> None:
    groups = [0] * 8 + [2] * 4 + [5] * 6
    order = Order(18, 6, Context(seed=1), groups)
    steps = [order.step(s, 36) for s in range(6)]
    assert all(sorted(groups[r] for r in rows) == [0, 0, 2, 2, 5, 5] for rows in steps)
    # Each group's own rows come in permutations, one after another.
    for number, size in ((0, 8), (2, 4), (5, 6)):
        own = [r for rows in steps for r in rows if groups[r] == number]
        mine = {r for r, g in enumerate(groups) if g == number}
        whole = [set(own[i : i + size]) for i in range(0, len(own) - size + 1, size)]
        assert whole and all(some == mine for some in whole)
    # Batches that the groups do not divide take turns, and the last step has a row of each.
    order = Order(18, 4, Context(seed=1), groups)
    counts = [[sum(groups[r] == g for r in order.step(s, 18)) for g in (0, 2, 5)] for s in range(5)]
    assert counts == [[2, 1, 1], [1, 2, 1], [1, 1, 2], [2, 1, 1], [1, 1, 1]]
    alone = Order(18, 4, Context(seed=1), [3] * 18)
    assert alone.step(2, 18) == Order(18, 4, Context(seed=1)).step(2, 18)


def test_schedules_by_hand() -> None:
    cosine = Training(schedule="cosine", warmup=0.2)
    assert [cosine.rate(s, 10) for s in range(2)] == pytest.approx([1 / 3, 2 / 3])
    assert cosine.rate(2, 10) == 1.0
    assert cosine.rate(6, 10) == pytest.approx(0.5)
    assert cosine.rate(9, 10) == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    linear = Training(schedule="linear", warmup=0.0)
    assert [linear.rate(s, 4) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert Training(schedule="constant", warmup=0.0).rate(3, 4) == 1.0


def test_number_of_steps() -> None:
    assert Training(batch=8).total(17) == 3
    assert Training(batch=8, epochs=2.0).total(16) == 4
    assert Training(batch=8, epochs=0.1).total(16) == 1
    assert Training(batch=8, steps=5).total(16) == 5
    assert Training(batch=8, epochs=3.0).total(3) == 3


@pytest.mark.parametrize(
    "wrong",
    [{"batch": 0}, {"lr": -1.0}, {"warmup": 1.0}, {"epochs": 0.0}, {"clip": float("nan")}],
)
def test_settings_out_of_range(wrong: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        run(tmp_path, task(), Training(**wrong))  # type: ignore[arg-type]


def test_nan_names_step_and_row(tmp_path: Path, always_save: Callable[[], None]) -> None:
    always_save()
    bad = Order(11, 4, Context(seed=3)).step(1, 22)[2]
    with pytest.raises(Stopped, match=rf"step 2 of 6.*after step 1 is kept.*\['id{bad}'\]") as stop:
        run(tmp_path, task(bad_row=bad), Training(epochs=2.0, batch=4))
    assert stop.value.exit_code == 3
    assert Checkpoints(tmp_path / "checkpoints-line", "line").steps() == [1]


def test_infinite_gradient_names_the_batch(tmp_path: Path) -> None:
    one = task()

    def losses(rows: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        # sqrt has a finite value and an infinite slope at 0
        return (one.module(X[list(rows)])[:, 0] * 0).clamp(min=0).sqrt(), {}

    one.losses = losses
    with pytest.raises(Stopped, match=r"gradient is not finite at step 1.*rows of the batch"):
        run(tmp_path, one, Training(steps=1, batch=3))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kill_at", [1, 4, 7])
def test_killed_and_resumed_gives_the_same_bits(
    kill_at: int, tmp_path: Path, always_save: Callable[[], None]
) -> None:
    settings = Training(steps=9, lr=0.05, batch=4)
    done, expected = run(tmp_path / "whole", task(2, dropout=0.3), settings)
    always_save()

    class Dying(PlainTask):
        def after_step(self, step: int) -> None:
            if step == kill_at:
                raise Killed

    dying = task(2, dropout=0.3)
    dying.__class__ = Dying
    with pytest.raises(Killed):
        run(tmp_path / "cut", dying, settings)
    kept = Checkpoints(tmp_path / "cut" / "checkpoints-line", "line")
    assert kept.steps() == list(range(max(1, kill_at - 2), kill_at))
    fresh = task(2, dropout=0.3)
    nn.init.zeros_(fresh.module[1].weight)  # whatever the new process starts from
    if kill_at == 1:
        fresh = task(2, dropout=0.3)  # nothing was saved: the start is the model's own
    again, resumed = run(tmp_path / "cut", fresh, settings)
    assert again.history == done.history
    assert all(torch.equal(expected[n], resumed[n]) for n in expected)
    # A third run has nothing left to do.
    third, same = run(tmp_path / "cut", task(), settings)
    assert third.history == done.history and torch.equal(same["1.weight"], expected["1.weight"])


def test_damaged_and_foreign_checkpoints_are_passed_over(
    tmp_path: Path, always_save: Callable[[], None]
) -> None:
    always_save()
    _, expected = run(tmp_path, task(), Training(steps=5, lr=0.05, batch=4))
    kept = Checkpoints(tmp_path / "checkpoints-line", "line")
    assert kept.steps() == [4, 5]
    newest = kept.folder / "step-00000005"
    whole = (newest / "tensors.safetensors").read_bytes()
    (newest / "tensors.safetensors").write_bytes(whole[: len(whole) // 2])
    found = kept.last()
    assert found is not None and found.step == 4
    _, resumed = run(tmp_path, task(), Training(steps=5, lr=0.05, batch=4))
    assert torch.equal(expected["1.weight"], resumed["1.weight"])
    facts = json.loads((newest / "facts.json").read_text())
    (newest / "facts.json").write_text(json.dumps(facts | {"key": "other"}))
    found = kept.last()
    assert found is not None and found.step == 4


def test_rows_without_weight_leave_the_parameters_alone(tmp_path: Path) -> None:
    one = task()
    start = {n: p.detach().clone() for n, p in one.trained().items()}

    class Weightless(PlainTask):
        def parts(self, rows: Sequence[int], step: int) -> Iterator[Part]:
            for part in super().parts(rows, step):
                yield Part(part.loss * 0, 0.0)

    one.__class__ = Weightless
    done, after = run(tmp_path, one, Training(steps=2, lr=0.1, batch=4))
    assert [h["loss"] for h in done.history] == [0.0, 0.0]
    assert all(torch.equal(start[n], after[n]) for n in start)


def test_global_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    one = task(dropout=0.5)
    torch.manual_seed(1)
    run(tmp_path, one, Training(steps=2, batch=4))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("epochs", "rows", "batch"), [(1.1, 100, 10), (2.2, 50, 10), (0.85, 10, 8), (0.01, 10, 8)]
)
def test_no_step_is_without_rows(epochs: float, rows: int, batch: int) -> None:
    settings = Training(epochs=epochs, batch=batch)
    order = Order(rows, batch, Context())
    end = settings.end(rows)
    steps = [order.step(s, end) for s in range(settings.total(rows))]
    assert all(steps)
    assert sum(map(len, steps)) <= end
