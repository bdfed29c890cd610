"""Which pairs to label next: each measure by hand, the greedy design against brute force."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_numbers import PAIRS, plain_states

from truing.context import Context, use
from truing.core.judging.rewards import score_model
from truing.core.passes import pair_states
from truing.core.passes.pair_states import Numbers
from truing.core.passes.scoring import ScoreHead
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.select.informative_pairs import design, disagreement, entropy
from truing.tables import Row, Table
from truing.train.reward.embedding_reward import fitted


def added(z_ND: Numbers, weight_N: Numbers, some: tuple[int, ...], ridge: float = 1.0) -> float:
    """What rows add to log det A, by determinants."""
    at = list(some)
    a_DD = ridge * np.eye(z_ND.shape[1])
    whole = a_DD + (z_ND[at].T * weight_N[at]) @ z_ND[at]
    return float(np.linalg.slogdet(whole)[1] - np.linalg.slogdet(a_DD)[1])


def h(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def test_entropy_by_hand() -> None:
    found = entropy(np.array([0.0, math.log(3), -math.log(3), 800.0]))
    assert found.tolist() == pytest.approx([math.log(2), h(0.75), h(0.75), 0.0], abs=1e-12)


def test_disagreement_by_hand() -> None:
    three = math.log(3)
    found = disagreement(np.array([[three, three, 0.0, 900.0], [-three, three, 0.0, -900.0]]))
    want = [math.log(2) - h(0.75), 0.0, 0.0, math.log(2)]
    assert found.tolist() == pytest.approx(want, abs=1e-9)


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=1, max_size=4))
def test_disagreement_is_part_of_the_entropy(margins: list[tuple[float, float]]) -> None:
    found = disagreement(np.array(margins))
    assert (found >= 0).all() and (found <= math.log(2) + 1e-9).all()


def test_design_by_hand() -> None:
    """The second row is not the largest one left, which is nearly the first again."""
    z, quarter = np.array([[3.0, 0.0], [0.0, 2.0], [2.9, 0.1], [1.0, 1.0]]), np.full(4, 0.25)
    order, gains = design(z, quarter, 2, np.eye(2))
    assert order == [0, 1]
    assert gains == pytest.approx([math.log(1 + 9 / 4), math.log(1 + 4 / 4)])
    pairs = list(itertools.combinations(range(4), 2))
    assert max(pairs, key=lambda s: added(z, quarter, s)) == (0, 1)
    # Of the first direction all is known already, and of a row that nobody doubts nothing comes.
    assert design(z, quarter, 1, np.diag([1e-6, 1.0]))[0] == [1]
    assert design(z, np.array([0.0, 0.25, 0.25, 0.25]), 1, np.eye(2))[0] == [2]
    assert design(z[[1, 1, 0]], quarter[:3], 3, np.eye(2))[0] == [2, 0, 1]  # equal: the first


@pytest.mark.parametrize("seed", range(5))
def test_each_choice_is_the_best_one_by_determinants(seed: int) -> None:
    source = np.random.default_rng(seed)
    z, weight = source.normal(size=(9, 4)), source.uniform(0.05, 0.25, 9)
    order, gains = design(z, weight, 9, np.eye(4) / 0.3)
    assert sorted(order) == list(range(9))
    for k in range(9):
        before = tuple(order[:k])
        known = added(z, weight, before, 0.3)
        each = {i: added(z, weight, (*before, i), 0.3) - known for i in set(range(9)) - {*before}}
        assert order[k] == max(each, key=each.__getitem__)
        assert gains[k] == pytest.approx(each[order[k]], abs=1e-9)
    for n in (2, 3):
        best = max(added(z, weight, s, 0.3) for s in itertools.combinations(range(9), n))
        assert sum(gains[:n]) >= (1 - 1 / math.e) * best


def accuracy(w_D: Numbers, z_ND: Numbers) -> float:
    return float((z_ND @ w_D > 0).mean())


def test_it_takes_fewer_labels_than_chance_does() -> None:
    """At nine tenths of the labels at least as right; ten draws of states, labels told by sigmoid.

    On states like these it takes seven tenths.
    """
    found: dict[tuple[str, int], list[float]] = {}
    for seed in range(10):
        source = np.random.default_rng(seed)
        pool, w_D, held = (source.normal(size=s) for s in ((300, 16), 16, (500, 16)))
        told = np.where(source.random(300) < 1 / (1 + np.exp(-2 * pool @ w_D)), 1.0, -1.0)
        labelled, held = pool * told[:, None], held * np.sign(held @ w_D)[:, None]
        chosen, _ = design(pool, np.full(300, 0.25), 54, np.eye(16))
        by_chance = source.permutation(300).tolist()
        for name, order, n in (("design", chosen, 54), ("chance", by_chance, 54),
                               ("chance", by_chance, 60)):  # fmt: skip
            fit = fitted(labelled[order[:n]], np.zeros(n), 0.02)
            found.setdefault((name, n), []).append(accuracy(fit, held))
    mean = {k: sum(v) / len(v) for k, v in found.items()}
    assert mean["design", 54] > mean["chance", 60] > mean["chance", 54] > 0.8


# On a model


def choose(folder: Path, rows: list[Row], model: Model, **given: object) -> Table:
    with use(Context(folder=folder)):
        made = methods["informative_pairs"](Table("pair", rows), model, **given)
    assert isinstance(made, Table)
    return made


def prompts(rows: Table | list[Row]) -> list[str]:
    return [str(r["prompt"]) for r in rows]


def headed(model: Model, seed: int, folder: Path) -> Model:
    """A reward model with a head of its own."""
    head = ScoreHead(128)
    with torch.no_grad():
        head.weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed))
    return head.added_to(model, folder / f"head-{seed}", "answers")


@pytest.fixture(scope="module")
def base(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


def told(table: Table) -> list[float]:
    return [float(str(r["information"])) for r in table]


def margins_of(model: Model) -> Numbers:
    """One pair after the other."""
    sides = [[score_model(model, [{"prompt": r["prompt"], "completion": r[s]}])[0] for r in PAIRS]
             for s in ("chosen", "rejected")]  # fmt: skip
    return np.array(sides[0]) - np.array(sides[1])


def test_by_what_reward_models_say(base: Model, tmp_path: Path) -> None:
    one, two = (headed(base, seed, tmp_path) for seed in (1, 2))
    margin = np.stack([margins_of(one), margins_of(two)])
    made = choose(tmp_path / "a", PAIRS, one, n=5, by="entropy")
    order = np.argsort(np.abs(margin[0]))[:5]
    assert prompts(made) == [PAIRS[i]["prompt"] for i in order]
    want = [h(1 / (1 + math.exp(-m))) for m in margin[0][order]]
    assert told(made) == pytest.approx(want, abs=1e-5)
    assert all(r["lineage"]["filters"] == ["informative_pairs by entropy"] for r in made)  # type: ignore[index]
    made = choose(tmp_path / "b", PAIRS, one, others={"two": two}, n=5, by="disagreement")
    p = 1 / (1 + np.exp(-margin))
    gain = [h(p[:, i].mean()) - (h(p[0, i]) + h(p[1, i])) / 2 for i in range(len(PAIRS))]
    assert prompts(made) == [PAIRS[i]["prompt"] for i in np.argsort(gain)[::-1][:5]]
    assert told(made) == pytest.approx(sorted(gain, reverse=True)[:5], abs=1e-5)


def brute(z: Numbers, weight: Numbers, n: int, known: Numbers, ridge: float) -> list[int]:
    """The greedy design by determinants, n at a time; `known` is what A has already."""
    chosen: list[int] = []
    a = ridge * np.eye(z.shape[1]) + known
    for _ in range(n):
        gains = [np.linalg.slogdet(a + w * np.outer(x, x))[1] for x, w in zip(z, weight)]
        best = max((i for i in range(len(z)) if i not in chosen), key=lambda i: gains[i])
        chosen.append(best)
        a = a + weight[best] * np.outer(z[best], z[best])
    return chosen


@pytest.mark.parametrize("with_head", [False, True])
def test_by_design(with_head: bool, base: Model, tmp_path: Path) -> None:
    """States by transformers, the choice by determinants; with labels and without."""
    model = headed(base, 3, tmp_path) if with_head else base
    states = plain_states(base, PAIRS).numpy()
    z = states[:, 0] - states[:, 1]
    weight = np.full(len(z), 0.25)
    if with_head:
        p = 1 / (1 + np.exp(-margins_of(model)))
        weight = p * (1 - p)
        assert weight.max() > 1.2 * weight.min()  # else it would not be seen
    scaled = z / math.sqrt((z[4:] ** 2).mean())
    none = np.zeros((128, 128))
    known = (scaled[:4].T * weight[:4]) @ scaled[:4]
    for labelled, a in ((None, none), (Table("pair", PAIRS[:4]), known)):
        made = choose(tmp_path / str(labelled is None), PAIRS[4:], model, labelled=labelled,
                      n=6, ridge=0.5)  # fmt: skip
        want = brute(scaled[4:], weight[4:], 6, a, 0.5)
        assert prompts(made) == [PAIRS[4 + i]["prompt"] for i in want]
        assert told(made) == sorted(told(made), reverse=True)


def test_what_is_labelled_is_not_asked_again(base: Model, tmp_path: Path) -> None:
    first = choose(tmp_path / "a", PAIRS, base, n=1)
    again = choose(tmp_path / "b", PAIRS, base, labelled=first, n=1, ridge=0.01)
    assert prompts(again) != prompts(first)


def test_pairs_that_ask_nothing_are_never_chosen(base: Model, tmp_path: Path) -> None:
    nothing: list[Row] = [{"prompt": "p", "chosen": "a ", "rejected": "a"},
                          {"prompt": "q", "chosen": "a", "rejected": ""}]  # fmt: skip
    rows = [*nothing, *PAIRS]
    one = headed(base, 1, tmp_path)
    for by, model in (("design", base), ("entropy", one)):
        made = choose(tmp_path / by, rows, model, n=len(PAIRS), by=by)
        assert sorted(prompts(made)) == sorted(prompts(PAIRS))
    with pytest.raises(InputError, match=f"13 of 12.*Set n to {len(PAIRS)} or less"):
        choose(tmp_path / "c", rows, base, n=13)


def test_a_row_that_cannot_be_read_is_named(tiny_path: Path, tmp_path: Path) -> None:
    """Beyond the first rows that are read at once, and behind some that are left out."""
    model, nothing = Model.open(tiny_path), {"prompt": "p", "chosen": "a", "rejected": "a"}
    rows = [nothing, *({"prompt": f"p {i}", "chosen": "a", "rejected": "b"} for i in range(38))]
    rows[35] = {"prompt": "p", "chosen": "a", "rejected": "b" * 2048}
    for by, given_model in (("design", model), ("entropy", headed(model, 1, tmp_path))):
        with pytest.raises(InputError, match="does not fit into the model's context") as error:
            choose(tmp_path / by, rows, given_model, n=2, by=by)
        assert error.value.where.endswith("row 36")


def test_a_stopped_step_reads_what_it_had_finished(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = headed(Model.open(tiny_path), 1, tmp_path)
    for by, made_by in (("design", "by_tree"), ("entropy", "score_model")):
        first = choose(tmp_path / by, PAIRS, model, n=5, by=by)
        with monkeypatch.context() as patch:
            patch.setattr(pair_states, made_by, lambda *_: pytest.fail("is read from the journal"))
            again = choose(tmp_path / by, PAIRS, model, n=5, by=by)
        assert again.key == first.key


def test_the_same_is_chosen_whatever_the_seed(base: Model, tmp_path: Path) -> None:
    made = [prompts(choose(tmp_path / str(i), PAIRS, base, n=4)) for i in range(2)]
    with use(Context(folder=tmp_path / "c", seed=9)):
        other = methods["informative_pairs"](Table("pair", PAIRS), base, n=4)
    assert made[0] == made[1] == prompts(other)  # type: ignore[arg-type]


def test_inputs_that_are_missing_or_count_for_nothing(base: Model, tmp_path: Path) -> None:
    one = headed(base, 1, tmp_path)
    steps = ScoreHead(128).added_to(base, tmp_path / "steps", "steps")
    table = Table("pair", PAIRS[:2])
    for model, given_, said in (
        (one, {"by": "disagreement"}, "does not disagree"),
        (one, {"by": "entropy", "others": {"a": one}}, "'others' counts for nothing by entropy"),
        (one, {"by": "entropy", "labelled": table}, "'labelled' counts for nothing by entropy"),
        (base, {"by": "entropy"}, "rewards by what was changed in it, and nothing was"),
        (steps, {"by": "design"}, "scores the steps of answers"),
    ):
        with pytest.raises(InputError, match=said):
            choose(tmp_path / "x", PAIRS, model, n=2, **given_)
