"""The loss on held-out rows while training: its values by hand, what is kept, kills, bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from truing import cli, pipeline, recipe
from truing.context import Context, Json, use
from truing.core import held_out, reference
from truing.core.chat import completion_ids, prompt_ids
from truing.core.engine import Loop, Trained, train
from truing.core.held_out import LOSS, Course, HeldOut, Watch
from truing.core.online_training import OnlineTraining
from truing.core.plain_task import PlainTask
from truing.core.tiny import tiny_tokenizer
from truing.core.trainer.checkpoint import Checkpoints
from truing.core.trainer.text_task import TextTask
from truing.core.training import TextTraining, Training
from truing.errors import InputError, Stopped
from truing.method import methods
from truing.models import Model
from truing.signature import class_docs
from truing.store import Store
from truing.tables import Row, Table, content_hash

ROWS: list[Row] = [
    {"prompt": f"what is {i}?", "chosen": f"it is {i}." + " so." * (i % 3), "rejected": f"no {i}"}
    for i in range(14)
]
PAIRS, HELD = Table("pair", ROWS[:10]), Table("pair", ROWS[10:])
SMALL: dict[str, object] = {"steps": 6, "batch": 4, "lr": 1e-3, "rank": 4, "dtype": "float32"}

# The loop, on a line through points


X = torch.linspace(-1, 1, 45).reshape(15, 3)
Y = X @ torch.tensor([1.0, -2.0, 3.0]) + torch.tensor([0.5, -0.5, 0.0]).repeat(5)
SETTINGS = Training(steps=9, lr=0.4, batch=4, schedule="constant", warmup=0.0)
HELD_ROWS = (11, 12, 13, 14)


def line(dropout: float = 0.0) -> tuple[PlainTask, nn.Module]:
    """A task over the first eleven points."""
    torch.manual_seed(7)
    module = nn.Sequential(nn.Dropout(dropout), nn.Linear(3, 1))

    def losses(rows: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        error = module(X[list(rows)])[:, 0] - Y[list(rows)]
        return error**2, {"error": error.detach().abs()}

    return PlainTask("line", module, 11, losses, micro=3), module


def run(folder: Path, watch: Watch, dropout: float = 0.0) -> tuple[Trained, dict[str, Tensor]]:
    task, module = line(dropout)
    with use(Context(seed=3, folder=folder)):
        done = train(task, SETTINGS, held=HeldOut(task, [HELD_ROWS], watch))
    return done, {n: p.detach().clone() for n, p in module.named_parameters()}


def by_hand(weights: dict[str, Tensor]) -> float:
    """Mean squared error of the four points that no update sees."""
    at = list(HELD_ROWS)
    return float(((X[at] @ weights["1.weight"][0] + weights["1.bias"] - Y[at]) ** 2).mean())


def measured(history: Sequence[dict[str, object]]) -> dict[int, float]:
    return {
        int(str(r["step"])): float(str(r[held_out.LOSS.key]))
        for r in history
        if held_out.LOSS.key in r
    }


def test_loss_without_dropout_when_it_is_due(tmp_path: Path) -> None:
    _, start = line()
    first = {n: p.detach().clone() for n, p in start.named_parameters()}
    done, weights = run(tmp_path, Watch(eval_every=4), dropout=0.5)
    seen = measured(done.history)
    assert list(seen) == [0, 4, 8, 9] and done.steps == 9
    assert seen[0] == pytest.approx(by_hand(first), rel=1e-5)
    assert seen[9] == pytest.approx(by_hand(weights), rel=1e-5)
    (row,) = [r for r in done.history if r.get("held_out/error") and r["step"] == 9]
    at = list(HELD_ROWS)
    gap = (X[at] @ weights["1.weight"][0] + weights["1.bias"] - Y[at]).abs().mean()
    assert row["held_out/error"] == pytest.approx(float(gap), rel=1e-5)


def test_progress_tells_the_newest_loss(tmp_path: Path) -> None:
    task, _ = line()
    said: list[str] = []
    with use(Context(3, tmp_path, lambda done, total, label: said.append(label))):
        done = train(task, SETTINGS, held=HeldOut(task, [HELD_ROWS], Watch(eval_every=4)))
    seen = measured(done.history)
    newest = [seen[0]] * 3 + [seen[4]] * 4 + [seen[8], seen[9]]
    assert said == [f"training (line), held-out loss {loss:.4g}" for loss in newest]


def test_training_is_what_it_would_be_without(tmp_path: Path) -> None:
    task, module = line(0.3)
    with use(Context(seed=3, folder=tmp_path / "without")):
        plain = train(task, SETTINGS)
    done, weights = run(tmp_path / "with", Watch(), dropout=0.3)
    assert list(measured(done.history)) == [0, 2, 4, 6, 8, 9]  # five in a run of nine
    assert all(torch.equal(p, weights[n]) for n, p in module.named_parameters())
    assert [r for r in done.history if "lr" in r] == plain.history


def test_best_update_is_kept(tmp_path: Path) -> None:
    done, weights = run(tmp_path, Watch(eval_every=1, keep_best=True))
    seen = {step: loss for step, loss in measured(done.history).items() if step}
    lowest = min(seen, key=lambda s: seen[s])
    assert 0 < lowest < 9, "the rate is too low for a minimum inside"
    assert by_hand(weights) == pytest.approx(seen[lowest], rel=1e-5)
    kept = Checkpoints(tmp_path / "checkpoints-line", "line")
    assert lowest in kept.steps() and kept.steps()[-1] == 9
    last, other = run(tmp_path / "last", Watch(eval_every=1))
    assert measured(last.history) == measured(done.history)
    assert by_hand(other) == pytest.approx(measured(last.history)[9], rel=1e-5)


def test_patience_ends_the_training(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", Watch(eval_every=1))
    losses = list(measured(whole.history).values())
    done, weights = run(tmp_path / "short", Watch(eval_every=1, patience=2))
    end = next(i for i in range(2, 10) if min(losses[i - 1 : i + 1]) >= min(losses[: i - 1]))
    assert done.steps == end < 9 and list(measured(done.history).values()) == losses[: end + 1]
    assert by_hand(weights) == pytest.approx(losses[end], rel=1e-5)
    again, same = run(tmp_path / "short", Watch(eval_every=1, patience=2))
    assert again.steps == end and all(torch.equal(weights[n], same[n]) for n in weights)


@pytest.mark.parametrize("kill_at", [2, 5, 8])
@pytest.mark.parametrize("keep_best", [False, True])
def test_killed_and_resumed(
    keep_best: bool,
    kill_at: int,
    tmp_path: Path,
    always_save: Callable[[], None],
    interrupted: Callable[[type, int], AbstractContextManager[None]],
) -> None:
    watch = Watch(eval_every=3, keep_best=keep_best)
    expected, weights = run(tmp_path / "whole", watch, dropout=0.2)
    always_save()
    with interrupted(PlainTask, kill_at):
        run(tmp_path / "cut", watch, dropout=0.2)
    done, resumed = run(tmp_path / "cut", watch, dropout=0.2)
    assert done.history == expected.history
    assert all(torch.equal(weights[n], resumed[n]) for n in weights)


def test_a_best_checkpoint_that_is_gone(tmp_path: Path) -> None:
    done, _ = run(tmp_path, Watch(eval_every=1, keep_best=True))
    seen = {step: loss for step, loss in measured(done.history).items() if step}
    lowest = min(seen, key=lambda s: seen[s])
    folder = tmp_path / "checkpoints-line" / f"step-{lowest:08d}"
    (folder / "facts.json").write_text("{")
    with pytest.raises(Stopped, match=f"after update {lowest}, where the held-out loss was lowest"):
        run(tmp_path, Watch(eval_every=1, keep_best=True))


def test_decisions_by_hand() -> None:
    def of(*losses: float) -> list[dict[str, Json]]:
        return [{"step": 2 * i, held_out.LOSS.key: loss} for i, loss in enumerate(losses)]

    seen = Course(LOSS, [{"step": 1, "loss": 0.1}, *of(0.5, 0.9, 0.7, 0.7)])
    assert (seen.best, seen.best_value) == (4, 0.7)  # before training is no update
    assert (seen.first, seen.newest, seen.waited) == (0.5, 0.7, 3)
    assert (Course(LOSS, of(0.5)).best, Course(LOSS, of(0.5)).waited) == (0, 0)
    assert Course(LOSS, of(1.0, math.nan, 3.0)).best == 4
    assert (Course(LOSS, of(math.nan, math.nan)).best, Course(LOSS).newest) == (2, None)
    waited = [Course(LOSS, of(3.0, 2.0, 2.5, *more)).waited for more in ([], [2.1], [1.9])]
    assert waited == [1, 2, 0]
    assert [s for s in range(11) if Watch().due(s, 10)] == [0, 2, 4, 6, 8, 10]
    assert [s for s in range(8) if Watch(eval_every=5).due(s, 7)] == [0, 5, 7]
    assert [s for s in range(3) if Watch().due(s, 2)] == [0, 1, 2]


class Counting(list[dict[str, Json]]):
    """A history that counts how often it is gone through."""

    walks = 0

    def __iter__(self) -> Iterator[dict[str, Json]]:
        self.walks += 1
        return super().__iter__()


@pytest.mark.parametrize("watched", [False, True])
def test_an_update_costs_the_same_however_many_there_were(watched: bool, tmp_path: Path) -> None:
    """What is decided between updates does not go through all of the history each time."""

    def walks(steps: int) -> int:
        task, _ = line()
        with use(Context(3, tmp_path / str(steps), lambda done, total, label: None)):
            watch = Watch(eval_every=2, patience=steps, keep_best=False)
            held = HeldOut(task, [HELD_ROWS], watch) if watched else None
            loop = Loop(task, replace(SETTINGS, steps=steps), "line", 0.1, held)
            loop.history = Counting()
            assert loop.run().steps == steps
        return loop.history.walks

    assert walks(24) == walks(6)


# Language models


def tokens(model: Model, prompt: object, text: object) -> Tensor:
    """log p of each token of an answer under the stock module, one row at a time."""
    module, tokenizer = model.load_module().module, tiny_tokenizer()
    head, tail = prompt_ids(tokenizer, str(prompt)), completion_ids(tokenizer, str(text))
    with torch.no_grad():
        logp = module(torch.tensor([[*head, *tail]])).logits[0].log_softmax(-1)
    return logp[len(head) - 1 : -1].gather(1, torch.tensor(tail)[:, None])[:, 0]


def nll(model: Model) -> float:
    """Mean over all tokens of the held-out chosen answers, each row as long as it is."""
    found = [tokens(model, r["prompt"], r["chosen"]) for r in HELD]
    return float(-torch.cat(found).mean())


def preference(model: Model, base: Model, beta: float) -> tuple[float, float]:
    """Mean over the held-out pairs of DPO's loss, and how many chosen answers are preferred."""

    def gap(of: Model, row: Row) -> Tensor:
        sides = [tokens(of, row["prompt"], row[n]).sum() for n in ("chosen", "rejected")]
        return sides[0] - sides[1]

    d = torch.stack([gap(model, row) - gap(base, row) for row in HELD])
    return float(-logsigmoid(beta * d).mean()), float((d > 0).float().mean())


