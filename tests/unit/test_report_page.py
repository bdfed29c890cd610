"""The report of a run as a page: its numbers, its escaping, runs that lack parts."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import report_run
import yaml

from truing import report
from truing.errors import InputError
from truing.models import Model
from truing.report import curves, graph, layout, room, samples, svg, wording
from truing.report.facts import noted, read_metrics, read_run
from truing.report.measures import lines
from truing.report.outcome import Change, before_after, change
from truing.report.page import embedded
from truing.report.tally import tallies
from truing.reports import Measure, Report
from truing.tables import Table

VOID = {"meta", "link", "input", "br", "img"}


class Page(HTMLParser):
    """The elements of a page, with the text inside each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.open: list[int] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}, []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for i in self.open:
            self.elements[i][2].append(data)

    def all(self, tag: str, **wanted: str) -> list[tuple[dict[str, str], str]]:
        """(attributes, text) of the elements with these attributes."""
        return [
            (attrs, " ".join("".join(text).split()))
            for name, attrs, text in self.elements
            if name == tag and all(attrs.get(k.rstrip("_")) == v for k, v in wanted.items())
        ]

    def raw(self, tag: str, **wanted: str) -> list[str]:
        """Text of elements, untouched."""
        return [
            "".join(text)
            for name, attrs, text in self.elements
            if name == tag and all(attrs.get(k.rstrip("_")) == v for k, v in wanted.items())
        ]


@pytest.fixture(scope="module")
def results() -> dict[str, object]:
    return report_run.results()


@pytest.fixture(scope="module")
def text(results: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run") / "quickstart-1"
    report_run.write_run(folder, report_run.manifest(), report_run.metrics())
    path = report.write(folder, results)
    assert path == folder / "report.html"
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json", "metrics.jsonl", "report.html",
    ]  # fmt: skip
    return path.read_text(encoding="utf-8")


def share(value: float) -> str:
    return f"{100 * value:.1f} %".replace("-", "\u2212")


def rows_of(page: Page) -> dict[str, list[str]]:
    """Cells of the table of before and after, by measure."""
    found: dict[str, list[str]] = {}
    name = ""
    for tag, attrs, parts in page.elements:
        cell = " ".join("".join(parts).split())
        if tag == "th" and attrs.get("scope") == "row":
            name = cell
            found.setdefault(name, [])
        elif tag == "td" and name and len(found[name]) < 8:
            found[name].append(cell)
    return found


def test_numbers_of_every_principle_are_those_of_the_report(
    text: str, results: dict[str, object]
) -> None:
    measured = results["result"]
    assert isinstance(measured, Report)
    rows = rows_of(Page(text))
    for name in ("brief", "prose", "whole", "impersonal"):
        b = measured.get("violation rate before", name)
        a = measured.get("violation rate after", name)
        d = measured.get("violations difference", name)
        cells = rows[name]
        assert cells[0] == share(b.value)
        assert cells[1] == f"{share(b.lo)} to {share(b.hi)}"
        assert cells[2] == share(a.value)
        assert cells[3] == f"{share(a.lo)} to {share(a.hi)}"
        assert cells[4] == f"{100 * d.value:+.1f} points".replace("-", "\u2212")
        assert cells[6] == str(len(report_run.ASKED))


def test_key_figures_and_headline(text: str, results: dict[str, object]) -> None:
    measured = results["result"]
    assert isinstance(measured, Report)
    page = Page(text)
    tiles = [t for _, t in page.all("div", class_="tile")]
    assert [t.split()[0] for t in tiles] == ["violations", "relevance", "words", "ability"]
    for tile, name, form in zip(
        tiles,
        ("violation rate", "relevance", "words", "ability"),
        (share, "{:.3f}".format, "{:.1f}".format, "{:.3f}".format),
        strict=True,
    ):
        assert form(measured.get(f"{name} before").value) in tile
        assert form(measured.get(f"{name} after").value) in tile
    d = measured.get("violations difference")
    assert (
        f"95 % interval {100 * d.lo:+.1f} to {100 * d.hi:+.1f}".replace("-", "\u2212") in tiles[0]
    )
    (headline,) = (t for _, t in page.all("h1"))
    before = round(100 * measured.get("violation rate before").value)
    after = round(100 * measured.get("violation rate after").value)
    assert headline.startswith(f"Violations of the principles fell from {before} % to {after} %")
    assert headline.endswith(
        "; relevance improved by 31 % and ability went from 3.214 to 3.243 nats per token."
    )  # of which no interval tells whether it is a change


def test_a_page_says_that_ability_was_not_measured(text: str, results: dict[str, object]) -> None:
    said = "general ability was not measured"
    assert said not in text
    before, after = (results[name] for name in ("before", "after"))
    assert isinstance(before, Report) and isinstance(after, Report)
    made = report_run.before_after(before, after)
    without = {"before": before, "after": after, "result": made}
    page = report.render(report_run.manifest(), [], without)
    effects = page[page.index("Side effects") :]
    assert said in effects[: effects.index("</figure>")]


