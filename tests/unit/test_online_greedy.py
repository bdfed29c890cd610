"""An opponent that answers greedily: what it says, what is kept of it, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
import torch

from truing.context import Context, Json, use
from truing.core.drawing import Completion
from truing.core.rl.answers import Asked, Group
from truing.core.rl.collect import Collector, Say
from truing.core.rl.online_task import OnlineTask
from truing.core.rl.train_online import Players
from truing.core.sampling import SamplingSettings
from truing.core.tiny import tiny_tokenizer
from truing.core.trainer.start import Start
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.tables import Row, Table

TOKENIZER = tiny_tokenizer()
PROMPTS = Table("prompt", [{"prompt": f"say {w}"} for w in "lime oak rain stone".split()])
LETTERS = {"letters": {"use": "share_of", "letters": "abcdefghijklmnop"}}
SMALL: dict[str, object] = {
    "steps": 2, "batch": 4, "answers": 2, "max_tokens": 6, "lr": 2e-2, "rewards": LETTERS,
}  # fmt: skip


@pytest.fixture
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[list[Group]]:
    """The groups of each rollout."""
    seen: list[list[Group]] = []
    find = OnlineTask._groups

    def found(task: OnlineTask, number: int) -> object:
        groups, counts = find(task, number)
        seen.append(groups)
        return groups, counts

    monkeypatch.setattr(OnlineTask, "_groups", found)
    return seen


def run(model: Model, folder: Path, data: Table = PROMPTS, **more: object) -> list[dict[str, Json]]:
    with use(Context(seed=4, folder=folder)) as context:
        methods["remax"](model, data, **{**SMALL, **more})
    return [m for m in context.metrics if "step" in m]


def test_the_likeliest_answer_is_rewarded_and_not_trained_on(
    model: Model, tmp_path: Path, made: list[list[Group]]
) -> None:
    steps = run(model, tmp_path)
    (path, *_) = sorted(tmp_path.glob("rollouts-*/*.jsonl"))
    held = dict(
        cast("tuple[str, Json]", json.loads(line)) for line in path.read_bytes().splitlines()
    )
    drawn = cast("list[list[list[Json]]]", held["rollout/0//1/0"])
    module = model.load_module().module
    assert len(made[0]) == len(drawn) == 4
    for group, items in zip(made[0], drawn, strict=True):
        (ids, _, text, _), *more = items
        assert not more  # one for the group, however many answers there are
        line = list(group.prompt)
        for token in cast("list[int]", ids):
            with torch.no_grad():
                assert token == int(module(torch.tensor([line])).logits[0, -1].argmax())
            line.append(token)
        share = sum(c in "abcdefghijklmnop" for c in str(text)) / max(1, len(str(text)))
        assert group.greedy == pytest.approx(share)
        assert [a.own for a in group.answers] == [True] * 2 == [True] * len(group.reward)
        assert [len(v) for v in group.terms.values()] == [2]
        assert len(list(group.tree().rows())) == 2
    for groups, step in zip(made, steps, strict=True):
        greedy = [cast(float, g.greedy) for g in groups]
        assert step["reward_greedy"] == pytest.approx(sum(greedy) / 4)
        own = [r for g in groups for r in g.reward]
        assert step["reward"] == pytest.approx(sum(own) / 8)


def test_it_is_drawn_by_the_policy_as_it_is_then(
    model: Model, tmp_path: Path, made: list[list[Group]]
) -> None:
    """A high rate moves the greedy answers from one rollout to the next."""
    run(model, tmp_path, steps=5, lr=5e-2, answers=4)
    greedy = {tuple(sorted((g.number, g.greedy or 0.0) for g in groups)) for groups in made}
    assert len(greedy) > 1


def test_no_reference_is_loaded_without_a_pull(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def frozen(start: Start) -> object:
        raise AssertionError("not needed")

    monkeypatch.setattr(Start, "frozen", frozen)
    run(model, tmp_path / "a", rank=0, steps=1)
    with pytest.raises(AssertionError, match="not needed"):
        run(model, tmp_path / "b", rank=0, steps=1, beta=0.1)


def test_as_good_as_the_greedy_answer_is_skipped_or_replaced(
    model: Model, tmp_path: Path, made: list[list[Group]]
) -> None:
    equal = {"any": {"use": "max_words", "n": 1000}}
    (step,) = run(model, tmp_path / "a", steps=1, rewards=equal)
    assert (step["skipped"], step["flat"], step["grad_norm"]) == (1.0, 1.0, 0.0)
    (step,) = run(model, tmp_path / "b", steps=1, rewards=equal, refill=2)
    assert step["left_out"] == 1.0
    rare = {"rare": {"use": "share_of", "letters": "abcd"}}
    (step,) = run(model, tmp_path / "c", steps=1, rewards=rare, answers=1, refill=6)
    # Groups of one answer are compared with their greedy one.
    assert step["flat"] == 0.0 and "left_out" in step
    assert all(g.reward[0] != g.greedy for g in made[-1])
    with pytest.raises(InputError, match=r"setting 'refill'.*teach here too"):
        methods["nash_md"](model, PROMPTS, **{**SMALL, "refill": 1})


def test_episodes_have_a_greedy_one(
    model: Model, tmp_path: Path, made: list[list[Group]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several turns, all greedy, from the state that the others begin with."""
    asked: list[tuple[int, bool]] = []

    def scripted(
        self: Players, prompts: Sequence[Sequence[int]], sampling: SamplingSettings, *_: object
    ) -> list[list[Completion]]:
        asked.append((sampling.n, sampling.greedy))
        rows: list[list[Completion]] = []
        for ids in prompts:
            told = re.findall(r"sum is (\d+)\. Add (\d+)", str(TOKENIZER.decode(list(ids))))[-1]
            text = str(sum(map(int, told)) if sampling.greedy else 0)
            own = TOKENIZER(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
            one = Completion(text, tuple(own), (-1.0,) * len(own), "stop", len(own))
            rows.append([one] * sampling.n)
        return rows

    monkeypatch.setattr(Players, "policy", scripted)
    tasks = Table("record", [{"numbers": [i, 2, 3]} for i in range(4)])
    world = {"use": "running_sum", "terms": 2, "tries": 1, "tool": False}
    steps = run(
        model, tmp_path, tasks, rewards=None, environment=world, steps=1, max_tokens=12,
        max_length=400,
    )  # fmt: skip
    assert [(g.greedy, g.reward) for g in made[0]] == [(1.0, (0.0, 0.0))] * 4
    assert asked == [(2, False), (1, False), (1, True), (1, True)]
    assert (steps[0]["reward"], steps[0]["reward_greedy"]) == (0.0, 1.0)
    assert float(str(steps[0]["grad_norm"])) > 0


class Lengths:
    """Rewards by length: a pool, which leaves out a group, and what rewards alone can say."""

    def check(self, row: Row) -> str:
        return ""

    def facts(self, row: Row) -> dict[str, float]:
        return {"sort": 7.0}

    def prompt(self, row: Row, seed: int) -> tuple[str, Row]:
        return str(row["prompt"]), {}

    def score(
        self, groups: Sequence[Sequence[Row]], seed: int, say: Say
    ) -> list[list[float] | None]:
        return [None if g[0]["prompt"] == "odd" else self.weigh({}, g) for g in groups]

    def terms(self, rows: Sequence[Row]) -> dict[str, list[float]]:
        return {"length": self.weigh({}, rows)}

    def weigh(self, terms: object, rows: Sequence[Row]) -> list[float]:
        return [float(len(str(row["completion"]))) for row in rows]

    def inside(self, terms: object, rows: Sequence[Row]) -> list[list[tuple[int, float]]]:
        return [[] for _ in rows]


def drawn(
    prompts: Sequence[Sequence[int]], sampling: SamplingSettings, first: Sequence[int]
) -> list[list[Completion]]:
    text = "aaaa" if sampling.greedy else "aa"
    return [[Completion(text, (1,), (0.0,))] * sampling.n for _ in prompts]


@pytest.mark.parametrize("pooled", [True, False])
def test_pools_and_answers_of_the_rows_own(pooled: bool, tmp_path: Path) -> None:
    own = tuple(TOKENIZER("abc")["input_ids"])
    asked = [Asked({"prompt": p}, (1, 2), () if pooled else own) for p in ("one", "odd", "two")]
    by = Lengths()
    reward, pool = (None, by) if pooled else (by, None)
    collector = Collector(
        asked, [drawn, drawn], reward, pool, TOKENIZER, tmp_path, Context(folder=tmp_path),
        greedy=True,
    )  # fmt: skip
    groups = collector.collect(0, [0, 1, 2], SamplingSettings(n=2, max_tokens=4))
    assert [g.number for g in groups] == ([0, 2] if pooled else [0, 1, 2])
    paid = (2.0, 2.0) if pooled else (2.0, 2.0, 3.0)  # the row's own stands last
    for group in groups:
        assert (group.greedy, group.reward) == (4.0, paid)
        assert group.terms == ({"sort": [7.0] * 2} if pooled else {"length": list(paid)})
        assert [a.own for a in group.answers] == [True, True, *([] if pooled else [False])]
