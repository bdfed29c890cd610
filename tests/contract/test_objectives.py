"""Every training objective, found in the registry; what is tested follows from unit and needs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from test_learning import LEARNING
from torch import Tensor
from transformers import LlamaForCausalLM

from truing.changes import Weights
from truing.context import Context, use
from truing.core.batch.measure import blank
from truing.core.batch.reading import read_units
from truing.core.modelfiles import lora
from truing.core.modelfiles.stock import quiet
from truing.core.objective import Loss, Measurements, Objective, objective_of
from truing.core.passes.scoring import ScoreHead, has_head
from truing.core.reference import Reference
from truing.core.tiny import tiny_config, tiny_tokenizer
from truing.core.trainer.own_samples import FinishedSamples, OwnSamples
from truing.core.trainer.text_task import TextTask
from truing.core.trainer.train_text import find_heads, find_teachers
from truing.core.training import HOOKS, Hook
from truing.core.weights import open_weights
from truing.merge.mixture_of_experts import mixture_of_experts
from truing.method import methods
from truing.models import Model
from truing.tables import Row, Table

OBJECTIVES = [n for n in methods if methods[n].entry.kind == "objective"]
WORDS = "lime oak rain stone river cloud ash fern moss reed".split()


def spec_of(name: str) -> Objective:
    return objective_of(methods[name].declared)


def defaults(spec: Objective) -> dict[str, object]:
    return {n: p.default for n, p in spec.settings.items()}


def hook_of(spec: Objective) -> Hook:
    """The objective's hook; one that draws answers draws two short ones, or some that end."""
    if not spec.hook:
        return Hook()
    # What a hook leaves out where rows are measured is drawn for each micro-batch, so that how a
    # step is split shows in it.
    return HOOKS[spec.hook](**drawing(spec), **HOOKS[spec.hook].quiet)


def noisy(spec: Objective) -> bool:
    """True where, by default, what is trained on differs from what is measured."""
    if not spec.hook:
        return False
    usual = HOOKS[spec.hook]().settings()
    return usual | HOOKS[spec.hook].quiet != usual


def drawing(spec: Objective) -> dict[str, int]:
    """Settings of the answers that the hook draws."""
    if not spec.hook or not issubclass(kind := HOOKS[spec.hook], OwnSamples):
        return {}
    ending = issubclass(kind, FinishedSamples)
    return {"samples": 8, "max_tokens": 200} if ending else {"samples": 2, "max_tokens": 6}


def table_for(spec: Objective, rows: int = 6) -> Table:
    """Rows of the objective's kind with the columns that it declares."""
    made: list[Row] = []
    for i in range(rows):
        answers = [f"{WORDS[i]} {'very ' * (i % 3)}good", f"no {WORDS[(3 * i) % 10]}", "hm, maybe"]
        row: Row = {"prompt": f"say {WORDS[i % 4]} {i}"}
        if spec.rows == "pair":
            row |= {"chosen": answers[0], "rejected": answers[1]}
        elif spec.rows == "group":
            row |= {"completions": answers[: 2 + i % 2], "scores": [2.0, 0.5, 1.0][: 2 + i % 2]}
        elif spec.rows == "steps":
            steps = [f"{WORDS[i]} one", "then two", "so three"][: 1 + i % 3]
            row |= {"steps": steps, "labels": [1.0, 0.0, 0.5][: 1 + i % 3]}
        elif spec.rows == "judgement":
            row |= {"completion": answers[i % 2], "score": 0.15 * i}
        elif spec.rows == "negative":
            row |= {"rejected": answers[i % 2]}
        elif spec.rows != "prompt":
            row |= {"completion": answers[i % 2]}
        if spec.rows == "unpaired":
            row["label"] = i % 2 == 0
        row |= dict.fromkeys(spec.texts, f"gold {WORDS[-i]}")
        for name, default in spec.columns.items():
            if name not in row:
                row[name] = 0.3 + 0.05 * i if default is None else default
        if spec.heads:
            row[spec.heads] = i % 2
        made.append(row)
    return Table(spec.rows, made)


