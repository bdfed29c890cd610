"""The page put together: templates, style, script and the data that the script shows."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import cast

from jinja2 import PackageLoader, StrictUndefined
from jinja2.sandbox import SandboxedEnvironment
from markupsafe import Markup

from truing import __version__, jsontext
from truing.models import Model
from truing.report import comparison, curves, graph, measures, outcome, room, samples, svg
from truing.report.facts import Facts, RunFacts, StepFacts, noted, of_step, read_run, text
from truing.report.wording import count, duration, excerpt, shown
from truing.reports import Report
from truing.summary import notes_of

STATIC_SAMPLES = 12
STATUS = {"done": "done", "failed": "failed", "stopped": "stopped", "running": "running"}


@dataclass(frozen=True)
class Cost:
    """One step's bar."""

    step: StepFacts
    text: str
    chart: Markup


@functools.cache
def _environment() -> SandboxedEnvironment:
    made = SandboxedEnvironment(
        loader=PackageLoader("truing.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = cast("dict[str, object]", made.filters)
    filters.update(duration=duration, excerpt=excerpt, count=count, notes=notes_of, typed=typed)
    return made


@functools.cache
def _asset(name: str) -> str:
    return resources.files("truing.report").joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _assets(script: bool) -> dict[str, str]:
    """Style, script where it is wanted, and the policy that allows these alone."""
    style, code = _asset("page.css"), _asset("page.js") if script else ""
    return {"style": Markup(style), "code": Markup(code), "policy": policy(style, code)}


def policy(style: str, script: str) -> str:
    """Content-Security-Policy: this very style and script, nothing else and from nowhere."""
    allowed = _hash(script) if script else "'none'"
    return (
        f"default-src 'none'; style-src {_hash(style)}; script-src {allowed}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def embedded(data: object) -> Markup:
    """JSON that is safe inside a script element: no character there can end it or open markup."""
    made = jsontext.dumps(data)
    for char in "<>&\u2028\u2029":
        made = made.replace(char, f"\\u{ord(char):04x}")
    # A lone surrogate, which a file cannot hold, stays an escape.
    return Markup(made.encode("utf-8", "backslashreplace").decode())


def typed(setting: object) -> str:
    """A setting as a recipe takes it; YAML has no number without a point before its power."""
    if isinstance(setting, str) and setting:
        return setting
    made = jsontext.dumps(setting, default=str)
    return made.replace("e", ".0e") if isinstance(setting, float) and "." not in made else made


def _costs(run: RunFacts) -> list[Cost]:
    most = max((s.seconds for s in run.steps.values()), default=0.0) or 1.0
    made: list[Cost] = []
    for step in run.steps.values():
        ran = step.status != "pending"
        known = step.seconds or step.status == "done"
        said = (duration(step.seconds) if known else "not known") if ran else "not run"
        said = f"{said}, cost {step.cost:.4g}" if step.cost else said
        said = f"{said}, cached" if step.cached and ran else said
        bar = svg.bar(step.seconds / most, hollow=step.cached, label=f"{step.name}: {said}")
        made.append(Cost(step, said, bar))
    return made


def _licences(run: RunFacts, results: Mapping[str, object]) -> list[tuple[str, str, str, str]]:
    """(name, licence, source, key) of the models that went in, then of those that came out."""
    rows = [
        (
            name,
            text(m, "licence") or "unknown",
            _source(text(m, "source"), text(m, "quarantine")),
            text(m, "key"),
        )
        for name, m in run.models.items()
    ]
    for name, noun in results.items():
        if isinstance(noun, Model):
            key = run.steps[name].artefact if name in run.steps else ""
            rows.append((name, noun.licence, _source("made by this run", noun.quarantine), key))
    return rows


def _source(source: str, quarantine: str) -> str:
    return f"{source}; quarantined: {quarantine}" if quarantine else source


def _facts(facts: Facts) -> list[tuple[str, str]]:
    return [(k.replace("_", " "), shown(v) or "none") for k, v in facts.items()]


def _observed(metrics: Sequence[Facts], apart: set[str]) -> dict[str, list[tuple[str, str]]]:
    """What steps observed, but those whose training shows it."""
    return {n: noted(rows) for n, rows in of_step(metrics).items() if n not in apart}


def render(
    manifest: Facts, metrics: Sequence[Facts], results: Mapping[str, object], *, script: bool
) -> str:
    """The page as text; see `truing.report.render`."""
    run = read_run(manifest)
    ordered = {n: results[n] for n in run.steps if n in results}
    results = ordered | {n: r for n, r in results.items() if n not in ordered}
    reports = {n: r for n, r in results.items() if isinstance(r, Report)}
    outcomes = outcome.before_after_of(reports)
    compared = samples.compared_steps(run, results)
    comparisons = [
        comparison.compared(n, r) for n, r in reports.items() if comparison.is_comparison(r)
    ]
    others = [
        (n, r, measures.lines(r))
        for n, r in reports.items()
        if not (outcome.is_before_after(r) or comparison.is_comparison(r))
    ]
    main = outcomes[-1] if outcomes else None
    if main:
        headline = f"{main.step}: {main.headline}" if len(outcomes) > 1 else main.headline
    elif comparisons:
        headline = comparisons[-1].headline
    else:
        headline = measures.plain_headline(run, reports, curves.by_update(metrics))
    targets = {name: f"step-{i}" for i, name in enumerate(run.steps)}
    trainings = curves.trainings(metrics)
    found = room.fitting(samples.sources(run, results))
    made = (
        _environment()
        .get_template("page.html")
        .render(
            **_assets(script),
            run=run,
            version=__version__,
            status=STATUS.get(run.status, "running"),
            headline=headline,
            main=main,
            outcomes=outcomes,
            comparisons=comparisons,
            others=[o for o in others if o[0] not in compared],
            compared=[o for o in others if o[0] in compared],
            broken=measures.broken_step(run),
            picture=graph.picture(run, targets),
            state=graph.state,
            targets=targets,
            trainings=trainings,
            observed=_observed(metrics, {t.step for t in trainings}),
            sources=found,
            first=found[0].rows[:STATIC_SAMPLES] if found else [],
            data=embedded([asdict(s) for s in found]) if script else "",
            costs=_costs(run),
            models=_licences(run, results),
            versions=_facts(run.versions),
            hardware=_facts(run.hardware),
            result=_facts(run.result),
        )
    )
    return made.encode("utf-8", "replace").decode()