def test_pictures_come_first_and_in_order(text: str) -> None:
    places = [text.index(f'id="{i}"') for i in (
        "result", "pipeline", "training", "samples", "cost", "again",
    )]  # fmt: skip
    assert places == sorted(places)
    assert text.index('<svg class="plot"') < text.index("<table")


def test_intervals_are_drawn_where_they_are(results: dict[str, object]) -> None:
    measured = results["result"]
    assert isinstance(measured, Report)
    (row, *_) = before_after("result", measured).principles
    drawn = Page(str(row.drawn(svg.Scale.shares())))
    bands = [attrs for attrs, _ in drawn.all("line") if attrs["class"].startswith("band")]
    dots = [attrs for attrs, _ in drawn.all("circle")]
    for band, dot, m in zip(bands, dots, (row.before, row.after), strict=True):
        assert float(band["x1"].rstrip("%")) == pytest.approx(100 * m.lo, abs=0.01)
        assert float(band["x2"].rstrip("%")) == pytest.approx(100 * m.hi, abs=0.01)
        assert float(dot["cx"].rstrip("%")) == pytest.approx(100 * m.value, abs=0.01)


def test_what_a_model_wrote_stays_text(text: str) -> None:
    page = Page(text)
    assert report_run.HOSTILE not in text
    assert not page.all("img")
    assert len(page.all("script")) == 2
    data = json.loads(page.raw("script", id="data")[0])
    prompts = [r["prompt"] for r in data[0]["rows"]]
    assert f"What is <b>bold</b> in HTML? {report_run.HOSTILE}" in prompts


def test_every_name_and_text_of_a_run_is_escaped(results: dict[str, object]) -> None:
    evil = report_run.HOSTILE
    about = report_run.manifest() | {"name": evil, "recipe": evil, "started": evil, "seed": evil}
    about |= {"versions": {evil: evil}, "hardware": {evil: evil}, "result": {evil: evil}}
    about |= {"models": {evil: {"key": evil, "licence": evil, "source": evil}}, "status": "failed"}
    about["steps"] = {
        evil: {"method": evil, "summary": evil, "settings": {evil: [evil]}, "key": evil,
               "inputs": {evil: [evil]}, "artefact": evil, "noun": evil, "about": evil,
               "status": "failed", "error": evil, "note": evil, "seed": evil}
    }  # fmt: skip
    measure = Measure(evil, 0.5, 0.1, 0.9, 4, "share", evil, "lower")
    table = Table(
        "record", [{"prompt": evil, evil: evil, "lineage": {evil: evil, "principle": evil}}]
    )
    made = {evil: Report(evil, [measure], table), "x": results["result"]}
    seen = [
        {"at": evil, "step": 1, "loss": 1.0, evil: 2.0},
        {"at": evil, "receipt": evil, evil: evil},
    ]
    for script in (False, True):
        page = report.render(about, seen, made, script=script)
        assert evil not in page
        assert not Page(page).all("img")
        assert len(Page(page).all("script")) == (2 if script else 0)


