"""Rows for the page's browser: samples before and after, and the tables of the run.

Every row is prepared here as texts, so that the page's script only shows and filters. Lineage is
followed as `truing why` follows it: a sample leads to its answers, their prompt, where that came
from, and to the training rows that touch the same principles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from truing.context import Json as Plain
from truing.lineage import Rows, lineage_of, parents, touched
from truing.principles import Principles
from truing.report.facts import RunFacts
from truing.report.outcome import is_before_after
from truing.report.tally import became, ids_of, principles_of
from truing.report.wording import cut, excerpt, shown, value
from truing.reports import Report
from truing.store import Noun
from truing.tables import Row, Table

MOST_CHANGES = 1000
MOST_ROWS = 300
DEEPEST = 8
LONGEST_CHAIN = 24
TEXTS = ("completion", "chosen", "rejected", "baseline", "text", "completions", "turns", "steps")
APART = ("id", "lineage", "prompt", "messages")
SHORT = 100  # longer values are shown as a text of their own

Results = Mapping[str, object]
Json = dict[str, object]


@dataclass(frozen=True)
class Source:
    """Rows of one step that the browser offers."""

    step: str
    title: str
    total: int
    rows: Sequence[Json]
    principles: Sequence[str]
    compares: bool = False


class Origins:
    """Where every row of the run stands, as `truing why` finds it, and what training steps saw."""

    def __init__(self, run: RunFacts, results: Results) -> None:
        steps: dict[str, dict[str, Plain]] = {
            n: {"method": "", "key": "", "inputs": {}} for n in results
        }
        for name, step in run.steps.items():
            inputs: dict[str, Plain] = {n: [*sources] for n, sources in step.inputs.items()}
            steps[name] = {"method": step.method, "key": step.key, "inputs": inputs}
        self.run, self.rows = run, Rows(cast("Mapping[str, Noun]", results), steps)
        self.training = self.rows.training_tables()
        self.taught: dict[str, dict[str, int]] = {}  # training rows by principle and step
        for name in self.training:
            for id in (id for row in self.rows.tables[name] for id in touched(row)):
                counts = self.taught.setdefault(id, {})
                counts[name] = counts.get(name, 0) + 1

    def chain(self, step: str, row: Row) -> list[list[object]]:
        """[depth, id, steps, excerpt] of the ancestors of a step's row, nearest first."""
        found: list[list[object]] = []
        if not parents(row):
            return found
        own = self.rows.places(str(row["id"]), step)
        seen = {(str(row["id"]), own[0])}
        front = [(id, own) for id in parents(row)]
        for depth in range(1, DEEPEST + 1):
            following: list[tuple[str, list[str]]] = []
            for id, below in front:
                above = self.rows.above(id, below)
                where = self.rows.places(id, above) if above else [""]
                if (id, where[0]) in seen or len(found) == LONGEST_CHAIN:
                    continue
                seen.add((id, where[0]))
                one = self.rows.row(id, where) if above else {}
                said = excerpt(body(one)) if above else "not among this run's rows"
                found.append([depth, id, ", ".join(reversed(where)), said])
                following += [(p, where) for p in parents(one)]
            front = following
        return found

    def training_rows(self, ids: Sequence[str]) -> list[list[object]]:
        """[principle, step, number of training rows that touch it]."""
        return [[id, step, n] for id in ids for step, n in self.taught.get(id, {}).items()]


def body(row: Row) -> str:
    """The text that a row is known by."""
    for name in ("completion", "prompt", "messages", "text", "chosen"):
        if text := shown(row.get(name)):
            return text
    return shown({k: v for k, v in row.items() if k not in APART})


def _facts_of_lineage(row: Row, names: Mapping[str, str]) -> list[list[str]]:
    facts: list[list[str]] = [["row", str(row["id"])]]
    for name, what in lineage_of(row).items():
        text = shown(what)
        if name in ("parents", "principles") or not text:
            continue
        if name in ("generator", "judge") and text in names:
            text = f"{names[text]} ({text})"
        facts.append([name.replace("_", " "), cut(text, 400)])
    return facts


def _side(row: Row, when: str) -> Json:
    words, cosine = row.get(f"words_{when}"), row.get(f"relevance_{when}")
    notes = [
        f"{value(float(words))} words" if isinstance(words, (int, float)) else "",
        f"relevance {value(float(cosine), 'cosine')}" if isinstance(cosine, (int, float)) else "",
    ]
    unusable = str(row.get(f"unusable_{when}") or "")
    return {
        "label": when,
        "text": cut(str(row.get(when) or "")),
        "broken": sorted(ids_of(row.get(f"violated_{when}"))),
        "notes": ", ".join(filter(None, notes)),
        "unusable": unusable,
    }


