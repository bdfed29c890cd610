"""Rewards at positions by hand: where they fall, what methods make of them, easy_to_hard_ppo."""

from __future__ import annotations

import importlib
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from online_numbers import OLD, REF, REWARD, VALUE, gradient, loss_of, rollout, total
from torch import Tensor

from truing.context import Context, use
from truing.core.drawing import Completion
from truing.core.judging.answer_steps import steps_of
from truing.core.judging.rewards import Rewards
from truing.core.judging.scores import named_scores
from truing.core.objective import Measurements
from truing.core.online import Update
from truing.core.passes.scoring import ScoreHead
from truing.core.placed import PaidAt, Placed, at_tokens, closings
from truing.core.rl.answers import Answer, Asked
from truing.core.rl.collect import Collector
from truing.core.rl.online_reward import Reward
from truing.core.rl.online_task import OnlineTask
from truing.core.rl.train_online import Players
from truing.core.sampling import SamplingSettings
from truing.core.tiny import tiny_tokenizer
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.tables import Row, Table
from truing.train.reward.easy_to_hard import at_steps
from truing.train.reward.process_reward import min_rewards, prod_rewards
from truing.train.rl.grpo import grpo
from truing.train.rl.ppo import ppo
from truing.train.rl.ppo_max import ppo_max
from truing.train.rl.reinforce_plus_plus import reinforce_plus_plus
from truing.train.rl.rloo import rloo

components = importlib.import_module("truing.components")
TOKENIZER = tiny_tokenizer()
# What fell inside of the answers of `online_numbers`, at their tokens.
INSIDE = [([0.0, 0.25, 0.0], [-0.5, 0.0]), ([0.0], [0.75, 0.0, -1.0, 0.5])]


def decoded(ids: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(ids), skip_special_tokens=True))


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def with_inside() -> Measurements:
    padded = [[y + [9.0] * (4 - len(y)) for y in row] for row in INSIDE]
    return rollout().having(token_reward=torch.tensor(padded))


def token_rewards(beta: float) -> list[list[list[float]]]:
    """r_t by plain loops: what fell there, the rest at the end, less beta times the log-ratio."""
    made: list[list[list[float]]] = []
    for u in range(2):
        made.append([])
        for k in range(2):
            own = list(INSIDE[u][k])
            own[-1] += REWARD[u][k] - sum(own)
            made[u].append([x - beta * (OLD[u][k][t] - REF[u][k][t]) for t, x in enumerate(own)])
    return made


def whitened(values: list[list[list[float]]]) -> list[list[list[float]]]:
    flat = [x for row in values for y in row for x in y]
    mean = sum(flat) / len(flat)
    var = sum((x - mean) ** 2 for x in flat) / (len(flat) - 1)
    return [[[(x - mean) / math.sqrt(var + 1e-8) for x in y] for y in row] for row in values]


def close(made: Tensor, want: list[list[list[float]]]) -> None:
    for u in range(2):
        for k in range(2):
            assert made[u, k, : len(OLD[u][k])].tolist() == pytest.approx(want[u][k], abs=1e-5)


# Positions


def test_what_closes_each_step() -> None:
    assert closings("a\n\nbb\n\nc", "\n\n") == [[2, 3], [6, 7], [8]]
    assert closings("a\n\n\n\nb", "\n\n") == [[2, 3], [6]]  # what is blank between is no step
    assert closings("one; two", "; ") == [[4, 5], [8]]
    assert closings("", "\n\n") == [] and closings("x", "\n\n") == [[1]]
    source = random.Random(0)
    for _ in range(200):
        text = "".join(source.choice(["a", "b ", "\n", "\n\n"]) for _ in range(9)).strip()
        found = closings(text, "\n\n")
        assert len(found) == len(steps_of(text))
        for step, ends in zip(steps_of(text), found, strict=True):
            first = ends[0] - len(step) - (1 if len(ends) == 2 else 0)
            assert text[first:].startswith(step)
            assert len(ends) == 1 or text[ends[0] - 1 : ends[1]] == "\n\n"


def test_tokens_of_positions() -> None:
    parts = [(2, 0.5), (3, 0.25), (4, 1.0), (99, 4.0)]
    text = "a\n\nb"
    assert at_tokens([*ids_of(text), 2], text, parts, decoded) == [0.0, 0.5, 0.25, 1.0, 4.0]
    # The words of an answer are stripped, its tokens are not.
    loose = [*ids_of(f"  {text} "), 2]
    assert at_tokens(loose, text, parts, decoded) == [0, 0, 0, 0.5, 0.25, 1.0, 0, 4.0]
    # A character of two bytes is there with its second one; an empty answer has its end alone.
    assert at_tokens(ids_of("é\n"), "é\n", [(1, 1.0), (2, 2.0)], decoded) == [0.0, 1.0, 2.0]
    assert at_tokens([2], "", [(0, 1.0), (0, 2.0)], decoded) == [3.0]
    # One token for both newlines, or one that a newline shares, is paid for both.
    for pieces, want in ((["a", ".\n\n", "b"], [0, 1.0, 0]), (["a.", "\n", "\nb"], [0, 0.5, 0.5])):
        words = dict(enumerate(pieces))
        found = at_tokens(
            list(words), "a.\n\nb", [(3, 0.5), (4, 0.5)], lambda ids: "".join(words[i] for i in ids)
        )
        assert found == want