def test_page_needs_nothing_and_allows_nothing_else(text: str) -> None:
    page = Page(text)
    (policy,) = (a["content"] for a, _ in page.all("meta") if "http-equiv" in a)
    rules = dict(r.strip().split(" ", 1) for r in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["base-uri"] == rules["form-action"] == "'none'"
    style, code = page.raw("style")[0], page.raw("script")[-1]
    for name, content in (("style-src", style), ("script-src", code)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"
    for tag, attrs, _ in page.elements:
        assert "style" not in attrs, f"<{tag}> has a style of its own, which the policy refuses"
        assert not [a for a in attrs if a.startswith("on")]
        for name in ("src", "href", "xlink:href", "action"):
            assert attrs.get(name, "#").startswith("#") or attrs[name] == "data:,"
    assert "http" not in style and "url(" not in style and "fetch" not in code


def test_page_is_well_formed_and_named_for_screen_readers(text: str) -> None:
    page = Page(text)
    assert page.open == []
    ids = [attrs["id"] for _, attrs, _ in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    anchors = {attrs["href"][1:] for attrs, _ in page.all("a")}
    assert anchors <= set(ids)
    for attrs, _ in page.all("svg"):
        if attrs.get("role") in ("img", "group"):
            assert attrs["aria-label"]
        else:
            assert attrs.get("aria-hidden") == "true" or "viewbox" in attrs
    assert [t for a, t in page.all("html", lang="en")]


def test_page_without_script_shows_the_first_samples(results: dict[str, object]) -> None:
    page = Page(report.render(report_run.manifest(), report_run.metrics(), results))
    assert not page.all("script")
    said = [t for _, t in page.all("p", class_="said")]
    assert report_run.ASKED[1][1] in said and report_run.ASKED[1][3] in said
    assert len(page.all("li", class_="item")) == 12


@pytest.mark.parametrize("status", ["failed", "stopped", "running"])
def test_runs_that_did_not_end(results: dict[str, object], status: str) -> None:
    about = report_run.manifest() | {"status": status}
    steps = dict(about["steps"])  # type: ignore[arg-type]
    steps["aligned"] |= {"status": status, "error": "" if status == "running" else "not finite"}
    steps["aligned"] |= {"seconds": 0.0}
    for name in ("before", "after", "ability_before", "ability_after", "result"):
        steps[name] |= {"status": "pending"}
    about["steps"] = steps
    ended = {n: results[n] for n in ("rules", "drawn", "pairs", "picked")}
    page = Page(report.render(about, report_run.metrics(7), ended))
    (headline,) = (t for _, t in page.all("h1"))
    assert "8 of 14 steps done" in headline
    assert ("at step aligned" in headline) == (status != "running")
    assert "not known" in [t for _, t in page.all("p", class_="numbers")]
    notices = page.all("div", role="status")
    assert len(notices) == (status != "running")
    if notices:
        assert "not finite" in notices[0][1]
        assert "truing run recipes/quickstart.yaml" in notices[0][1]


def test_one_training_step_alone(tiny_path: Path) -> None:
    about = report_run.manifest()
    aligned = dict(about["steps"])["aligned"]  # type: ignore[call-overload]
    about["steps"] = {"dpo": aligned}
    model = Model.open(tiny_path)
    seen = [m | {"at": "dpo"} for m in report_run.metrics(20)]
    page = Page(report.render(about, seen, {"dpo": model}))
    losses = [float(str(m["loss"])) for m in seen if "loss" in m]
    (headline,) = (t for _, t in page.all("h1"))
    assert headline == f"dpo: the loss went from {losses[0]:.3g} to {losses[-1]:.3g} in 20 updates."
    assert not page.all("section", id="result") and not page.all("section", id="samples")
    licences = [t for _, t in page.all("td", class_="wrap")]
    assert model.licence in licences and "made by this run" in licences


def test_a_report_alone_is_its_own_headline() -> None:
    about = report_run.manifest() | {
        "steps": {"a": {"method": "evaluate/ability", "status": "done"}}
    }
    page = Page(report.render(about, [], {"a": report_run.ability(3.2, 40)}))
    (headline,) = (t for _, t in page.all("h1"))
    assert (
        headline == "general ability: ability 3.200 nats per token (95 % interval 3.110 to 3.300)."
    )
    rows = rows_of(page)
    assert rows["choices"][:1] == ["50.0 %"] and rows["choices"][2] == "80"
    assert rows["ability"][3] == "lower is better" and rows["choices"][3] == "higher is better"
    assert [t for _, t in page.all("th", class_="chart")] == ["0 to 100 %"]
    assert len(page.all("details", class_="card fold", open="")) == 1


def test_the_headline_of_several_reports_names_the_step() -> None:
    made = {
        name: Report("refusals", [Measure("refusal rate", v, v, v, 9, "share")])
        for name, v in (("trusted", 0.95), ("repaired", 0.8))
    }
    steps = {name: {"method": "evaluate/refusal_rate"} for name in made}
    page = Page(report.render(report_run.manifest() | {"steps": steps}, [], made))
    assert [t for _, t in page.all("h1")] == ["repaired: refusal rate 80.0 %."]


def test_what_is_found_beside_measures_is_told() -> None:
    part = Measure("refusal rate", 0.92, 0.9, 0.94, 50, "share", "cost 0")
    note = "not within 192 rows times passes"
    made = Report("cost to undo", [part], meta={"notes": [note]})
    about = report_run.manifest() | {"steps": {"undo": {"method": "evaluate/cost_to_undo"}}}
    about |= {"left_out": [{"data": "hh/train", "left_out": 3}]}
    page = Page(report.render(about, [], {"undo": made}))
    assert [t for _, t in page.all("h1")] == [f"cost to undo: {note}."]
    told = [t for _, t in page.all("p", class_="soft")]
    assert note in told and "Left out, as they cannot be used: 3 rows of hh/train." in told


def test_settings_can_be_copied_and_all_observations_are_told() -> None:
    settings = {"lr": 1e-5, "share": 0.123456, "checks": [{"use": "min_words"}], "judge": None}
    seen = [{"at": "s", "unread": n} for n in (5, 0, 0)]
    steps = {"s": {"method": "select/checked", "settings": settings}}
    page = Page(report.render(report_run.manifest() | {"steps": steps}, seen, {}))
    told = {t for _, t in page.all("dd")}
    assert {"1.0e-05", "0.123456", '[{"use": "min_words"}]', "null", "5, 0, 0"} <= told
    assert yaml.safe_load("1.0e-05") == 1e-5
    assert noted([{"at": "s", "unread": n} for n in range(9)]) == [("unread", "0 to 8, 9 times")]


def test_a_run_of_nothing() -> None:
    page = Page(report.render({"schema_version": 1}, [], {}))
    assert [t for _, t in page.all("h1")] == ["The run is not at its end: 0 of 0 steps done."]


def test_manifest_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no readable manifest") as caught:
        report.write(tmp_path, {})
    assert "manifest.json" in caught.value.where
    (tmp_path / "manifest.json").write_text('{"schema_version": 9}')
    with pytest.raises(InputError, match="another schema"):
        report.write(tmp_path, {})
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(InputError, match="one JSON object"):
        report.write(tmp_path, {})
    assert not (tmp_path / "report.html").exists()


def test_metrics_may_be_absent_or_torn(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").write_text('{"at": "a", "step": 1}\n{"at": "a", "st')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"at": "a", "step": 1}]


def test_torch_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from truing import report; from truing.reports import *; "
        "from truing.tables import Table; "
        "r = Report('t', [Measure('m', 1.0, 0.5, 2.0, 3)], Table('record', [{'a': 'b'}])); "
        "report.write(pathlib.Path(sys.argv[1]), {'result': r}); "
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    folder = report_run.write_run(tmp_path, report_run.manifest(), report_run.metrics())
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "report.html").stat().st_size > 20_000


def measures(before: float, after: float, lo: float, hi: float) -> Report:
    side = {"n": 40, "unit": "share", "better": "lower"}
    return Report(
        "t",
        [
            Measure("violation rate before", before, before, before, **side),
            Measure("violation rate after", after, after, after, **side),
            Measure("violations difference", after - before, lo, hi, **side),
        ],
        meta={"kind": "before_after", "principles": []},
    )


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ((0.75, 0.25, -0.6, -0.4), "Violations of the principles fell from 75 % to 25 %"),
        ((0.25, 0.75, 0.4, 0.6), "Violations of the principles rose from 25 % to 75 %"),
        ((0.5, 0.45, -0.12, 0.02), "No clear change in violations: 50 % before and 45 % after"),
    ],
)
def test_headline_claims_no_more_than_the_interval(
    numbers: tuple[float, float, float, float], says: str
) -> None:
    headline = before_after("r", measures(*numbers)).headline.replace("\u00a0", " ")
    assert headline.startswith(says)
    assert headline.endswith("over 40 prompts.")


def test_no_verdict_of_one_prompt() -> None:
    sides = [
        Measure(f"words {w}", v, v, v, 1, "words", "", "")
        for w, v in (("before", 3.0), ("after", 9.0))
    ]
    gap = Measure("words difference", 6.0, 6.0, 6.0, 1, "words", "", "lower")
    found = change(Report("r", [*sides, gap]), "words")
    assert found is not None and found.difference is None and not found.clear
    assert (found.difference_interval, found.before_interval, found.verdict) == ("", "", "")
    assert found.in_words == "words an answer went from 3.0 to 9.0\u00a0words"


def test_no_verdict_without_an_interval() -> None:
    def told(*difference: Measure) -> Change:
        side = {"n": 40, "unit": "share", "better": "higher"}
        before, after = Measure("c", 0.5, 0.4, 0.6, **side), Measure("c", 0.55, 0.4, 0.7, **side)
        return Change("c", "", before, after, *difference)

    def gap(lo: float, hi: float) -> Measure:
        return Measure("c difference", 0.05, lo, hi, 40, "share", "", "higher")

    bare = told()
    assert (bare.clear, bare.verdict) == (False, "")
    texts = [c.verdict_text.replace("\u00a0", " ") for c in (bare, told(gap(0.01, 0.09)))]
    assert texts == ["+5.0 points", "+5.0 points better"]
    assert told(gap(-0.01, 0.11)).verdict_text.endswith("unclear")
    assert bare.in_words.replace("\u00a0", " ") == "c went from 50.0 % to 55.0 %"
    # What is the same on every row is no unclear change.
    same = Change("c", "", bare.before, bare.before, Measure("d", 0.0, 0.0, 0.0, 40, "share"))
    assert same.verdict_text.endswith("same")
    plain = Report("t", measures(0.75, 0.25, 0, 0).measures[:2], meta={"kind": "before_after"})
    headline = before_after("r", plain).headline.replace("\u00a0", " ")
    assert headline == ("Violations of the principles: 75 % before and 25 % after over 40 prompts.")


def test_what_is_clear_is_told_however_small_and_from_nothing() -> None:
    def told(unit: str, better: str, before: float, *gap: float) -> Change:
        sides = (Measure("c", v, v, v, 40, unit, "", better) for v in (before, before + gap[0]))
        return Change("c", "", *sides, Measure("d", *gap, 40, unit, "", better))

    assert told("words", "", 0.0, 50.0, 45.0, 55.0).in_words == "c went from 0.0 to 50.0\u00a0words"
    small = told("nats per token", "lower", 3.6, 0.001, 0.0008, 0.0012)
    assert (small.verdict_text, small.in_words) == ("+0.0010 worse", "c worsened by 0.03\u00a0%")
    assert small.difference_interval == "+0.0008 to +0.0012"
    steady = told("nats per token", "lower", 3.6, 0.0, 0.0, 0.0)
    assert (steady.verdict, steady.in_words) == ("same", "c stayed the same")
    headline = before_after("r", measures(0.124, 0.116, -0.012, -0.004)).headline
    assert "fell from 12.4 % to 11.6 %" in headline.replace("\u00a0", " ")


def test_headline_names_the_principle_that_a_better_mean_hides() -> None:
    made = measures(0.75, 0.25, -0.6, -0.4)
    side = {"n": 40, "unit": "share", "better": "lower", "category": "whole"}
    more = [
        Measure("violation rate before", 0.08, 0.02, 0.1, **side),
        Measure("violation rate after", 0.41, 0.3, 0.5, **side),
        Measure("violations difference", 0.33, 0.2, 0.4, **side),
    ]
    both = Report("t", [*made, *more], meta={"kind": "before_after", "principles": ["whole"]})
    headline = before_after("r", both).headline.replace("\u00a0", " ")
    assert headline.endswith("over 40 prompts, but whole rose from 8 % to 41 %.")


def test_several_results_stand_side_by_side(results: dict[str, object]) -> None:
    about = report_run.manifest()
    steps = dict(about["steps"])  # type: ignore[call-overload]
    steps["second"] = steps["result"]
    made = results | {"second": measures(0.75, 0.25, -0.6, -0.4)}
    page = Page(report.render(about | {"steps": steps}, [], made))
    (sides,) = page.all("section", id="sides")
    assert "result" in sides[1] and "75.0 % \u2192 25.0 %" in sides[1]
    (headline,) = (t for _, t in page.all("h1"))
    assert headline.startswith("second: Violations of the principles fell from 75 % to 25 %")


def test_what_was_measured_says_which_way_is_good(text: str, results: dict[str, object]) -> None:
    page, measured = Page(text), results["result"]
    assert isinstance(measured, Report)
    notes = [t for _, t in page.all("p", class_="label soft")]
    assert "held-out text, nats per token, lower is better" in notes
    # Colours are not all that tells what became of the answers, and print has them, too.
    tallied = [t for _, t in page.all("div", class_="row tally")]
    assert tallied and all(t.text in said for t, said in zip(tallies(measured), tallied))
    assert "newly broken" in str(page.all("title"))
    (keys,) = re.findall(r"\.key::before \{(.*?)\}", page.raw("style")[0])
    assert "print-color-adjust: exact" in keys


def test_texts_of_data_go_their_own_way_and_look_alike(text: str) -> None:
    page = Page(text)
    written = [*page.all("p", class_="said"), *page.all("span", class_="ask")]
    assert written and all(attrs.get("dir") == "auto" for attrs, _ in written)
    table = Table("record", [{"prompt": "p", "hidden": "seen " * 50}])
    other = Page(report.render(report_run.manifest(), [], {"t": table}))
    assert "seen seen" in other.all("div", class_="text")[0][1]


def test_a_difference_of_shares_is_no_share() -> None:
    gap = Measure("a less b", 0.12, -0.03, 0.2, 64, "difference of shares")
    (line,) = lines(Report("t", [gap]))
    assert (line.text, line.interval) == ("+12.0\u00a0points", "\u22123.0 to +20.0")
    assert not line.chart


def test_tallies_by_hand() -> None:
    rows = [
        {"prompt": "a", "violated_before": "x, y", "violated_after": "y"},
        {"prompt": "b", "violated_before": "", "violated_after": "x"},
        {"prompt": "c", "violated_before": "x", "violated_after": ""},
    ]
    made = Report("t", [], Table("record", rows), {"principles": ["x", "y"]})
    x, y = tallies(made)
    assert x.counts == {"fixed": 2, "broken": 1, "still": 0, "kept": 0}
    assert y.counts == {"fixed": 0, "broken": 0, "still": 1, "kept": 2}
    widths = [float(a["width"].rstrip("%")) for a, _ in Page(str(x.chart)).all("rect")]
    assert widths == [pytest.approx(66.67), pytest.approx(33.33)]


def test_a_sample_leads_to_its_answers_its_prompt_and_training_rows(
    results: dict[str, object],
) -> None:
    first, *others = samples.sources(read_run(report_run.manifest()), results)
    assert (first.step, first.compares, first.total) == ("result", True, len(report_run.ASKED))
    row = dict(first.rows[1])  # long and personal before, neither after
    assert row["tags"] == [
        ["brief", "fixed"], ["prose", "kept"], ["whole", "kept"], ["impersonal", "fixed"],
    ]  # fmt: skip
    chain = row["chain"]
    assert isinstance(chain, list)
    assert [(depth, steps) for depth, _, steps, _ in chain] == [
        (1, "before"), (1, "after"), (2, "held_out, drawn"),
    ]  # fmt: skip
    assert chain[2][3] == report_run.ASKED[1][0]
    lineage = dict(row["lineage"])  # type: ignore[call-overload]
    assert lineage["row"] == row["id"]
    assert lineage["generator"] == "aligned (aligned-key)"
    pairs = results["picked"]
    assert isinstance(pairs, Table)
    touch = sum(r["principle"] == "impersonal" for r in pairs)
    assert touch and ["impersonal", "picked", touch] in row["taught"]  # type: ignore[operator]
    assert others[0].step == "picked"  # what training saw comes before other tables
    assert {s.step for s in others}.isdisjoint({"before", "after"})


def test_a_row_does_not_come_from_one_of_another_file_with_its_parents_id() -> None:
    texts = {"exam": "EXAM question: capital of France?", "prompts": "How do I keep basil alive?"}
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "lineage": {"parents": ["1"]}}
    made: dict[str, object] = {n: Table("prompt", [{"id": "1", "prompt": t}])
                               for n, t in texts.items()}  # fmt: skip
    made["pairs"] = Table("pair", [pair])
    steps: dict[str, dict[str, object]] = {name: {"method": "select/sample"} for name in made}
    steps["pairs"]["inputs"] = {"prompts": ["prompts"]}
    found = samples.sources(read_run(report_run.manifest() | {"steps": steps}), made)
    (pairs,) = (source for source in found if source.step == "pairs")
    assert pairs.rows[0]["chain"] == [[1, "1", "prompts", texts["prompts"]]]


