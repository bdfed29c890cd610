"""Chunks against plain computations: who sees whom, who is drawn how often, what weighs what."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from objective_numbers import LOGP, nll, pairs, total
from torch import Tensor

from truing.context import Context, use
from truing.core.batch.reading import read_units
from truing.core.batch.training_rows import Unit
from truing.core.chat import completion_ids, prompt_ids
from truing.core.logprob import measure
from truing.core.objective import objective_of
from truing.core.reference import Reference
from truing.core.trainer.text_task import TextTask
from truing.core.tree import pack
from truing.errors import InputError
from truing.models import Loaded, Model
from truing.tables import Row, Table
from truing.train.supervised.mixture_of_instructions import (
    InstructionChunks,
    balanced,
    mixture_of_instructions,
    under,
)

SYSTEMS = {"code": "You code.", "math": "You count."}
ROWS: list[Row] = [
    {"prompt": "add", "completion": "a + b", "task": "code"},
    {"prompt": "two?", "completion": "it is 2", "task": "math"},
    {"prompt": "sort", "completion": "sorted(x)", "task": "code"},
    {"prompt": "max", "completion": "max(x)", "task": "code"},
    {"prompt": "hello", "completion": "hi there", "task": "chat"},
]


@pytest.fixture(scope="module")
def loaded(tiny_path: Path) -> Loaded:
    return Model.open(tiny_path).load_module(fresh=True)


def read(loaded: Loaded, rows: list[Row], limit: int = 512, **settings: object) -> list[Unit]:
    hook = InstructionChunks(systems=SYSTEMS, **settings)
    spec = objective_of(mixture_of_instructions)
    with use(Context()):
        return read_units(spec, loaded, Table("example", rows), limit, hook)[0]


def parts(loaded: Loaded, row: Row) -> tuple[list[int], list[int]]:
    """(prompt, answer) ids of a row under its task's system prompt, made by hand."""
    system = SYSTEMS.get(str(row["task"]))
    told = [{"role": "system", "content": system}] if system else []
    asked = [*told, {"role": "user", "content": row["prompt"]}]
    return prompt_ids(loaded.tokenizer, asked), completion_ids(
        loaded.tokenizer, str(row["completion"])
    )


def whole(loaded: Loaded, row: Row) -> tuple[int, ...]:
    prompt, answer = parts(loaded, row)
    return tuple(prompt + answer)


def logp(loaded: Loaded, units: list[Unit]) -> Tensor:
    return measure(loaded.module, pack([u.tree() for u in units], 10**6)[0], grad=False)["logp"]