@pytest.fixture
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


def trained(
    name: str, folder: Path, model: Model, held: Table | None = HELD, **more: object
) -> tuple[Model, Context]:
    with use(Context(seed=4, folder=folder)) as context:
        made = methods[name](model, PAIRS, held_out=held, **{**SMALL, **more})
    assert isinstance(made, Model)
    return made, context


def test_mean_over_tokens_and_over_pairs(model: Model, tmp_path: Path) -> None:
    tuned, context = trained("sft", tmp_path / "sft", model, eval_every=3, budget=40)
    seen = measured(context.metrics)
    assert list(seen) == [0, 3, 6]
    assert seen[0] == pytest.approx(nll(model), rel=1e-5)
    assert seen[6] == pytest.approx(nll(tuned), rel=1e-5)
    aligned, context = trained("dpo", tmp_path / "dpo", model, beta=0.3, eval_every=6, budget=40)
    seen = measured(context.metrics)
    assert seen[0] == pytest.approx(math.log(2), rel=1e-6)
    loss, accuracy = preference(aligned, model, 0.3)
    assert seen[6] == pytest.approx(loss, rel=1e-4)
    (last,) = [r for r in context.metrics if r.get("step") == 6 and held_out.LOSS.key in r]
    assert last["held_out/accuracy"] == pytest.approx(accuracy)