def made_up(spec: Objective, scale: float = 1.0, seed: int = 0) -> Measurements:
    """Random measurements of the right shape: four units, two to four branches."""
    source = torch.Generator().manual_seed(seed)
    width = {"pair": 2, "group": 3, "unpaired": 1, "example": 1, "prompt": 0}.get(spec.rows, 1)
    width += len(spec.texts) + ("mismatched" in spec.needs) + hook_of(spec).added
    lengths = torch.randint(1, 6, (4, width), generator=source)
    mask = (torch.arange(5) < lengths[..., None]).float()
    tensors: dict[str, Tensor] = {}
    for name in spec.needs:
        if name != "mismatched":
            value = torch.rand(4, width, 5, generator=source) * scale * mask
            tensors[name] = -value if name.endswith("logp") else value
    columns = {}
    for name, default in spec.columns.items():
        shape = {"group": (4, width), "steps": (4, 5)}.get(spec.rows, (4,))
        value = torch.rand(shape, generator=source)
        columns[name] = (value > 0.5).float() if name == "label" else value
        if default is not None:
            columns[name] = torch.full(shape, default)
    return Measurements(mask, tensors, columns)


def own_part(loss: Loss) -> Tensor:
    """Value of each unit and term, weighted."""
    return torch.cat([(c * v * w).reshape(len(v), -1).sum(1) for c, v, w in loss.terms()])


def test_the_standard_family_is_listed() -> None:
    names = {methods[n].name for n in OBJECTIVES}
    assert {"sft", "dft", "dpo", "ipo", "kto", "orpo", "simpo", "cpo", "tdpo1", "rrhf"} <= names
    assert len(OBJECTIVES) >= 38


@pytest.mark.parametrize("name", OBJECTIVES)
def test_declaration(name: str) -> None:
    method, spec = methods[name], spec_of(name)
    assert method.returns == "Model" and {"model", "data"} <= set(method.inputs)
    assert ("reference" in method.inputs) == spec.takes_reference
    assert set(spec.teachers) <= set(method.inputs)
    assert {"epochs", "lr", "batch", "rank", "max_length"} <= set(method.settings)
    values = method.validate({})
    assert method.validate(json.loads(json.dumps(values))) == values
    assert all(s.doc for s in method.settings.values())
    assert method.entry.unit == spec.unit and method.entry.rows == spec.rows
    assert method.paper and method.entry.needs == spec.needs


