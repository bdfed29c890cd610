"""Accuracy on pairs against win rate over runs, by hand."""

from __future__ import annotations

import pytest

from truing.errors import InputError
from truing.evaluate.discrimination import discrimination
from truing.reports import Report
from truing.tables import Table

# log-ratios (chosen, rejected) of two pairs, verdicts on four prompts
RUNS = {
    "start": ([(0.0, 0.0), (0.0, 0.0)], [0.5, 0.5, 0.5, 0.5]),
    "on": ([(1.0, 2.0), (-1.0, -3.0)], [1.0, 1.0, 1.0, 0.0]),
    "off1": ([(-2.0, -3.0), (-4.0, -5.0)], [1.0, 0.0, 0.0, 0.0]),
    "off2": ([(-1.0, -3.0), (2.0, 2.0)], [0.0, 0.0, 0.0, 0.0]),
}


def told(ratios: list[tuple[float, float]], last: str = "d") -> Report:
    rows = [
        {"prompt": "p", "chosen": c, "rejected": r, "ratio_chosen": a, "ratio_rejected": b}
        for (c, r), (a, b) in zip((("a", "b"), ("c", last)), ratios, strict=True)
    ]
    return Report("seen", [], Table("pair", rows), {"kind": "implicit_preference"})


def won(scores: list[float]) -> Report:
    rows = [{"prompt": p, "score": s} for p, s in zip("abcd", scores, strict=True)]
    return Report("win rate", [], Table("record", rows))


SEEN, WON = {n: told(r) for n, (r, _) in RUNS.items()}, {n: won(w) for n, (_, w) in RUNS.items()}


def test_by_hand() -> None:
    arms = {"online": ["on"], "offline": ["off1", "off2"]}
    made = discrimination(SEEN, WON, arms=arms)
    # online: 0 and 1; offline: 1 and 1, 1 and 1/2.
    assert made.get("accuracy online").value == 0.5
    assert made.get("accuracy offline").value == pytest.approx((1 + 0.75) / 2)
    assert made.get("accuracy online less offline").value == pytest.approx(-0.375)
    assert made.get("win rate online less offline").value == pytest.approx(0.75 - 0.125)
    units = [m.unit for m in made if m.name.endswith(" online less offline")]
    assert units == ["difference of shares"] * 2 + ["nats"]
    assert made.get("chosen offline").value == pytest.approx((-3.0 + 0.5) / 2)
    assert made.get("chosen online").value == 0.0
    assert [made.get("accuracy", n).value for n in ("on", "off1", "off2")] == [0.5, 1.0, 0.75]
    assert made.get("win rate", "off1").value == 0.25
    # Ranks of accuracy 1, 3, 2; of win rate 3, 2, 1: 1 - 6 (4 + 1 + 1) / (3 * 8) = -1/2.
    rho = made.get("rank correlation")
    assert rho.value == pytest.approx(-0.5) and rho.lo <= rho.value <= rho.hi and rho.n == 3
    for measure in made:
        assert measure.lo <= measure.value <= measure.hi, measure
    # Wilson's interval of one and a half of two.
    z, p, n = 1.959963984540054, 0.75, 2
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + (z / (2 * n)) ** 2) ** 0.5
    ends = [(middle + side * half) / (1 + z * z / n) for side in (-1, 1)]
    assert [made.get("accuracy", "off2").lo, made.get("accuracy", "off2").hi] == pytest.approx(ends)


def test_a_few_runs_say_little_of_their_order() -> None:
    ratios = {"a": [(0.0, 1.0)] * 2, "b": [(1.0, 0.0), (0.0, 1.0)], "c": [(1.0, 0.0)] * 2}
    wins = {"a": [0.0] * 4, "b": [1.0, 1.0, 0.0, 0.0], "c": [1.0] * 4}
    seen, rates = {n: told(r) for n, r in ratios.items()}, {n: won(w) for n, w in wins.items()}
    rho = discrimination(seen, rates, arms={"x": ["a", "b"], "y": ["c"]}).get("rank correlation")
    assert rho.value == rho.hi == 1 and rho.lo < 1
    for name, report in seen.items():
        report.meta["reference_key"] = name
    with pytest.raises(InputError, match="input 'preferences': reports of other 'reference_key'"):
        discrimination(seen, rates, arms={"x": ["a", "b"], "y": ["c"]})


def test_an_arm_against_itself() -> None:
    made = discrimination(SEEN, WON, arms={"a": ["on", "start"], "b": ["on", "start"]})
    for name in ("accuracy", "win rate", "chosen"):
        gap = made.get(f"{name} a less b")
        assert (gap.value, gap.lo, gap.hi) == (0.0, 0.0, 0.0)
    assert made.get("accuracy", "start").value == 0.5


def test_mistakes() -> None:
    arms = {"online": ["on"], "offline": ["off1"]}
    with pytest.raises(InputError, match="an accuracy and a win rate"):
        discrimination(SEEN, {"on": WON["on"]}, arms=arms)
    with pytest.raises(InputError, match="setting 'arms'"):
        discrimination(SEEN, WON, arms={"online": ["on"]})
    with pytest.raises(InputError, match="unknown run 'off7'"):
        discrimination(SEEN, WON, arms={**arms, "third": ["off7"]})
    with pytest.raises(InputError, match="same pairs"):
        discrimination({**SEEN, "off1": told(RUNS["off1"][0], "x")}, WON, arms=arms)
    with pytest.raises(InputError, match="implicit_preference"):
        discrimination({**SEEN, "off1": WON["off1"]}, WON, arms=arms)