def test_nothing_random_is_measured(model: Model, tmp_path: Path) -> None:
    noisy, context = trained("neftune", tmp_path, model, noise=50.0, steps=2, eval_every=2)
    seen = measured(context.metrics)
    assert seen[0] == pytest.approx(nll(model), rel=1e-5)
    assert seen[2] == pytest.approx(nll(noisy), rel=1e-5)


# What else a task holds: a state, answers of other rows, a reference that moves, whole weights.
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("dpo", {}),
        ("bco", {"budget": 60}),
        ("kto", {}),
        ("tr_dpo", {"every": 2, "rank": 0}),
        ("sft", {"layers": 2}),
    ],
)
def test_it_changes_no_bit(
    name: str, more: dict[str, object], model: Model, tmp_path: Path
) -> None:
    plain, _ = trained(name, tmp_path / "without", model, None, **more)
    watched, context = trained(name, tmp_path / "with", model, eval_every=1, **more)
    assert watched.key == plain.key
    assert len(measured(context.metrics)) == 7


def test_keys_of_runs(model: Model, tmp_path: Path) -> None:
    """Without held-out rows that of ever; with them what is held out and when it is measured."""
    parts = ["sft", {}, None, {}, vars(TextTraining(**SMALL)), model.weights_key]  # type: ignore[arg-type]
    plain = content_hash([*parts, PAIRS.key, 4, "", {}], 8)
    trained("sft", tmp_path / "a", model, None)
    assert [p.name for p in (tmp_path / "a").glob("checkpoints-*")] == [f"checkpoints-{plain}"]
    trained("sft", tmp_path / "b", model, steps=1)
    trained("sft", tmp_path / "b", model, steps=1, eval_every=1)
    trained("sft", tmp_path / "b", model, Table("pair", ROWS[10:12]), steps=1)
    assert len(list((tmp_path / "b").glob("checkpoints-*"))) == 3


