"""What is measured of a reward: by hand, by enumeration, and on a model's own answers."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from truing.context import Context, use
from truing.core.drawing import Completion
from truing.core.judging.reward_quality import (
    Compared,
    accuracy_lost,
    alike,
    best_of,
    best_of_measures,
    calibration_error,
    kl_best_of,
    lost_past_peak,
    order_measures,
    unidentified,
)
from truing.core.stats import SEED
from truing.errors import InputError
from truing.evaluate import reward_diagnostics as measured
from truing.method import methods
from truing.models import Model
from truing.reports import Report
from truing.tables import Row, Table


def test_divergence_of_the_best() -> None:
    assert kl_best_of(1) == 0.0
    assert kl_best_of(4) == pytest.approx(math.log(4) - 0.75)


def test_best_of_by_enumeration() -> None:
    """The mean over all choices of n draws, of equal proxies the mean."""
    proxy, gold = [0.5, 2.0, -1.0, 2.0, 0.0], [1.0, 3.0, -2.0, 7.0, 0.25]
    for n in range(1, 6):
        found: list[float] = []
        for some in itertools.combinations(range(5), n):
            top = max(proxy[i] for i in some)
            tied = [gold[i] for i in some if proxy[i] == top]
            found.append(sum(tied) / len(tied))
        want = sum(found) / len(found)
        assert best_of(np.array(proxy), np.array(gold), n) == pytest.approx(want), n
    assert best_of(np.array(proxy), np.array(proxy), 5) == 2.0


def test_calibration_by_hand() -> None:
    # sure .731 right, .731 wrong, .881 right, and .5 on a tie, which is half right.
    sure = [1 / (1 + math.exp(-m)) for m in (1.0, 1.0, 2.0)]
    bins = abs(1 - sure[0] - sure[1]) + abs(1 - sure[2]) + 0.0
    margins = np.array([1.0, -1.0, 2.0, 0.0])
    assert calibration_error(margins) == pytest.approx(bins / 4)
    assert calibration_error(np.array([800.0, 900.0])) == pytest.approx(0.0)


def test_what_comparisons_leave_open() -> None:
    scores = np.array([[1.0, 3.0], [5.0, 7.0]])
    # Variances, of samples, 2 within either prompt and 8 of the means, 2 / 2 of it by the draws.
    assert unidentified(scores) == pytest.approx(7 / (7 + 2))
    assert unidentified(np.array([[0.0, 1.0], [0.0, 1.0]])) == 0.0
    assert unidentified(np.ones((2, 2))) == unidentified(scores[:1]) == 0.0
    assert unidentified(np.array([[1.0, 1.0], [2.0, 2.0]])) == 1.0


def test_scores_that_know_nothing_of_the_prompt_leave_nothing_open() -> None:
    source = np.random.default_rng(3)
    found = [unidentified(source.normal(size=(200, 4))) for _ in range(50)]
    assert np.mean(found) < 0.02  # not 1/4
    prompts = source.normal(size=(4000, 1))
    assert unidentified(prompts + source.normal(size=(4000, 4))) == pytest.approx(0.5, abs=0.03)


def test_order_of_two_rewards() -> None:
    one, two = np.array([1.0, 2.0, 3.0]), np.array([1.0, 1.0, 0.0])
    # (0,1): a tie of one; (0,2) and (1,2) the other way.
    assert alike(one, two) == pytest.approx(0.5 / 3)
    assert alike(one, 5 * one + 7) == 1.0 and alike(one, -one) == 0.0


def test_share_of_the_others_that_lose() -> None:
    side = Compared(np.array([1.0, 0.0]), np.array([[0.0, 1.0, 2.0, -1.0], [-1.0, -2, -3, -4]]))
    assert side.right.tolist() == [(1 + 0.5 + 0 + 1) / 4, 1.0]
    assert side.margins[1].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_over_optimisation_is_seen() -> None:
    """Gold that rises with the proxy up to the middle and falls behind it peaks and is lost."""
    source = np.random.default_rng(0)
    proxy = source.normal(size=(60, 16))
    gold = -((proxy - 0.8) ** 2)
    with use(Context()):
        made = {(m.name, m.category): m for m in best_of_measures(proxy, gold)}
    curve = [made["proxy", f"best of {n}"].value for n in (1, 2, 4, 8, 16)]
    assert curve == sorted(curve) and curve[0] == pytest.approx(proxy.mean())
    assert curve[-1] == pytest.approx(proxy.max(1).mean())
    assert 1 < made["peak of gold", ""].value < 16
    lost = made["gold lost past the peak", ""]
    assert 0 < lost.lo <= lost.value <= lost.hi
    assert made["divergence", "best of 8"].value == pytest.approx(math.log(8) - 7 / 8)
    with use(Context()):
        sound = {(m.name, m.category): m for m in best_of_measures(proxy, 2 * proxy + 1)}
    assert sound["gold lost past the peak", ""].hi == 0 and sound["peak of gold", ""].value == 16
    assert sound["proxy with gold", ""].value == pytest.approx(1.0)
    assert sum(m.name == "gold" for m in best_of_measures(proxy, None)) == 0


def test_loss_from_the_peak_of_the_other_half() -> None:
    # One half of the rows peaks at the second size, the other at the first, wherever they stand.
    gold = np.array([[0.0, 2.0, 1.0], [4.0, 0.0, 3.0], [1.0, 3.0, 0.0], [5.0, 1.0, 1.0]])
    want = np.array([0.0 - 1.0, 0.0 - 3.0, 1.0 - 0.0, 1.0 - 1.0])
    drawn = np.random.default_rng(SEED).permutation(4)
    there, wanted = np.empty_like(gold), np.empty_like(want)
    there[drawn], wanted[drawn] = gold, want
    assert lost_past_peak(there).tolist() == wanted.tolist()
    assert lost_past_peak(gold[:1]).tolist() == [0.0]


def test_a_gold_that_only_wavers_loses_nothing() -> None:
    source = np.random.default_rng(5)
    found = [lost_past_peak(source.normal(size=(20, 5))).mean() for _ in range(400)]
    assert abs(np.mean(found)) < 3 * np.std(found) / 20
    assert np.mean(np.array(found) < 0) > 0.3  # not a loss by construction
    proxy, gold = source.normal(size=(2, 30, 8))
    with use(Context(seed=2)):
        made = {(m.name, m.category): m for m in best_of_measures(proxy, gold)}
    lost, peak = made["gold lost past the peak", ""], made["peak of gold", ""]
    assert lost.lo < 0 < lost.hi
    assert peak.lo in (1, 2, 4, 8) and peak.lo <= peak.value <= peak.hi and peak.lo < peak.hi


def test_each_value_lies_in_its_interval() -> None:
    source = np.random.default_rng(9)
    for n in range(6, 26):
        side = Compared(source.normal(size=n), source.normal(size=(n, 2)))
        measures = [*order_measures(side, ""), accuracy_lost(side, side)]
        if n % 5 == 0:
            measures += best_of_measures(*source.normal(size=(2, n, 4)))
        assert all(m.lo <= m.value <= m.hi for m in measures), n
    right = order_measures(Compared(np.ones(8), np.zeros((8, 1))), "")[0]
    assert right.value == right.hi == 1 and right.lo == pytest.approx(0.6756, abs=1e-4)


DRAWN = ["a", "bb", "ccc", "dddd"]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward of the number of letters, and a policy that says four words."""

    def generate(model: object, prompts: list[object], **how: object) -> list[list[Completion]]:
        assert how["n"] == 4
        return [[Completion(f"{w} ", finish="stop") for w in DRAWN] for _ in prompts]

    def scores(reward: object, rows: list[Row]) -> list[float]:
        return [float(len(str(r["completion"]))) for r in rows]

    monkeypatch.setattr(measured, "generate", generate)
    monkeypatch.setattr(measured, "score_model", scores)
    monkeypatch.setattr(measured, "check_reward_model", lambda *_: None)


