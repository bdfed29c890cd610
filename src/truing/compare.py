"""Several methods for one goal, on the same rows, budget and seeds: one table, one picture.

Every seed draws its own training sample, every method trains on the same one; all models are
measured on the same held-out pairs. Where there are rows enough, no two samples share one; else
each is drawn from all that are left, and stderr, table and report say that they overlap. The
comparison is a plan like any other: what it shares with an earlier one (reference
log-probabilities, measurements of the base) is not computed again.

    gain         = preference accuracy after - before, on held-out pairs
    side effect  = held-out nats per token after - before (higher is worse)

Intervals are Student's over seeds; with one seed there are none. All seeds are measured on the same
held-out pairs, whose own sampling error is in no interval, and each interval is at 95 % by itself:
of many methods that are all alike one in twenty seems clear by chance. Held-out and training rows
share no prompt (see select/sample), though one may say nearly the same as another: `select/split`
parts such. Methods share their rows, so they are compared seed by seed: "over FIRST" is a method's
gain less that of the first one named. Seconds are positive and skewed: their mean is the geometric
one and their interval Student's of the logarithms, which never reaches below zero.

A group's name stands for all of its methods that can be trained on these rows. Those that need more
(a column, a teacher, rewards) are left out, which stderr and the report say; one that is named by
itself is refused. A method whose loss does not stay finite, with whatever seed, is left out of the
table in the same way, and the others are compared.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

from truing import jsontext
from truing.contenders import (
    Contender,
    budget_of,
    contenders_of,
    members,
    missing_inputs,
    parts,
    reasons,
    taken,
)
from truing.context import Json
from truing.core import files
from truing.core.stats import mean_interval
from truing.errors import InputError, unknown
from truing.given import as_noun
from truing.method import methods as registry
from truing.models import Model
from truing.pipeline import Result, run
from truing.plan import Plan
from truing.reports import Measure, Report
from truing.sources import Opened
from truing.steps import Typed
from truing.store import Noun
from truing.summary import rows_text
from truing.tables import Table

HELD_OUT = 128  # pairs that every model is measured on
TEXTS, QUESTIONS = "prose", "common_knowledge"  # general ability is measured on these
OVER_FIRST = "gain over first"
OVERLAP = "the seeds' samples overlap: intervals are narrower than over rows of their own"
ABILITY_TOKENS = 128  # of each text: every model of a comparison reads the same ones


def plan_of(
    contenders: Sequence[Contender],
    model: str,
    data: str,
    n: int,
    seeds: int,
    *,
    held_out: int,
    overlap: bool = False,
) -> Plan:
    """The plan of a comparison on preference pairs.

    Args:
        overlap: each seed draws from all rows that are not held out, those of others among them.
    """
    plan = Plan("compare", folder=Path(), source="")
    plan.model("base", model)
    plan.table("pairs", data)
    plan.step("held_out", "select/sample", data="pairs", n=held_out)
    pool = plan.step("pool", "select/sample", data="pairs", n=held_out, part="rest")
    plan.step("base-gain", "evaluate/preference", model="base", data="held_out")

    def ability(name: str, model: str) -> None:
        """Measure general ability; the texts are named, so that their content is in the key."""
        plan.step(
            name,
            "evaluate/ability",
            model=model,
            texts=TEXTS,
            questions=QUESTIONS,
            max_length=ABILITY_TOKENS,
        )

    ability("base-ability", "base")
    for seed in range(seeds):
        rows = plan.step(f"rows-{seed}", "select/sample", data=pool, n=n, seed=seed)
        if not overlap and seed + 1 < seeds:
            name = f"pool-{seed + 1}"
            pool = plan.step(name, "select/sample", data=pool, n=n, part="rest", seed=seed)
        for one in contenders:
            method = registry[one.method]
            given = {"model": "base"} | ({"data": rows} if "data" in method.inputs else {})
            if missing := missing_inputs(method):
                raise InputError(
                    f"{one.method} needs {', '.join(missing)}, which a comparison on pairs "
                    "cannot give",
                    where="--methods",
                    fix="Leave it out of --methods; in a recipe a step is given any input",
                )
            name = f"{one.label}-{seed}"
            plan.step(name, one.method, seed=seed, **given, **one.settings)
            plan.step(f"{name}-gain", "evaluate/preference", model=name, data="held_out")
            ability(f"{name}-ability", name)
    return plan


def strands_of(contenders: Sequence[Contender], seeds: int) -> dict[str, str]:
    """Label of the contender that a step is of, by the step's name."""
    ends = ("", "-gain", "-ability")
    names = [(c.label, f"{c.label}-{seed}") for c in contenders for seed in range(seeds)]
    return {name + end: label for label, name in names for end in ends}


def _value(results: Mapping[str, Noun], step: str, measure: str) -> float:
    return cast(Report, results[step]).get(measure).value


def _over_seeds(name: str, label: str, values: Sequence[float], unit: str, better: str) -> Measure:
    mean = sum(values) / len(values)
    lo, hi = mean_interval(values)
    return Measure(name, mean, lo, hi, len(values), unit, label, better)