def test_sorting_compares_the_held_out_rows(model: Model, tmp_path: Path) -> None:
    """AOT sorts log-ratios: over all four held-out pairs, which are one step of about `batch`."""
    made, context = trained("aot", tmp_path, model, steps=3, eval_every=3)

    def gaps(of: Model) -> Tensor:
        both = [[tokens(of, r["prompt"], r[n]).sum() for n in ("chosen", "rejected")] for r in HELD]
        return torch.stack([w - l for w, l in both]).sort().values  # noqa: E741

    loss = -logsigmoid(0.1 * (gaps(made) - gaps(model))).mean()
    assert measured(context.metrics)[3] == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_moving_reference_stays_for_rows_that_are_held_out(
    rank: int, model: Model, tmp_path: Path
) -> None:
    """So that a loss after a move compares with one before it."""
    made, context = trained(
        "tr_dpo", tmp_path, model, steps=4, eval_every=1, every=2, share=1.0, rank=rank, lr=1e-2
    )

    def gaps(of: Model) -> Tensor:
        both = [[tokens(of, r["prompt"], r[n]).sum() for n in ("chosen", "rejected")] for r in HELD]
        return torch.stack([w - l for w, l in both])  # noqa: E741

    loss = -logsigmoid(0.1 * (gaps(made) - gaps(model))).mean()
    assert abs(float(loss) - math.log(2)) > 1e-3  # what it is against a reference moved just now
    assert measured(context.metrics)[4] == pytest.approx(float(loss), rel=1e-4)