def test_rows_that_were_held_out_are_no_training_rows() -> None:
    row = {"chosen": "a", "rejected": "b", "lineage": {"principle": "brief"}}
    made = {n: Table("pair", [row | {"prompt": f"of {n}"}]) for n in ("taught", "kept")}
    steps: dict[str, object] = {name: {"method": "select/split"} for name in made}
    steps["t"] = {"method": "train/dpo", "inputs": {"data": ["taught"], "held_out": ["kept"]}}
    origins = samples.Origins(read_run(report_run.manifest() | {"steps": steps}), made)
    assert origins.taught == {"brief": {"taught": 1}}
    assert [found.made_by for found in origins.rows.touching({"brief"})] == [
        "taught (select/split)"
    ]


def test_long_tables_and_texts_are_cut_and_it_is_said() -> None:
    table = Table("prompt", [{"prompt": f"{i} " + "long " * 2000} for i in range(310)])
    about = report_run.manifest() | {"steps": {"t": {"method": "synthesize/magpie"}}}
    (source,) = samples.sources(read_run(about), {"t": table})
    assert (len(source.rows), source.total) == (samples.MOST_ROWS, 310)
    prompt = str(source.rows[0]["prompt"])
    assert prompt.endswith("[cut here: 10,002 characters in all]")
    assert len(prompt) < wording.TEXT_LIMIT + 60


