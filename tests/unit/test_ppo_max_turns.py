"""PPO-max in an environment of several turns: what is paid where, worked out row by row.

What is expected comes from transformers on padded rows and from plain loops over their tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_turns import Game, close, held, padded, run, stepped, values

from truing.context import Context, Journal, Json, use
from truing.core.passes.scoring import ScoreHead
from truing.core.rl import collect
from truing.core.tiny import tiny_folder, tiny_model
from truing.models import Model

BETA, LAM, CLIP, VF = 0.05, 0.9, 0.8, 0.5


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The reference: other weights, so that its divergence is not 0."""
    return Model.open(tiny_folder(tmp_path_factory.mktemp("other") / "tiny", seed=1))


@pytest.fixture(scope="module")
def reward(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The critic's beginning: the tiny model with a made-up head."""
    head = ScoreHead(128)
    with torch.no_grad():
        head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
        head.bias.fill_(0.25)
    return head.added_to(model, tmp_path_factory.mktemp("head") / "head")


def test_the_update_over_several_turns_is_that_of_padded_rows(
    model: Model, other: Model, reward: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R~ of the whole episode falls on its last token, whatever single turns were paid."""
    more: dict[str, object] = {
        "reference": other, "critic": reward, "rank": 0, "minibatches": 1, "critic_rollouts": 0,
        "beta": BETA, "lam": LAM, "clip_reward": CLIP, "vf": VF, "temperature": 1.0,
        "environment": lambda: Game(pay=lambda text, turn: turn * (1 + len(set(text)))),
    }  # fmt: skip
    with use(Context(seed=3)):
        task, groups = held(monkeypatch, "ppo_max", model, **more)
        value, grads = stepped(task, range(4))
    answers = [a for g in groups for a in g.answers]
    assert all(a.turns == 3 and sum(p != 0 for p in a.paid) == 3 for a in answers)
    rewards = [r for g in groups for r in g.reward]
    mu, sigma = statistics.fmean(rewards), statistics.stdev(rewards)
    z = [min(max((r - mu) / sigma, -CLIP), CLIP) for r in rewards]
    assert min(z) == -CLIP and max(z) == CLIP and len(set(z)) > 2

    policy, frozen, critic = tiny_model()[0], tiny_model(1)[0], tiny_model()[0]
    weight = reward.load_module().extra["reward_head.weight"].clone().requires_grad_()
    bias = torch.full((1,), 0.25, requires_grad=True)
    rows = [[*g.prompt, *a.ids] for g in groups for a in g.answers]
    starts = [len(g.prompt) for g in groups for _ in g.answers]
    logp = padded(policy, rows)  # of each token but the first
    with torch.no_grad():
        gap = logp.detach() - padded(frozen, rows)
    width = max(map(len, rows))
    ids = torch.tensor([[*r, *[0] * (width - len(r))] for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    states = critic(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    worth = (states @ weight[0] + bias)[:, :-1]  # at the token before, which predicts

    update = task.rollout.update if task.rollout is not None else None
    assert update is not None
    surrogate, squares, count = torch.zeros(()), torch.zeros(()), 0
    for i, (answer, start) in enumerate(zip(answers, starts, strict=True)):
        own = [start - 1 + t for t, drawn in enumerate(answer.loss) if drawn]
        assert len(own) < len(answer.ids)  # replies stand between, and carry nothing
        paid = [-BETA * float(gap[i, t]) for t in own]
        paid[-1] += z[i]
        v = worth[i, own].tolist()
        advantage, after, v_after = [0.0] * len(own), 0.0, 0.0
        for t in range(len(own) - 1, -1, -1):
            after = paid[t] + v_after - v[t] + LAM * after
            advantage[t], v_after = after, v[t]
        returns = [a + x for a, x in zip(advantage, v, strict=True)]
        u, k = divmod(i, 3)
        for name, want in (("advantage", advantage), ("returns", returns)):
            got = update.tensors[name][u, k].tolist()
            assert got[: len(own)] == pytest.approx(want, abs=2e-4)
            assert not any(got[len(own) :])
        surrogate = surrogate - (logp[i, own] * torch.tensor(advantage)).sum()
        squares = squares + (0.5 * (worth[i, own] - torch.tensor(returns)) ** 2).sum()
        count += len(own)
    (surrogate / count).backward()
    (VF * squares / count).backward()
    close({n: g for n, g in grads.items() if "critic" not in n and "head" not in n}, policy)
    close({n.removeprefix("critic/"): g for n, g in grads.items() if "critic/" in n}, critic)
    for name, wanted in (("weight", weight.grad), ("bias", bias.grad)):
        assert wanted is not None
        assert torch.allclose(grads[f"value_head.{name}"], wanted, rtol=1e-3, atol=1e-5)
    first = -float(update.tensors["advantage"].sum()) / count  # at ratio 1
    assert value == pytest.approx(first + VF * float(squares.detach()) / count, abs=1e-4)


def test_stopped_in_the_second_rollout_and_resumed(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, always_save: Callable[[], None]
) -> None:
    """Rewards are normalised by all that were seen: their moments are in the checkpoint."""
    monkeypatch.setattr(collect, "BLOCK", 6)
    always_save()
    more: dict[str, object] = {
        "steps": 2, "minibatches": 2, "critic_rollouts": 1,
        "rewards": {"letters": {"use": "share_of", "letters": "aeiou"}},
    }  # fmt: skip
    put, seen, last = Journal.put, 0, 0

    def counting(journal: Journal, key: str, value: Json) -> None:
        nonlocal seen
        put(journal, key, value)
        seen += 1
        if seen == last:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "put", counting)
    expected, whole = run("ppo_max", model, tmp_path / "whole", **more)
    assert len(whole) == 4 and [bool(m.get("clip_fraction") is None) for m in whole] == [
        True, True, False, False
    ]  # fmt: skip
    last, seen = seen - 1, 0
    with pytest.raises(KeyboardInterrupt):
        run("ppo_max", model, tmp_path / "cut", **more)
    last = 0
    again, rest = run("ppo_max", model, tmp_path / "cut", **more)
    assert again.key == expected.key and values(rest) == values(whole)
    assert whole[0]["turns"] == 2.0
