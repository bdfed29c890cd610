"""Turn a clinical table into prompts, reasoned answers and outcomes to predict survival from.

A row of the cohort becomes a summary of its attributes, never of its outcome. `teacher="cohort"`
writes the trace that leads to it: for each attribute, the strongest first, the median time of the
patients in the same group (a category, or a third of the numbers) beside the median of all:

    ratio_a = median(times of the group) / median(times of all),   strength |log ratio_a|

Medians come from the reference rows alone (those of `part="train"`, whichever part is made) and for
each patient without the patient, so that no trace is fitted to the outcome it leads to. Their
medians are Kaplan-Meier's: a censored patient counts until last seen. The answer is a prediction
block (`form="prediction"`), or reasoning, comment and prediction (`form="reasoned"`). Columns:
prompt, completion, status (1: the event was seen), months, trace.

Source: OncoReason, arXiv 2510.17532. Differences: the paper's teacher is a large model that is told
the outcome, which explains labels after the fact; ours is a rule over the cohort and is not. Times
of censored patients are follow-up, no survival, so `censored="drop"` leaves them out of what is
learnt. Research data and a research demonstration: no medical advice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from truing.errors import InputError, unknown
from truing.method import method
from truing.tables import Row, Table, content_hash
from truing.train.reward.survival_answer import MONTHS, STATUS, answer_text

MONTH_DAYS = 365.25 / 12
LEAST = 5  # patients that a group needs before it says anything
ASK = (
    "You are an analyst in oncology. Read the summary and estimate the patient's survival.\n"
    "{summary}\n{form}"
)
FORMS = {
    "prediction": f'Answer in <prediction> tags with the lines "{STATUS}" and "{MONTHS}".',
    "reasoned": "Reason step by step in <reasoning> tags, then comment in <comment> tags, then "
    f'give in <prediction> tags the lines "{STATUS}" and "{MONTHS}".',
}
Form = Literal["prediction", "reasoned"]


@dataclass(frozen=True)
class Patient:
    """A row that can be used: attributes by name, months, and whether the event was seen."""

    row: Row
    attributes: Mapping[str, str]
    months: float
    event: bool


def km_median(times: Sequence[float], events: Sequence[bool]) -> float:
    """Kaplan-Meier's median; the last time seen where fewer than half had the event."""
    left, at_risk = 1.0, len(times)
    ordered = sorted(zip(times, events, strict=True), key=lambda x: (x[0], not x[1]))
    for time, event in ordered:
        if event:
            left *= 1 - 1 / at_risk
            if left <= 0.5 + 1e-12:
                return time
        at_risk -= 1
    return ordered[-1][0]


