"""Potential-based shaping: differences by hand, their sum, and the best policy of a small MDP."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truing.core.judging.answer_steps import step_values, steps_of
from truing.core.judging.scores import check_reward, named_scores
from truing.core.passes.scoring import ScoreHead
from truing.core.placed import Placed, at_tokens
from truing.core.tiny import tiny_tokenizer
from truing.errors import InputError
from truing.models import Model, hold
from truing.tables import Row
from truing.train.reward.potential_shaping import shaped

Path_ = tuple[int, ...]  # steps of an answer so far
Move = tuple[Path_, int, bool]  # from where, which step, and whether the answer ends with it
Policy = dict[Path_, tuple[int, bool]]
DEPTH, CHOICES = 3, 2


def test_differences_by_hand() -> None:
    assert shaped([0.5, 0.75]) == [0.5, 0.25, -0.75]
    assert shaped([0.5, 0.75], gamma=0.5, start=0.25) == [0.0, -0.125, -0.75]
    assert shaped([], start=0.25) == [-0.25]


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(st.lists(st.floats(-3, 3), max_size=8), st.floats(0.1, 1), st.floats(-1, 1))
def test_the_discounted_sum_is_one_constant(
    potentials: list[float], gamma: float, start: float
) -> None:
    made = shaped(potentials, gamma, start)
    assert len(made) == len(potentials) + 1
    assert sum(gamma**k * f for k, f in enumerate(made)) == pytest.approx(-start, abs=1e-9)


# A small MDP: answers of up to three steps, two choices each, which may end with any of them.


def answers() -> list[Path_]:
    return [p for n in range(1, DEPTH + 1) for p in itertools.product(range(CHOICES), repeat=n)]


def moves_of(path: Path_) -> list[Move]:
    return [(path[:k], step, k == len(path) - 1) for k, step in enumerate(path)]


def paid(
    outcome: dict[Path_, float], per_step: Callable[[Path_], Sequence[float]]
) -> dict[Move, float]:
    """What each move is paid, of which every answer that makes it has to say the same."""
    found: dict[Move, float] = {}
    for path in answers():
        for move, value in zip(moves_of(path), per_step(path), strict=True):
            whole = value + (outcome[path] if move[2] else 0.0)
            assert found.setdefault(move, whole) == pytest.approx(whole)
    return found


def best(reward: dict[Move, float], gamma: float) -> tuple[dict[Path_, float], Policy]:
    """Values and the best policy by value iteration."""
    states = {move[0] for move in reward}
    value = dict.fromkeys(states, 0.0)

    def worth(move: Move) -> float:
        after = 0.0 if move[2] else gamma * value[(*move[0], move[1])]
        return reward[move] + after

    for _ in range(DEPTH + 2):
        value = {s: max(worth(m) for m in reward if m[0] == s) for s in states}
    policy = {s: max((m for m in reward if m[0] == s), key=worth)[1:] for s in states}
    return value, policy


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_the_best_policy_stays_the_best(gamma: float) -> None:
    source, changed = random.Random(0), 0
    for _ in range(20):
        outcome = {p: source.random() for p in answers()}
        phi = {p: source.uniform(-2, 2) for p in answers()}
        start = source.random()

        def before_last(path: Path_, phi: dict[Path_, float] = phi) -> list[float]:
            return [phi[path[:k]] for k in range(1, len(path))]

        plain, policy = best(paid(outcome, lambda p: [0.0] * len(p)), gamma)
        value, shaped_policy = best(
            paid(outcome, lambda p, s=start, f=before_last: shaped(f(p), gamma, s)), gamma
        )
        assert shaped_policy == policy
        for state, v in value.items():
            assert v == pytest.approx(plain[state] - (phi[state] if state else start))
        # What the same model says of each step, paid as it is, leads elsewhere.
        liked = best(paid(outcome, lambda p, f=phi: [f[p[: k + 1]] for k in range(len(p))]), gamma)
        changed += liked[1] != policy
    assert changed > 10


# The component


TEXTS = ["one\n\ntwo, too\n\nthree", "alone", "", "a\n\n\n\nb\n\n"]
ROWS: list[Row] = [{"prompt": "say it", "completion": t, "finished": True} for t in TEXTS]


@pytest.fixture(scope="module")
def judge(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A process reward model that says something else of every step."""
    head = ScoreHead(128)
    with torch.no_grad():
        head.weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(3))
    return head.added_to(Model.open(tiny_path), tmp_path_factory.mktemp("j") / "head", "steps")


def decoded(ids: Sequence[int]) -> str:
    return str(tiny_tokenizer().decode(list(ids), skip_special_tokens=True))


def test_it_falls_where_steps_end_and_sums_to_a_constant(judge: Model) -> None:
    ref: dict[str, object] = {"use": "potential_shaping", "model": hold(judge), "start": 0.25}
    found = named_scores("shaped", ref, ROWS)["shaped"]
    assert found == [-0.25] * 4  # to the bit: groups of equal rewards are found by equality
    first = found[0]
    assert isinstance(first, Placed) and not isinstance(found[2], Placed)
    p = step_values(judge, [{"prompt": "say it", "steps": steps_of(TEXTS[0])}])[0]
    assert abs(p[0] - p[1]) > 1e-3  # else it would not be seen which one is where
    want = [p[0] - 0.25, p[1] - p[0], -p[1]]
    ids = [*tiny_tokenizer().encode(TEXTS[0], add_special_tokens=False), 2]
    tokens = at_tokens(ids, TEXTS[0], first.parts, decoded)
    newlines = [i for i, c in enumerate(TEXTS[0]) if c == "\n"]
    assert [tokens[i] + tokens[j] for i, j in zip(newlines[::2], newlines[1::2])] == pytest.approx(
        want[:2], abs=1e-5
    )
    assert tokens[len(TEXTS[0]) - 1] == pytest.approx(want[2], abs=1e-5)
    assert sum(map(abs, tokens)) == pytest.approx(sum(map(abs, want)), abs=1e-5)


def test_what_a_model_thinks_of_a_last_step_does_not_count(judge: Model) -> None:
    rows: list[Row] = [{"prompt": "p", "completion": f"same\n\n{end}"} for end in ("good", "bad!")]
    ref: dict[str, object] = {"use": "potential_shaping", "model": hold(judge)}
    one, two = named_scores("shaped", ref, rows)["shaped"]
    assert isinstance(one, Placed) and isinstance(two, Placed)
    assert [v for _, v in one.parts] == pytest.approx([v for _, v in two.parts], abs=1e-6)


def test_faults_are_told_before_anything_is_drawn(judge: Model, tmp_path: Path) -> None:
    answers_too = ScoreHead(128).added_to(Model.open(judge.folder), tmp_path / "answers", "answers")
    for model, more, told in (
        (answers_too, {}, "reward potential_shaping.*scores whole answers, not their steps"),
        (judge, {"gamma": 0.0}, r"'gamma' must be in \(0, 1\]"),
    ):
        with pytest.raises(InputError, match=told):
            check_reward({"use": "potential_shaping", "model": hold(model), **more})