def test_of_demonstrations(scored: None, tiny_path: Path, tmp_path: Path) -> None:
    model = Model.open(tiny_path)
    held = Table(
        "example", [{"prompt": "p", "completion": "eeeee"}, {"prompt": "q", "completion": "fff"}]
    )
    far = Table("example", [{"messages": [{"role": "user", "content": "r"},
                                          {"role": "assistant", "content": "gg"}]}])  # fmt: skip
    with use(Context(folder=tmp_path)):
        report = methods["reward_diagnostics"](
            model, held, policy=model, unseen=far, others={"again": model},
            gold={"use": "share_of", "letters": "ab"}, answers=4,
        )  # fmt: skip
    assert isinstance(report, Report)
    found = {(m.name, m.category): m.value for m in report}
    # fff is above a and bb, even with ccc, below dddd.
    assert found["accuracy", ""] == pytest.approx((1 + 2.5 / 4) / 2)
    assert found["accuracy", "unseen"] == pytest.approx(1.5 / 4)
    assert found["accuracy lost on unseen", ""] == pytest.approx((1 + 2.5 / 4) / 2 - 1.5 / 4)
    assert found["margin", ""] == pytest.approx(((4 + 3 + 2 + 1) + (2 + 1 + 0 - 1)) / 8)
    assert found["not identified", ""] == 0.0 and found["ordered alike", "again"] == 1.0
    assert found["proxy", "best of 1"] == 2.5 and found["proxy", "best of 4"] == 4.0
    assert found["gold", "best of 4"] == 0.0 and found["gold", "best of 1"] == 0.5
    assert found["peak of gold", ""] == 1 and found["gold lost past the peak", ""] == 0.5
    assert set(report.meta["checklist"].values()) == {"measured"}  # type: ignore[union-attr]
    assert report.samples is not None and len(report.samples) == 3
    for measure in report:
        assert measure.lo - 1e-12 <= measure.value <= measure.hi + 1e-12, measure


