"""Episodes: the loop by hand, roles and branches."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from torch import Tensor

from truing.changes import Rewriter
from truing.context import Context, Journal, Json, use
from truing.core.generation.prefix_cache import Reading, Shared
from truing.core.play import agents
from truing.core.rollout import (
    Acted,
    Asked,
    Episode,
    Observation,
    Scripted,
    Speaker,
    Step,
    advance,
    maker,
    rollout,
)
from truing.core.sampling import SamplingSettings
from truing.errors import InputError
from truing.fields.agent.running_sum import RunningSum, running_sum
from truing.method import get_component
from truing.models import Model, Prefix
from truing.tables import Row, Table

SUMS: dict[str, object] = {"use": "running_sum", "terms": 2, "most": 9}
TASKS = Table("record", [{"numbers": [2, 3, 4]}, {"numbers": [7, 1, 1]}, {"name": "drawn"}])


@pytest.fixture
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


def adder(observation: Json) -> Json:
    """Adds the two numbers of the last question."""
    words = str(observation).replace(".", " ").split()
    at = len(words) - 1 - words[::-1].index("sum")
    return f"It is {int(words[at + 2]) + int(words[-1])}."


def turns_of(row: Row) -> list[dict[str, Json]]:
    return cast("list[dict[str, Json]]", row["turns"])


def test_running_sum_by_hand() -> None:
    one = running_sum(terms=2, tries=2)
    first = one.reset(0, {"numbers": [2, 3, 4]})
    assert str(first.content).endswith("The sum is 2. Add 3.") and first.role == "policy"
    assert one.step("2 + 3 = 5") == Step(
        Observation("Right. The sum is 5. Add 4."), 0.5, False, {"right": True, "tool": False}
    )
    assert one.step("calc 5 + 4")[0].content == "calc: 9. The sum is 5. Add 4."
    observation, reward, done, info = one.step("eight")
    assert observation.content == "Reply with a number. The sum was 9."
    assert (reward, done, info["right"]) == (0.0, True, False)
    assert running_sum(tool=False).reset(0, {}).content != running_sum().reset(0, {}).content
    assert running_sum(terms=1).reset(5, {}) == running_sum(terms=1).reset(5, {})


@pytest.mark.parametrize("answer", ["9" * 5000, "", "-", "calc 1 + " + "9" * 50, "５", "5 and 6"])
def test_odd_answers_are_wrong_answers(answer: str) -> None:
    one = running_sum(terms=1, tries=1)
    one.reset(0, {"numbers": [2, 3]})
    assert one.step(answer)[1:3] == (0.0, True) or answer == "５"


def test_an_expert_gets_every_reward_and_a_dunce_none() -> None:
    with use(Context(seed=1)):
        made = rollout(SUMS, TASKS, {"policy": Scripted(adder, "1")}, n=2)
        dunce = rollout(SUMS, TASKS, {"policy": Scripted(lambda _: "?", "1")})
    assert made.kind == "trajectory" and len(made) == 6
    assert [(r["episode"], r["done"]) for r in made] == [(0, True), (1, True)] * 3
    for row in made:
        assert cast("dict[str, float]", row["rewards"])["policy"] == pytest.approx(1.0)
        assert len(turns_of(row)) == 2 and row["lineage"]["parents"] == [row["task"]]
    assert turns_of(made[0])[1]["observation"] == "Right. The sum is 5. Add 4."
    # Numbers that a task does not give are drawn anew for each episode.
    assert turns_of(made[4])[0]["observation"] != turns_of(made[5])[0]["observation"]
    assert [r["rewards"] for r in dunce] == [{"policy": 0.0}] * 3
    assert [len(turns_of(r)) for r in dunce] == [4, 4, 4]


def test_long_episodes_are_cut() -> None:
    made = rollout(SUMS, TASKS, {"policy": Scripted(lambda _: "?", "1")}, max_turns=3)
    assert [(len(turns_of(r)), r["done"]) for r in made] == [(3, False)] * 3


def test_all_live_ones_are_asked_at_once(model: Model) -> None:
    asked: list[int] = []

    class Counting(Speaker):
        def __call__(self, asked_now: Sequence[Asked]) -> list[Acted]:
            asked.append(len(asked_now))
            return super().__call__(asked_now)

    speaker = Counting(model, SamplingSettings(max_tokens=4))
    made = rollout({**SUMS, "tries": 1}, TASKS, {"policy": speaker}, n=4)
    assert asked == [12, 12]
    for row in made:
        for turn in turns_of(row):
            ids, logprobs = cast(list, turn["ids"]), cast(list, turn["logprobs"])
            assert 1 <= len(ids) == len(logprobs) <= 4 and max(logprobs) <= 0
    # Episodes of one task draw for themselves.
    assert len({str(turns_of(r)[0]["ids"]) for r in made}) == 12


def test_actions_do_not_depend_on_what_else_is_live(model: Model) -> None:
    roles = {"policy": model}
    short = SamplingSettings(max_tokens=5)
    with use(Context(seed=3)):
        both = rollout(SUMS, TASKS, roles, sampling=short)
        alone = [rollout(SUMS, [dict(task)], roles, sampling=short)[0] for task in TASKS]
    with use(Context(seed=4)):
        other = rollout(SUMS, TASKS, roles, sampling=short)
    for one, other_one in zip(both, alone, strict=True):
        for mine, theirs in zip(turns_of(one), turns_of(other_one), strict=True):
            assert mine.pop("logprobs") == pytest.approx(theirs.pop("logprobs"), abs=1e-4)
            assert mine == theirs
    assert both.key != other.key


def test_snapshot_and_restore_are_equal_in_every_later_step(model: Model) -> None:
    agents = {"policy": Speaker(model, SamplingSettings(max_tokens=5))}
    one = Episode(maker({**SUMS, "terms": 5}), {"id": "a"}, seed=9)
    advance([one], agents)
    kept = one.snapshot()
    assert json.loads(json.dumps(kept)) == kept
    other = Episode(maker({**SUMS, "terms": 5}), {"id": "a"}, seed=9)
    other.restore(kept)
    while not one.done:
        advance([one], agents)
    first, turns = one.snapshot(), list(one.turns)
    while not other.done:
        advance([other], agents)
    assert other.snapshot() == first
    one.restore(kept)
    assert one.snapshot() == kept != first
    while not one.done:
        advance([one], agents)
    assert one.turns == turns


def test_branches_share_the_past_and_differ_after_it(model: Model) -> None:
    agents = {"policy": Speaker(model, SamplingSettings(max_tokens=6))}
    root = Episode(maker({**SUMS, "terms": 3}), {"id": "a"}, seed=1)
    advance([root], agents)
    children = root.branch(3)
    grandchildren = [g for c in children for g in c.branch(1)]
    advance(children, agents)
    advance(grandchildren, agents)
    assert all(c.turns[0] == root.turns[0] and len(c.turns) == 2 for c in children)
    assert len({str(c.turns[1]["ids"]) for c in [*children, *grandchildren]}) == 6
    assert len(root.turns) == 1
    again = root.branch(3)
    advance(again, agents)
    assert [c.turns for c in again] == [c.turns for c in children]


def test_two_roles_each_see_their_own_dialogue(model: Model) -> None:
    seen: dict[str, list[list[dict[str, str]]]] = {"policy": [], "user": []}

    def role(name: str) -> Speaker:
        class Listening(Speaker):
            def __call__(self, asked: Sequence[Asked]) -> list[Acted]:
                seen[name] += [a.messages for a in asked]
                return [Acted(f"{name} {len(seen[name])}") for _ in asked]

        return Listening(model, SamplingSettings())

    talk: dict[str, object] = {"use": "conversation", "turns": 2}
    tasks: list[Row] = [{"prompt": "hello", "persona": "A nurse."}]
    made = rollout(talk, tasks, {"policy": role("policy"), "user": role("user")})
    said = [(t["role"], t["observation"], t["action"]) for t in turns_of(made[0])]
    told = "You asked: hello\nThe assistant answers: policy 1"
    assert said == [
        ("policy", "hello", "policy 1"), ("user", told, "user 1"), ("policy", "user 1", "policy 2"),
    ]  # fmt: skip
    assert [m["role"] for m in seen["policy"][1]] == ["user", "assistant", "user"]
    assert seen["user"][0][0]["content"].endswith("The person: A nurse.")
    assert [m["role"] for m in seen["user"][0]] == ["system", "user"]
    assert made[0]["done"] and made[0]["rewards"] == {"policy": 0.0, "user": 0.0}


def test_simulated_user_by_two_models(model: Model) -> None:
    prefixed = model.adding(Prefix([{"role": "system", "content": "be brief"}])).called("user")
    talk: dict[str, object] = {"use": "conversation", "turns": 2}
    short = SamplingSettings(max_tokens=4)
    made = rollout(
        talk, [{"prompt": "hi"}], {"policy": model, "user": prefixed}, n=2, sampling=short
    )
    assert [[t["role"] for t in turns_of(r)] for r in made] == [["policy", "user", "policy"]] * 2


class Long(RunningSum):
    """Begins with a long text."""

    def reset(self, seed: int, task: Row) -> Observation:
        first = super().reset(seed, task)
        return Observation(f"{'Numbers are added. ' * 10}{first.content}", first.role)


def test_where_nobody_remembers_nobody_asks_for_room(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Asking wakes the GPU."""
    asked: list[int] = []
    monkeypatch.setattr(agents, "room", lambda: asked.append(1) or 2**20)
    sampling = SamplingSettings(max_tokens=2)
    far = Speaker(Model.open("http://127.0.0.1:9/v1#m"), sampling)
    polite = Speaker(model.adding(Rewriter("polite")), sampling)
    plain, near = Scripted(adder, "1"), Speaker(model, sampling)
    journal = Journal(tmp_path / "journal")
    with agents.remembering({"a": plain, "b": far, "c": polite}, journal, "one"):
        assert far.memory is None and polite.memory is None
    assert not asked and "one/room" not in journal
    with agents.remembering({"a": plain, "b": far, "c": near}, journal, "two"):
        assert near.memory is not None and near.memory.limit == 2**20
    assert asked == [1] and near.memory is None and journal.get("two/room") == 2**20


