"""What alignment changed: the same evaluation before and after, paired prompt by prompt.

For principle i, b_i and a_i are the violation rates before and after. McNemar's exact test on the
prompts where only one of the two breaks it says whether they differ, Newcombe's interval for paired
shares by how much. Over all principles the difference of each prompt's violation share is averaged,
with a paired bootstrap interval (Newcombe's where each prompt keeps all or none): below zero means
fewer violations. Of a prompt that was asked several times the means are compared: in McNemar's test
it counts once, as better or worse. Relevance, length, unusable answers, ability and right choices
stand beside, each with its paired difference; without reports of ability a note says that it was
not measured. Our own; no paper.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

from truing.context import Json
from truing.core.stats import by_unit, difference_of, mcnemar, ratio_bootstrap
from truing.errors import InputError
from truing.method import method
from truing.reports import Measure, Report, check_same
from truing.tables import Row, Table, content_hash

WHERE = "evaluate/before_after"
NO_ABILITY = "general ability was not measured: give ability_before and ability_after"


def _check(
    before: Report, after: Report, ability_before: Report | None, ability_after: Report | None
) -> None:
    """Raise an InputError for reports of something else, and for one ability without the other."""
    for name, report in (("before", before), ("after", after)):
        kind = report.meta.get("kind")
        if kind != "adherence":
            raise InputError(
                "needs a report of evaluate/adherence",
                where=f"{WHERE} input {name!r}",
                seen=f"{report.title!r}, of kind {kind}",
            )
    if before.meta.get("principles") != after.meta.get("principles"):
        raise InputError(
            "the reports are of other principles",
            where=WHERE,
            seen=[before.meta.get("principles"), after.meta.get("principles")],
            fix="Measure both by the same principles",
        )
    check_same({"before": before, "after": after}, ("checks", "how"), WHERE)
    if (ability_before is None) != (ability_after is None):
        lacks = "ability_before" if ability_before is None else "ability_after"
        raise InputError(
            f"input {lacks!r} is missing, and one ability alone shows no change",
            where=WHERE,
            fix="Give ability_before and ability_after, or neither",
        )


def _numbered(samples: Table) -> dict[tuple[str, int], Row]:
    """Rows by their prompt and how often it came before: one prompt may be asked several times."""
    count: Counter[str] = Counter()
    found: dict[tuple[str, int], Row] = {}
    for row in samples:
        prompt = content_hash(row["prompt"], 8)
        found[prompt, count[prompt]] = row
        count[prompt] += 1
    return found


def align_samples(before: Report, after: Report) -> list[tuple[Row, Row]]:
    """Samples of both reports with the same prompt, in the order of `before`.

    Of a prompt that was asked several times the n-th answers go together.
    """
    if before.samples is None or after.samples is None:
        raise InputError(
            "both reports need their samples",
            where=WHERE,
            fix="Load each from its whole folder: its samples lie beside report.json",
        )
    earlier, later = _numbered(before.samples), _numbered(after.samples)
    pairs = [(row, later[key]) for key, row in earlier.items() if key in later]
    if len(pairs) != len(earlier) or len(pairs) != len(later):
        raise InputError(
            "the two reports answer different prompts",
            where=WHERE,
            seen=f"{len(earlier)} and {len(later)} prompts, {len(pairs)} shared",
            fix="Evaluate both models on one table of prompts",
        )
    return pairs


def violated(row: Row) -> set[str]:
    """Principles that a sample of `adherence` breaks."""
    return {v for v in str(row["violated"]).split(", ") if v}


def _number(name: str) -> Callable[[Row], float]:
    return lambda row: float(cast(float, row[name]))


def _difference(
    name: str, pairs: Sequence[tuple[Row, Row]], value: Callable[[Row], float], m: Measure
) -> Measure:
    before, after = ([value(row) for row in side] for side in zip(*pairs))
    prompts = [b["prompt"] for b, _ in pairs]
    found = difference_of(before, after, prompts, share=m.unit == "share")
    return Measure(name, *found, m.unit, m.category, m.better)


def _sample_rows(pairs: Sequence[tuple[Row, Row]]) -> list[Row]:
    rows: list[Row] = []
    for b, a in pairs:
        lineage = cast(Row, a["lineage"])
        rows.append(
            {
                "prompt": b["prompt"],
                "before": b["completion"],
                "after": a["completion"],
                "violated_before": b["violated"],
                "violated_after": a["violated"],
                "unusable_before": b["unusable"],
                "unusable_after": a["unusable"],
                "relevance_before": b["relevance"],
                "relevance_after": a["relevance"],
                "words_before": b["words"],
                "words_after": a["words"],
                "lineage": {
                    "prompt": lineage.get("prompt", ""),
                    "parents": [b["id"], a["id"]],
                    "principle": lineage.get("principle", ""),
                    "principles": lineage.get("principles", []),
                    "generator": lineage.get("generator", ""),
                },
            }
        )
    return rows


def principle_measures(
    pairs: Sequence[tuple[Row, Row]], before: Report, after: Report
) -> tuple[list[Measure], dict[str, float]]:
    """(rates and differences per principle, McNemar's p by principle)."""
    measures: list[Measure] = []
    p_values: dict[str, float] = {}
    prompts = [b["prompt"] for b, _ in pairs]
    for id in [str(i) for i in cast(list[object], before.meta.get("principles", []))]:
        b, a = before.get("violation rate", id), after.get("violation rate", id)
        was, now = ([float(id in violated(row)) for row in side] for side in zip(*pairs))
        measures += [_named(b, "before"), _named(a, "after")]
        found = difference_of(was, now, prompts, share=True)
        measures.append(Measure("violations difference", *found, b.unit, id, b.better))
        p_values[id] = mcnemar(by_unit(was, prompts)[0], by_unit(now, prompts)[0])
    return measures, p_values


def _named(measure: Measure, when: str) -> Measure:
    return replace(measure, name=f"{measure.name} {when}")


def _ability_difference(before: Report, after: Report) -> list[Measure]:
    """Change of the log-loss with its interval, where both sides read as much of the same texts."""
    sides = [[r for r in one.samples or () if r["tokens"]] for one in (before, after)]
    read = [[(r["text"], r["tokens"]) for r in side] for side in sides]
    if not read[0] or read[0] != read[1]:
        return []
    nats = [[float(cast(float, r["nats"])) for r in side] for side in sides]
    tokens = [float(cast(int, r["tokens"])) for r in sides[0]]
    changes = [a - b for b, a in zip(*nats, strict=True)]
    value, m = sum(changes) / sum(tokens), before.get("ability")
    lo, hi = ratio_bootstrap(changes, tokens)
    return [Measure("ability difference", value, lo, hi, len(tokens), m.unit, "", m.better)]


def _choices_difference(before: Report, after: Report) -> list[Measure]:
    """Change of the share of right choices with its interval, where the questions are the same."""
    asked = [r.meta.get("questions") for r in (before, after)]
    sides = [[float(cast(float, v)) for v in _right(r)] for r in (before, after)]
    if asked[0] != asked[1] or not sides[0] or len(sides[0]) != len(sides[1]):
        return []
    m, each = before.get("choices"), range(len(sides[0]))
    found = difference_of(sides[0], sides[1], each, share=True)
    return [Measure("choices difference", *found, m.unit, "", m.better)]


def _right(report: Report) -> list[Json]:
    """Of each question whether its right answer was chosen; [] where the report does not say."""
    return cast("list[Json]", report.meta.get("right") or [])


@method()
def before_after(
    before: Report,
    after: Report,
    ability_before: Report | None = None,
    ability_after: Report | None = None,
) -> Report:
    """What alignment changed: the same evaluation before and after, paired prompt by prompt."""
    _check(before, after, ability_before, ability_after)
    pairs = align_samples(before, after)
    rules = cast(list[object], before.meta.get("principles", []))
    measures: list[Measure] = []
    overall_b, overall_a = before.get("violation rate"), after.get("violation rate")
    difference = _difference(
        "violations difference", pairs, lambda r: len(violated(r)) / max(len(rules), 1), overall_b
    )
    by_rule, p_values = principle_measures(pairs, before, after)
    measures += [_named(overall_b, "before"), _named(overall_a, "after"), difference, *by_rule]
    summary: dict[str, Json] = {
        "violations_before": round(overall_b.value, 4),
        "violations_after": round(overall_a.value, 4),
        "difference_interval": [round(difference.lo, 4), round(difference.hi, 4)],
    }
    for name in ("relevance", "words"):
        b, a = before.get(name), after.get(name)
        measures += [_named(b, "before"), _named(a, "after")]
        measures.append(_difference(f"{name} difference", pairs, _number(name), b))
        summary |= {f"{name}_before": round(b.value, 4), f"{name}_after": round(a.value, 4)}
    b, a = before.get("unusable answers"), after.get("unusable answers")
    measures += [_named(b, "before"), _named(a, "after")]
    name = "unusable answers difference"
    measures.append(_difference(name, pairs, lambda r: float(bool(r["unusable"])), b))
    notes: list[Json] = [NO_ABILITY]
    if ability_before is not None and ability_after is not None:
        notes = []
        for name in ("ability", "choices"):
            b, a = ability_before.get(name), ability_after.get(name)
            measures += [_named(b, "before"), _named(a, "after")]
        b, a = ability_before.get("ability"), ability_after.get("ability")
        measures += _ability_difference(ability_before, ability_after)
        measures += _choices_difference(ability_before, ability_after)
        summary |= {"ability_before": round(b.value, 4), "ability_after": round(a.value, 4)}
        summary["ability_metric"] = str(ability_before.meta.get("metric", b.unit))
    summary["n_prompts"] = difference.n
    facts: dict[str, Json] = {
        "kind": "before_after",
        "summary": summary,
        "mcnemar": cast(Json, p_values),
        "principles": before.meta.get("principles", []),
        "texts": before.meta.get("texts", {}),
        "not_measured": before.meta.get("not_measured", []),
        "models": [before.meta.get("model", ""), after.meta.get("model", "")],
        "notes": notes,
    }
    samples = Table("record", _sample_rows(pairs))
    return Report("before and after", measures, samples, facts)