def test_a_page_has_room_for_so_much() -> None:
    def source(step: str, n: int) -> samples.Source:
        return samples.Source(
            step, "rows", n, [{"id": str(i), "a": "x" * 90} for i in range(n)], []
        )

    found = [source("large", 900), source("small", 3), source("larger", 1000)]
    kept = room.fitting(found, 30_000)
    assert [(s.step, s.total) for s in kept] == [("large", 900), ("small", 3), ("larger", 1000)]
    assert len(kept[1].rows) == 3 and 100 < len(kept[0].rows) <= len(kept[2].rows) < 200
    assert 28_000 < sum(len(str(row)) for s in kept for row in s.rows) <= 30_000
    assert room.fitting(found) == found
    assert [len(s.rows) for s in room.fitting(found, 9)] == [1, 1, 1]
    table = Table("record", [{"prompt": str(i), "text": "long " * 800} for i in range(250)])
    many = {f"r{i}": Report("t", [Measure("m", 1.0, 0.5, 2.0, 9)], table) for i in range(12)}
    page = report.render(report_run.manifest() | {"steps": {}}, [], many, script=True)
    assert 7_000_000 < len(page) < 9_000_000
    assert '<details class="card fold" open>' not in page


def test_messages_and_arrays_can_be_read() -> None:
    import numpy as np

    dialogue = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert wording.shown(dialogue) == "system: Be brief.\n\nuser: Hi"
    assert wording.shown(dialogue[1:]) == "Hi"
    image = np.zeros((8, 8), "float32")
    assert wording.shown(image) == "array of float32, [8, 8]"
    about = report_run.manifest() | {"steps": {}}
    (source,) = samples.sources(read_run(about), {"t": Table("record", [{"image": image, "y": 3}])})
    assert source.rows[0]["facts"] == [["image", "array of float32, [8, 8]"], ["y", "3"]]
    for name in ("prompt", "completion", "text"):
        (source,) = samples.sources(read_run(about), {"t": Table("record", [{name: image}])})
        assert source.rows[0]["prompt"] == "array of float32, [8, 8]"