def _change_row(
    step: str, row: Row, ids: Sequence[str], why: Mapping[str, str], origins: Origins
) -> Json:
    before, after = ids_of(row.get("violated_before")), ids_of(row.get("violated_after"))
    tags = [[id, became(id, before, after)] for id in ids]
    hit = [id for id in ids if id in before | after]
    return {
        "id": str(row["id"]),
        "prompt": cut(shown(row.get("prompt"))),
        "parts": [_side(row, "before"), _side(row, "after")],
        "tags": tags,
        "why": [[id, why.get(id, "")] for id in hit],
        "facts": [],
        "lineage": _facts_of_lineage(row, origins.run.named()),
        "chain": origins.chain(step, row),
        "taught": origins.training_rows(hit),
    }


def _row(step: str, row: Row, why: Mapping[str, str], origins: Origins) -> Json:
    parts: list[Json] = []
    facts: list[list[str]] = []
    for name, what in row.items():
        text = shown(what)
        if name in APART or not text:
            continue
        if name in TEXTS or len(text) > SHORT:
            parts.append({"label": name.replace("_", " "), "text": cut(text)})
        else:
            facts.append([name.replace("_", " "), text])
    ids = touched(row)
    prompt = shown(row.get("prompt")) or shown(row.get("messages"))
    return {
        "id": str(row["id"]),
        "prompt": cut(prompt or excerpt(body(row))),
        "parts": parts,
        "tags": [[id, ""] for id in ids],
        "why": [[id, why[id]] for id in ids if id in why],
        "facts": facts,
        "lineage": _facts_of_lineage(row, origins.run.named()),
        "chain": origins.chain(step, row),
        "taught": [],
    }


def explanations(results: Results) -> dict[str, str]:
    """Principle -> its text, and its check where a step of the run holds the principles."""
    found: dict[str, str] = {}
    for noun in results.values():
        if isinstance(noun, Report):
            texts = noun.meta.get("texts")
            items = texts.items() if isinstance(texts, dict) else ()
            found |= {str(k): str(v) for k, v in items if str(k) not in found}
    for noun in results.values():
        if isinstance(noun, Principles):
            for p in noun:
                found[p.id] = f"{p.text} {_check(p.check)}".strip()
    return found


def _check(check: Mapping[str, object] | None) -> str:
    if check is None:
        return "No check measures it."
    settings = shown({k: v for k, v in check.items() if k != "use"})
    return f"Checked by {check.get('use')}" + (f" ({settings})." if settings else ".")


def _rows_of(noun: object) -> Sequence[Row]:
    if isinstance(noun, Table):
        return noun.rows
    return noun.samples.rows if isinstance(noun, Report) and noun.samples else ()


def _ordered(run: RunFacts, results: Results) -> list[tuple[str, object]]:
    known = [name for name in run.steps if name in results]
    return [(n, results[n]) for n in [*known, *(n for n in results if n not in run.steps)]]


def sources(run: RunFacts, results: Results) -> list[Source]:
    """What the browser offers: samples before and after, then training data, then the rest."""
    ordered = dict(_ordered(run, results))
    origins, why = Origins(run, ordered), explanations(results)
    compared = compared_steps(run, results)
    made: list[tuple[int, Source]] = []
    for name, noun in ordered.items():
        rows = _rows_of(noun)
        if not rows or name in compared:
            continue
        if isinstance(noun, Report) and is_before_after(noun):
            ids = principles_of(noun)
            items = [_change_row(name, r, ids, why, origins) for r in rows[:MOST_CHANGES]]
            made.append((0, Source(name, "before and after", len(rows), items, ids, True)))
            continue
        items = [_row(name, r, why, origins) for r in rows[:MOST_ROWS]]
        ids = list(dict.fromkeys(id for r in rows for id in touched(r)))
        title = f"samples of {noun.title}" if isinstance(noun, Report) else _kind(noun)
        made.append(
            (1 if name in origins.training else 2, Source(name, title, len(rows), items, ids))
        )
    return [source for _, source in sorted(made, key=lambda m: m[0])]


def _kind(noun: object) -> str:
    return f"{noun.kind} rows" if isinstance(noun, Table) else "rows"


def compared_steps(run: RunFacts, results: Results) -> set[str]:
    """Steps whose reports a before-and-after report holds already."""
    return {
        source
        for name, noun in results.items()
        if isinstance(noun, Report) and is_before_after(noun) and name in run.steps
        for source in run.steps[name].sources()
    }
