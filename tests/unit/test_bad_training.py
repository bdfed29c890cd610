"""Bad input of every training method: one clear message, or a rule that is documented and counted.

What is tried follows from the kind of rows, the teachers, references and rewards that a method
declares.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
import torch

from truing.context import Context, use
from truing.core.batch.reading import read_units
from truing.core.batch.row_kinds import CONVERSIONS, as_kind
from truing.core.batch.training_rows import BRANCHES
from truing.core.objective import Measurements, Objective, objective_of
from truing.core.online import Online, online_of
from truing.core.passes.scoring import ScoreHead
from truing.core.rl import train_online
from truing.core.rl.collect import Pool, Say
from truing.core.trainer.own_samples import FinishedSamples, OwnSamples
from truing.core.training import HOOKS, Hook
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.principles import Principle, Principles
from truing.tables import Row, Table

OBJECTIVES = [n for n in methods if methods[n].entry.kind == "objective"]
ONLINE = [n for n in methods if methods[n].entry.kind == "online"]
LETTERS = {"letters": {"use": "share_of", "letters": "abcdefghijklmnop"}}
LIMIT = 700  # tokens
LONG = "very " * LIMIT


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


def good_rows(spec: Objective) -> list[Row]:
    """Three rows of the objective's kind."""
    made: list[Row] = []
    for i in range(3):
        row: Row = {"prompt": f"say {i}"}
        if spec.rows == "pair":
            row |= {"chosen": f"yes {i}", "rejected": f"no {i}"}
        elif spec.rows == "negative":
            row |= {"rejected": f"no {i}"}
        elif spec.rows == "group":
            row |= {"completions": [f"yes {i}", "no"], "scores": [1.0, 0.0]}
        elif spec.rows == "steps":
            row |= {"steps": [f"one {i}", "two"], "labels": [1.0, 0.0]}
        elif spec.rows != "prompt":
            row |= {"completion": f"yes {i}"}
        if spec.rows == "unpaired":
            row["label"] = i != 1
        row |= dict.fromkeys(spec.texts, "gold")
        row |= {n: 0.5 for n, d in spec.columns.items() if d is None and n not in row}
        if spec.heads:
            row[spec.heads] = i % 2
        made.append(row)
    return made


def bad_rows(spec: Objective, row: Row) -> dict[str, Row]:
    """Rows of which nothing can be learnt, by the name that they are counted under."""
    long = {"left_out_long": {**row, "prompt": LONG}}
    if spec.rows == "pair":
        return long | {
            "left_out_same": {**row, "rejected": row["chosen"]},
            "left_out_empty": {**row, "rejected": " \n"},
        }
    if spec.rows == "group":
        one, empty = {"completions": ["a"], "scores": [1.0]}, {"completions": [], "scores": []}
        return long | {
            "left_out_single": {**row, **one},
            "left_out_equal": {**row, "scores": [0.5, 0.5]},
            "left_out_empty": {**row, **empty},
        }
    if spec.rows == "steps":
        return long | {"left_out_empty": {**row, "steps": [], "labels": []}}
    if spec.rows == "negative":
        return long | {"left_out_empty": {**row, "rejected": ""}}
    return long if spec.rows == "prompt" else long | {"left_out_empty": {**row, "completion": ""}}


def cut_off(spec: Objective, row: Row) -> Row:
    """The row with answers none of which came to its end."""
    if spec.rows == "group":
        return {**row, "finished": [False] * len(cast("list[str]", row["completions"]))}
    names = (*BRANCHES[spec.rows], *spec.texts)
    marks = {"finished" if n == "completion" else f"{n}_finished": False for n in names}
    return {**row, **marks}


def hook_of(spec: Objective) -> Hook:
    if not spec.hook:
        return Hook()
    return HOOKS[spec.hook](**drawing(spec))