def test_the_last_turn_of_an_episode_is_paid() -> None:
    ids = (*ids_of("ab"), *ids_of("??"), *ids_of("x\ny"))
    loss = (True, True, False, False, True, True, True)
    answer = Answer(ids, (0.0,) * 5, "x\ny", True, loss=loss, turns=2, paid=(0.0, 3.0, 0, 0, 1.0))
    assert answer.paying([(2, 0.5), (3, 0.25)], TOKENIZER).paid == (0.0, 3.0, 0.0, 0.5, 1.25)
    assert answer.paying([], TOKENIZER) is answer


@pytest.mark.parametrize("scheme", [min_rewards, prod_rewards])
def test_step_rewards_telescope_over_tokens(scheme: Callable[..., list[float]]) -> None:
    source = random.Random(1)
    for _ in range(100):
        n = source.randint(1, 6)
        p = [source.random() for _ in range(n)]
        bound, bonus = source.random(), source.choice([0.0, 0.25])
        text = "\n\n".join(f"step {i}" for i in range(n))
        made = at_steps(text, scheme(p, bound, bonus), "\n\n")
        end = min(p) if scheme is min_rewards else math.prod(p)
        start = bound if scheme is min_rewards else min(1.0, bound)
        want = min(end, bound) - start + bonus
        assert float(made) == pytest.approx(want, abs=1e-12)
        paid = at_tokens([*ids_of(text), 2], text, made.parts, decoded)
        assert sum(paid) == pytest.approx(want, abs=1e-12)
        # Half on each newline that closes a step, nothing within one.
        newlines = [i for i, c in enumerate(text) if c == "\n"]
        assert all(v == 0 for i, v in enumerate(paid) if i not in newlines and i != len(text) - 1)
        assert [paid[i] for i in newlines[::2]] == [paid[i] for i in newlines[1::2]]
        # A further step that is perfect takes nothing away.
        more = scheme([*p, 1.0], bound, bonus)
        assert sum(more) == pytest.approx(want, abs=1e-12)


def test_a_reward_is_a_number_or_numbers_at_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Placed([(1, 0.5), (4, -0.25)]) == 0.25 and Placed([]) == 0.0
    assert math.isnan(Placed([(0, math.inf), (1, -math.inf)]))
    values: list[object] = [Placed([(1, 0.5)]), 2.0]
    monkeypatch.setattr(components, "get_component", lambda *a, **k: lambda rows: values)
    ref: dict[str, object] = {"use": "share_of"}
    found = named_scores("r", ref, [{}, {}])
    assert found == {"r": [0.5, 2.0]} and found["r"][0].parts == ((1, 0.5),)  # type: ignore[attr-defined]
    values[0] = {"a": Placed([(1, 0.5)]), "b": 1.0}
    values[1] = {"a": 3.0, "b": Placed([(0, 1.0), (2, 1.0)])}
    found = named_scores("r", ref, [{}, {}])
    assert found == {"r/a": [0.5, 3.0], "r/b": [1.0, 2.0]}
    reward = Reward(Rewards({}, {"r/b": -2.0, "r": 10.0}))
    assert reward.weigh(found, [{"finished": True}] * 2) == [3.0, 26.0]
    assert reward.inside(found, [{}, {}]) == [[(1, 5.0)], [(0, -2.0), (2, -2.0)]]
    values[:] = [Placed([(1, math.nan)]), 1.0]
    with pytest.raises(InputError, match="not a finite number"):
        named_scores("r", ref, [{}, {}])


# Methods


def test_ppo_pays_them_where_they_fall() -> None:
    r = with_inside()
    beta, gamma, lam = 0.1, 0.9, 0.8
    update = ppo(r, beta=beta, gamma=gamma, lam=lam)
    advantage: list[list[list[float]]] = []
    for u, row in enumerate(token_rewards(beta)):
        advantage.append([])
        for k, own in enumerate(row):
            made, after, value_after = [0.0] * len(own), 0.0, 0.0
            for t in reversed(range(len(own))):
                value = VALUE[u][k][t]
                after = own[t] + gamma * value_after - value + gamma * lam * after
                made[t], value_after = after, value
            advantage[u].append(made)
    close(update.tensors["advantage"], whitened(advantage))
    close(
        update.tensors["returns"],
        [[[a + v for a, v in zip(advantage[u][k], VALUE[u][k], strict=True)] for k in range(2)]
         for u in range(2)],
    )  # fmt: skip


def test_reinforce_plus_plus_sums_what_is_still_to_come() -> None:
    r = with_inside()
    rewards = token_rewards(0.2)
    to_go = [[[sum(own[t:]) for t in range(len(own))] for own in row] for row in rewards]
    close(reinforce_plus_plus(r, beta=0.2).tensors["advantage"], whitened(to_go))


