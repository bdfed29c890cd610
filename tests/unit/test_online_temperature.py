"""Which distribution the log-probabilities of online training are of, and that they agree."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from truing.context import Context, use
from truing.core.generation.draw_token import choose
from truing.core.objective import Measurements
from truing.core.rl.answers import Group
from truing.core.rl.online_record import Rollout
from truing.core.rl.online_task import OnlineTask
from truing.core.sampling import SamplingSettings
from truing.core.training import State
from truing.core.tree import Packed
from truing.method import methods
from truing.models import Model
from truing.tables import Table

HEAT = 0.5
PROMPTS = Table("prompt", [{"prompt": f"say {w}"} for w in "lime oak rain stone".split()])
SMALL: dict[str, object] = {
    "steps": 1, "batch": 4, "answers": 2, "max_tokens": 6, "temperature": HEAT, "passes": 1,
    "rewards": {"letters": {"use": "share_of", "letters": "abcdefghijklmnop"}},
}  # fmt: skip
Rows = list[list[list[float]]]  # of each group, answer and token
Seen = list[tuple[dict[float, Rows], Measurements]]


def by_hand(module: nn.Module, group: Group, heat: float) -> list[list[float]]:
    """log softmax(z / heat) at each token of each answer, by transformers on one row at a time."""
    made: list[list[float]] = []
    for answer in group.answers:
        ids = torch.tensor([[*group.prompt, *answer.ids]])
        with torch.no_grad():
            logp_TV = (module(input_ids=ids).logits[0].double() / heat).log_softmax(-1)
        at_T1 = torch.tensor(answer.ids)[:, None]
        made.append(logp_TV[len(group.prompt) - 1 : -1].gather(1, at_T1)[:, 0].tolist())
    return made


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> tuple[Seen, list[Tensor]]:
    """What a method is told of each rollout, and the log-probabilities that have gradients."""
    told: Seen = []
    fresh: list[Tensor] = []
    know, measure = OnlineTask._known, OnlineTask._fresh

    def known(task: OnlineTask, groups: Sequence[Group], given: State) -> Measurements:
        r = know(task, groups, given)
        rows = {h: [by_hand(task.module, g, h) for g in groups] for h in (HEAT, 1.0)}
        told.append((rows, r))
        return r

    def measured(
        task: OnlineTask, rollout: Rollout, at: Sequence[int], packed: Packed
    ) -> Measurements:
        m = measure(task, rollout, at, packed)
        for row, u in enumerate(at):
            fresh.append(m["logp"][row].detach() - by_group(rollout.r["logp"][u], m["logp"][row]))
        return m

    monkeypatch.setattr(OnlineTask, "_known", known)
    monkeypatch.setattr(OnlineTask, "_fresh", measured)
    return told, fresh


def by_group(wide_KT: Tensor, like_KT: Tensor) -> Tensor:
    return wide_KT[: like_KT.shape[0], : like_KT.shape[1]]


@pytest.mark.parametrize(
    ("name", "heat"),
    [("grpo", HEAT), ("ppo", HEAT), ("rloo", HEAT), ("nash_md", HEAT), ("online_dpo", 1.0),
     ("xpo", 1.0)],
)  # fmt: skip
def test_log_probabilities_are_of_what_is_drawn(
    name: str, heat: float, tiny_path: Path, tmp_path: Path, seen: tuple[Seen, list[Tensor]]
) -> None:
    """The policy's, the reference's (the same at first) and the fresh ones."""
    told, fresh = seen
    with use(Context(seed=3, folder=tmp_path)):
        methods[name](Model.open(tiny_path), PROMPTS, **SMALL)
    ((rows, r),) = told
    own_UK = r["own"] > 0
    for u, group in enumerate(rows[heat]):
        for k, row in enumerate(group):
            if own_UK[u, k]:
                assert r["logp"][u, k, : len(row)].tolist() == pytest.approx(row, abs=2e-4)
            if "ref_logp" in r.tensors:
                assert r["ref_logp"][u, k, : len(row)].tolist() == pytest.approx(row, abs=2e-4)
    assert fresh
    if name in ("grpo", "ppo", "rloo"):  # the others have answers that the policy did not draw
        assert max(float(d.abs().max()) for d in fresh) < 2e-4


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ["grao", "ppo_max"])
def test_given_answers_are_imitated_at_temperature_1(
    name: str,
    exact: bool,
    tiny_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seen: tuple[Seen, list[Tensor]],
) -> None:
    """Nobody drew them; what they share with drawn answers is at both temperatures."""
    told, _ = seen
    begin, measure, fresh = OnlineTask.__init__, OnlineTask._fresh, list[Measurements]()

    def inexact(task: OnlineTask, *given: Any, **more: Any) -> None:
        begin(task, *given, **more)
        task.exact = exact

    def measured(task: OnlineTask, *given: Any) -> Measurements:
        fresh.append(measure(task, *given))
        return fresh[-1]

    monkeypatch.setattr(OnlineTask, "__init__", inexact)
    monkeypatch.setattr(OnlineTask, "_fresh", measured)
    kind = "example" if name == "grao" else "prompt"
    rows = [{**r, "completion": str(r["prompt"])} for r in PROMPTS]
    # PPO-max compares with a reference too; its policy learns from the first rollout on.
    more = {"ptx": 1.0, "critic_rollouts": 0} if name == "ppo_max" else {}
    one = {"batch": 1, "minibatches": 1, "entropy": 0.0} if name == "ppo_max" else {"batch": 1}
    settings = {**SMALL, **one, **more}
    with use(Context(seed=3, folder=tmp_path)):
        methods[name](Model.open(tiny_path), Table(kind, rows[:1]), **settings)
    ((known, r),) = told
    own = [bool(o) for o in r["own"][0]]
    assert own == [True, True, False]
    for k, drawn in enumerate(own):
        want = known[HEAT if drawn else 1.0][0][k]
        other = known[1.0 if drawn else HEAT][0][k]
        n = len(want)
        assert max(abs(a - b) for a, b in zip(want, other, strict=True)) > 1e-2
        assert fresh[0]["logp"][0, k, :n].tolist() == pytest.approx(want, abs=2e-4)
        if drawn or not exact or name == "ppo_max":  # else it is not measured before
            assert r["logp"][0, k, :n].tolist() == pytest.approx(want, abs=2e-4)
        if name == "ppo_max":
            assert r["ref_logp"][0, k, :n].tolist() == pytest.approx(want, abs=2e-4)


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_a_token_s_log_probability_at_the_temperature_of_drawing(top_p: float) -> None:
    logits_BV = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)) * 3
    random_B = torch.linspace(0.05, 0.9, 5, dtype=torch.float64)
    cut = SamplingSettings(top_p=top_p)
    token_B, logp_B = choose(logits_BV, logits_BV, random_B, cut, HEAT, HEAT)
    same_B, cold_B = choose(logits_BV, logits_BV, random_B, cut, HEAT)
    assert token_B.tolist() == same_B.tolist()
    for heat, got_B in ((HEAT, logp_B), (1.0, cold_B)):
        want_BV = (logits_BV.double() / heat).log_softmax(1)
        want_B = want_BV.gather(1, token_B[:, None])[:, 0]
        assert got_B.tolist() == pytest.approx(want_B.tolist(), abs=1e-5)
