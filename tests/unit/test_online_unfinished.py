"""Answers that were cut off and are dropped: counted, and said once where nothing else is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from truing.context import Context, Json, use
from truing.core.drawing import Completion
from truing.core.objective import Measurements
from truing.core.online import Update
from truing.core.play.episodes import Line
from truing.core.rl.answers import Answer, Group
from truing.core.rl.collect import Drawn
from truing.core.rl.online_record import Rollout
from truing.core.rl.train_online import Players
from truing.core.rollout import Observation, Step
from truing.core.sampling import SamplingSettings
from truing.method import methods
from truing.models import Model
from truing.tables import Row, Table

METHODS = ("grpo", "dr_grpo", "dapo", "gdpo", "gspo")
PROMPTS = Table("prompt", [{"prompt": f"say {w}"} for w in ("lime", "oak", "rain", "ash")])
SMALL: dict[str, object] = {
    "steps": 3, "batch": 2, "answers": 3, "lr": 2e-3, "refill": 0, "rank": 4,
    "rewards": {"letters": {"use": "share_of", "letters": "abcdefghijklmnop"}},
}  # fmt: skip
SAID = "warning: all 6 answers of rollout 1 were cut off"


@pytest.fixture
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


def run(name: str, model: Model, folder: Path | None, **more: object) -> tuple[Model, list[Json]]:
    with use(Context(seed=4, folder=folder)) as context:
        made = methods[name](model, PROMPTS, **SMALL, **more)
    assert isinstance(made, Model)
    return made, [m.get("dropped") for m in context.metrics if "length" in m]


@pytest.mark.parametrize("name", METHODS)
def test_all_cut_off_is_said_once(
    name: str, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, shares = run(name, model, tmp_path / "a", drop_unfinished=True, max_tokens=2)
    said = [line for line in capsys.readouterr().err.splitlines() if "were cut off" in line]
    assert shares == [1.0] * 3 and len(said) == 1
    assert said[0].startswith(f"{name}: {SAID}") and "raise max_tokens" in said[0]
    before, after = model.folded(), made.folded()
    assert all(torch.equal(before[n], after[n]) for n in before)  # nothing is learnt
    if name == METHODS[0]:
        _, shares = run(name, model, tmp_path / "b", max_tokens=2)
        assert shares == [None] * 3 and "were cut off" not in capsys.readouterr().err


class Talk:
    """An environment that never ends; a wordy one leaves no room for a second turn."""

    def __init__(self, wordy: bool = False) -> None:
        self.wordy, self.turns = wordy, 0

    def reset(self, seed: int, task: Row) -> Observation:
        self.turns = 0
        return Observation(str(task["prompt"]))

    def step(self, action: Json) -> Step:
        self.turns += 1
        return Step(Observation("go on " * (99 if self.wordy else 1)), 0.5, False)

    def snapshot(self) -> Json:
        return self.turns

    def restore(self, snapshot: Json) -> None:
        self.turns = int(str(snapshot))


@pytest.mark.parametrize(
    ("world", "ended", "told"),
    [
        (Talk, True, "raise turns"),
        (lambda: Talk(wordy=True), True, "raise max_length"),
        (Talk, False, "raise max_tokens"),
    ],
)
def test_of_several_turns_the_limit_that_cut_is_named(
    world: Callable[[], Talk],
    ended: bool,
    told: str,
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def draw(_: object, prompts: Sequence[object], how: SamplingSettings, *__: object) -> object:
        one = Completion("a", (70, 2), (-1.0, -1.0), "stop" if ended else "length", 2)
        return [[one] * how.n for _ in prompts]

    monkeypatch.setattr(Players, "policy", draw)
    more: dict[str, object] = {"environment": world, "turns": 2, "max_length": 160}
    _, shares = run("grpo", model, None, drop_unfinished=True, max_tokens=2, **more)
    said = [line for line in capsys.readouterr().err.splitlines() if "were cut off" in line]
    assert shares == [1.0] * 3 and len(said) == 1 and said[0].endswith(told)


def test_the_first_limit_counts_and_all_that_cut_are_named() -> None:
    whole = ((70, 2), (-1.0, -1.0), "a", True)
    cut = ((70, 71), (-1.0, -1.0), "b", False)
    reply: dict[str, Json] = {"reward": 0.0, "prompt": [], "done": False, "ids": [5]}
    over = reply | {"ids": []}

    def line(*turns: Drawn, end: dict[str, Json], last: bool) -> Answer:
        made = Line(turns[0])
        for turn in turns[1:]:
            made.hear(reply, last=False)
            made.say(turn)
        made.hear(end, last=last)
        return made.answer(1.0)

    answers = (
        line(whole, whole, end=over, last=True),
        line(cut, whole, end=over, last=True),
        line(whole, end=over, last=False),
        line(whole, cut, end=over | {"done": True}, last=True),
        line(whole, whole, end=over | {"done": True}, last=True),
    )
    assert [(a.finished, a.limit) for a in answers] == [
        (False, "turns"), (False, "max_tokens"), (False, "max_length"), (False, "max_tokens"),
        (True, ""),
    ]  # fmt: skip
    assert Answer((70,), (-1.0,), "a", False).limit == "max_tokens"  # of one turn
    group = Group(0, (9,), answers[:4], (0.0,) * 4, {})
    none = Measurements(torch.ones(1, 4, 2), {}, {})
    update = Update({}, lambda m: m, metrics={"dropped": torch.ones(4)})  # type: ignore[arg-type]
    told = Rollout(0, [group], none, update, {})._cut_off()
    assert told.startswith("all 4 answers of rollout 1 were cut off")
    assert told.endswith("raise max_tokens and turns and max_length")


def test_some_that_ended_are_learnt_from(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, shares = run("gdpo", model, tmp_path, drop_unfinished=True, max_tokens=48)
    assert all(0.0 < float(str(s)) < 1.0 for s in shares), shares
    assert "were cut off" not in capsys.readouterr().err
    before, after = model.folded(), made.folded()
    assert any(not torch.equal(before[n], after[n]) for n in before)
