"""Running a plan: each step once, kept in the store, resumable at any point.

A step's key is the hash of method, settings, content of its inputs, seed, device class and code.
What has the key in the store is not made again; what was begun goes on from its scratch folder.
"""

from __future__ import annotations

import functools
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from truing import watchers
from truing.context import Context, Json, use
from truing.core import private
from truing.datasets import licensed
from truing.errors import InputError, Stopped, TruingError, Unread
from truing.faults import check_space, told
from truing.given import need_rows
from truing.keys import Nouns, key_to_run
from truing.method import Method
from truing.models import Model, hold
from truing.naming import Place, holding, referred_model, with_keys
from truing.plan import Checked, Plan
from truing.progress import Clock, Progress
from truing.quarantine import check_served, marked
from truing.recipe import plan_of
from truing.runs import Run, facts_of, versions
from truing.sources import Opened, check_abilities, open_sources, with_defaults
from truing.store import Noun, Store
from truing.strands import Strands
from truing.summary import about, summary_of, table_of
from truing.tables import Table

WAITS = "another process makes this step; waiting for it"

# One step


@dataclass
class StepResult:
    """What a step made, from the store."""

    method: Method
    key: str
    artefact: Noun
    cached: bool
    seconds: float
    metrics: list[dict[str, Json]] = field(default_factory=list)
    note: str = ""
    cost: float = 0.0  # of endpoints whose price is known

    def line(self) -> dict[str, Json]:
        """One JSON object for machines."""
        found: dict[str, Json] = {
            "job": self.method.id,
            "key": self.key,
            "noun": type(self.artefact).__name__,
            "about": about(self.artefact),
            "cached": self.cached,
            "seconds": round(self.seconds, 2),
        }
        return found | _costing(self.cost) | summary_of({self.method.name: self.artefact})

    def text(self) -> str:
        """For people."""
        shown = table_of({self.method.name: self.artefact}) or about(self.artefact)
        how = "from the store" if self.cached else f"in {self.seconds:.1f} s"
        return f"{shown}\n{self.method.id}: {how}; truing store export {self.key[:12]} FOLDER"


def _costing(cost: float) -> dict[str, Json]:
    return {"cost": round(cost, 6)} if cost else {}


def _reused(facts: Mapping[str, Json]) -> str:
    """A remark when an artefact was made under other library versions; else ""."""
    made = cast("dict[str, Json]", facts.get("versions") or {})
    now = versions(made)
    other = [f"{n} {made[n]}, now {now[n]}" for n in made if n in now and made[n] != now[n]]
    return f"made with {'; '.join(other)}" if other else ""


def _noted(key: str, beside: Iterable[str], *notes: str) -> str:
    """The notes of a step, and by what by-products of it are named."""
    named = ", ".join(f"{name} (`{key[:12]}/{name}`)" for name in beside)
    return "; ".join(filter(None, (*notes, named and f"beside it: {named}")))


def perform(
    method: Method,
    nouns: Nouns,
    settings: Mapping[str, object],
    *,
    seed: int = 0,
    name: str = "",
    store: Store | None = None,
    root: Callable[[str], None] | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
    on_metric: Callable[[dict[str, Json]], None] | None = None,
    on_fault: Callable[[Clock], None] | None = None,
) -> StepResult:
    """Run one step, or take what it made before from the store.

    Args:
        method: any but of the verb serve.
        nouns: inputs by name; those that take several, by role.
        settings: validated, defaults included.
        seed: of all random streams.
        name: of the step, which lineage records.
        store: by default the user's.
        root: called with the key before anything is done, to keep gc away from it.
        on_progress: called with (done, total, label).
        on_metric: called with each observation.
        on_fault: called when it fails or is stopped, with what it has taken until then.
    Raises:
        InputError: a mistake in data or settings, such as a table without a row.
    """
    need_rows(nouns)
    store = store or Store()
    key = key_to_run(method, nouns, settings, seed, store)
    with told(name := name or method.name), store.lock(key, said=f"{name}: {WAITS}"):
        if root is not None:
            root(key)
        damage = ""
        if store.has(key):
            try:
                return _from_store(method, store, key)
            except Unread:
                raise  # it may be whole: nothing is thrown away for a machine's fault
            except (InputError, OSError, ValueError) as error:
                store.discard(key)
                damage = f"the stored one was damaged and is made again ({error})"
        check_space(store.root)
        clock = Clock(scratch := store.scratch(key))
        heard = clock.heard(on_progress), clock.paying(on_metric)
        context = Context(seed, scratch, *heard, name)
        with clock.running(on_fault), use(context):
            # What it observed is kept by the context beyond its end.
            made = method.function(**nouns, **settings)
        seconds = clock.seconds
        facts = facts_of(method, nouns, settings, seed, seconds) | _costing(clock.cost)
        finished = functools.partial(_finished, method, nouns, settings)
        beside = {n: finished(noun) for n, noun in context.beside.items()}
        made = store.put(key, finished(made), facts, context.metrics, beside=beside)
        note = _noted(key, beside, damage)
        return StepResult(method, key, made, False, seconds, context.metrics, note, clock.cost)


