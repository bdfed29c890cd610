"""The referee: what its gradings of open answers train, its reward for other methods, its measure.

What is expected is worked out from the texts that were said, and by transformers on padded rows.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from misbehaving import Log, good, server
from test_turns import close, padded, stepped

from truing.context import Context, current, use
from truing.core.judging.rewards import Rewards
from truing.core.rl import train_online
from truing.core.rl.collect import Collector
from truing.core.rl.online_task import OnlineTask
from truing.errors import InputError
from truing.method import methods
from truing.models import Model, hold
from truing.tables import Row, Table
from truing.train.reward.referee import referee

PAIR: Row = {"prompt": "hm", "completions": ["yes", "no"], "scores": [1.0, 0.0]}
POOLS = Table("prompt", [{"prompt": "a"}, PAIR, {"prompt": "b"}, {"prompt": "1 + 2", "answer": 3}])
SHOWN = re.compile(r'<candidate number="\d+">\n(.*?)\n</candidate>', re.S)


# In training


@pytest.fixture(scope="module")
def grader(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The tiny model after it was taught to say two unequal grades to whatever it is asked."""
    said = ["[7, 3]", "[2, 9]", "[8, 1]", "[3, 6]"]
    rows = [{"prompt": w * n, "completion": s} for w in "abc" for n in (1, 9, 60) for s in said]
    with use(Context(seed=1, folder=tmp_path_factory.mktemp("grader"))):
        made = methods["sft"](
            Model.open(tiny_path), Table("example", rows), rank=0, lr=3e-3, epochs=6.0, batch=12
        )
    assert isinstance(made, Model)
    return made


class Held(Exception):
    """Stops a run where training would begin."""


def held(model: Model, monkeypatch: pytest.MonkeyPatch, **more: object) -> OnlineTask:
    """The task of a run of urpo as training would get it."""
    tasks: list[OnlineTask] = []

    def hold_it(task: OnlineTask, *_: object, **__: object) -> None:
        tasks.append(task)
        raise Held

    monkeypatch.setattr(train_online, "train", hold_it)
    settings: dict[str, object] = {
        "steps": 1, "batch": 4, "answers": 2, "chunk": 2, "max_tokens": 10, "rank": 0, "beta": 0.0,
        "max_length": 1500,
    }  # fmt: skip
    with pytest.raises(Held):
        methods["urpo"](model, POOLS, **(settings | more))
    return tasks[0]


