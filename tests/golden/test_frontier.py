"""Frontiers of win rate against divergence, and log-ratios of pairs, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from truing.core.tiny import tiny_folder
from truing.errors import InputError
from truing.evaluate.frontier import Run, _measures, _past, best_within, frontier, wins_of
from truing.evaluate.implicit_preference import implicit_preference
from truing.models import Loaded, Model
from truing.reports import Measure, Report
from truing.tables import Table

# divergence, verdicts on four prompts
RUNS = {
    "start": (0.0, [0.5, 0.5, 0.5, 0.5]),
    "on1": (0.8, [1.0, 0.0, 1.0, 1.0]),
    "on2": (3.0, [1.0, 1.0, 1.0, 1.0]),
    "on3": (9.0, [0.0, 1.0, 0.0, 0.0]),
    "off1": (1.5, [1.0, 0.0, 0.0, 1.0]),
    "off2": (7.0, [1.0, 1.0, 0.0, 1.0]),
}
ARMS = {"online": ["start", "on1", "on2", "on3"], "offline": ["start", "off1", "off2"]}


def moved(value: float) -> Report:
    return Report("divergence", [Measure("divergence", value, value, value, 4, "nats")])


def won(scores: list[float], prompts: str = "abcd") -> Report:
    rows = [{"prompt": p, "score": s} for p, s in zip(prompts, scores, strict=True)]
    return Report("win rate", [], Table("record", rows))


def reports(names: list[str]) -> tuple[dict[str, Report], dict[str, Report]]:
    return {n: moved(RUNS[n][0]) for n in names}, {n: won(RUNS[n][1]) for n in names}


def test_best_within_a_budget() -> None:
    """The first and third prompt take the run that wins most on the others, and these on them."""
    runs = [Run(n, k, np.array(s)) for n, (k, s) in RUNS.items() if n.startswith("on")]
    assert best_within(runs, 0.8).tolist() == [1.0, 0.0, 1.0, 1.0]
    assert best_within(runs, 3.0).tolist() == [1.0, 0.0, 1.0, 1.0]  # on2, and on1 for the others
    assert best_within(runs[1:], 3.0).tolist() == [1.0, 1.0, 1.0, 1.0]


def test_choosing_among_equal_runs_gains_nothing() -> None:
    source = np.random.default_rng(4)
    above, lost = 0, list[float]()
    for _ in range(200):
        runs = [Run(str(i), i / 10, source.integers(0, 2, 64) * 1.0) for i in range(11)]
        gap, *_ = _measures({"many": runs[:10], "one": runs[10:]}, [1.0])
        above += gap.lo > 0
        if len(lost) < 60:
            lost.append(_past("many", runs[:7]).value)
    assert above / 200 < 0.08
    assert abs(np.mean(lost)) < 3 * np.std(lost) / 60**0.5
    past = _past("many", runs[:7])
    assert past.lo < past.value < past.hi
    sure = [Run("a", 0.5, np.ones(8)), Run("b", 0.5, np.zeros(8))]
    found = _measures({"a": sure[:1], "b": sure[1:]}, [1.0])
    assert all(m.lo < m.hi for m in found)  # eight of eight are not all there are


def test_frontier_by_hand() -> None:
    made = frontier(*reports([*RUNS]), arms=ARMS)
    # Within 1, 2, 4 and 8 nats, each half of the prompts by the run that wins most on the other:
    # online start and on1 twice, then on2 and on1; offline start, at last off2 and start.
    got = [
        [made.get(f"win rate {arm}", f"{k} nats").value for k in (1, 2, 4, 8)]
        for arm in ("online", "offline")
    ]
    assert got == [[0.5, 0.5, 0.75, 0.75], [0.5, 0.5, 0.5, 0.5]]
    gap = made.get("online less offline")
    assert gap.value == pytest.approx((0.25 + 0.25) / 4)
    assert gap.lo <= gap.value <= gap.hi and gap.lo < gap.hi
    assert gap.unit == "difference of shares"
    assert made.get("past the peak online").value == (1 + 1 - 1 + 1) / 4
    assert made.get("past the peak offline").value == (0 - 0.5 + 0 - 0.5) / 4
    assert made.samples is not None and [r["run"] for r in made.samples][:4] == ARMS["online"]


def test_an_arm_against_itself_has_no_gap() -> None:
    made = frontier(*reports([*RUNS]), arms={"a": ARMS["online"], "b": ARMS["online"]})
    gap = made.get("a less b")
    assert (gap.value, gap.lo, gap.hi) == (0.0, 0.0, 0.0)


def test_budgets_that_an_arm_cannot_keep_are_left_out() -> None:
    arms = {"online": ["on1"], "offline": ["off1", "off2"]}
    made = frontier(*reports([*RUNS]), arms=arms, budgets=[1.0, 2.0])
    assert made.meta["left_out"] == [1.0]
    assert made.meta["notes"] == ["left out: 1 nats, within which an arm has no run"]
    assert made.get("online less offline").value == 0.25
    rates = [made.get(f"win rate {arm}", "2 nats").value for arm in arms]
    assert rates == [0.75, 0.5] and len(made.measures) == 5
    with pytest.raises(InputError, match="no budget"):
        frontier(*reports([*RUNS]), arms=arms, budgets=[0.5])


def test_mistakes() -> None:
    found = reports([*RUNS])
    with pytest.raises(InputError, match="unknown run 'on7'"):
        frontier(*found, arms={"online": ["on7"], "offline": ["off1"]})
    with pytest.raises(InputError, match="two arms"):
        frontier(*found, arms={"online": ["on1"]})
    with pytest.raises(InputError, match="a divergence and a win rate"):
        frontier(found[0], {"on1": won([1.0] * 4)}, arms=ARMS)
    with pytest.raises(InputError, match="same prompts"):
        frontier(found[0], {**found[1], "off2": won([1.0] * 4, "abcx")}, arms=ARMS)


def test_what_was_measured_otherwise_is_refused() -> None:
    divergences, wins = reports([*RUNS])
    for fact, which in (("baseline_key", "a"), ("judge", "j"), ("how", "h")):
        told = {n: Report("w", [], r.samples, {fact: which}) for n, r in wins.items()}
        frontier(divergences, told, arms=ARMS)
        told["off2"].meta[fact] = "other"
        with pytest.raises(InputError, match=f"input 'win_rates': reports of other '{fact}'"):
            frontier(divergences, told, arms=ARMS)
    for name, report in divergences.items():
        report.meta["reference_key"] = name
    with pytest.raises(InputError, match="input 'divergences': reports of other 'reference_key'"):
        frontier(divergences, wins, arms=ARMS)


def test_a_prompt_asked_again_counts_once() -> None:
    scores = {"one": [1.0, 1.0, 0.0, 0.0], "two": [0.0, 1.0, 0.5, 0.5]}
    found, left_out = wins_of({n: won(s, "aabb") for n, s in scores.items()}, "here")
    assert {n: v.tolist() for n, v in found.items()} == {"one": [1.0, 0.0], "two": [0.5, 0.5]}
    assert left_out == 0


def test_verdicts_that_were_not_read() -> None:
    """Of a, b, a, c the second a and c are each unread once: the first a and b stay."""

    def read(scores: dict[int, float]) -> Report:
        rows = [{"prompt": "abac"[i], "completion": "x", "score": s} for i, s in scores.items()]
        unread = [str(i) for i in range(4) if i not in scores]
        return Report("win rate", [], Table("record", rows), {"unparsed": unread})

    a = {"one": read({0: 1.0, 1: 0.0, 2: 0.5}), "two": read({0: 0.0, 1: 0.5, 2: 1.0, 3: 1.0}),
         "three": read({0: 0.5, 1: 0.0, 3: 0.0})}  # fmt: skip
    found, left_out = wins_of(a, "here")
    assert {n: v.tolist() for n, v in found.items()} == {
        "one": [1.0, 0.0], "two": [0.0, 0.5], "three": [0.5, 0.0]
    }  # fmt: skip
    assert left_out == 2
    with pytest.raises(InputError, match="no prompt was judged for all"):
        wins_of({"one": read({0: 1.0, 1: 1.0}), "two": read({3: 1.0})}, "here")
    with pytest.raises(InputError, match="same prompts"):
        wins_of({"one": a["one"], "other": won([1.0] * 3, "abx")}, "here")
    report = frontier({n: moved(0.5) for n in a}, a, arms={"x": ["one", "three"], "y": ["two"]})
    assert report.meta["prompts_left_out"] == 2 and report.measures[0].n == 2
    assert report.meta["notes"] == ["prompts left out, without a verdict for every run: 2"]
    assert report.get("win rate x", "1 nats").value == 0.5


PAIRS = Table(
    "pair",
    [
        {"prompt": "one?", "chosen": "yes", "rejected": "never, no"},
        {"prompt": "two", "chosen": "it may be", "rejected": "no"},
        {"prompt": "three", "chosen": "abc", "rejected": "abd"},
    ],
)


def logp(loaded: Loaded, prompt: object, text: object) -> float:
    """Summed log-probability of an answer and its end, by the module alone."""
    head = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    before = loaded.tokenizer.encode(head)
    after = loaded.tokenizer.encode(f"{text}<|im_end|>")
    with torch.no_grad():
        found = loaded.module(torch.tensor([[*before, *after]])).logits[0].log_softmax(-1)
    at = range(len(before) - 1, len(before) + len(after) - 1)
    return sum(float(found[i, t]) for i, t in zip(at, after, strict=True))


def test_log_ratios_by_hand(tiny_path: Path, tmp_path: Path) -> None:
    reference = Model.open(tiny_path)
    tuned = Model.open(tiny_folder(tmp_path / "tuned", seed=1))
    a, b = tuned.load_module(), reference.load_module()
    want = [
        [logp(a, r["prompt"], r[n]) - logp(b, r["prompt"], r[n]) for r in PAIRS]
        for n in ("chosen", "rejected")
    ]
    made = implicit_preference(tuned, reference, PAIRS)
    assert made.get("chosen").value == pytest.approx(sum(want[0]) / 3, rel=1e-4)
    assert made.get("rejected").value == pytest.approx(sum(want[1]) / 3, rel=1e-4)
    right = [w > l for w, l in zip(*want, strict=True)]  # noqa: E741
    assert made.get("accuracy").value == pytest.approx(sum(right) / 3)
    same = implicit_preference(reference, reference, PAIRS)
    assert same.get("accuracy").value == 0.5 and same.get("margin").value == 0.0
    tied = same.get("accuracy")  # three of them: one and a half are right
    assert tied.lo + tied.hi == pytest.approx(1.0) and tied.hi < 1
    with pytest.raises(InputError, match="no pair"):
        implicit_preference(tuned, reference, Table("pair", []))