def _cost(label: str, seconds: Sequence[float]) -> Measure:
    """Seconds of a run; those of a step are told to the hundredth."""
    logs = [math.log(max(s, 0.01)) for s in seconds]
    m = _over_seeds("seconds", label, logs, "s", "lower")
    return replace(m, value=math.exp(m.value), lo=math.exp(m.lo), hi=math.exp(m.hi))


def _shown(m: Measure, digits: int) -> str:
    value, lo, hi = (f"{x:+.{digits}f}" for x in (m.value, m.lo, m.hi))
    return f"{value} [{lo}, {hi}]" if m.n > 1 else f"{value} (one seed)"


def collect(
    contenders: Sequence[Contender],
    seeds: int,
    result: Result,
    left: Mapping[str, str],
    *,
    overlap: bool,
) -> Report:
    """Gain, side effect and cost of each contender, as one report; `left` out ones with reasons."""
    results, steps = result.results, result.run.steps
    measures: list[Measure] = []
    for one in contenders:
        names = [f"{one.label}-{seed}" for seed in range(seeds)]
        for name, measure, unit in (
            ("gain", "preference", "share"),
            ("margin gain", "margin", "nats per token"),
        ):
            before = _value(results, "base-gain", measure)
            values = [_value(results, f"{n}-gain", measure) - before for n in names]
            measures.append(_over_seeds(name, one.label, values, unit, "higher"))
        before = _value(results, "base-ability", "ability")
        values = [_value(results, f"{n}-ability", "ability") - before for n in names]
        measures.append(_over_seeds("side effect", one.label, values, "nats per token", "lower"))
        seconds = [float(cast(float, steps[n]["seconds"])) for n in names]
        measures.append(_cost(one.label, seconds))
    first = contenders[0].label
    for one in contenders[1:]:
        both = [[f"{label}-{s}-gain" for s in range(seeds)] for label in (one.label, first)]
        apart = [
            _value(results, a, "preference") - _value(results, b, "preference")
            for a, b in zip(*both, strict=True)
        ]
        measures.append(_over_seeds(OVER_FIRST, one.label, apart, "share", "higher"))
    facts: dict[str, Json] = {
        "kind": "comparison",
        "methods": {c.label: c.method for c in contenders},
        "settings": {c.label: cast(Json, dict(c.settings)) for c in contenders},
        "base": {
            "preference": _value(results, "base-gain", "preference"),
            "ability": _value(results, "base-ability", "ability"),
        },
        "seeds": seeds,
        "held_out": len(cast(Table, results["held_out"])),
        "overlap": overlap,
        "first": contenders[0].label,
        "left_out": dict(left),
    }
    return Report("comparison", measures, None, facts)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `result` is the run behind it."""

    report: Report
    result: Result

    def __repr__(self) -> str:
        return self.table()

    def table(self) -> str:
        """One line for each method, the largest gain first."""
        seeds = cast(int, self.report.meta["seeds"])
        first = str(self.report.meta["first"])
        over = f"over {first} [95 %]"
        rows = [("method", "gain [95 %]", over, "margin", "side effect [95 %]", "s/run")]
        gains = [m for m in self.report if m.name == "gain"]
        for gain in sorted(gains, key=lambda m: -m.value):
            margin, side, seconds = (
                self.report.get(n, gain.category) for n in ("margin gain", "side effect", "seconds")
            )
            rows.append(
                (
                    gain.category,
                    _shown(gain, 3),
                    ""
                    if gain.category == first
                    else _shown(self.report.get(OVER_FIRST, gain.category), 3),
                    f"{margin.value:+.3f}",
                    _shown(side, 4),
                    f"{seconds.value:.1f}",
                )
            )
        base = cast("dict[str, float]", self.report.meta["base"])
        foot = f"before: preference {base['preference']:.3f}, {base['ability']:.4f} nats per token"
        foot += f"; {seeds} seed{'' if seeds == 1 else 's'}"
        if seeds > 1:
            same = f"the same {self.report.meta['held_out']} held-out pairs"
            foot += f"\nintervals are over seeds, on {same}, each at 95 % by itself"
        notes = [
            f"left out: {line}"
            for line in reasons(cast("dict[str, str]", self.report.meta["left_out"]))
        ]
        notes += [OVERLAP] if self.report.meta["overlap"] else []
        return "\n".join([rows_text(rows), foot, *notes])

    def line(self) -> dict[str, Json]:
        """One JSON object for machines."""
        return {
            "job": "compare",
            "seeds": self.report.meta["seeds"],
            "base": self.report.meta["base"],
            "left_out": self.report.meta["left_out"],
            "overlap": self.report.meta["overlap"],
            "measures": [asdict(m) for m in self.report],
            "cached_steps": self.result.line()["cached_steps"],
            "seconds": self.result.line()["seconds"],
            "report": str(self.result.report),
        }


def _pairs(data: Table, budget: int, held_out: int) -> Table:
    """The pairs; an InputError unless they are enough to learn from and to measure on."""
    from truing.core.trainer.preflight import check_rows

    check_rows(data, "pair", "--data")
    if held_out + budget > len(data):
        raise InputError(
            f"--held-out {held_out} and --budget {budget} ask for more rows than there are",
            where=f"--data {data.source}",
            seen=f"{len(data)} rows",
            fix="Lower one of them",
        )
    return data


def _named(given: object, noun: str, option: str) -> tuple[str, Opened]:
    """What a plan calls a model or a table, and what is at hand under that name.

    A table's name or path is read at once; a model's is opened by the plan.
    """
    if isinstance(given, (str, Path)) and noun == "Model":
        return str(given), {}
    if isinstance(given, (str, Path)):
        path = files.expanded(given)
        text = str(path) if path.exists() else str(given)
        return text, {(noun, text): Table.read(text)}
    found = cast("Model | Table", as_noun(noun, given, option, where="compare"))
    name = found.name if isinstance(found, Model) else found.source
    text = f"{name} {found.key[:12]}"  # two of one name are two in the run's folder
    return text, {(noun, text): found}


def _command(settings: Mapping[str, object], **options: object) -> list[str]:
    """What compares so on the command line; nothing where it cannot be said there."""
    texts = [f"{n}={v.text}" for n, v in settings.items() if isinstance(v, Typed)]
    at_hand = any(not isinstance(v, (str, int, Path)) for v in options.values())
    if at_hand or len(texts) < len(settings):
        return []
    words = [w for n, v in options.items() for w in (f"--{n.replace('_', '-')}", str(v))]
    return ["compare", *words, *(w for text in texts for w in ("--set", text))]


def compare(
    methods: str | Sequence[str],
    *,
    model: str | Path | Model,
    data: str | Path | Table | Sequence[Mapping[str, object]],
    verb: str = "train",
    budget: str | int = "64pairs",
    seeds: int = 3,
    held_out: int = HELD_OUT,
    settings: Mapping[str, object] | None = None,
    runs: str | Path = "runs",
) -> Comparison:
    """Set several methods side by side on the same rows, budget and seeds.

    Args:
        methods: names, `verb/name`, `name@setting=value@...`, or a group's name for all of it that
            can be trained on the pairs; a text lists them with commas.
        model: what each of them starts from, or what names it.
        data: preference pairs: a table, rows, a file or a data set's name.
        verb: of bare names.
        budget: rows to learn from, such as "64pairs".
        seeds: repetitions, each with another training sample.
        held_out: pairs that are measured on.
        settings: of every method, such as {"lr": 1e-3}.
        runs: where the run's folder goes.
    Raises:
        InputError: unknown method or setting; too few rows; one that needs other inputs.
        Diverged: no method's loss stays finite.
    """
    from truing import report

    methods = parts(methods, ",") if isinstance(methods, str) else methods
    if not methods:
        raise InputError("no methods to compare", where="--methods", fix="Such as dpo,ipo,simpo")
    for option, count in (("--seeds", seeds), ("--held-out", held_out)):
        if not isinstance(count, int) or count < 1:
            raise InputError("must be a whole number, at least 1", where=option, seen=count)
    found = contenders_of(methods, verb, settings)
    rows = budget_of(str(budget))
    name, at_hand = _named(data, "Table", "data")
    pairs = _pairs(cast(Table, at_hand["Table", name]), rows, held_out)
    start, opened = _named(model, "Model", "model")
    found, left = taken(found, pairs)
    overlap = held_out + seeds * rows > len(pairs)
    if overlap:
        print(f"compare: {OVERLAP} ({seeds} x {rows} of {len(pairs) - held_out})", file=sys.stderr)
    plan = plan_of(found, start, name, rows, seeds, held_out=held_out, overlap=overlap)
    plan.command = _command(
        settings or {},
        methods=",".join(methods),
        model=model,
        data=data,
        verb=verb,
        budget=budget,
        seeds=seeds,
        held_out=held_out,
    )
    result = run(plan, runs, opened=at_hand | opened, strands=strands_of(found, seeds))
    found = [c for c in found if c.label not in result.lost]
    made = collect(found, seeds, result, left | result.lost, overlap=overlap)
    result.results["comparison"] = made
    files.write_text(
        result.folder / "comparison.json", jsontext.dumps(made.to_json(), indent=1) + "\n"
    )
    report.write(result.folder, result.results)
    return Comparison(made, result)


def from_options(**options: object) -> Comparison:
    """`compare` from the command line's words."""
    verb, methods = str(options["verb"]), cast("list[str]", options.pop("methods"))
    for text in methods:
        bare = parts(text.strip(), "@")[0]
        known = bare in registry or f"{verb}/{bare}" in registry
        if not known and not members(text, verb):
            of_verb = [m for m in registry.values() if m.verb == verb]
            names = {m.name for m in of_verb} | {m.group for m in of_verb if m.group}
            raise unknown("method", bare, names, where="--methods", limit=60)
    return compare(methods, **options)  # pyright: ignore[reportArgumentType]
