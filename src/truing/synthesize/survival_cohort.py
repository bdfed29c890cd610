"""Turn a clinical table into prompts, reasoned answers and outcomes to predict survival from.

A row of the cohort becomes a summary of its attributes, never of its outcome. The trace that leads
to it tells for each attribute, the strongest first, the median time of the patients in the same
group (a category, or a third of the numbers) beside the median of all:

    ratio_a = median(times of the group) / median(times of all),   strength |log ratio_a|

Groups and medians come from the reference rows alone (those of `part="train"`, whichever part is
made), medians for each patient without the patient, so that no trace is fitted to the outcome it
leads to. They are Kaplan-Meier's: a censored patient counts until last seen. The answer is a
prediction block (`form="prediction"`), or reasoning, comment and prediction (`form="reasoned"`).
Columns: prompt, completion, status (1: the event was seen), months, trace.

Source: OncoReason, arXiv 2510.17532. Differences: the paper's teacher is a large model that is told
the outcome, which explains labels after the fact; ours is a rule over the cohort and is not. Times
of censored patients are follow-up, no survival, so `censored="drop"` leaves them out of what is
learnt. Summaries are flat: series of markers, dated treatments and what only one sort of cancer has
must be columns already. Where the event is not death alone, "DECEASED" and survival in the answers
stand for the event and the time to it. Research data and a research demonstration: no medical
advice.
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

WHERE = "synthesize/survival_cohort"
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
    return _median(sorted(zip(times, events, strict=True), key=lambda x: (x[0], not x[1])))


def _median(ordered: Sequence[tuple[float, bool]]) -> float:
    """`km_median` of (time, event) in the order of time, events first."""
    left, at_risk = 1.0, len(ordered)
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


def cuts_of(values: Sequence[str]) -> tuple[float, float] | None:
    """Where many numbers are parted into low, middle and high; None for categories."""
    figures = [number(v) for v in values]
    every = sorted(f for f in figures if f is not None)
    if len(set(values)) <= 5 or len(every) < len(figures):
        return None
    return every[len(every) // 3], every[2 * len(every) // 3]


class Cohort:
    """The reference patients, grouped once by each attribute: their value, or a third of them."""

    def __init__(self, patients: Sequence[Patient]) -> None:
        # In the order of time, events first, so that no median sorts anew.
        self.patients = sorted(patients, key=lambda p: (p.months, not p.event))
        names = dict.fromkeys(n for p in self.patients for n in p.attributes)
        self.cuts = {
            n: cuts_of([p.attributes[n] for p in self.patients if n in p.attributes]) for n in names
        }
        self.groups: dict[tuple[str, str], list[Patient]] = {}
        for patient in self.patients:
            for name, value in patient.attributes.items():
                self.groups.setdefault((name, self.place(name, value)), []).append(patient)

    def place(self, name: str, value: str) -> str:
        """Group of a value of an attribute: itself, or low, middle or high."""
        cuts, figure = self.cuts.get(name), number(value)
        if cuts is None or figure is None:
            return value
        return "low" if figure < cuts[0] else "high" if figure >= cuts[1] else "middle"

    def others(self, patient: Patient, name: str = "") -> list[tuple[float, bool]]:
        """(time, event) of all others, or of those in the same group by the attribute `name`."""
        place = self.place(name, patient.attributes[name]) if name else ""
        group = self.groups.get((name, place), []) if name else self.patients
        return [(p.months, p.event) for p in group if p is not patient]


def trace(patient: Patient, cohort: Cohort, most: int) -> list[str]:
    """Steps that name the attributes which part patients most, by the medians of the others."""
    everyone = cohort.others(patient)
    whole = _median(everyone) if everyone else 0.0
    found: list[tuple[float, str]] = []
    for name, value in patient.attributes.items():
        mine = cohort.others(patient, name)
        if len(mine) < LEAST or not whole:
            continue
        median, place = _median(mine), cohort.place(name, value)
        said = f"{name} is {value}" + (f", which is {place}" if place != value else "")
        way = "better" if median > whole else "worse" if median < whole else "as usual"
        text = f"{said}: a median of {median:.0f} months against {whole:.0f} in all, {way}."
        found.append((abs(math.log(max(median, 0.1) / max(whole, 0.1))), text))
    found.sort(key=lambda x: -x[0])
    return [text for _, text in found[:most]]


def outcome(value: object) -> str:
    """A value of the column of events as it is compared: true is 1, and so is 1.0."""
    text = str(value).strip().lower().removesuffix(".0")
    return {"true": "1", "false": "0"}.get(text, text)


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
        seen = outcome(row[event]) == outcome(happened)
        made.append(Patient(row, told, months / MONTH_DAYS if days else months, seen))
    if not made:
        text, fix = "no row has a time and an outcome", "Name their columns by time and event"
        raise InputError(text, where=data.source, seen=len(data), fix=fix)
    if not any(p.event for p in made):
        values = sorted({str(p.row[event]) for p in made})[:8]
        text = f"no row has the event: column {event!r} is never {happened!r}"
        fix = "Say by the setting happened which of its values means that the event was seen"
        raise InputError(text, where=data.source, seen=values, fix=fix)
    return made


@method(
    paper="oncoreason",
    rows={"data": ()},  # of any kind: settings name its columns
    within={"test": (1, None), "most": (1, None), "salt": "(-inf, inf)"},
    makes="example",
)
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
    if {time, event} & set(attributes):
        raise InputError(
            "the summary would tell the outcome",
            where=WHERE,
            seen=[time, event],
            fix="Leave these columns out of attributes",
        )
    patients = patients_of(data, time, event, happened, unit == "days", attributes)
    if not 0 < test < len(patients):
        raise InputError(
            "no training row would be left",
            where=WHERE,
            seen=(test, len(patients)),
            fix="Lower test, or give more rows",
        )
    shuffled = sorted(patients, key=lambda p: content_hash([salt, p.row["id"]]))
    known = shuffled[test:]
    chosen = known if part == "train" else shuffled[:test]
    if part == "train" and censored == "drop":
        chosen = [p for p in chosen if p.event]
    cohort = Cohort(known)
    made = [_row(patient, trace(patient, cohort, most), form) for patient in chosen]
    return Table("example", made, where=f"cohort of {data.source}")


def _row(patient: Patient, steps: list[str], form: Form) -> Row:
    """A patient as prompt and answer, with the trace that the reasoned form tells."""
    summary = "; ".join(f"{n}: {v}" for n, v in patient.attributes.items())
    shown = steps if form == "reasoned" else ()
    status = int(patient.event)
    comment = "" if patient.event else "Last seen at this time, without the event."
    lineage = patient.row.get("lineage")
    known = lineage.items() if isinstance(lineage, dict) else ()
    return {
        "prompt": ASK.format(summary=summary, form=FORMS[form]),
        "completion": answer_text(status, patient.months, shown, comment),
        "status": status,
        "months": patient.months,
        "trace": steps,
        "lineage": {"parents": [patient.row["id"]], "generator": WHERE}
        | {n: v for n, v in known if n in ("licence", "source")},
    }