def test_steps_of_rows_that_are_compared(model: Model, tmp_path: Path) -> None:
    """No step is of one row, and every row is in one of them."""
    seen: list[list[int]] = []
    parts = TextTask.parts

    def watched(task: TextTask, rows: Sequence[int], step: int) -> object:
        if not torch.is_grad_enabled():
            seen.append(list(rows))
        return parts(task, rows, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextTask, "parts", watched)
        trained("aot", tmp_path, model, steps=1, batch=3, eval_every=1)
    one, two = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert one == two and sorted(r for rows in one for r in rows) == [0, 1, 2, 3]
    assert all(len(rows) > 1 for rows in one)


def test_best_model_is_the_one_that_was_measured(deep_path: Path, tmp_path: Path) -> None:
    """A rate so high that it gets worse again: what is kept has the lowest loss of all."""
    made, context = trained(
        "sft", tmp_path, Model.open(deep_path), lr=0.1, steps=6, schedule="constant", eval_every=1,
        keep_best=True,
    )  # fmt: skip
    seen = {s: loss for s, loss in measured(context.metrics).items() if s}
    lowest = min(seen, key=lambda s: seen[s])
    assert lowest < 6
    assert nll(made) == pytest.approx(seen[lowest], rel=1e-4)
    (told,) = [r for r in context.metrics if "held_out_lowest_after" in r]
    assert told["held_out_lowest_after"] == lowest


@pytest.mark.parametrize("name", ["bco", "tr_dpo"])
def test_killed_between_measurements(
    name: str,
    model: Model,
    tmp_path: Path,
    always_save: Callable[[], None],
    interrupted: Callable[[type, int], AbstractContextManager[None]],
) -> None:
    more: dict[str, object] = {"eval_every": 2, "keep_best": True, "patience": 2, "steps": 8}
    more |= {"lr": 2e-2, "budget": 80} | ({"every": 3} if name == "tr_dpo" else {})
    expected, whole = trained(name, tmp_path / "whole", model, **more)
    always_save()
    with interrupted(TextTask, 3):
        trained(name, tmp_path / "cut", model, **more)
    resumed, context = trained(name, tmp_path / "cut", model, **more)
    assert resumed.key == expected.key
    assert measured(context.metrics) == measured(whole.metrics)


