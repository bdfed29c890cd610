"""Losses mixed by weights, in whole steps and runs of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from truing.context import Context, use
from truing.core.batch.reading import read_units
from truing.core.batch.row_kinds import as_kind
from truing.core.modelfiles import lora
from truing.core.objective import Objective, objective_of
from truing.core.reference import Reference
from truing.core.trainer.mix import VIEWS, mixed
from truing.core.trainer.text_task import TextTask
from truing.core.training import Hook
from truing.method import methods
from truing.models import Model
from truing.tables import Row, Table

Mix = dict[str, object]
PAIRS: list[Row] = [
    {"prompt": f"say {i}", "chosen": f"yes {'very ' * (i % 3)}{i}", "rejected": f"no {i * 7}"}
    for i in range(6)
]
GROUPS: list[Row] = [
    {"prompt": f"say {i}", "completions": [f"no {i}", f"yes {i}!", "hm"][: 2 + i % 2],
     "scores": [0.5, 2.0, 1.0][: 2 + i % 2]}
    for i in range(6)
]  # fmt: skip
SINGLES: list[Row] = [
    {"prompt": f"say {i}", "completion": f"well {i}", "label": i % 3 == 0} for i in range(6)
]


def spec_of(name: str) -> Objective:
    return objective_of(methods[f"train/{name}"].declared)


def defaults(name: str) -> dict[str, object]:
    return {n: p.default for n, p in spec_of(name).settings.items()}


def task_of(model: Model, host: str, mix: Mix | None, rows: list[Row], budget: int) -> TextTask:
    """The task as `train_model` builds it, with an adapter that already does something."""
    spec = mixed(spec_of(host), mix)
    loaded = model.load_module(fresh=True)
    kind = "dialogue_pair" if isinstance(rows[0].get("chosen"), list) else spec.rows
    units, _ = read_units(spec, loaded, Table(kind, rows), 512)
    reference = Reference(model.weights_key, "float32")
    task = TextTask(spec, defaults(host), Hook(), units, loaded.module, reference, budget=budget)
    if spec.with_reference:
        task.measure_reference(loaded.module, [range(len(units))])
    task.adapt(lora.attach(loaded.module, 4, 8.0, seed=1))
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in task.trained().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=source))
    return task


def step(task: TextTask, rows: Sequence[int]) -> tuple[float, Tensor, dict[str, float], int]:
    """Loss, flat gradient, metrics and number of parts of one step."""
    loss = weight = 0.0
    sums: dict[str, tuple[float, float]] = {}
    parts = 0
    for part in task.parts(rows, 0):
        part.loss.backward()
        loss += float((part.loss if part.value is None else part.value).detach())
        weight += float(part.weight)
        parts += 1
        for n, (value, count) in part.metrics.items():
            before = sums.get(n, (0.0, 0.0))
            sums[n] = (before[0] + float(value), before[1] + count)
    grads = [p.grad.flatten() / weight for p in task.trained().values() if p.grad is not None]
    means = {n: s / w for n, (s, w) in sums.items() if w}
    return loss / weight, torch.cat(grads), means, parts


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


MIXTURES: list[tuple[str, Mix, list[Row]]] = [
    ("dpo", {"sft": 0.5, "ipo": {"weight": 0.2, "beta": 0.5}}, PAIRS),
    ("simpo", {"aot": 1.0, "bco": 0.5, "gradient_ascent": 0.1}, PAIRS),  # a whole step at once
    ("orpo", {"tdpo1": 0.3, "slic": 0.1, "apo_zero_unpaired": 1.0}, PAIRS),
    ("rrhf", {"dpo": 1.0, "sft": 0.2}, GROUPS),
    ("kto", {"sft": 0.5, "gradient_ascent": 0.1, "bco": 0.2}, SINGLES),
]


@pytest.mark.parametrize(("host", "mix", "rows"), MIXTURES, ids=[m[0] for m in MIXTURES])
def test_micro_batches_and_row_order_do_not_change_a_step(
    model: Model, host: str, mix: Mix, rows: list[Row]
) -> None:
    loss, grad, metrics, parts = step(task_of(model, host, mix, rows, 100_000), range(6))
    assert parts == 1 and grad.norm() > 0 and math.isfinite(loss)
    for budget, order in ((60, [4, 1, 5, 0, 2, 3]), (1, [*range(6)])):
        again = step(task_of(model, host, mix, rows, budget), order)
        assert again[3] > 1 and again[0] == pytest.approx(loss, rel=2e-5)
        assert torch.allclose(again[1], grad, atol=1e-4 * float(grad.norm()))
        assert again[2] == pytest.approx(metrics, rel=1e-4, abs=1e-4)


def own_step(model: Model, name: str, table: Table) -> tuple[float, Tensor]:
    """One step of an objective by itself, on the rows converted for it."""
    rows, _ = as_kind(table, spec_of(name).rows, "x")
    loss, grad, _, _ = step(task_of(model, name, None, list(rows), 100), range(len(rows)))
    return loss, grad


def test_a_step_is_the_weighted_sum_of_separate_steps(model: Model) -> None:
    mix = {"dpo": 0.5, "sft": 0.7, "ipo": 0.2}
    loss, grad, _, _ = step(task_of(model, "dpo", dict(mix), PAIRS, 100), range(6))
    parts = [(w, *own_step(model, name, Table("pair", PAIRS))) for name, w in mix.items()]
    assert loss == pytest.approx(sum(w * value for w, value, _ in parts), rel=1e-5)
    whole = torch.stack([w * slope for w, _, slope in parts]).sum(0)
    assert torch.allclose(grad, whole, atol=1e-5 * float(whole.norm()))


KINDS = {
    "example": "sft",
    "negative": "gradient_ascent",
    "unpaired": "bco",
    "group": "rrhf",
    "pair": "dpo",
}


@pytest.mark.parametrize("kinds", VIEWS, ids="-".join)
def test_an_added_objective_learns_what_it_would_learn_alone(
    model: Model, kinds: tuple[str, str]
) -> None:
    """The method's own loss weighs nothing; rows are converted for the other one."""
    rows = {"pair": PAIRS, "group": GROUPS, "unpaired": SINGLES}[kinds[0]]
    host = {"pair": "simpo", "group": "pro", "unpaired": "apo_zero_unpaired"}[kinds[0]]
    name = KINDS[kinds[1]]
    found = step(task_of(model, host, {host: 0.0, name: 1.0}, rows, 100), range(6))
    loss, grad = own_step(model, name, Table(kinds[0], rows))
    assert found[0] == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(found[1], grad, atol=1e-5 * float(grad.norm()))