@pytest.mark.parametrize("rewrites", [False, True])
def test_models_remember_the_turns_before(
    rewrites: bool, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows; of a template that writes earlier turns anew, what begins alike is kept."""
    path = tmp_path / "tiny"
    shutil.copytree(tiny_path, path)
    template = path / "chat_template.jinja"
    if rewrites:
        words = "message['content']"
        shown = f"({words} if loop.last or message['role'] == 'user' else '(an answer)')"
        template.write_text(template.read_text().replace(words, shown))
    roles = {"policy": Speaker(Model.open(path), SamplingSettings(max_tokens=6))}
    read: list[int] = []
    before = Shared._read

    def counted(self: Shared, *given: Any) -> Tensor:
        made = before(self, *given)
        read.append(cast(Reading, self.reading).spans[-1][-1])
        return made

    monkeypatch.setattr(Shared, "_read", counted)
    made: list[tuple[Table, int]] = []
    for room in (2**30, 0):
        monkeypatch.setattr("truing.core.play.agents.room", lambda room=room: room)
        read.clear()
        with use(Context(seed=3)):
            played = rollout(lambda: Long(4, 9, 1, False), TASKS.rows, roles, n=2)
        made.append((played, sum(read)))
        assert roles["policy"].memory is None
    (ours, some), (theirs, more) = made
    assert some < 0.5 * more
    for a, b in zip(ours, theirs, strict=True):
        for one, two in zip(turns_of(a), turns_of(b), strict=True):
            assert one.pop("logprobs") == pytest.approx(two.pop("logprobs"), abs=1e-5)
            assert one == two


def test_what_was_asked_in_earlier_turns(model: Model) -> None:
    """Told from the turns that were taken: what a resumed run reads again."""
    talk: dict[str, object] = {"use": "conversation", "turns": 3}
    one = Episode(maker(talk), {"prompt": "hello", "persona": "A nurse."}, seed=9)
    told: list[tuple[str, Asked]] = []
    while not one.done:
        told.append((one.waiting.role, one.ask()))
        one.take(Acted(f"words {len(one.turns)}"))
    assert [role for role, _ in told] == ["policy", "user"] * 2 + ["policy"]
    assert [one.asked(turn) for turn in range(5)] == told


class Broken(RunningSum):
    value: object = float("nan")

    def step(self, action: Json) -> Step:
        return super().step(action)._replace(reward=self.value)  # type: ignore[arg-type]


def broken(value: object) -> RunningSum:
    made = Broken(2, 9, 1, True)
    made.value = value
    return made


def test_mistakes_are_named(model: Model, tmp_path: Path) -> None:
    expert = {"policy": Scripted(adder, "1")}
    with pytest.raises(InputError, match=r"unknown environment 'runing_sum'.*'running_sum'"):
        rollout("runing_sum", TASKS, expert)
    with pytest.raises(InputError, match=r"unknown setting 'term'.*'terms'"):
        rollout({"use": "running_sum", "term": 2}, TASKS, expert)
    with pytest.raises(InputError, match=r"unknown role 'policy'.*polcy"):
        rollout(SUMS, TASKS, {"polcy": Scripted(adder, "1")})
    with pytest.raises(InputError, match="two or more whole numbers"):
        rollout(SUMS, [{"numbers": [1, "2"]}], expert)
    with pytest.raises(InputError, match="user's opening words"):
        rollout("conversation", [{"text": "x"}], expert)
    for value in (float("nan"), float("inf"), "1", None):
        with pytest.raises(InputError, match=r"role 'policy' is not a finite number"):
            rollout(lambda: broken(value), TASKS, expert)
    with pytest.raises(InputError, match="must be plain data"):
        rollout(SUMS, TASKS, {"policy": Scripted(lambda _: cast(Json, object()), "1")})
    with use(Context(folder=tmp_path)), pytest.raises(InputError, match="@component"):
        rollout(lambda: running_sum(), TASKS, expert)


def test_a_model_can_only_be_shown_texts(model: Model) -> None:
    class Numbers(RunningSum):
        def reset(self, seed: int, task: Row) -> Observation:
            return Observation([1.0, 2.0])

    with pytest.raises(InputError, match="only be shown texts"):
        rollout(lambda: Numbers(2, 9, 1, True), TASKS, {"policy": model})


def test_registered_environments_are_found_without_importing() -> None:
    from truing import catalogue

    assert {"running_sum", "conversation"} <= set(catalogue.components("environment"))
    assert isinstance(get_component("environment", SUMS)(), RunningSum)
    assert not any(e.id.startswith("/") for e in catalogue.methods().values())


def test_a_thousand_scripted_episodes_are_quick() -> None:
    began = time.monotonic()
    made = rollout(SUMS, [{"name": str(i)} for i in range(1000)], {"policy": Scripted(adder, "1")})
    assert len(made) == 1000 and time.monotonic() - began < 10