def test_reference_of_held_out_rows_is_measured_once(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    made: list[reference.Reference] = []

    class Counting(reference.Reference):
        def __init__(self, *given: str) -> None:
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr("truing.core.trainer.train_text.Reference", Counting)
    trained("dpo", tmp_path / "a", model, steps=1, beta=0.1)
    trained("dpo", tmp_path / "b", model, steps=1, beta=0.5)
    trained("ipo", tmp_path / "c", model, None, steps=1)
    assert made[0].computed == 2 and made[0].cached == 0  # rows to train on, and the others
    assert [(r.computed, r.cached) for r in made[1:]] == [(0, 2), (0, 1)]


# What is said


def test_bad_input(model: Model, tmp_path: Path) -> None:
    bad: Row = {"prompt": "a", "chosen": "same", "rejected": "same"}
    texts = Table("text", [{"text": "a"}])
    with use(Context(folder=tmp_path)):
        with pytest.raises(InputError, match="dpo held_out: needs rows of kind pair"):
            methods["dpo"](model, PAIRS, held_out=texts)
        with pytest.raises(InputError, match=r"dpo held_out: no row can be trained on.*the same"):
            methods["dpo"](model, PAIRS, held_out=Table("pair", [bad]), **SMALL)
        with pytest.raises(InputError, match="setting 'patience' must be at least 0"):
            methods["dpo"](model, PAIRS, held_out=HELD, patience=-1)
        with pytest.raises(InputError, match="'keep_best'"):
            methods["dpo"](model, PAIRS, held_out=HELD, keep_best="first")
        for name, value in (("eval_every", 5), ("keep_best", True), ("patience", 1)):
            with pytest.raises(InputError, match=f"setting '{name}' counts for nothing"):
                methods["dpo"](model, PAIRS, **{name: value})
        one = Table("unpaired", [{"prompt": "a", "completion": "b", "label": True}])
        with pytest.raises(InputError, match="kto held_out: needs two rows") as caught:
            methods["kto"](model, PAIRS, held_out=one, **SMALL)
        assert caught.value.fix == "Give more rows"
        with pytest.raises(InputError, match=r"kto: needs two rows.*apo_zero_unpaired"):
            methods["kto"](model, one, **SMALL)
    assert not list(tmp_path.glob("checkpoints*"))


def test_rows_that_are_trained_on_too(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = Table("pair", ROWS[8:12])
    _, context = trained("dpo", tmp_path, model, both, steps=1)
    said = capsys.readouterr().err
    assert "dpo held_out: warning: 2 of 4 rows are trained on, too" in said
    assert "held_out_rows: 4" in said and "held-out loss" in said
    assert context.metrics[0]["held_out_rows"] == 4 and context.metrics[0]["rows"] == 10


def test_heads_that_there_are_not(model: Model, tmp_path: Path) -> None:
    def of(*heads: int) -> Table:
        return Table("pair", [{**r, "objective": h} for r, h in zip(ROWS, heads, strict=False)])

    method = methods["mah_dpo"]
    settings = method.validate({"objectives": 2})
    method.check(settings, {"data": of(0, 1, 0), "held_out": of(0, 0)})
    with pytest.raises(InputError, match=r"held_out.*objectives"):
        method.check(settings, {"data": of(0, 1, 0), "held_out": of(0, 2)})


# The command line, recipes, the report


def test_command_and_recipe(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rows in (("data", PAIRS), ("held", HELD)):
        lines = [json.dumps({n: r[n] for n in ("prompt", "chosen", "rejected")}) for r in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    words = ["train", "sft", "--model", str(tiny_path), "--data", str(tmp_path / "data.jsonl")]
    words += [
        "--held-out",
        str(tmp_path / "held.jsonl"),
        "--eval-every",
        "1",
        "--keep-best",
        "true",
    ]
    assert cli.main([*words, "--steps", "2", "--rank", "2", "--json"]) == 0
    assert "lowest" in capsys.readouterr().err
    assert cli.main([*words[:6], "--patience", "1"]) == 2
    assert "setting 'patience' counts for nothing" in capsys.readouterr().err
    (tmp_path / "r.yaml").write_text(
        f"name: watched\nmodels: {{base: {tiny_path}}}\nsteps:\n"
        "  held: {do: select/sample, data: data.jsonl, n: 3}\n"
        "  rest: {do: select/sample, data: data.jsonl, n: 3, part: rest}\n"
        "  tuned: {do: train/sft, model: base, data: rest, held_out: held, steps: 3, rank: 2,\n"
        "    eval_every: 1}\n"
    )
    plan = recipe.load(tmp_path / "r.yaml")
    result = pipeline.run(plan, tmp_path / "runs", store=Store(tmp_path / "store"))
    lines = (result.folder / "metrics.jsonl").read_text().splitlines()
    assert list(measured([json.loads(line) for line in lines])) == [0, 1, 2, 3]
    page = (result.folder / "report.html").read_text()
    assert "held out" in page and "step 0" in page


def test_each_setting_is_told_in_one_place_and_means_the_same_in_all() -> None:
    """A class says of those above it what it words otherwise; methods say nothing of these."""
    text, drawn = class_docs(TextTraining), class_docs(OnlineTraining)
    assert set(text) == {f.name for f in fields(TextTraining)}
    assert set(drawn) == {f.name for f in fields(OnlineTraining)}
    assert text["lr"] == drawn["lr"] == class_docs(Training)["lr"]
    assert "rollouts" in drawn["steps"] and "rollouts" not in text["steps"]
    for name, said in class_docs(Watch).items():
        assert methods["train/dpo"].settings[name].doc == said
        assert methods["train/replay"].settings[name].doc == said
    own = methods["train/cyclealign"].settings["eval_every"].doc
    assert "in a cycle" in own  # its own words go before