def test_embedded_data_cannot_leave_its_element() -> None:
    told = {"a": "</script><!--", "b": "\u2028\u2029&", "c": math.nan, "d": "\ud800"}
    made = str(embedded(told))
    assert not re.search(r"[<>&\u2028\u2029]", made)
    made.encode("utf-8")
    assert json.loads(made) == {**told, "c": None, "d": "\ufffd"}  # half a character is none


def test_curves_of_a_resumed_step_have_each_update_once() -> None:
    told = [{"at": "s", "step": i, "loss": 1.0 / i} for i in (1, 2, 3, 1, 2, 3, 4)]
    (training,) = curves.trainings(told)
    assert training.updates == 4
    assert [row[0] for row in training.rows] == ["1", "2", "3", "4"]
    assert training.rows[3] == ["4", "0.25"]


def test_a_further_training_of_a_step_is_numbered_on() -> None:
    first = [{"at": "s", "step": i, "loss": 5.0 + i} for i in range(1, 11)]
    told: list[dict[str, object]] = [*first, {"at": "s", "step": 0, "held_out/loss": 9.0}]
    told += [{"at": "s", "step": i, "loss": 1.0 + i} for i in range(1, 6)]
    (training,) = curves.trainings(told)
    assert training.updates == 15
    losses = [row[:2] for row in training.rows if row[1]]
    assert losses == [[str(i), str(5 + i)] for i in range(1, 11)] + [
        [str(10 + i), str(1 + i)] for i in range(1, 6)
    ]
    assert (training.curves[0].last, training.curves[0].held) == ("6", "9")