def number(text: str) -> float | None:
    """The number that a text is, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def group_of(name: str, patients: Sequence[Patient]) -> dict[str, str]:
    """Group of each value of an attribute: itself, or low, middle or high of many numbers."""
    values = sorted({p.attributes[name] for p in patients if name in p.attributes})
    figures = {v: number(v) for v in values}
    if len(values) <= 5 or any(f is None for f in figures.values()):
        return {v: v for v in values}
    every = sorted(float(p.attributes[name]) for p in patients if name in p.attributes)
    low, high = every[len(every) // 3], every[2 * len(every) // 3]
    return {
        v: "low" if f < low else "high" if f >= high else "middle"
        for v, f in figures.items()
        if f is not None
    }


def trace(patient: Patient, others: Sequence[Patient], most: int) -> list[str]:
    """Steps that name the attributes which part patients most, by the medians of the others."""
    whole = km_median([p.months for p in others], [p.event for p in others])
    found: list[tuple[float, str]] = []
    for name, value in patient.attributes.items():
        groups = group_of(name, [*others, patient])
        mine = [p for p in others if groups.get(p.attributes.get(name, "")) == groups[value]]
        if len(mine) < LEAST or not whole:
            continue
        median = km_median([p.months for p in mine], [p.event for p in mine])
        place = groups[value] if groups[value] != value else ""
        said = f"{name} is {value}" + (f", which is {place}" if place else "")
        way = "better" if median > whole else "worse" if median < whole else "as usual"
        text = f"{said}: a median of {median:.0f} months against {whole:.0f} in all, {way}."
        found.append((abs(math.log(max(median, 0.1) / max(whole, 0.1))), text))
    found.sort(key=lambda x: -x[0])
    return [text for _, text in found[:most]]


def patients_of(
    data: Table, time: str, event: str, happened: str, days: bool, attributes: Mapping[str, str]
) -> list[Patient]:
    """Rows with a time and an outcome; an InputError for columns that are not there."""
    for column in (time, event, *attributes):
        if column not in data.columns:
            raise unknown("column", column, data.columns, where=data.source)
    made: list[Patient] = []
    for row in data:
        months = number(str(row.get(time, "")))
        if months is None or months < 0 or row.get(event) in (None, ""):
            continue
        told = {label: str(row.get(name, "")).strip() for name, label in attributes.items()}
        told = {n: v.removesuffix(".0") for n, v in told.items() if v}
        seen = str(row[event]).removesuffix(".0") == happened
        made.append(Patient(row, told, months / MONTH_DAYS if days else months, seen))
    if not made:
        raise InputError("no row has a time and an outcome", where=data.source, seen=len(data))
    return made


@method(paper="oncoreason", within={"test": (1, None), "most": (1, None)}, makes="example")
def survival_cohort(
    data: Table,
    *,
    time: str,
    event: str,
    attributes: dict[str, str],
    part: Literal["train", "test"],
    test: int = 100,
    happened: str = "1",
    unit: Literal["days", "months"] = "days",
    form: Form = "reasoned",
    censored: Literal["keep", "drop"] = "keep",
    most: int = 4,
    salt: int = 0,
) -> Table:
    """Turn a clinical table into prompts, reasoned answers and outcomes to predict survival from.

    Args:
        time: column of the time to the event, or to when the patient was last seen.
        event: column that says whether the event was seen.
        attributes: columns that the summary tells, with what they are called there.
        part: which rows to return; the split depends on the rows' content and `salt` alone.
        test: rows of the test part.
        happened: value of `event` where it was seen.
        unit: of `time`.
        form: of the answers: a prediction, or one with reasons.
        censored: whether patients without the event stay among the training rows.
        most: steps of a trace.
        salt: another number gives another split.
    """
    where = "synthesize/survival_cohort"
    if {time, event} & set(attributes):
        raise InputError("the summary would tell the outcome", where=where, seen=[time, event])
    patients = patients_of(data, time, event, happened, unit == "days", attributes)
    if not 0 < test < len(patients):
        raise InputError("no training row would be left", where=where, seen=(test, len(patients)))
    shuffled = sorted(patients, key=lambda p: content_hash([salt, p.row["id"]]))
    known = shuffled[test:]
    chosen = known if part == "train" else shuffled[:test]
    if part == "train" and censored == "drop":
        chosen = [p for p in chosen if p.event]
    made: list[Row] = []
    for patient in chosen:
        steps = trace(patient, [p for p in known if p is not patient], most)
        summary = "; ".join(f"{n}: {v}" for n, v in patient.attributes.items())
        shown = steps if form == "reasoned" else ()
        status = int(patient.event)
        comment = "" if patient.event else "Last seen at this time, without the event."
        made.append(
            {
                "prompt": ASK.format(summary=summary, form=FORMS[form]),
                "completion": answer_text(status, patient.months, shown, comment),
                "status": status,
                "months": patient.months,
                "trace": steps,
                "lineage": {"parents": [patient.row["id"]], "generator": where}
                | _licence(patient.row),
            }
        )
    return Table("example", made, where=f"cohort of {data.source}")


def _licence(row: Row) -> dict[str, object]:
    lineage = row.get("lineage")
    kept = lineage if isinstance(lineage, dict) else {}
    return {n: kept[n] for n in ("licence", "source") if n in kept}