def journal(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("rollouts-*/000000.jsonl")
    return dict(json.loads(line) for line in path.read_text().splitlines())


def grades(text: str) -> list[float] | None:
    """Two numbers from 1 to 10 in the last brackets."""
    found = re.findall(r"\[\s*(\d+)\s*,\s*(\d+)\s*\]", text)
    numbers = [float(n) for n in found[-1]] if found else []
    return numbers if numbers and all(1 <= n <= 10 for n in numbers) else None


def test_what_the_referee_says_of_open_answers_carries_no_loss(
    grader: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn, read and paid for real; the gradient is that of the players' answers alone."""
    with use(Context(seed=5, folder=tmp_path)) as context:
        task = held(grader, monkeypatch)
        rollout = task._ready(0)
        seed = context.stream("rollout/0//score")
        value, grads = stepped(task, range(4))
    assert rollout is not None
    kept = journal(tmp_path)
    said = [[text for _, _, text, _ in items] for items in kept["rollout/0//say/1/0"]]
    order = task.order.step(0, task.end)
    opens = [u for u, row in enumerate(order) if row in (0, 2)]
    assert len(said) == 2 == len(opens) and all(len(texts) == 1 for texts in said)
    paid = {g.number: list(g.reward) for g in rollout.groups}
    graded = 0
    for (text,), u in zip(said, opens, strict=True):
        found = grades(text)
        if found is None:
            continue  # asked once more
        shuffled = random.Random(f"{seed}/{u}").sample(range(2), 2)
        assert paid[order[u]] == [found[shuffled.index(k)] for k in range(2)]
        graded += found[0] != found[1]
    assert graded  # or nothing would be learnt from a grading here

    module = grader.load_module(fresh=True).module
    loss, tokens = torch.zeros(()), 0
    count = sum(len(g.answers) for g in rollout.groups)
    for group in rollout.groups:
        a, b = group.reward
        half = (a - b) / 2
        advantage = half / (abs(a - b) / 2**0.5 + 1e-4)
        for answer, weight in zip(group.answers, (advantage, -advantage), strict=True):
            logp = padded(module, [[*group.prompt, *answer.ids]])[0, len(group.prompt) - 1 :]
            assert len(logp) == len(answer.ids)
            loss = loss - weight * (logp - logp.detach()).exp().mean() / count
            tokens += len(answer.ids)
    loss.backward()
    assert value == pytest.approx(float(loss.detach()), abs=1e-5)
    close(grads, module)
    # Tokens with loss are the players', none of them the gradings' own.
    drawn = sum(len(ids) for items in kept["rollout/0//0/0"] for ids, *_ in items)
    assert tokens <= drawn and float(rollout.r.mask_UKT.sum()) == tokens


def test_settings_and_rows_are_refused_before_a_model_is_read() -> None:
    method = methods["urpo"]
    for wrong in ({"chunk": 0}, {"chunk": -1}, {"chunk": 1}, {"grades": 0}, {"grades": -2}):
        with pytest.raises(InputError, match=rf"setting '{next(iter(wrong))}' must be at least"):
            method.check(method.validate(wrong), {})
    settings = method.validate({})
    for row, told in (
        ({"answer": " "}, "'answer' holds no number"),
        ({"completions": ["a", "b"], "scores": [1.0]}, "one number for each completion"),
        ({"completions": ["a", "b"], "scores": [1.0, "x"]}, "one number for each completion"),
    ):
        table = Table("prompt", [{"prompt": "p"}, {"prompt": "q", **row}], where="mine.jsonl")
        with pytest.raises(InputError, match=told) as error:
            method.check(settings, {"data": table})
        assert "mine.jsonl row 2" in str(error.value)
        with pytest.raises(InputError, match=told) as error:  # also where nothing checks first
            method(cast(Model, Unread()), table)
        assert "mine.jsonl row 2" in str(error.value)
    alone = Table("prompt", [{"prompt": "p", "completions": ["a"], "scores": [1.0]}])
    with pytest.raises(InputError, match="in 1 the group has a single answer"):
        method.check(settings, {"data": alone})


class Unread:
    """A model of which nothing but its key may be asked."""

    weights_key, key, name, licence = "k", "k", "m", ""

    def load_module(self, *_: object, **__: object) -> None:
        raise AssertionError("a model was opened")


def test_rows_without_an_order_are_counted(
    grader: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [{**PAIR, "scores": [1.0, 1.0]}, {**PAIR, "completions": ["a"], "scores": [1.0]}]
    rows = Table("prompt", [*POOLS.rows, *more])
    monkeypatch.setattr(Collector, "collect", lambda *_, **__: [])
    with use(Context(folder=tmp_path)) as context:
        methods["urpo"](grader, rows, steps=1, batch=2, answers=2, max_tokens=4, max_length=1500)
    assert context.metrics[0]["left_out_single"] == 1 == context.metrics[0]["left_out_equal"]


# For other methods


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    with use(Context()):
        yield


def scripted() -> Any:
    """A served referee that counts the x of each candidate, and will not grade a "?"."""

    def script(_: int, body: dict[str, Any]) -> Any:
        texts = SHOWN.findall(body["messages"][-1]["content"])
        numbers = ", ".join(str(t.count("x")) for t in texts)
        return good("Hm." if "?" in "".join(texts) else f"I see.\n[{numbers}]")

    return server(script)


def told(log: Log) -> list[str]:
    return [body["messages"][-1]["content"] for _, _, body in log.asked]


def rows(*answers: str, prompt: str = "Why?") -> list[Row]:
    return [{"prompt": prompt, "completion": a, "finished": True} for a in answers]


def mixed(first: Sequence[Row], second: Sequence[Row]) -> list[Row]:
    return [row for pair in zip(first, second, strict=True) for row in pair]


def test_answers_are_graded_among_those_to_the_same_prompt(home: None) -> None:
    with scripted() as (url, log):
        asked = mixed(rows("x", "xxx", "xx"), rows("xxxx", "x" * 10, "x", prompt="How?"))
        found = referee(asked, model=f"{url}#m", criteria="many x", grades=2, chunk=4)
        assert found == [1.0, 4.0, 3.0, 10.0, 2.0, 1.0]
        assert len(log.asked) == 4 and all("many x" in t for t in told(log))
        assert {"Why?" in t for t in told(log)} == {True, False}
        assert all(len(SHOWN.findall(t)) == 3 for t in told(log))
        # In lists of two: five answers are two and three.
        log.asked.clear()
        found = referee(rows("x", "xx", "xxx", "xxxx", "xxxxx"), model=f"{url}#m", chunk=2)
        assert found == [1.0, 2.0, 3.0, 4.0, 5.0]
        assert sorted(len(SHOWN.findall(t)) for t in told(log)) == [2, 3]
        terms = {"good": {"use": "referee", "model": f"{url}#m", "chunk": 2}}
        assert Rewards(terms, {})(rows("x", "xx")) == [1.0, 2.0]


def test_of_a_dialogue_all_is_shown(home: None) -> None:
    talk = [{"role": "user", "content": "Is it dry?"}, {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Why?"}]  # fmt: skip
    said = "Instruction:\nuser: Is it dry?\n\nassistant: Yes.\n\nuser: Why?\n\n<candidate"
    graded: list[Row] = [{"prompt": talk, "completion": c} for c in ("x", "xx")]
    group: Row = {"prompt": talk, "completions": ["x", "xx"], "scores": [0, 1]}
    with scripted() as (url, log):
        assert referee(graded, model=f"{url}#m") == [1.0, 2.0]
        methods["evaluate/referee_accuracy"](Model.open(f"{url}#m"), Table("group", [group]))
        assert told(log) and all(said in text for text in told(log))


def test_what_cannot_be_read_teaches_nothing(home: None) -> None:
    with scripted() as (url, log):
        asked = [*rows("x", "?"), *rows("x", "xxxxx", prompt="How?")]
        # A zero is out of range, and so is eleven.
        asked += [*rows("", "xx", prompt="What?"), *rows("x" * 11, "x", prompt="Who?")]
        found = referee(asked, model=f"{url}#m")
        assert found == [5.5, 5.5, 1.0, 5.0, 5.5, 5.5, 5.5, 5.5]
        assert len(log.asked) == 4 + 3  # what cannot be read is asked once more
        assert [(m["judged"], m["unparsed"]) for m in current().metrics] == [(8, 6)]
        with pytest.raises(InputError, match="no score could be read for 26 of 28 answers"):
            referee([row for i in range(10) for row in rows("?", "x", prompt=f"{i}")],
                    model=f"{url}#m")  # fmt: skip
    assert referee([], model="http://127.0.0.1:9/v1#m") == []


def test_wrong_settings_of_the_reward(home: None, grader: Model) -> None:
    far = "http://127.0.0.1:9/v1#m"
    for wrong in ({"chunk": 1}, {"grades": 0}, {"max_tokens": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Rewards({"r": {"use": "referee", "model": far, **wrong}}, {}).check()
    with pytest.raises(InputError, match="reward referee setting 'model'"):
        Rewards({"r": {"use": "referee", "model": "none such"}}, {}).check()
    Rewards({"r": {"use": "referee", "model": hold(grader)}}, {}).check()


def test_a_trained_one_grades_for_others(home: None, grader: Model) -> None:
    ref = {"use": "referee", "model": hold(grader), "max_tokens": 10}
    made = Rewards({"r": ref}, {})(rows("one", "two"))
    assert made[0] != made[1] and all(v in range(1, 10) for v in made)  # what it was taught to say
    assert Rewards({"r": ref}, {})(rows("one", "two")) == made


# Measured


def test_accuracy_and_tau_by_hand(home: None) -> None:
    def row(texts: list[str], gold: list[float]) -> Row:
        return {"prompt": f"{texts} {gold}", "completions": texts, "scores": gold}

    data = Table(
        "group",
        [
            row(["x", "xx", "xxx"], [1, 2, 3]),  # all in order
            row(["xxx", "x", "xx"], [1, 2, 3]),  # of three pairs one
            row(["xx", "xx"], [0, 1]),  # equal grades
            row(["x", "xx", "xxx"], [0, 0, 1]),  # one pair has no order
            row(["x", "?"], [0, 1]),  # cannot be read
            row(["x", "xx"], [1, 1]),
            row(["x"], [1]),
        ],
    )
    with scripted() as (url, log):
        report = methods["evaluate/referee_accuracy"](Model.open(f"{url}#m"), data)
        assert len(log.asked) == 6
    found = {m.name: m for m in cast(Any, report)}
    assert found["accuracy"].value == pytest.approx((1 + 1 / 3 + 1 / 2 + 1 + 0) / 5)
    z, p, n = 1.959963984540054, (2 + 5 / 6) / 5, 5  # Wilson's interval, of parts of rows
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + (z / (2 * n)) ** 2) ** 0.5
    ends = [(middle + side * half) / (1 + z * z / n) for side in (-1, 1)]
    assert [found["accuracy"].lo, found["accuracy"].hi] == pytest.approx(ends)
    assert found["tau"].value == pytest.approx((1 - 1 / 3 + 0 + 2 / 3 + 0) / 5)
    assert found["unread"].value == pytest.approx(1 / 5) and found["accuracy"].n == 5
    meta = cast(Any, report).meta
    assert (meta["left_out_equal"], meta["left_out_single"]) == (1, 1)
    samples = cast(Any, report).samples
    assert [r.get("grades") for r in samples][:2] == [[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]]
    assert "grades" not in samples[4]


def test_pairs_are_measured_too(home: None) -> None:
    pairs = Table(
        "pair",
        [{"prompt": "p", "chosen": "xx", "rejected": "x"},
         {"prompt": "q", "chosen": "x", "rejected": "xxx"}],
    )  # fmt: skip
    with scripted() as (url, _):
        report = methods["referee_accuracy"](Model.open(f"{url}#m"), pairs, grades=3)
    assert cast(Any, report).get("accuracy").value == 0.5
    assert cast(Any, report).get("tau").value == 0.0
    wrong = Table("group", [{"prompt": "p", "completions": ["a", "b"], "scores": [1.0]}])
    with pytest.raises(InputError, match="one number for each completion"):
        methods["referee_accuracy"](Model.open("http://127.0.0.1:9/v1#m"), wrong)