def test_every_metric_is_drawn_and_listed() -> None:
    names = [f"m{i:02}" for i in range(16)]
    (training,) = curves.trainings([{"at": "s", "step": 1, **dict.fromkeys(names, 12345.5)}])
    assert [c.name for c in training.curves] == names and training.columns == ["step", *names]
    texts = [t for _, t in Page(str(training.curves[0].chart)).all("text")]
    assert texts.count("step 1") == 1 and "1" not in texts  # one update has one label
    (near,) = curves.trainings([{"at": "s", "step": i, "loss": 12344.0 + i} for i in (1, 2)])
    labels = [t for _, t in Page(str(near.curves[0].chart)).all("text")]
    assert {"12345", "12345.5", "12346"} <= set(labels)


def test_curves_break_where_a_value_is_not_finite() -> None:
    told = [{"at": "s", "step": i, "loss": v} for i, v in enumerate((3.0, 2.0, math.nan, 1.0), 1)]
    (training,) = curves.trainings(told)
    (path,) = (a["d"] for a, _ in Page(str(training.curves[0].chart)).all("path"))
    assert path.count("M") == 2
    assert [row[1] for row in training.rows] == ["3", "2", "not finite", "1"]


def test_held_out_values_are_a_second_line() -> None:
    told: list[dict[str, object]] = [{"at": "s", "rows": 3, "held_out_rows": 2}]
    for i in range(101):
        told += [{"at": "s", "step": i, "loss": 1.0 / i, "lr": 0.1}] if i else []
        told += [{"at": "s", "step": i, "held_out/loss": 2.0 - i / 100}] if i % 33 == 0 else []
    (training,) = curves.trainings(told)
    assert training.updates == 100 and training.held
    assert [(c.name, c.last, c.held) for c in training.curves] == [
        ("loss", "0.01", "1.01"),
        ("lr", "0.1", ""),
    ]
    page = Page(str(training.curves[0].chart))
    assert [a["class"] for a, _ in page.all("path")] == ["line faint", "line", "line held"]
    spots = [text for a, text in page.all("circle") if a["class"] == "spot"]
    assert spots[0] == "step 0: held-out loss 2" and len(spots) == 4
    assert training.columns == ["step", "loss", "lr", "held_out/loss"]
    measured = {row[0]: row[3] for row in training.rows if row[3]}
    assert measured == {"0": "2", "33": "1.67", "66": "1.34", "99": "1.01"}
    assert ("held_out_rows", "2") in training.notes


def test_thinning_keeps_the_extremes() -> None:
    points = [(float(i), math.sin(i / 50)) for i in range(5000)]
    points[1234] = (1234.0, 9.0)
    kept = svg.thinned(points, 400)
    assert len(kept) <= 402
    assert (1234.0, 9.0) in kept and kept[-1] == points[-1]
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


def test_thinning_keeps_gaps_and_the_extremes_beside_them() -> None:
    points = [(float(i), math.nan if i % 20 == 0 else float(i)) for i in range(5000)]
    kept = svg.thinned(points, 400)
    assert math.isnan(kept[0][1]) and (1.0, 1.0) in kept and (24.0, 24.0) in kept


