"""Training on tokens of high entropy: what is measured, when, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from truing.context import Context, Json, use
from truing.core.objective import Measurements
from truing.core.rl.answers import Group
from truing.core.rl.online_task import OnlineTask
from truing.core.training import State
from truing.method import methods
from truing.models import Model
from truing.tables import Table

PROMPTS = Table("prompt", [{"prompt": f"say {w}"} for w in "lime oak rain stone".split()])
SMALL: dict[str, object] = {
    "steps": 2, "batch": 4, "answers": 3, "max_tokens": 6, "lr": 2e-2, "passes": 2,
    "minibatches": 2, "rewards": {"letters": {"use": "share_of", "letters": "abcdefghijklmnop"}},
}  # fmt: skip


def entropies(module: nn.Module, group: Group) -> list[list[float]]:
    """-sum p log p at each token of each answer, by transformers alone on one row at a time."""
    made: list[list[float]] = []
    for answer in group.answers:
        ids = torch.tensor([[*group.prompt, *answer.ids]])
        with torch.no_grad():
            logp_TV = module(input_ids=ids).logits[0].double().log_softmax(-1)
        rows = logp_TV[len(group.prompt) - 1 : -1]
        made.append((-(rows.exp() * rows).sum(-1)).tolist())
    return made


def run(model: Model, folder: Path, **more: object) -> list[dict[str, Json]]:
    with use(Context(seed=4, folder=folder)) as context:
        methods["grpo"](model, PROMPTS, **{**SMALL, **more})
    return [m for m in context.metrics if "step" in m]


@pytest.fixture
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[list[list[float]]], Measurements]]:
    """Of each rollout that is made, the entropies at that time, and what the method is given."""
    made: list[tuple[list[list[list[float]]], Measurements]] = []
    know = OnlineTask._known

    def seen(task: OnlineTask, groups: Sequence[Group], given: State) -> Measurements:
        r = know(task, groups, given)
        made.append(([entropies(task.module, g) for g in groups], r))
        return r

    monkeypatch.setattr(OnlineTask, "_known", seen)
    return made


def test_entropies_are_those_that_the_answers_were_drawn_with(
    model: Model, tmp_path: Path, known: list[tuple[list[list[list[float]]], Measurements]]
) -> None:
    steps = run(model, tmp_path, entropy_share=0.4)
    assert len(steps) == 8 and len(known) == 2  # measured once a rollout, for its four updates
    for (by_hand, r), step in zip(known, steps[::4], strict=True):
        got: Tensor = r["old_entropy"]
        every = sorted((x for group in by_hand for row in group for x in row), reverse=True)
        for u, group in enumerate(by_hand):
            for k, row in enumerate(group):
                assert got[u, k, : len(row)].tolist() == pytest.approx(row, abs=1e-4)
                assert got[u, k, len(row) :].abs().sum() == 0
        kept = int(0.4 * (len(every) - 1)) + 1
        assert step["high_entropy_from"] == pytest.approx(every[kept - 1], abs=1e-4)
        # First tokens of a group are drawn from one distribution, and stay together.
        assert kept / len(every) <= float(str(step["high_entropy"])) < (kept + 3) / len(every)
    first = [row[0] for row in known[0][0][0]]
    assert first == pytest.approx([first[0]] * 3)


def test_all_tokens_cost_nothing(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, sweeps = OnlineTask._sweep, [0]

    def counting(task: OnlineTask, *given: object) -> State:
        sweeps[0] += 1
        return sweep(task, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(OnlineTask, "_sweep", counting)
    plain = run(model, tmp_path / "a")
    assert sweeps == [0] and not any("high_entropy" in step for step in plain)
    some = run(model, tmp_path / "b", entropy_share=0.4)
    assert sweeps == [2]
    assert [s["reward"] for s in (plain[0], some[0])] == [plain[0]["reward"]] * 2
    norms = [[float(str(s["grad_norm"])) for s in steps[:4]] for steps in (plain, some)]
    assert any(norms[0]) and any(norms[1]) and norms[0] != norms[1]


def test_beside_log_probabilities_that_are_measured(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In shorter types the log-probabilities of sampling are measured again, in the same pass."""
    measured, found = OnlineTask._measured, list[State]()

    def rough(task: OnlineTask, groups: Sequence[Group]) -> State:
        task.exact = False
        found.append(measured(task, groups))
        return found[-1]

    monkeypatch.setattr(OnlineTask, "_measured", rough)
    run(model, tmp_path, steps=1, passes=1, minibatches=1, entropy_share=0.4)
    assert set(found[0]) == {"logp", "old_entropy"}