def test_of_pairs_alone(scored: None, tiny_path: Path, tmp_path: Path) -> None:
    model = Model.open(tiny_path)
    pairs = Table("pair", [{"prompt": "p", "chosen": "aaa", "rejected": "b"},
                           {"prompt": "q", "chosen": "a", "rejected": "bb"}])  # fmt: skip
    with use(Context(folder=tmp_path)):
        report = methods["reward_diagnostics"](model, pairs)
        assert isinstance(report, Report)
        assert {m.name for m in report} == {"accuracy", "margin", "calibration error"}
        assert report.get("accuracy").value == 0.5 and report.get("margin").value == 0.5
        assert report.meta["checklist"]["over-optimisation"] == "needs gold"  # type: ignore[index]
        assert "not measured: over-optimisation, which needs gold" in report.meta["notes"]  # type: ignore
        # Margins 2, right, and -1, wrong, are beta times as many nats; s itself stays.
        half = methods["reward_diagnostics"](model, pairs, beta=0.5)
        assert isinstance(half, Report) and half.get("margin").value == 0.5
        sure = [1 / (1 + math.exp(-m)) for m in (1.0, 0.5)]
        assert half.get("calibration error").value == pytest.approx((1 - sure[0] + sure[1]) / 2)
        held = Table("example", [{"prompt": "p", "completion": "x"}])
        with pytest.raises(InputError, match="policy's own answers"):
            methods["reward_diagnostics"](model, held)
        with pytest.raises(InputError, match="policy"):
            methods["reward_diagnostics"](model, pairs, gold={"use": "max_words", "n": 2})
        turns = Table("example", [{"messages": [{"role": "user", "content": "only asks"}]}])
        with pytest.raises(InputError, match=r"ends with an answer"):
            methods["reward_diagnostics"](model, turns, policy=model, answers=4)


def test_a_reward_inferred_from_demonstrations(tiny_path: Path, tmp_path: Path) -> None:
    """The whole way on the tiny model: infer, then measure against its own answers."""
    model = Model.open(tiny_path)
    rows = [{"prompt": f"say {w}", "completion": f"{w} {w}."} for w in ("oak", "ash", "elm", "yew")]
    with use(Context(folder=tmp_path)):
        reward = methods["reward_from_demos"](
            model, Table("example", rows), samples=4, max_tokens=96, steps=2, batch=2, rank=2
        )
        assert isinstance(reward, Model)
        report = methods["reward_diagnostics"](
            reward, Table("example", rows[:2]), policy=model, answers=2, max_tokens=8
        )
    assert isinstance(report, Report) and report.get("accuracy").n == 2
    assert report.get("proxy", "best of 2").value >= report.get("proxy", "best of 1").value
    with pytest.raises(InputError, match="setting 'beta' counts for nothing"):
        methods["reward_diagnostics"](reward, Table("example", rows), policy=model, beta=0.1)
    with (
        use(Context(folder=tmp_path / "none")),
        pytest.raises(InputError, match="nothing was"),
    ):
        methods["reward_diagnostics"](model, Table("example", rows), policy=model)