def test_running_means_are_those_of_each_window_and_take_no_longer_than_reading() -> None:
    source = random.Random(0)
    values = [source.gauss(3, 1) if source.random() < 0.8 else math.nan for _ in range(200)]
    points = [(float(i), v) for i, v in enumerate(values)]
    for i, (x, mean) in enumerate(svg.smoothed(points)):
        reach = min(10, i, 199 - i)
        near = [v for v in values[i - reach : i + reach + 1] if math.isfinite(v)]
        assert x == i and math.isnan(mean) == math.isnan(values[i])  # a gap stays one
        assert math.isnan(mean) or mean == pytest.approx(sum(near) / len(near), abs=1e-9)
    began = time.process_time()
    svg.smoothed([(float(i), 1.0) for i in range(200_000)])
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("unit", "low", "high"),
    [("words", 5.2, 6.1), ("share", 0.0, 0.0126), ("share", 0.0, 0.0038), ("cosine", 0.64, 0.65)],
)
def test_labels_stand_where_they_say(unit: str, low: float, high: float) -> None:
    before, after = (Measure("m", v, v, v, 9, unit) for v in (low, high))
    drawn = Change("m", "", before, after)
    labels = [t for _, t in Page(str(drawn.axis)).all("text")]
    scale = 100 if unit == "share" else 1
    assert [float(t.removesuffix(" %")) for t in labels] == [
        pytest.approx(scale * t) for t in drawn.scale.ticks
    ]


def test_axes_are_round_and_hold_their_values() -> None:
    scale = svg.Scale.around([0.417, 0.771], 3)
    assert scale.ticks == (0.4, 0.6, 0.8)
    assert scale.at(0.4) == 0 and scale.at(0.6) == 50 and scale.at(5) == 100
    assert svg.Scale.around([2.0, 2.0]).lo < 2.0 < svg.Scale.around([2.0, 2.0]).hi


def test_layers_are_longest_paths() -> None:
    names = ["a", "b", "c", "e", "d"]
    edges = [("a", "b"), ("b", "c"), ("a", "d"), ("c", "d"), ("e", "d")]
    # e is a source, yet stands beside c: its only edge becomes short.
    assert layout.layers(names, edges) == {"a": 0, "b": 1, "c": 2, "d": 3, "e": 2}


def test_spacing_is_the_nearest_one() -> None:
    # Both want 0 and must be 10 apart: 5 to each side; three times the weight moves a third as far.
    assert layout.spaced([0, 0], [1, 1], [0, 10]) == [-5, 5]
    assert layout.spaced([0, 0], [3, 1], [0, 10]) == [-2.5, 7.5]
    assert layout.spaced([0, 50], [1, 1], [0, 10]) == [0, 50]


def test_drawing_untangles_and_nothing_overlaps() -> None:
    names = ["a", "b", "c", "x", "y", "z"]
    edges = [("a", "z"), ("b", "y"), ("c", "x")]  # as written, all three cross
    drawn = layout.lay_out(names, edges)
    at = drawn.nodes
    order = sorted("abc", key=lambda n: at[n][0])
    below = sorted("xyz", key=lambda n: at[n][0])
    assert [dict(edges)[n] for n in order] == below
    for row in ("abc", "xyz"):
        places = sorted(at[n][0] for n in row)
        gaps = [b - a for a, b in pairwise(places)]
        assert min(gaps) >= layout.WIDTH + layout.GAP_X - 0.2
        assert places[0] >= layout.WIDTH / 2 and places[-1] <= drawn.width - layout.WIDTH / 2 + 0.2


def test_wide_pipelines_are_drawn_as_a_line(results: dict[str, object]) -> None:
    for n, drawn in ((5, ["graph layered", "graph rail"]), (7, ["graph layered", "graph rail"]),
                     (10, ["graph rail always"])):  # fmt: skip
        steps = {f"s{i}": {"method": "train/dpo", "status": "done"} for i in range(n)}
        page = Page(report.render(report_run.manifest() | {"steps": steps}, [], {}))
        graphs = [a for a, _ in page.all("svg") if a["class"].startswith("graph")]
        assert [a["class"] for a in graphs] == drawn
        assert "width" in graphs[0] and (n == 10 or float(graphs[0]["width"]) <= graph.WIDEST + 4)
    both = Page(report.render(report_run.manifest(), [], results))
    classes = [a["class"] for a, _ in both.all("svg") if a["class"].startswith("graph")]
    assert classes == ["graph layered", "graph rail"]


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_colours_can_be_read_in_light_and_dark() -> None:
    style = (Path(report.__file__).parent / "page.css").read_text()
    schemes: list[Mapping[str, str]] = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", part))
        for part in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    assert len(schemes) == 2
    for colours in schemes:
        for ink in ("ink", "soft", "before", "after", "good", "bad", "wait"):
            for ground in ("bg", "card"):
                low, high = sorted((luminance(colours[ink]), luminance(colours[ground])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground)
        low, high = sorted((luminance(colours["calm"]), luminance(colours["ink"])))
        assert (high + 0.05) / (low + 0.05) >= 4.5


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0, "under 0.1 s"), (0.05, "0.1 s"), (9.94, "9.9 s"), (59.6, "1 min 00 s"),
     (121.9, "2 min 02 s"), (3700, "1 h 01 min"), (math.nan, "\u2013")],
)  # fmt: skip
def test_durations(seconds: float, said: str) -> None:
    assert wording.duration(seconds).replace("\u00a0", " ") == said
