"""Several rewards as one: the lower bound by hand, its members' checks, and where it goes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truing.context import Context, use
from truing.core.judging.rewards import Rewards
from truing.core.judging.scores import check_reward
from truing.core.passes.scoring import ScoreHead
from truing.core.rl.gold import check_gold
from truing.errors import InputError
from truing.method import methods, score
from truing.models import Model, hold
from truing.naming import nouns_in
from truing.tables import Row, Table
from truing.train.reward.ensemble import lower_bound

ROWS: list[Row] = [{"prompt": "p", "completion": t, "finished": True} for t in ("a b", "a b c d")]
# They say 1 and 0 of the two rows, 0.5 and 1.
NEAR: dict[str, object] = {"use": "length_near", "n": 2}
FAR: dict[str, object] = {"use": "length_near", "n": 4}
MOST: dict[str, object] = {"use": "max_words", "n": 3}  # a check, which is a reward too


def test_mean_less_deviation_by_hand() -> None:
    assert lower_bound([1.0, 4.0, 4.0, 7.0], 0.0) == 4.0
    assert lower_bound([1.0, 4.0, 4.0, 7.0], 2.0) == pytest.approx(4 - 2 * math.sqrt(4.5))
    ref = {"use": "ensemble", "rewards": [NEAR, FAR], "kappa": 0.5}
    want = [0.75 - 0.5 * 0.25, 0.5 - 0.5 * 0.5]
    assert score("reward", ref, ROWS) == pytest.approx(want)
    assert score("reward", {**ref, "kappa": 0}, ROWS) == pytest.approx([0.75, 0.5])
    three = score("reward", {"use": "ensemble", "rewards": [NEAR, FAR, MOST]}, ROWS[:1])
    assert three == pytest.approx([2.5 / 3 - math.sqrt((2 * 1 + 0.25) / 3 - (2.5 / 3) ** 2)])
    assert score("reward", ref, []) == []


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6), st.floats(0, 10), st.floats(0, 10))
def test_it_is_never_above_the_mean_and_falls_with_kappa(
    values: list[float], one: float, two: float
) -> None:
    mean = math.fsum(values) / len(values)
    assert lower_bound(values, one) <= mean + 1e-9 * max(1, abs(mean))
    low, high = sorted((one, two))
    assert lower_bound(values, high) <= lower_bound(values, low)
    assert lower_bound([values[0]] * 3, one) == pytest.approx(values[0], abs=1e-6)


def saying(model: Model, value: float, folder: Path) -> Model:
    """A reward model that says one number of everything."""
    head = ScoreHead(128)
    with torch.no_grad():
        head.bias.fill_(value)
    return head.added_to(model, folder, "answers")


def test_reward_models_wherever_rewards_are_named(tiny_path: Path, tmp_path: Path) -> None:
    model = Model.open(tiny_path)
    members = [saying(model, v, tmp_path / str(v)) for v in (1.0, 3.0)]
    refs = [{"use": "reward_model", "model": m} for m in members]
    asked: dict[str, object] = {"sure": {"use": "ensemble", "rewards": refs, "kappa": 0.25}}
    made = methods["best_of_n"](model, n=2, rewards=asked)
    assert isinstance(made, Model)
    again = Model.load(made.save(tmp_path / "saved"))  # it brings both models along
    assert again.key == made.key
    assert {p.name for p in (tmp_path / "saved" / "held").iterdir()} == {m.key for m in members}
    held = {"use": "ensemble", "rewards": [{**r, "model": hold(m)} for r, m in zip(refs, members)],
            "kappa": 0.25}  # fmt: skip
    rewards = Rewards({"sure": held}, {"sure": 2.0})
    rewards.check()
    assert rewards(ROWS) == pytest.approx([2 * (2 - 0.25)] * 2)


def test_names_inside_of_it_are_found() -> None:
    named = {"use": "ensemble", "rewards": [{"use": "reward_model", "model": m} for m in "ab"]}
    found = nouns_in({"rewards": {"sure": named}})
    assert [(n.setting, n.noun, n.text) for n in found] == [
        ("rewards", "Model", "a"), ("rewards", "Model", "b"),
    ]  # fmt: skip


def test_rows_that_a_member_cannot_read_are_told_before_anything_is_drawn() -> None:
    rows = [{"prompt": "p", "answer": "1"}, {"prompt": "q"}]
    ref = {"use": "ensemble", "rewards": [NEAR, {"use": "numeric_answer"}]}
    with pytest.raises(InputError, match="answer") as error:
        check_gold({"right": ref}, Table("prompt", rows), "train/grpo")
    assert error.value.where.endswith("row 2")


def test_faults_are_told_before_anything_is_scored(tiny_path: Path, tmp_path: Path) -> None:
    plain = hold(Model.open(tiny_path))
    unchanged: dict[str, object] = {"use": "reward_model", "model": plain}
    for rewards, more, told in (
        ([NEAR], {}, "'rewards' needs 2 at least"),
        ([NEAR, FAR], {"kappa": -1}, "'kappa' must be at least 0"),
        ([NEAR, {"use": "lenght_near", "n": 2}], {}, "length_near"),
        ([NEAR, {"use": "length_near"}], {}, "setting 'n' is missing"),
        ([NEAR, unchanged], {}, "rewards by what was changed in it, and nothing was"),
    ):
        with use(Context(folder=tmp_path)), pytest.raises(InputError, match=told):
            check_reward({"use": "ensemble", "rewards": rewards, **more})
