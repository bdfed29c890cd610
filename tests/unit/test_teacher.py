"""Teachers: distributions against the plain computation, kept once; models that cannot teach."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from truing.context import Context, use
from truing.core.tiny import tiny_folder
from truing.core.trainer.teacher import Teacher, Teachers
from truing.core.tree import Node, group_tree, pack
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.tables import Table

TREES = [group_tree([3, 4, 5], [[6, 7, 8], [9, 10]]), group_tree([5, 6], [[7]])]


def teachers(student: Model, teacher: Model, how: str, top_k: int = 3) -> Teachers:
    loaded = student.load_module()
    roles = {"teacher": teacher}
    return Teachers(loaded, roles, {"teacher": how}, top_k=top_k, dtype="float32", where="x")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    made = [Model.open(tiny_folder(tmp_path_factory.mktemp("m"), seed)) for seed in (0, 7)]
    return made[0], made[1]


def test_distributions_are_the_plain_ones_and_kept_once(pair: tuple[Model, Model]) -> None:
    student, teacher = pair
    rows = [ids for tree in TREES for ids, _ in tree.rows()]
    module = teacher.load_module().module
    with torch.no_grad():
        logp = [module(torch.tensor([ids])).logits[0].log_softmax(-1) for ids in rows]
    plain_MV = torch.cat([logp[0][2:5], logp[1][2:4], logp[2][1:2]])
    (packed,) = pack(TREES)

    full = teachers(student, teacher, "full")
    full.sweep(TREES)
    read = cast("Callable[[slice], Tensor]", full.extras(TREES, packed)["teacher_logp"])
    assert torch.allclose(read(slice(None)), plain_MV, atol=1e-4)
    assert torch.allclose(read(slice(2, 4)), plain_MV[2:4], atol=1e-4)

    top = teachers(student, teacher, "top")
    top.sweep(TREES)
    found = cast("dict[str, Tensor]", top.extras(TREES, packed))
    want = plain_MV.topk(3)
    assert torch.equal(found["teacher_ids"], want.indices)
    assert torch.allclose(found["teacher_logp"], want.values, atol=1e-4)

    for how, first in (("full", full), ("top", top)):
        again = teachers(student, teacher, how)
        again.sweep(TREES)
        assert (first.by_role["teacher"].computed, again.by_role["teacher"].computed) == (1, 0)
    other = teachers(student, teacher, "top", top_k=2)
    other.sweep(TREES, keep=False)
    assert other.by_role["teacher"].computed == 1


@pytest.mark.parametrize(("name", "branches"), [("forward_kl", 1), ("dckd", 2)])
def test_beyond_the_budget_each_step_measures_its_own(
    name: str,
    branches: int,
    pair: tuple[Model, Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, teacher = pair
    rows = [{"prompt": f"say {i}", "chosen": f"it is {i}", "rejected": "no"} for i in range(6)]
    most: list[int] = []
    sweep = Teacher.sweep

    def counting(held: Teacher, *args: object, **settings: object) -> None:
        sweep(held, *args, **settings)  # type: ignore[arg-type]
        most.append(len(held._values))

    monkeypatch.setattr(Teacher, "sweep", counting)
    losses: list[list[object]] = []
    kept: list[int] = []
    for hold in (2.0, 0.0):
        most.clear()
        monkeypatch.setattr("truing.core.trainer.teacher.HOLD", hold)
        monkeypatch.setenv("TRUING_HOME", str(tmp_path / str(hold)))
        with use(Context(seed=3, folder=tmp_path / f"run{hold}")) as context:
            methods[name](student, Table("pair", rows), teacher=teacher, batch=2, epochs=2.0)
        losses.append([m["loss"] for m in context.metrics if "loss" in m])
        facts = next(m for m in context.metrics if "teacher_gib" in m)
        assert facts["teacher_by_step"] is (hold == 0.0)
        files = list((tmp_path / str(hold) / "reference").rglob("*.safetensors"))
        assert bool(files) is (hold == 2.0)
        kept.append(max(most))
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert kept == [6 * branches, 2 * branches]  # all rows, or the two of a step


def test_rows_that_no_step_visits_are_not_measured(
    pair: tuple[Model, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = pair
    seen: list[int] = []
    prepare = Teachers.prepare

    def counting(held: Teachers, trees: list[Node], others: list[Node]) -> None:
        seen.append(len(trees))
        prepare(held, trees, others)

    monkeypatch.setattr(Teachers, "prepare", counting)
    rows = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(20)]
    with use(Context(folder=tmp_path)):
        methods["forward_kl"](student, Table("example", rows), teacher=teacher, batch=2, steps=2)
    assert seen == [4]


def test_models_that_cannot_teach(pair: tuple[Model, Model], tmp_path: Path) -> None:
    student, teacher = pair
    folder = tmp_path / "other"
    shutil.copytree(teacher.folder, folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    rows = Table("example", [{"prompt": "p", "completion": "c"}])
    with pytest.raises(InputError, match="differ in tokenizer"):
        methods["forward_kl"](student, rows, teacher=Model.open(folder), steps=1)
    with pytest.raises(InputError, match="input 'teacher'"):
        methods["forward_kl"](student, rows, steps=1)
    with pytest.raises(InputError, match="top_k"):
        methods["dckd"](
            student,
            Table("pair", [{"prompt": "p", "chosen": "a", "rejected": "b"}]),
            teacher=teacher,
            top_k=0,
        )