def drawing(spec: Objective) -> dict[str, int]:
    """Settings of own answers: short ones, or as many as it takes for some to end."""
    kind = HOOKS[spec.hook] if spec.hook else Hook
    if issubclass(kind, FinishedSamples):
        return {"max_tokens": 200, "samples": 8}
    return {"max_tokens": 3} if issubclass(kind, OwnSamples) else {}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_that_teach_nothing_are_left_out_and_counted(
    name: str, model: Model, tmp_path: Path
) -> None:
    spec, loaded = objective_of(methods[name].declared), model.load_module()
    good = good_rows(spec)
    for why, row in bad_rows(spec, good[0]).items():
        with use(Context(folder=tmp_path / why)):
            table = Table(spec.rows, [*good, row])
            _, notes = read_units(spec, loaded, table, LIMIT, hook_of(spec))
            whole = why == "left_out_long" and not notes.get(why)
            # A hook that puts the prompt into the answer cuts that, which is counted as well.
            cut = notes.get("cut", 0) or notes.get("cut_question", 0)
            assert (cut if whole else notes[why]) == 1 + whole, why
            if whole:
                continue
            with pytest.raises(InputError, match=r"no row can be trained on of the 2 of .*in 2 "):
                read_units(spec, loaded, Table(spec.rows, [row, row]), LIMIT, hook_of(spec))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_answers_none_of_which_ends(name: str, model: Model, tmp_path: Path) -> None:
    """An error where answers are learnt; nothing to what only scores them, or draws its own."""
    spec = objective_of(methods[name].declared)
    if not spec.answers_end:
        return
    rows = [cut_off(spec, row) for row in good_rows(spec)]
    teachers = dict.fromkeys(spec.teachers, model)
    more = drawing(spec)
    with (
        use(Context(folder=tmp_path)),
        pytest.raises(InputError, match="no answer ends with a stop token"),
    ):
        methods[name](model, Table(spec.rows, rows), steps=1, **teachers, **more)
    assert not list(tmp_path.glob("checkpoints*"))


@pytest.mark.parametrize("name", [*OBJECTIVES, *ONLINE])
def test_models_of_other_tokens(name: str, model: Model, stranger: Model, tmp_path: Path) -> None:
    """Teachers and references score the model's own tokens: they must be the same."""
    method = methods[name]
    if method.entry.kind == "online":
        spec: Online | Objective = online_of(method.declared)
        roles: Sequence[str] = ()
        table = Table(spec.rows, [{"prompt": "p", "completion": "c"}] * 2)
        more: dict[str, object] = {} if spec.pools else {"rewards": LETTERS}
    else:
        spec = objective_of(method.declared)
        roles, more = tuple(spec.teachers), {}
        table = Table(spec.rows, good_rows(spec))
    for role in [*roles, *(["reference"] if "reference" in method.inputs else [])]:
        models = {**dict.fromkeys(roles, model), role: stranger}
        with use(Context(folder=tmp_path)), pytest.raises(InputError, match="differ in tokenizer"):
            method(model, table, steps=1, **models, **more)