def trained(model: Model, folder: Path, name: str, **settings: object) -> tuple[Model, Context]:
    with use(Context(seed=4, folder=folder)) as context:
        values = {"steps": 4, "batch": 3, "rank": 0, "budget": 200, **settings}
        made = methods[name](model, Table("pair", PAIRS), **values)
    assert isinstance(made, Model)
    return made, context


def weights_of(made: Model) -> dict[str, Tensor]:
    folded = made.folded()
    return {name: folded[name] for name in folded}


def test_a_run_of_dpo_with_likelihood_is_a_run_of_rpo(model: Model, tmp_path: Path) -> None:
    one, said = trained(model, tmp_path / "mix", "dpo", mix={"sft": 0.5}, beta=0.2)
    two, known = trained(model, tmp_path / "rpo", "rpo", alpha=0.5, beta=0.2)
    plain, _ = trained(model, tmp_path / "dpo", "dpo", beta=0.2)
    a, b, c = weights_of(one), weights_of(two), weights_of(plain)
    assert all(torch.equal(a[n], b[n]) for n in b) and any(not torch.equal(a[n], c[n]) for n in c)
    losses = [[m["loss"] for m in s.metrics if "loss" in m] for s in (said, known)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    (told,) = [m["mix"] for m in said.metrics if "mix" in m]
    assert told == "1 dpo + 0.5 sft (chosen answers as examples)"
    assert all("sft/logp" in m and "accuracy" in m for m in said.metrics if "loss" in m)


SAID = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
DIALOGUES: list[Row] = [
    {
        "prompt": "hi",
        "chosen": [*SAID, {"role": "assistant", "content": f"yes {i}"}],
        "rejected": [*SAID, {"role": "assistant", "content": f"no {i}"}],
    }
    for i in range(3)
]


def test_of_dialogues_the_turns_after_the_parting_are_learnt(model: Model) -> None:
    loss, grad, _, _ = step(task_of(model, "dpo", {"sft": 1.0}, DIALOGUES, 100), range(3))
    known, slope, _, _ = step(task_of(model, "rpo", None, DIALOGUES, 100), range(3))
    assert loss == known and torch.equal(grad, slope)


@pytest.mark.parametrize(
    ("host", "name", "more"),
    [
        ("d2o", "gradient_ascent", {"samples": 2, "max_tokens": 4}),  # branches of a hook
        ("mah_dpo", "sft", {"objectives": 1}),  # heads
        ("bradley_terry", "dpo", {}),  # scores, and a reference that it has not itself
        ("forward_kl", "sft", {"teacher": True}),
        ("neftune", "dft", {"noise": 0.0}),
    ],
)
def test_what_is_special_of_the_method_stays_its_own(
    model: Model, tmp_path: Path, host: str, name: str, more: dict[str, object]
) -> None:
    """The loss is linear in the weight, and the method's own record is that of a plain run."""
    given = {n: model if n == "teacher" else v for n, v in more.items()}
    seen: list[dict[str, object]] = []
    for weight in (0, 1, 2):
        mix = {"mix": {name: weight}} if weight else {}
        _, said = trained(model, tmp_path / str(weight), host, **{"steps": 1, **given, **mix})
        seen += [dict[str, object](m) for m in said.metrics if "loss" in m]
    losses = [float(str(m["loss"])) for m in seen]
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-3, abs=1e-5)
    assert abs(losses[1] - losses[0]) > 1e-3
    own = {n: v for n, v in seen[0].items() if n not in ("loss", "grad_norm", "seconds")}
    assert own.items() <= seen[1].items() and any(n.startswith(f"{name}/") for n in seen[1])


def test_the_state_of_a_term_is_part_of_a_checkpoint(model: Model) -> None:
    task = task_of(model, "dpo", {"bco": 1.0}, PAIRS, 100)
    step(task, range(6))
    task.after_step(1)
    kept = task.state()
    assert float(kept["objective/bco/count"]) == 12
    other = task_of(model, "dpo", {"bco": 1.0}, PAIRS, 100)
    other.load_state(kept)
    for one in (task, other):
        step(one, range(6))
        one.after_step(2)
    assert float(other.state()["objective/bco/count"]) == 24
    assert torch.equal(other.state()["objective/bco/mean"], task.state()["objective/bco/mean"])
