"""A head on frozen states: its optimum in closed form, by gradients, and by many plain steps."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from objective_numbers import sigma
from pair_numbers import PAIRS, plain_states
from torch import Tensor

from truing.context import Context, use
from truing.core.judging.rewards import score_model
from truing.core.objective import Measurements
from truing.core.passes.scoring import ScoreHead, sort_of
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.tables import Row, Table
from truing.train.reward.bradley_terry import bradley_terry
from truing.train.reward.embedding_reward import fitted, loss, slopes

RIDGE = 0.1


def fit(model: Model, rows: list[Row], folder: Path, seed: int = 0, **how: float) -> Model:
    with use(Context(folder=folder, seed=seed)):
        made = methods["embedding_reward"](model, Table("pair", rows), **how)
    assert isinstance(made, Model)
    return made


def plain_loss(w_D: Tensor, state_NKD: Tensor, margin_N: Tensor) -> Tensor:
    """The loss of bradley_terry on these states, and the penalty."""
    scores = (state_NKD @ w_D)[..., None]
    m = Measurements(torch.ones_like(scores), {"scores": scores}, {"margin": margin_N})
    z_ND = state_NKD[:, 0] - state_NKD[:, 1]
    return bradley_terry(m).total() + RIDGE / 2 * z_ND.square().mean() * w_D.square().sum()


def root(f: Callable[[float], float]) -> float:
    """Where a falling function is 0, between 0 and 50."""
    low, high = 0.0, 50.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) > 0 else (low, middle)
    return low


def weight_of(model: Model) -> Tensor:
    return model.load_module().extra["reward_head.weight"][0].double()


def test_the_gradient_is_0_at_what_is_fitted() -> None:
    source = np.random.default_rng(0)
    for ridge in (1e-6, 1e-2, 10.0):
        z, margin = source.normal(size=(30, 8)) * 3, source.normal(size=30)
        w = fitted(z, margin, ridge)
        leaf = torch.tensor(w, requires_grad=True)
        zero = torch.zeros(30, 1, dtype=torch.float64)
        scores = torch.cat([(torch.tensor(z) @ leaf)[:, None], zero], 1)[..., None]
        m = Measurements(torch.ones_like(scores), {"scores": scores},
                         {"margin": torch.tensor(margin)})  # fmt: skip
        total = bradley_terry(m).total() + ridge / 2 * leaf.square().sum()
        (slope,) = torch.autograd.grad(total, leaf)
        assert float(slope.norm()) < 1e-8
        assert loss(w, z, margin, ridge) == pytest.approx(float(total.detach()), rel=1e-12)
        for _ in range(20):  # nothing around it is better
            assert loss(w + 0.1 * source.normal(size=8), z, margin, ridge) > float(total.detach())


def test_slopes_are_differences_of_the_loss() -> None:
    source = np.random.default_rng(1)
    z, margin, w = source.normal(size=(9, 3)), source.normal(size=9), source.normal(size=3)
    first, second = slopes(w, z, margin, 0.3)
    for i, step in enumerate(np.eye(3) * 1e-5):
        up, down = loss(w + step, z, margin, 0.3), loss(w - step, z, margin, 0.3)
        assert (up - down) / 2e-5 == pytest.approx(first[i], abs=1e-7)
        change = slopes(w + step, z, margin, 0.3)[0] - slopes(w - step, z, margin, 0.3)[0]
        assert (change / 2e-5).tolist() == pytest.approx(second[i].tolist(), abs=1e-7)


def test_far_from_the_optimum_steps_are_halved() -> None:
    """Where the loss is nearly straight full steps leap to and fro for ever: 667, -333, 667, ..."""
    for z, margin, least, most in (
        ([[1.0], [1.0], [-1.0]], [200.0, 200.0, 0.0], 198.0, 199.0),
        ([[1.0], [-1.0]], [30.0, -30.0], 29.0, 30.0),
    ):
        w = fitted(np.array(z), np.array(margin), 1e-3)
        first, _ = slopes(w, np.array(z), np.array(margin), 1e-3)
        assert abs(first[0]) < 1e-8 and least < w[0] < most


@pytest.mark.parametrize("ridge", [1e-6, 6.4])
def test_one_pair_of_which_one_label_in_four_is_turned(
    ridge: float, tiny_path: Path, tmp_path: Path
) -> None:
    """The share of labels is the sigmoid of the margin, but for the penalty, which is known."""
    one: Row = {"prompt": "say oak", "chosen": "oak", "rejected": "ash?"}
    turned: Row = {"prompt": "say oak", "chosen": "ash?", "rejected": "oak"}
    rows = [{**r, "n": i} for i, r in enumerate([one, one, turned, one])]
    made = fit(Model.open(tiny_path), rows, tmp_path, ridge=ridge)
    asked: list[Row] = [{"prompt": "say oak", "completion": t} for t in ("oak", "ash?")]
    a, b = score_model(made, asked)
    want = root(lambda s: (3 - 4 * sigma(s)) / 4 - ridge * s / 128)
    assert a - b == pytest.approx(want, abs=2e-4)
    assert ridge > 1 or want == pytest.approx(math.log(3), abs=1e-5)
    assert a + b == pytest.approx(0, abs=2e-4)  # the mean score of all answers


def test_it_is_where_many_steps_of_bradley_terry_lead(tiny_path: Path, tmp_path: Path) -> None:
    model = Model.open(tiny_path)
    margins = [0.5 * (i % 3) for i in range(len(PAIRS))]
    rows: list[Row] = [{**r, "margin": m} for r, m in zip(PAIRS, margins, strict=True)]
    made = fit(model, rows, tmp_path, ridge=RIDGE)
    state_NKD, margin_N = plain_states(model, PAIRS), torch.tensor(margins).double()
    w_D = torch.zeros(128, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.LBFGS([w_D], max_iter=400, tolerance_grad=1e-10, tolerance_change=0,
                                line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> Tensor:
        descent.zero_grad()
        total = plain_loss(w_D, state_NKD, margin_N)
        total.backward()
        return total

    descent.step(closure)
    found_D = weight_of(made).requires_grad_()
    assert torch.allclose(found_D, w_D, atol=1e-3 * float(w_D.detach().abs().max()))
    total = plain_loss(found_D, state_NKD, margin_N)
    (slope_D,) = torch.autograd.grad(total, found_D)
    start_D = torch.zeros_like(w_D).requires_grad_()
    (first_D,) = torch.autograd.grad(plain_loss(start_D, state_NKD, margin_N), start_D)
    assert float(slope_D.norm()) < 1e-4 * float(first_D.norm())


def test_it_is_a_reward_model_like_any_other(tiny_path: Path, tmp_path: Path) -> None:
    model = Model.open(tiny_path)
    made = fit(model, PAIRS, tmp_path / "a", seed=1)
    assert sort_of(made) == "answers" and made.key == fit(model, PAIRS, tmp_path / "b", seed=2).key
    before, after = model.folded(), made.folded()
    assert all(torch.equal(before[n], after[n]) for n in before)
    head = made.load_module().extra
    state_NKD = plain_states(model, PAIRS)
    want_NK = state_NKD @ weight_of(made) + float(head["reward_head.bias"])
    sides = [[{"prompt": r["prompt"], "completion": r[s]} for r in PAIRS]
             for s in ("chosen", "rejected")]  # fmt: skip
    again = Model.load(made.save(tmp_path / "saved"))
    for k, rows in enumerate(sides):
        assert score_model(again, rows) == pytest.approx(want_NK[:, k].tolist(), abs=1e-3)
    assert float(want_NK.mean()) == pytest.approx(0, abs=1e-3)
    assert (want_NK[:, 0] > want_NK[:, 1]).all()  # twelve pairs in 128 dimensions


def test_pairs_that_prefer_nothing_are_left_out(tiny_path: Path, tmp_path: Path) -> None:
    model = Model.open(tiny_path)
    nothing: list[Row] = [{"prompt": "p", "chosen": "a", "rejected": " a"},
                          {"prompt": "p", "chosen": "", "rejected": "a"}]  # fmt: skip
    with use(Context(folder=tmp_path / "a")) as context:
        made = methods["embedding_reward"](model, Table("pair", [*PAIRS, *nothing]))
    assert isinstance(made, Model)
    assert context.metrics[-1]["left_out"] == 2 and context.metrics[-1]["rows"] == len(PAIRS)
    assert torch.equal(weight_of(made), weight_of(fit(model, PAIRS, tmp_path / "b")))
    with pytest.raises(InputError, match="no pair has two answers that differ"):
        fit(model, nothing, tmp_path / "c")


def test_faults_are_named(tiny_path: Path, tmp_path: Path) -> None:
    model = Model.open(tiny_path)
    with pytest.raises(InputError, match=r"row 2.*'margin'|'margin'.*row 2"):
        fit(model, [PAIRS[0], {**PAIRS[1], "margin": "much"}], tmp_path / "a")
    with pytest.raises(InputError, match="setting 'ridge' must be above 0"):
        fit(model, PAIRS, tmp_path / "b", ridge=0.0)
    values = ScoreHead(128, 8).added_to(model, tmp_path / "values")
    with pytest.raises(InputError, match="head of values"):
        fit(values, PAIRS, tmp_path / "c")


def ruled(source: random.Random, n: int) -> list[Row]:
    """Pairs of one rule: the answer that names a colour is the better one."""
    colours, others = ["red", "blue", "green"], ["big", "soft", "round", "old"]
    things = ["hat", "cup", "door", "coat", "book", "lamp"]
    made: list[Row] = []
    for i in range(n):
        sides = [f"the {source.choice(words)} {source.choice(things)}" for words in
                 (colours, others)]  # fmt: skip
        made.append({"prompt": f"what is it {i}", "chosen": sides[0], "rejected": sides[1]})
    return made


def test_a_rule_is_learnt_from_200_pairs(tiny_path: Path, tmp_path: Path) -> None:
    """Three of four unseen pairs at least, even on states of a model that was never trained."""
    source = random.Random(0)
    made = fit(Model.open(tiny_path), ruled(source, 200), tmp_path)
    held = ruled(source, 100)
    chosen, rejected = (
        score_model(made, [{"prompt": r["prompt"], "completion": r[s]} for r in held])
        for s in ("chosen", "rejected")
    )
    right = sum(a > b for a, b in zip(chosen, rejected, strict=True))
    assert right >= 75