SAID = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(("kind", "to"), CONVERSIONS)
def test_converted_rows_that_teach_nothing(kind: str, to: str) -> None:
    pair: Row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    row: Row = {
        "pair": pair,
        "unpaired": {"prompt": "p", "completion": "a", "label": to == "example"},
        "dialogue_pair": {"prompt": "p", "chosen": [SAID], "rejected": [{**SAID, "content": "b"}]},
        "dialogue_example": {"prompt": "p", "completion": [SAID]},
        "dialogue_unpaired": {"prompt": "p", "completion": [SAID], "label": to == "example"},
        "implicit_pair": {"chosen": "p: a", "rejected": "p: b"},
        "stepwise": {"prompt": "p", "completions": ["a", "b"], "labels": [1, 0]},
        "alpaca": {"instruction": "p", "output": "a"},
        "alpaca_pair": {"instruction": "p", "chosen": "a", "rejected": "b"},
        "sharegpt": {
            "conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "a"}]
        },
        "sharegpt_pair": {
            "conversations": [{"from": "human", "value": "p"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        "openai_pair": {
            "input": {"messages": [{"role": "user", "content": "p"}]},
            "preferred_output": [SAID],
            "non_preferred_output": [{**SAID, "content": "b"}],
        },
        "tagged": {"instruction": "p", "output": "a", "kto_tag": to == "example"},
        "group": {"prompt": "p", "completions": ["a", "b"], "scores": [1.0, 0.0]},
    }[kind]
    bad: dict[tuple[str, str], tuple[Row, str]] = {
        ("pair", "unpaired"): ({"rejected": "a"}, "left_out_same"),
        ("pair", "group"): ({"rejected": "a"}, "left_out_same"),
        ("unpaired", "example"): ({"label": False}, "left_out_bad"),
        ("unpaired", "negative"): ({"label": True}, "left_out_good"),
        ("group", "pair"): ({"scores": [1.0, 1.0]}, "left_out_equal"),
        ("group", "example"): ({"completions": [], "scores": []}, "left_out_empty"),
    }
    if (kind, to) in bad:
        change, why = bad[(kind, to)]
        table, notes = as_kind(Table(kind, [row, {**row, **change}]), to, "x")
        assert notes[why] == 1 and len(table) == (2 if to == "unpaired" else 1)
        with pytest.raises(InputError, match="no row can be trained on of the 1 of table: in 1 "):
            as_kind(Table(kind, [{**row, **change}]), to, "x")
    if kind == "group":
        for scores in ([1.0], [1.0, 0.0, 2.0], [1.0, math.nan], [1.0, "b"]):
            with pytest.raises(InputError, match=r"x table row 2.*one number for each completion"):
                as_kind(Table(kind, [row, {**row, "scores": scores}]), to, "x")


# Online


SHORT: dict[str, object] = {
    "steps": 1, "batch": 2, "answers": 2, "max_tokens": 4, "minibatches": 1,
}  # fmt: skip


def asked(spec: Online) -> Table:
    rows: list[Row] = [{"prompt": f"say {w}", "completion": f"no {w}"} for w in ("oak", "ash")]
    if spec.pools:
        rows = [{**row, "answer": "3"} for row in rows]
    return Table(spec.rows, rows)


def rewarded(spec: Online, model: Model, folder: Path) -> dict[str, object]:
    """What rewards answers: a rule; a reward model that is told principles; nothing for pools."""
    if spec.pools:
        return {}
    if not spec.follows:
        return {"rewards": LETTERS}
    judge = ScoreHead(128).added_to(model, folder, "reviews")
    return {"reward_model": judge, "principles": Principles([Principle("brief", "Be brief.")])}


class Wrong:
    """A reward that is one score short, or not finite."""

    def __init__(self, short: bool) -> None:
        self.short = short

    def __call__(self, rows: Sequence[Row]) -> list[float]:
        return [0.5] * (len(rows) - 1) + ([] if self.short else [math.nan])


class WrongPool:
    """The same of a pool."""

    def __init__(self, pool: Pool, short: bool) -> None:
        self.check, self.facts, self.prompt = pool.check, pool.facts, pool.prompt
        self.wrong = Wrong(short)

    def score(self, groups: Sequence[Sequence[Row]], seed: int, say: Say) -> list[list[float]]:
        return [self.wrong(rows) for rows in groups]


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("name", ONLINE)
def test_rewards_that_are_wrong_stop_the_first_rollout(
    name: str, short: bool, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = online_of(methods[name].declared)
    component = importlib.import_module("truing.components")
    monkeypatch.setattr(component, "get_component", lambda *_, **__: Wrong(short))
    build = train_online.pool_of
    monkeypatch.setattr(
        train_online, "pool_of", lambda *a: WrongPool(pool, short) if (pool := build(*a)) else None
    )
    told = "one finite reward for each" if spec.pools else "one score a row"
    term = spec.follows or next(iter(LETTERS))
    told = told if short or spec.pools else rf"'{term}'.*row \d+.*not a finite number|not a finite"
    rewards = rewarded(spec, model, tmp_path / "judge")
    with use(Context(folder=tmp_path)), pytest.raises(InputError, match=told):
        methods[name](model, asked(spec), **SHORT, **rewards)
    assert not list(tmp_path.glob("checkpoints*/step*"))


@pytest.mark.parametrize("name", ONLINE)
def test_groups_and_prompts_that_cannot_be(name: str, model: Model, tmp_path: Path) -> None:
    spec = online_of(methods[name].declared)
    rewards = rewarded(spec, model, tmp_path / "judge")
    with use(Context(folder=tmp_path)):
        if spec.least > 1:
            with pytest.raises(InputError, match="must be at least 2"):
                methods[name](model, asked(spec), **(SHORT | {"answers": 1}), **rewards)
        rows = [{**row, "prompt": LONG} for row in asked(spec)]
        small = SHORT | {"max_length": LIMIT}
        with pytest.raises(InputError, match="no prompt leaves room for an answer of 4 tokens"):
            methods[name](model, Table(spec.rows, rows), **small, **rewards)
    assert not list(tmp_path.glob("rollouts-*/*"))


def degenerate(spec: Online, case: str) -> Measurements:
    """A made-up rollout of a kind that training meets: [U, K, T] = [2, K, 3]."""
    own = 1 if case == "one answer" and spec.least == 1 else 2
    width = own * (2 if spec.opposed else 1) + bool(spec.given)
    length = 1 if case == "empty" else 3  # an empty answer is its stop token
    mask = torch.ones(2, width, 3) * (torch.arange(3) < length)
    source = torch.Generator().manual_seed(3)
    tensors = {
        n: -torch.rand(mask.shape, generator=source) * mask for n in ("logp", "ref_logp", "values")
    }
    tensors["ref_top_kl"] = -tensors["ref_logp"]
    reward = torch.rand(2, width, generator=source)
    reward = torch.full_like(reward, 0.1) if case == "equal" else reward
    is_own = torch.ones(2, width)
    is_own[:, own:] = 0.0
    ended = torch.zeros(2, width) if case == "cut" else torch.ones(2, width)
    columns = {"reward": reward, "own": is_own, "finished": ended, "reward/a": reward}
    columns |= {"sort": torch.zeros(2, width), "unread": torch.zeros(2, width)}
    columns |= {"greedy": torch.full((2,), 0.1)}
    return Measurements(mask, tensors, columns)


@pytest.mark.parametrize("case", ["equal", "empty", "cut", "one answer"])
@pytest.mark.parametrize("name", ONLINE)
def test_degenerate_rollouts_give_finite_updates(name: str, case: str) -> None:
    """Equal rewards, answers that are only their stop token, or that never end, groups of one."""
    spec = online_of(methods[name].declared)
    values = {n: p.default for n, p in spec.settings.items()} | {"max_tokens": 3}
    values |= {"drop_unfinished": True, "critic_rollouts": 0}
    r = degenerate(spec, case)
    update = spec(r, values)
    assert all(t.isfinite().all() for t in update.tensors.values())
    fixed = {n: t for n, t in update.tensors.items() if t.dim() == 3}
    fixed |= {"old_logp": r["logp"], "old_values": r["values"], "ref_logp": r["ref_logp"]}
    fixed["entropy"] = torch.rand(r.mask_UKT.shape)
    logp = (r["logp"] - 0.05 * r.mask_UKT).requires_grad_()
    values_UKT = (r["values"] + 0.05 * r.mask_UKT).requires_grad_()
    numbers = {n: t for n, t in update.tensors.items() if t.dim() < 3}
    tensors = {**fixed, "logp": logp, "values": values_UKT}
    loss = update.loss(Measurements(r.mask_UKT, tensors, {**r.columns, **numbers}))
    loss.total().backward()
    assert loss.total().isfinite() and all(v.isfinite().all() for v in loss.metrics.values())
    assert logp.grad is None or logp.grad.isfinite().all()
    if case == "equal" and spec.least > 1 and not spec.given:
        # Nothing is better than anything else: what is left is the pull of the reference.
        plain = spec(r, values | {"beta": 0.0})
        assert plain.active_U is None or not plain.active_U.any()
        assert all(t.abs().sum() == 0 for n, t in plain.tensors.items() if n == "advantage")