@pytest.mark.parametrize("method", [grpo, rloo])
def test_whole_answers_are_compared_by_their_sums(method: Callable[..., Update]) -> None:
    """The same bits as where nobody says where rewards fall."""
    plain, inside = rollout(), with_inside()
    made = [loss_of(method(r), r) for r in (plain, inside)]
    assert total(made[0]) == total(made[1])
    assert torch.equal(gradient(made[0]), gradient(made[1]))


def test_a_normalised_reward_is_paid_at_the_end() -> None:
    plain, inside = (ppo_max(r, critic_rollouts=0) for r in (rollout(), with_inside()))
    assert all(torch.equal(plain.tensors[n], inside.tensors[n]) for n in plain.tensors)


# Runs

SOLUTIONS = ["a\n\nbc\n\nd", "e"]


def solving(
    self: Players, prompts: Sequence[Sequence[int]], sampling: SamplingSettings, *_: object
) -> list[list[Completion]]:
    rows: list[list[Completion]] = []
    for number in range(len(prompts)):
        text = SOLUTIONS[number % 2]
        own = tuple(ids_of(f"{text}<|im_end|>"))
        one = Completion(text, own, (-1.0,) * len(own), "stop", len(own))
        rows.append([one] * sampling.n)
    return rows


def test_easy_to_hard_pays_each_step_on_its_newlines(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process model that says 0.3 of every step, then the terminal reward at the end."""
    head, seen = ScoreHead(128), list[Measurements]()
    with torch.no_grad():
        head.bias.fill_(math.log(0.3 / 0.7))
    model = Model.open(tiny_path)
    judge = head.added_to(model, tmp_path / "head", "steps")
    made = OnlineTask._ready

    def ready(task: OnlineTask, number: int) -> object:
        rollout = made(task, number)
        seen.append(rollout.r)  # type: ignore[union-attr]
        return rollout

    monkeypatch.setattr(Players, "policy", solving)
    monkeypatch.setattr(OnlineTask, "_ready", ready)
    rows: list[Row] = [{"prompt": "first", "answer": "7"}, {"prompt": "second"}]
    with use(Context(folder=tmp_path / "run", seed=1)) as context:
        methods["easy_to_hard_ppo"](
            model, Table("prompt", rows), judge, steps=1, batch=2, minibatches=1,
            critic_rollouts=0, max_tokens=12, rank=4,
        )  # fmt: skip
    first = [m for m in context.metrics if "reward/process" in m]
    assert first[0]["reward/process"] == pytest.approx(0.3 - 0.5 + 0.25, abs=1e-6)
    by_length = {int(n): u for u, n in enumerate(seen[0].length_UK[:, 0])}
    long, short = seen[0]["token_reward"][by_length[9], 0], seen[0]["token_reward"][by_length[2], 0]
    # a \n \n b c \n \n d <end>: the first step falls by 0.2, the others have their bonus alone.
    bad, good = (0.3 - 0.5 + 0.25 / 3) / 2, 0.25 / 3 / 2
    want = [0, bad, bad, 0, 0, good, good, 2 * good, 0]
    assert long.tolist() == pytest.approx(want, abs=1e-6)
    assert short[:2].tolist() == pytest.approx([0.3 - 0.5 + 0.25, 0], abs=1e-6)
    # What falls inside holds no terminal reward: 0 and 0.25 for the outcomes, -1 for either's form.
    rest = (seen[0]["reward"] - seen[0]["token_reward"].sum(-1)).flatten().tolist()
    assert sorted(rest) == pytest.approx([-1.0, -0.75], abs=1e-6)


def test_what_falls_inside_comes_from_the_journal_too(tmp_path: Path) -> None:
    asked = [Asked({"prompt": p}, (1, 2)) for p in ("one", "two")]
    calls: list[int] = []

    def draw(prompts: Sequence[Sequence[int]], *_: object) -> list[list[Completion]]:
        own = (*ids_of("ab\ncd"), 2)
        return [[Completion("ab\ncd", own, (-1.0,) * 6)] * 2 for _ in prompts]

    class ByLine(Reward):
        def terms(self, rows: Sequence[Row]) -> dict[str, list[float]]:
            calls.append(len(rows))
            parts: list[list[PaidAt]] = [[(3, 0.5), (5, float(i))] for i in range(len(rows))]
            return {"line": [Placed(p) for p in parts], "plain": [1.0] * len(rows)}

    found = [
        Collector(
            asked, [draw], ByLine(Rewards({}, {"line": 2.0})), None, TOKENIZER, tmp_path,
            Context(folder=tmp_path),
        ).collect(0, [0, 1], SamplingSettings(n=2, max_tokens=8))
        for _ in range(2)
    ]  # fmt: skip
    assert calls == [4] and found[0] == found[1]
    answers = [a for g in found[1] for a in g.answers]
    assert [a.paid for a in answers] == [(0, 0, 1.0, 0, 2.0 * i, 0) for i in range(4)]
    assert [r for g in found[1] for r in g.reward] == [2.0 + 2.0 * i for i in range(4)]
    assert [type(v) for g in found[1] for v in g.terms["line"]] == [float] * 4
