"""OncoReason's parser, rewards and cohort against values worked out by hand."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable

import pytest
import torch

from truing.core.rl.advantages import group_advantage
from truing.errors import InputError
from truing.method import score
from truing.synthesize.survival_cohort import km_median, survival_cohort
from truing.tables import Row, Table
from truing.train.reward.survival_answer import (
    Prediction,
    answer_text,
    extracted,
    parse,
    reference_months,
    reward,
    steps_of,
    tagged_parts,
)

survival_module = importlib.import_module("truing.synthesize.survival_cohort")
GOOD = answer_text(1, 13.6, ["stage is IV", "ECOG is 2"], "Frail.")


def test_forms_of_a_status() -> None:
    for text, want in (
        ("0", 0), ("1", 1), ("LIVING", 0), ("deceased", 1), ("0:LIVING", 0), ("1:DECEASED", 1),
        ('"1: Deceased"', 1), ("1 ,", 1), ("2", None), ("unknown", None), ("10", None),
    ):  # fmt: skip
        said = parse(f"overall  survival\nStatus: {text}\nEstimated Overall Survival (months): 7.5")
        assert said.status == want, text
        assert said.months == 7.5 and not said.whole
    assert parse("Estimated Overall Survival (months): -3").months is None
    assert parse("nothing") == Prediction(None, None, None, False)
    assert [reference_months(v) for v in (">60", "= 12.5", "<3", "n/a", None, "inf")] == [
        60, 12.5, 3, None, None, None
    ]  # fmt: skip


def test_an_answer_in_form_is_read_back() -> None:
    said = parse(GOOD)
    assert (said.status, said.months, said.whole) == (1, 14, True)
    assert steps_of(said.reasoning or "") == ["stage is IV", "ECOG is 2"]
    assert parse(answer_text(0, 3.2)) == Prediction(0, 3.0, None, False)


def test_reward_by_hand() -> None:
    trace = "stage is IV\nECOG is 2"
    # The numbers of the list, which stand in no trace, do not count.
    assert reward(parse(GOOD), 1, 14.0, trace, 0.5) == pytest.approx(1 + 1 + 0.5 + 0.5)
    said = parse(answer_text(1, 14, ["stage is IV"], "Frail."))
    assert reward(said, 1, 14.0, trace, 0.5) == pytest.approx(2.5 + 0.5 * 2 * 3 / (3 + 6))
    assert reward(parse(GOOD), 0, 26.0, "", 0.5) == pytest.approx(math.exp(-1) + 0.5)
    leaky = answer_text(1, 14, ["the patient died"])
    assert reward(parse(leaky), 1, None, "", 0.5) == pytest.approx(1 + 0.5 - 0.5)
    assert reward(parse(""), 1, 14.0, trace, 0.5) == 0.0
    rows: list[Row] = [{"completion": GOOD, "status": 1, "months": 14, "trace": trace.split("\n")}]
    assert score("reward", "survival_answer", rows)[0] == pytest.approx(3.0, rel=1e-6)
    with pytest.raises(InputError, match="status"):
        score("reward", "survival_answer", [{"completion": GOOD, "status": 3}])


def test_tagged_answers_by_hand() -> None:
    strict = "<reasoning>\n6 x 7\n</reasoning>\n<answer>\n42\n</answer>"
    assert tagged_parts(strict, "42") == (1.0, 0.5, 0.5, 0.5)
    assert tagged_parts(strict + " and more", "41") == (0.0, 0.5, 0.5, 0.5)
    assert tagged_parts("so " + strict, "42") == (1.0, 0.5, 0.0, 0.0)
    loose = "<reasoning>6 x 7</reasoning> <answer>42.0</answer>"
    assert tagged_parts(loose, "42.0") == (1.0, 0.0, 0.0, 0.5)
    assert extracted("42") == "42"
    assert extracted("<answer>1</answer> no: <answer>2 </answer>") == "2"
    assert score("reward", {"use": "tagged_answer", "column": "g"}, [
        {"completion": strict, "g": 42}
    ]) == [2.5]  # fmt: skip


def test_advantages_of_a_group() -> None:
    there = torch.ones(1, 4)
    r = torch.tensor([[0.5, 2.0, 1.0, 0.0]])
    a = group_advantage(r, there, "group")
    assert float(a.sum()) == pytest.approx(0, abs=1e-5)
    assert torch.allclose(group_advantage(3 * r + 7, there, "group"), a, atol=1e-3)
    assert group_advantage(torch.ones(1, 4), there, "group").abs().sum() == 0


def test_median_of_censored_times() -> None:
    assert km_median([1, 2, 3, 4], [True] * 4) == 2
    # At 2 the survival is 3/4, at 5 (2 at risk) 3/8.
    assert km_median([2, 3, 5, 6], [True, False, True, True]) == 5
    assert km_median([2, 3, 9], [False, False, False]) == 9


def cohort(n: int = 60) -> Table:
    """Half the patients have the mark and live a third as long."""
    rows: list[Row] = []
    for i in range(n):
        marked = i % 2
        days = (300 + 7 * i) / (3 if marked else 1)
        rows.append({"days": str(days), "dead": str(int(i % 5 > 0)), "mark": "yes" if marked else
                     "no", "size": str(10 + i % 7), "id": f"p{i}"})  # fmt: skip
    return Table("record", rows)


def made(part: str, data: Table | None = None, **settings: object) -> Table:
    return survival_cohort(
        data or cohort(), time="days", event="dead", attributes={"mark": "Mark", "size": "Size"},
        part=part, test=20, **settings,
    )  # fmt: skip


def test_cohort() -> None:
    train, test = made("train"), made("test")
    assert (len(train), len(test)) == (40, 20)
    parents = [{r["lineage"]["parents"][0] for r in t} for t in (train, test)]
    assert not parents[0] & parents[1]
    for row in (*train, *test):
        said = parse(str(row["completion"]))
        assert said.whole and said.status == row["status"]
        assert said.months == round(float(str(row["months"])))
        (step,) = [s for s in row["trace"] if s.startswith("Mark")]
        marked = "Mark: yes" in str(row["prompt"])
        assert re.match(r"Mark is (yes|no): a median of \d+ months against \d+ in all", step)
        assert step.endswith("worse." if marked else "better.")
    dropped = made("train", censored="drop")
    assert 0 < len(dropped) < 40 and all(r["status"] == 1 for r in dropped)
    bare = made("test", form="prediction")
    assert all("<reasoning>" not in str(r["completion"]) for r in bare)


def test_nothing_of_the_outcome_is_told() -> None:
    """Other outcomes of the test patients change neither what is asked nor the reasons."""
    other = cohort()
    tested = {str(r["lineage"]["parents"][0]) for r in made("test")}
    for row in other.rows:
        if row["id"] in tested:
            row["days"], row["dead"] = "99999", "0"
    before, after = made("test"), made("test", other)
    assert [r["prompt"] for r in before] == [r["prompt"] for r in after]
    assert [r["trace"] for r in before] == [r["trace"] for r in after]
    assert [r["months"] for r in before] != [r["months"] for r in after]
    one = cohort()  # nor does a training patient's own outcome
    name = str(made("train")[0]["lineage"]["parents"][0])
    next(r for r in one.rows if r["id"] == name)["days"] = "99999"
    same = made("train", one)
    assert same[0]["trace"] == made("train")[0]["trace"]


def test_mistakes() -> None:
    with pytest.raises(InputError, match="tell the outcome"):
        survival_cohort(cohort(), time="days", event="dead", attributes={"dead": "x"}, part="test")
    with pytest.raises(InputError, match="no training row"):
        survival_cohort(cohort(), time="days", event="dead", attributes={"mark": "m"}, part="test")
    with pytest.raises(InputError, match="unknown column 'sise'"):
        survival_cohort(cohort(), time="days", event="dead", attributes={"sise": "x"}, part="test")


@pytest.mark.parametrize("seen", [bool, lambda dead: float(dead), str])
def test_an_outcome_may_be_true_or_a_number(seen: Callable[[bool], object]) -> None:
    other = cohort()
    for row in other.rows:
        row["dead"] = seen(row["dead"] == "1")
    for said in ("1", "1.0", "true", "True"):
        assert made("train", other, happened=said).rows == made("train").rows
    living = made("train", other, happened="false")
    assert [r["status"] for r in living] == [1 - int(str(r["status"])) for r in made("train")]
    with pytest.raises(InputError, match=r"no row has the event.*'dead' is never '2'.*happened"):
        made("train", other, happened="2")


def test_settings_of_a_cohort() -> None:
    by_months = made("test", unit="months")
    assert [float(str(r["months"])) for r in by_months] == pytest.approx(
        [float(str(r["months"])) * 365.25 / 12 for r in made("test")]
    )
    assert {len(r["trace"]) for r in made("test")} == {2}  # type: ignore[arg-type]
    assert [r["trace"] for r in made("test", most=1)] == [r["trace"][:1] for r in made("test")]  # type: ignore[index]


def hand_trace(row: Row, others: list[Row], every: list[Row]) -> list[str]:
    """Steps by groups made anew for one patient, as the equation says, in plain loops."""

    def times(rows: list[Row]) -> tuple[list[float], list[bool]]:
        days = [float(str(r["days"])) / (365.25 / 12) for r in rows]
        return days, [r["dead"] == "1" for r in rows]

    def group(name: str, value: str) -> str:
        known = [str(r[name]) for r in every]
        if name == "mark" or len(set(known)) <= 5:
            return value
        ordered = sorted(map(float, known))
        low, high = ordered[len(ordered) // 3], ordered[2 * len(ordered) // 3]
        return "low" if float(value) < low else "high" if float(value) >= high else "middle"

    whole, found = km_median(*times(others)), []
    for name, label in (("mark", "Mark"), ("size", "Size")):
        value = str(row[name])
        mine = [r for r in others if group(name, str(r[name])) == group(name, value)]
        if len(mine) < 5:
            continue
        median = km_median(*times(mine))
        place = group(name, value)
        way = "better" if median > whole else "worse" if median < whole else "as usual"
        said = f"{label} is {value}" + (f", which is {place}" if place != value else "")
        told = f"a median of {median:.0f} months against {whole:.0f} in all, {way}."
        found.append((-abs(math.log(median / whole)), f"{said}: {told}"))
    return [text for _, text in sorted(found, key=lambda x: x[0])]


def test_patients_are_grouped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same traces as groups made anew for every patient have."""
    data = cohort(90)
    calls: list[int] = []
    cuts = survival_module.cuts_of
    monkeypatch.setattr(
        survival_module, "cuts_of", lambda values: calls.append(len(values)) or cuts(values)
    )
    train, test = made("train", data), made("test", data)
    assert calls == [70, 70] * 2  # once an attribute, whatever the number of patients
    by_id = {str(r["id"]): r for r in data}
    parent = {str(r["id"]): str(r["lineage"]["parents"][0]) for r in (*train, *test)}  # type: ignore[index]
    every = [by_id[parent[str(r["id"])]] for r in train]
    for row in (*train, *test):
        own = by_id[parent[str(row["id"])]]
        others = [r for r in every if r is not own]
        assert row["trace"] == hand_trace(own, others, every)