# The last one has margins of thousands of nats, on both sides of 0.
@pytest.mark.parametrize("scale", [1e-7, 1.0, 60.0, 1000.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_and_gradients_are_finite(name: str, scale: float) -> None:
    spec = spec_of(name)
    m = made_up(spec, scale)
    leaves = {n: t.clone().requires_grad_() for n, t in m.tensors.items()}
    loss = spec(m.having(**leaves), defaults(spec))
    assert loss.total().isfinite() and all(v.isfinite().all() for v in loss.metrics.values())
    assert not any(v.requires_grad for v in loss.metrics.values())
    loss.total().backward()
    for leaf_name, leaf in leaves.items():
        assert leaf.grad is None or leaf.grad.isfinite().all(), leaf_name
    slopes = [leaf.grad for n, leaf in leaves.items() if n != "ref_logp" and leaf.grad is not None]
    assert scale > 60 or sum(float(slope.abs().sum()) for slope in slopes) > 0
    if "ref_logp" in leaves and scale == 1.0:  # it must count for something
        changed = m.having(ref_logp=m.ref_logp_UKT * 0.5)
        assert not torch.equal(own_part(spec(changed, defaults(spec))), own_part(loss))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_is_not_looked_at(name: str) -> None:
    spec = spec_of(name)
    m = made_up(spec)
    hidden = m.mask_UKT == 0
    wide = Measurements(
        torch.nn.functional.pad(m.mask_UKT, (0, 3)),
        {
            n: torch.nn.functional.pad(torch.where(hidden, 0.37, t), (0, 3), value=0.9)
            for n, t in m.tensors.items()
        },
        m.columns,
    )
    a, b = spec(m, defaults(spec)), spec(wide, defaults(spec))
    assert torch.allclose(own_part(a), own_part(b), atol=1e-6)
    assert torch.allclose(a.total(), b.total(), atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_weights_are_known_before_the_forward_pass(name: str) -> None:
    spec = spec_of(name)
    one, two = made_up(spec), made_up(spec, 3.0, seed=9)
    other = one.having(
        **{n: torch.where(one.mask_UKT > 0, two.tensors[n], 0.0) for n in one.tensors}
    )
    first = [w for _, _, w in spec(one, defaults(spec)).terms()]
    second = [w for _, _, w in spec(other, defaults(spec)).terms()]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_units_are_as_independent_as_declared(name: str) -> None:
    spec = spec_of(name)
    m = made_up(spec)

    def some(rows: Sequence[int]) -> Measurements:
        at = list(rows)
        return Measurements(
            m.mask_UKT[at],
            {n: t[at] for n, t in m.tensors.items()},
            {n: c[at] for n, c in m.columns.items()},
        )

    whole = spec(m, defaults(spec))
    turned = spec(some([2, 0, 3, 1]), defaults(spec))
    assert torch.allclose(whole.total(), turned.total(), atol=1e-6)
    if spec.unit != "batch":
        alone = torch.stack([own_part(spec(some([i]), defaults(spec))).sum() for i in range(4)])
        terms = len(list(whole.terms()))
        together = own_part(whole).reshape(terms, 4).sum(0)
        assert torch.allclose(alone, together, atol=1e-5)


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    """Two models of another size with the same tokens: teachers."""
    made: list[Model] = []
    for seed in (1, 2):
        config = tiny_config()
        config.hidden_size, config.num_hidden_layers, config.intermediate_size = 64, 2, 96
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("teacher")
        with quiet():
            LlamaForCausalLM(config).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        made.append(Model.open(folder))
    return made


def taught_by(spec: Objective, others: Sequence[Model]) -> dict[str, Model]:
    """A teacher for each role."""
    return dict(zip(spec.teachers, others, strict=False))


def fitting(model: Model, spec: Objective) -> Model:
    """The model, or a mixture of experts made of it where routers are measured."""
    sparse = any(n.startswith("router_") for n in spec.needs)
    return mixture_of_experts({"base": model}) if sparse else model


def build(model: Model, spec: Objective, others: Sequence[Model]) -> TextTask:
    """The task as `train_model` builds it, with an adapter that already does something."""
    model = fitting(model, spec)
    loaded = model.load_module(fresh=True)
    hook = hook_of(spec)
    units, _ = read_units(spec, loaded, table_for(spec), 512, hook)
    reference = Reference(model.weights_key, "float32")
    head = ScoreHead.of(loaded) if "scores" in spec.needs else None
    task = TextTask(
        spec, defaults(spec), hook, units, loaded.module, reference, budget=100_000, head=head
    )
    if spec.with_reference:
        task.measure_reference(loaded.module, [range(len(units))])
    taught = find_teachers(spec, loaded, taught_by(spec, others), defaults(spec), "float32")
    if taught is not None:
        task.learn_from(taught, [range(len(units))])
    if spec.heads:
        task.speak_with(find_heads(loaded, defaults(spec), 4))
    task.adapt(lora.attach(loaded.module, 4, 8.0, seed=1))
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in task.trained().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=source))
    return task


def step(task: TextTask, rows: Sequence[int]) -> tuple[float, Tensor, dict[str, float], int]:
    """Loss, flat gradient, metrics and number of parts of one step."""
    torch.manual_seed(5)
    for parameter in task.trained().values():
        parameter.grad = None
    loss = weight = 0.0
    sums: dict[str, tuple[float, float]] = {}
    parts = 0
    for part in task.parts(rows, 0):
        part.loss.backward()
        loss += float((part.loss if part.value is None else part.value).detach())
        weight += float(part.weight)
        parts += 1
        for n, (value, of) in part.metrics.items():
            before = sums.get(n, (0.0, 0.0))
            sums[n] = (before[0] + float(value), before[1] + of)
    grads = [p.grad.flatten() / weight for p in task.trained().values() if p.grad is not None]
    return loss / weight, torch.cat(grads), {n: s / w for n, (s, w) in sums.items()}, parts


def check_measurements(task: TextTask) -> None:
    """What the model and the reference say of real rows is what the objective declares."""
    spec = task.spec
    (micro,) = task._micro_batches(range(6), task._trees(range(6)))
    real = task._measure(micro, grad=True)
    # No gradient flows into the reference, and one into all that the model says.
    assert all(t.requires_grad == (n != "ref_logp") for n, t in real.tensors.items())
    empty = blank(micro.trees, spec.needs, real.columns)
    assert torch.equal(empty.mask_UKT, real.mask_UKT)
    assert set(real.tensors) == set(spec.asked(defaults(spec))) - {"mismatched"}
    assert set(real.columns) == set(spec.columns)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_and_row_order_do_not_change_a_step(
    name: str, model: Model, others: list[Model]
) -> None:
    task = build(model, spec_of(name), others)
    check_measurements(task)
    rows = range(6)
    loss, grad, metrics, parts = step(task, rows)
    assert parts == 1 and grad.norm() > 0
    for budget, order in ((60, [4, 1, 5, 0, 2, 3]), (1, rows)):
        task.budget = budget
        again = step(task, order)
        assert again[3] > 1
        assert again[0] == pytest.approx(loss, rel=2e-5)
        assert torch.allclose(again[1], grad, atol=1e-4 * float(grad.norm()))
        assert again[2] == pytest.approx(metrics, rel=1e-4, abs=1e-4)


# What a model is made of when it is trained: an adapter, all its weights, or the top block's alone.
SORTS: dict[str, dict[str, object]] = {
    "adapter": {"steps": 6, "lr": 2e-3},
    "whole": {"steps": 2, "rank": 0},
    "top": {"steps": 2, "rank": 0, "layers": 1},
}
TRAINED = [
    pytest.param(n, sort, id=f"{n}-{sort}", marks=pytest.mark.xdist_group(n))
    for n in OBJECTIVES
    for sort in SORTS
    if sort != "whole" or n not in LEARNING  # which are trained so, and further, in test_learning
]
first_loss: dict[str, float] = {}  # of the sort that is trained first


def moved(made: Model) -> set[str]:
    """Where weights are others than the base's: "embed_tokens", "layers.3", "norm", ..."""
    (own, *_) = (c for c in made.weight_changes if isinstance(c, Weights))
    return {re.sub(r"^model\.((?:layers\.)?\w+)\..*", r"\1", n) for n in open_weights(own.path)}


def check_held_out(context: Context, apart: bool) -> None:
    """Held out, the rows say before the first update what they say in it, unless `apart`."""
    first = next(m for m in context.metrics if m.get("step") == 1 and "loss" in m)
    seen = {n: v for m in context.metrics if m.get("step") == 0 for n, v in m.items()}
    own = set(first) - {"step", "lr", "grad_norm", "seconds"}
    assert set(seen) == {"step", *(f"held_out/{n}" for n in own)}
    for n in own:
        same = seen[f"held_out/{n}"] == pytest.approx(first[n], rel=1e-4, abs=1e-5)
        assert same is not apart, n


@pytest.mark.parametrize(("name", "sort"), TRAINED)
def test_training_lowers_the_objective(
    name: str, sort: str, model: Model, others: list[Model], tmp_path: Path
) -> None:
    """Every objective trains every sort of model that the engine can hold."""
    spec = spec_of(name)
    more: dict[str, object] = {**taught_by(spec, others), **drawing(spec), **SORTS[sort]}
    if noisy(spec):
        more.setdefault("lr", 5e-4)  # by default it would gain less than the noise makes
    if sort != "adapter" and hook_of(spec).fresh:
        more["steps"] = 3  # each of them has rows of its own, some of which are harder
    if sort == "adapter":
        more |= {"held_out": table_for(spec), "eval_every": more["steps"]}
    with use(Context(folder=tmp_path)) as context:
        model = fitting(model, spec)
        made = methods[name](model, table_for(spec), batch=6, warmup=0.0, **more)
    scored = "scores" in spec.needs
    kinds = ["adapter" if sort == "adapter" else "weights"]
    kinds += ["weights"] if scored or spec.heads else []
    assert isinstance(made, Model) and [c.kind for c in made.weight_changes] == kinds
    assert has_head(made) is scored
    losses = [float(str(m["loss"])) for m in context.metrics if "loss" in m]
    assert len(losses) == more["steps"] and min(losses[-2:]) < losses[0]
    # Before the first update all sorts say the same.
    assert losses[0] == pytest.approx(first_loss.setdefault(name, losses[0]), rel=1e-4)
    if sort == "adapter":
        check_held_out(context, noisy(spec))
    if sort == "top":
        assert moved(made) == {"layers.2"}
    if sort == "whole":
        assert {"embed_tokens", *(f"layers.{i}" for i in range(3))} <= moved(made)