def _finished(method: Method, nouns: Nouns, settings: Mapping[str, object], made: object) -> Noun:
    """What a method made, with the licences and the quarantine that go on to it."""
    return cast(Noun, marked(licensed(made, nouns), method, nouns, settings))


def _from_store(method: Method, store: Store, key: str) -> StepResult:
    facts = store.facts(key)
    seconds, cost = (float(cast(float, facts.get(n) or 0.0)) for n in ("seconds", "cost"))
    # By-products are read, so that one that is damaged is made again with the step.
    note = _noted(key, store.beside(key), _reused(facts))
    found = store.load(key), True, seconds, store.metrics(key), note, cost
    shutil.rmtree(store.scratch(key), ignore_errors=True)  # left by a kill right after it was kept
    return StepResult(method, key, *found)


def run_step(
    method: Method, inputs: Nouns, settings: Mapping[str, object], *, seed: int = 0
) -> StepResult:
    """Run a single method on nouns at hand, stored and resumable like a step of a recipe."""
    progress, store = Progress(), Store()
    inputs, checked = with_defaults(method, inputs), holding(method.validate(settings))
    progress.start(method.name, method.id)
    result = perform(
        method,
        inputs,
        checked,
        seed=seed,
        store=store,
        root=store.roots.keep_recent,
        on_progress=progress.tell,
    )
    progress.end(about(result.artefact), result.cached, result.seconds, result.note)
    return result


# A whole plan


@dataclass
class Result:
    """A finished run: what each step made is in `results`, by the step's name.

    `lost` are the strands, and steps of none, that were left out, with the reason.
    """

    plan: Plan
    folder: Path
    results: dict[str, Noun]
    run: Run
    report: Path
    lost: dict[str, str] = field(default_factory=dict)

    def line(self) -> dict[str, Json]:
        """One JSON object for machines: what was measured, its cost, where the report is."""
        facts: dict[str, Json] = {"job": self.plan.name}
        facts |= summary_of(self.results)
        facts["seconds"] = round(time.time() - self.run.began, 1)
        facts["cached_steps"] = sum(bool(s["cached"]) for s in self.run.steps.values())
        own = [s.get("cost") for s in self.run.steps.values() if not s["cached"]]
        facts |= _costing(sum(float(cast(float, cost or 0.0)) for cost in own))
        facts["report"] = str(self.report)
        return facts

    def table(self) -> str:
        """For people: what was measured."""
        made = (f"{n}: {about(r)}" for n, r in self.results.items())
        return table_of(self.results) or "\n".join(made)


def run(
    plan: Plan | str | Path,
    runs: str | Path = "runs",
    *,
    store: Store | None = None,
    opened: Opened | None = None,
    strands: Mapping[str, str] | None = None,
    watch: watchers.Watch | Sequence[watchers.Watch] = (),
) -> Result:
    """Run a recipe or a plan to its end; what is in the store already costs nothing.

    Args:
        plan: path of a recipe, .yaml or .py, or a plan made in Python.
        runs: where its folder goes.
        store: by default the user's.
        opened: sources that are at hand, by noun and text as the plan has it.
        strands: of steps, which of them belong together: where a loss of one is not finite, the
            others and what depends on them are left out, the rest runs on (see `Result.lost`).
        watch: what is told of it as it goes, by name or as it is: see `truing.watchers`.
    Raises:
        InputError: a mistake in plan, data or settings; nothing has run.
        Stopped: interrupted, disk full, loss not finite; the same call goes on from there. Or
            another process runs the same plan in the same folder.
    """
    plan = plan_of(plan)
    checked, watched = plan.check(), watchers.watched(watch, plan.watch)
    check_abilities(checked)
    with use(Context()) as reading:
        opened = open_sources(checked, opened)
    check_abilities(checked, opened)
    check_served(checked, opened)
    record = Run(plan, runs, watched)
    if reading.metrics:  # rows of data sets that cannot be used
        record.manifest["left_out"] = list(reading.metrics)
    with record.alone():
        return _run_all(checked, opened, record, store or Store(), Strands(strands or {}))