def plain(loaded: Loaded, ids: tuple[int, ...]) -> Tensor:
    """log p of each token but the first, by the module alone."""
    with torch.no_grad():
        logp_NV = loaded.module(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logp_NV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_balanced_by_hand() -> None:
    tasks = ["a", "b", "a", "a", "c", "a", "a"]
    chunks = balanced(tasks, {"a": 2}, False, np.random.default_rng(0))
    assert [[tasks[i] for i in c] for c in chunks] == [["a", "a", "b", "c"]] * 3
    seen = [i for c in chunks for i in c[:2]]
    assert sorted(seen[:5]) == [0, 2, 3, 5, 6]  # one whole pass, then the next begins
    turned = balanced(tasks, {}, True, np.random.default_rng(0))
    assert [tasks[c[0]] for c in turned] == ["a", "b", "c", "a", "b"]


def test_every_chunk_holds_all_tasks_under_their_prompts(loaded: Loaded) -> None:
    units = read(loaded, ROWS)
    assert len(units) == 3  # code has three rows; math and chat are drawn again
    by_ids = {whole(loaded, r): r for r in ROWS}
    for unit in units:
        ids = list(unit.tree().ids)
        starts = [i for i in range(len(ids)) for r in by_ids if tuple(ids[i : i + len(r)]) == r]
        found = [by_ids[tuple(ids[a:b])] for a, b in zip(starts, [*starts[1:], len(ids)])]
        assert [r["task"] for r in found] == ["code", "math", "chat"]
        want = [mark for r in found for n, mark in zip(parts(loaded, r), (False, True)) for _ in n]
        assert list(unit.tree().loss) == want


def test_a_chunk_sees_itself_alone(loaded: Loaded) -> None:
    one, two, _ = read(loaded, ROWS)
    both = logp(loaded, [one, two])
    turned = logp(loaded, [two, one])
    for i, unit in enumerate((one, two)):  # restarted positions: as if alone
        node = unit.tree()
        want = plain(loaded, node.ids)[torch.tensor(node.loss[1:])]
        assert torch.allclose(both[i, 0, : len(want)], want, atol=1e-5)
        assert torch.allclose(turned[1 - i, 0, : len(want)], want, atol=1e-5)
    # A sample sees those before it, within its chunk.
    other = [{**r, "completion": "a * b"} if r["prompt"] == "add" else r for r in ROWS]
    changed, before = (logp(loaded, read(loaded, rows)) for rows in (other, ROWS))
    same = [bool(torch.equal(a, b)) for a, b in zip(changed, before)]
    assert sorted(same) == [False, True, True]
    first = len(parts(loaded, ROWS[0])[1])  # the changed sample stands first: later ones move too
    at = same.index(False)
    assert not torch.isclose(changed[at, 0, first:], before[at, 0, first:]).all()


def test_isolated_samples_are_as_without_packing(loaded: Loaded) -> None:
    units = read(loaded, ROWS, packing="isolated")
    assert len(units) == 9
    made = logp(loaded, units)
    for i, unit in enumerate(units):
        node = unit.tree()
        want = plain(loaded, node.ids)[torch.tensor(node.loss[1:])]
        assert torch.allclose(made[i, 0, : len(want)], want, atol=1e-5)
    assert {u.tree().ids for u in units} == {whole(loaded, r) for r in ROWS}
    assert len(read(loaded, ROWS, packing="sequence")) == 5
    assert len(read(loaded, ROWS, alone=1.0)) == 9


def test_rows_are_filled_and_no_token_is_lost(loaded: Loaded) -> None:
    answers = sum(len(parts(loaded, r)[1]) for r in ROWS)
    longest = max(len(whole(loaded, r)) for r in ROWS)
    for limit in (longest, 2 * longest, 512):
        units = read(loaded, ROWS, limit, packing="packing")
        assert sum(sum(u.tree().loss) for u in units) == answers
        assert max(u.tree().size for u in units) <= limit
    assert len(units) == 1
    assert len(read(loaded, ROWS, packing="balance")) == 1
    assert len(read(loaded, ROWS, longest)) == 9  # no two samples fit


def test_loss_by_hand() -> None:
    tokens = [row[0] for row in LOGP]
    plainly = mixture_of_instructions(pairs(weight=[1.0] * 3).branches(0))
    assert total(plainly) == pytest.approx(nll())
    weights = [2.0, 0.5, 1.0]
    want = sum(w * -sum(t) for w, t in zip(weights, tokens)) / sum(
        w * len(t) for w, t in zip(weights, tokens)
    )
    made = mixture_of_instructions(pairs(weight=weights).branches(0))
    assert total(made) == pytest.approx(want)


@pytest.mark.parametrize("average", ["token", "sample"])
def test_a_step_is_the_mean_over_samples_or_tokens(loaded: Loaded, average: str) -> None:
    rows = [{**r, "weight": 1.0 + i} for i, r in enumerate(ROWS)]
    units = read(loaded, rows, packing="isolated", average=average)
    spec = objective_of(mixture_of_instructions)
    task = TextTask(
        spec, {}, InstructionChunks(), units, loaded.module, Reference("", "float32"), budget=40
    )
    value = sum(float(p.loss.detach()) for p in task.parts(range(len(units)), 0)) / len(units)
    top = bottom = 0.0
    weight = {whole(loaded, r): float(str(r["weight"])) for r in rows}
    for unit in units:
        node = unit.tree()
        each = plain(loaded, node.ids)[torch.tensor(node.loss[1:])]
        w = weight[node.ids] / (len(each) if average == "sample" else 1)
        top, bottom = top - w * float(each.sum()), bottom + w * len(each)
    assert value == pytest.approx(top / bottom, rel=1e-5)


ADD = {"name": "add", "parameters": {"a": "number"}}


def test_the_prompt_of_a_task_with_tools_lists_them(loaded: Loaded) -> None:
    """By its own system message or the column `tools`, which this template does not write."""
    plain = "You are an agent with tools. Call one with a JSON object of its name and arguments."
    listed = '{"name": "add", "parameters": {"a": "number"}}'
    own = {"role": "system", "content": f"Functions: {listed}"}
    asked = {"role": "user", "content": "2+3?"}
    common: Row = {"task": "tools", "completion": "add"}
    rows: list[Row] = [
        {**common, "prompt": [own, asked]},
        {**common, "prompt": "2+3?", "tools": [ADD]},
        {**common, "prompt": [own, asked], "tools": [{**ADD, "strict": None}]},
        {**common, "prompt": "2+3?"},
        {**common, "prompt": "2+3?", "system": own["content"]},
    ]
    said = f"\n\n{own['content']}"
    told = [said, f"\n\n{listed}", f"\n\n{listed}\n{own['content']}", "", said]
    hook = InstructionChunks(packing="sequence")
    spec = objective_of(mixture_of_instructions)
    for row, more in zip(rows, told, strict=True):
        with use(Context()):
            units, _ = read_units(spec, loaded, Table("example", [row]), 512, hook)
        (unit,) = units
        system = f"<|im_start|>system\n{plain}{more}<|im_end|>\n"
        assert loaded.tokenizer.decode(unit.tree().ids).startswith(
            f"{system}<|im_start|>user\n2+3?"
        )
    # Where the template writes them itself, the column is left to it.
    assert under(rows[1], "Tools:\n{tools}", native=True)["tools"] == [ADD]
    # Prompts of other tasks take the place of what the row says, whatever it is.
    other = under({**rows[0], "task": "code"}, SYSTEMS["code"])["prompt"]
    assert other == [{"role": "system", "content": "You code."}, asked]
    dialogue = {"messages": [own, asked, {"role": "assistant", "content": "add"}], "task": "tools"}
    with use(Context()):
        units, _ = read_units(spec, loaded, Table("example", [dialogue]), 512, hook)
    text = loaded.tokenizer.decode(units[0].tree().ids)
    assert f"arguments.\n\nFunctions: {listed}<|im_end|>" in text


def test_mistakes(loaded: Loaded) -> None:
    with pytest.raises(InputError, match="alone"):
        InstructionChunks(alone=2.0)
    with pytest.raises(InputError, match="at least 1"):
        InstructionChunks(each={"code": 0})
    with pytest.raises(InputError, match="no row is of this task"):
        read(loaded, ROWS, each={"poetry": 2})
    with pytest.raises(InputError, match="must be text"):
        read(loaded, [{**ROWS[0], "task": 3}])