def _run_all(
    checked: Sequence[Checked], opened: Opened, record: Run, store: Store, strands: Strands
) -> Result:
    from truing import report

    for one in checked:
        record.open_step(one)
    record.manifest["models"] = {
        shown: {"key": n.key, "licence": n.licence, "source": shown, "quarantine": n.quarantine}
        for shown, n in ((private.without_login(text), n) for (_, text), n in opened.items())
        if isinstance(n, Model)
    }
    record.begin()
    results: dict[str, Noun] = {}
    try:
        for i, one in enumerate(checked, 1):
            if why := strands.why_not(one.name, one.edges()):
                record.change(one.name, error=f"left out: {why}")
                continue
            with told(one.name), strands.apart(one.name):
                _run_one(one, i, len(checked), results, opened, record, store)
    except BaseException as error:
        stopped = isinstance(error, (Stopped, KeyboardInterrupt))
        try:
            record.finish("stopped" if stopped else "failed", summary_of(results))
            report.write(record.folder, results)
        except Exception as fault:  # such as a full disk: it must not hide what happened
            print(f"the page of {record.folder} is not written: {fault}", file=sys.stderr)
        raise
    with told("report"):
        record.finish("done", summary_of(results))
        used = [str(s["key"]) for s in record.steps.values() if s["key"]]
        store.roots.keep_run(record.folder, used, final=True)
        page = report.write(record.folder, results)
    return Result(record.plan, record.folder, results, record, page, strands.lost | strands.alone)


def _nouns(
    one: Checked, results: Mapping[str, Noun], opened: Opened
) -> dict[str, Noun | Mapping[str, Noun]]:
    """A step's inputs: what earlier steps made, and what was opened; or what they refer to."""
    given = with_keys(one.references, _keys(one, results, opened))
    nouns: dict[str, Noun | Mapping[str, Noun]] = {
        name: referred_model(name, cast("dict[str, object]", ref), where=one.step.at(name))
        for name, ref in given.items()
    }
    for name, roles in one.sources.items():
        wanted = one.method.inputs[name]
        found = {
            r: results[s.text] if s.is_step else opened[wanted.noun, s.text]
            for r, s in roles.items()
        }
        nouns[name] = found if wanted.many else found[""]
    return nouns


def _keys(one: Checked, results: Mapping[str, Noun], opened: Opened) -> dict[Place, str]:
    """Keys of the nouns that a step's settings name, which are held."""
    return {
        (n.noun, n.text): hold(
            cast(Model, results[s.text] if s.is_step else opened[n.noun, s.text])
        )
        for n, s in one.named.items()
    }


def _run_one(
    one: Checked,
    number: int,
    total: int,
    results: dict[str, Noun],
    opened: Opened,
    record: Run,
    store: Store,
) -> None:
    progress = Progress(f"[{number}/{total}] ")
    progress.start(one.name, one.method.id)
    nouns = _nouns(one, results, opened)
    settings = with_keys(one.settings, _keys(one, results, opened))
    if one.method.verb == "serve":
        record.change(one.name, status="done")
        one.method.function(**nouns, **settings)
        return
    record.change(one.name, status="running")
    try:
        made = perform(
            one.method,
            nouns,
            settings,
            seed=one.seed,
            name=one.name,
            store=store,
            root=lambda key: store.roots.keep_run(record.folder, [key]),
            on_progress=progress.tell,
            on_metric=lambda values: record.metric(one.name, values),
            on_fault=lambda clock: record.change(
                one.name, seconds=round(clock.seconds, 2), **_costing(clock.cost)
            ),
        )
    except BaseException as error:
        stopped = isinstance(error, (Stopped, KeyboardInterrupt))
        if isinstance(error, InputError) and not error.where.startswith(one.step.at()):
            error.where = f"{one.step.at()}: {error.where}".rstrip(": ")
        told = str(error) if isinstance(error, TruingError) else repr(error)
        record.end_step(one.name, status="stopped" if stopped else "failed", error=told)
        raise
    if isinstance(made.artefact, Table):
        given = [v for n in nouns.values() for v in (n.values() if isinstance(n, Mapping) else [n])]
        made.artefact.made_in(one.name, [n for n in given if isinstance(n, Table)])
    results[one.name] = made.artefact
    if made.cached:
        for values in made.metrics:
            record.metric(one.name, values)
    record.end_step(
        one.name,
        made.artefact,
        key=made.key,
        artefact=made.artefact.key,
        about=about(made.artefact),
        status="done",
        cached=made.cached,
        seconds=round(made.seconds, 2),
        note=made.note,
        **_costing(made.cost),
    )
    progress.end(about(made.artefact), made.cached, made.seconds, made.note)


def load_results(folder: str | Path, store: Store | None = None) -> dict[str, Noun]:
    """What the steps of a run made, from the store; steps that have not ended are left out."""
    from truing import runs

    store = store or Store()
    steps = cast("dict[str, dict[str, Json]]", runs.read(folder)["steps"])
    return {
        n: store.load(str(s["key"]))
        for n, s in steps.items()
        if s["key"] and store.has(str(s["key"]))
    }
