"""The report in a real browser: it loads alone, fits every width, filters and opens samples.

First a page of answers written by hand, whose outcomes are known; then that of a run which really
ran, held against its manifest, its metrics and the report in its store.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import report_run
from small_run import STEPS, Small

from truing import report
from truing.report.tally import became, ids_of
from truing.reports import Measure, Report
from truing.store import Store
from truing.tables import Table

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or ""
ARGUMENTS = (
    "--no-sandbox", "--disable-quic", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
)  # fmt: skip
pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="there is no Chromium (Debian: apt install chromium)"
)


class Watched:
    """A page with everything that it asked for and complained about."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda r: self.requests.append(r.url))
        page.on("console", lambda m: self.complaints.append(f"{m.type}: {m.text}"))
        page.on("pageerror", lambda e: self.complaints.append(str(e)))

    def open(self, path: Path) -> Page:
        self.page.goto(path.as_uri())
        return self.page


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    results = report_run.results()
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    report_run.write_run(folder, report_run.manifest(), report_run.metrics())
    measured = results["result"]
    assert isinstance(measured, Report)
    return report.write(folder, results), measured


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield opened
        opened.close()


@pytest.fixture
def watched(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Watched]:
    width, scheme = getattr(request, "param", (1280, "light"))
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(60_000)  # a machine may be busy
    yield Watched(page)
    page.close()


def became_of(measured: Report, principle: str, outcome: str) -> list[str]:
    """Prompts of the samples in which the principle went that way."""
    assert measured.samples is not None
    return [
        str(r["prompt"])
        for r in measured.samples
        if became(principle, ids_of(r["violated_before"]), ids_of(r["violated_after"])) == outcome
    ]


def listed(page: Page) -> list[str]:
    return page.locator("#list .ask").all_inner_texts()


@pytest.mark.parametrize(
    "watched", [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")], indirect=True
)
def test_it_loads_alone_and_fits(made: tuple[Path, Report], watched: Watched) -> None:
    path, _ = made
    page = watched.open(path)
    page.locator("#list .item-head").last.click()
    for more in page.locator("details").all():
        more.evaluate("d => d.open = true")
    wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1], "the page scrolls sideways"
    small = page.viewport_size["width"] < 860  # type: ignore[index]
    assert page.locator(".graph.layered").is_visible() != small
    assert page.locator(".graph.rail").is_visible() == small
    narrow = page.evaluate(
        "[...document.querySelectorAll('.numbers, .tile dd, h1, h2, h3')]"
        ".filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)"
    )
    assert narrow == [], "these texts stick out of their boxes"
    assert watched.requests == [path.as_uri(), "data:,"] or watched.requests == [path.as_uri()]
    assert watched.complaints == []


def test_nothing_that_a_model_wrote_runs(made: tuple[Path, Report], watched: Watched) -> None:
    page = watched.open(made[0])
    page.fill("#search", "onerror")
    assert len(listed(page)) == 1
    page.locator("#list .item-head").click()
    said = page.locator("#list .said")
    assert said.nth(0).inner_text() == f"I would write {report_run.HOSTILE} in my page."
    assert page.title().startswith("quickstart: Violations")
    assert page.locator("img").count() == 0
    assert watched.complaints == []


def test_filters(made: tuple[Path, Report], watched: Watched) -> None:
    path, measured = made
    page = watched.open(path)
    n = len(report_run.ASKED)
    assert page.locator("#count").inner_text() == f"{n} of {n} rows match"
    page.select_option("#principle", "prose")
    page.locator("input[value=fixed]").check(force=True)
    fixed = became_of(measured, "prose", "fixed")
    assert 0 < len(fixed) < n
    assert listed(page) == fixed
    assert page.locator("#count").inner_text() == f"{len(fixed)} of {n} rows match"
    page.select_option("#principle", "whole")
    page.locator("input[value=broken]").check(force=True)
    assert listed(page) == became_of(measured, "whole", "broken")
    page.locator("input[value='']").check(force=True)
    page.select_option("#principle", "")
    page.fill("#search", "carburettor ENGINE")
    assert listed(page) == ["What does a carburettor do?"]
    page.fill("#search", "no such words anywhere")
    assert listed(page) == []


def test_a_sample_opens_by_keyboard_and_leads_to_its_training_rows(
    made: tuple[Path, Report], watched: Watched
) -> None:
    page = watched.open(made[0])
    heads = page.locator("#list .item-head")
    heads.first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert heads.nth(1).get_attribute("aria-expanded") == "true"
    assert heads.first.get_attribute("aria-expanded") == "false"
    body = page.locator("#list .item-body")
    texts = body.locator(".said").all_inner_texts()
    assert texts == [report_run.ASKED[1][1], report_run.ASKED[1][3]]
    assert "Answer in at most 40 words. Checked by max_words (n: 40)." in body.inner_text()
    assert made[1].samples is not None
    told = f"truing why 'result/{made[1].samples[1]['id']}' --run '{made[0].parent}'"
    assert told in body.inner_text()
    body.get_by_role("button", name="browse the training rows of impersonal").click()
    assert page.locator("#source option:checked").inner_text().startswith("picked: pair rows")
    assert page.input_value("#principle") == "impersonal"
    heads.first.click()
    labels = page.locator("#list .text h4").all_inner_texts()
    assert [label.strip() for label in labels] == ["chosen", "rejected"]
    assert watched.complaints == []


def test_a_row_is_named_to_a_shell_as_one_word(tmp_path: Path, watched: Watched) -> None:
    ids = ("a b'; x", "two\nlines")
    table = Table("prompt", [{"id": id, "prompt": "Why?"} for id in ids])
    about = report_run.manifest() | {"steps": {"t": {"method": "select/split"}}}
    folder = report_run.write_run(tmp_path / "it's 1 %", about, [])
    page = watched.open(report.write(folder, {"t": table}))
    page.locator("#list .item-head").first.click()
    said = page.locator("#list .ask-why code").text_content()
    assert shlex.split(said or "") == ["truing", "why", f"t/{ids[0]}", "--run", str(folder)]
    page.locator("#list .item-head").last.click()
    assert page.locator("#list .item-body").count() == 2
    assert page.locator("#list .ask-why").count() == 1  # no line can hold the other id


def test_a_step_of_the_picture_opens_its_settings(
    made: tuple[Path, Report], watched: Watched
) -> None:
    page = watched.open(made[0])
    page.locator(".graph.layered a.step", has_text="aligned").click()
    facts = page.locator("details:has(> summary b:text-is('aligned')) .facts")
    facts.first.wait_for(state="visible")
    assert "beta" in facts.first.inner_text()
    assert watched.complaints == []


@pytest.mark.parametrize("watched", [(390, "light")], indirect=True)
def test_columns_and_texts_of_any_kind_can_be_read(tmp_path: Path, watched: Watched) -> None:
    table = Table("record", [{"prompt": "\u05e9\u05dc\u05d5\u05dd.", "hidden": "seen " * 40}])
    results = {"t": table, "r": Report("x" * 60, [Measure("m", 0.5, 0.25, 0.75, 9, "share")])}
    report_run.write_run(tmp_path, report_run.manifest() | {"steps": {}}, [])
    path = report.write(tmp_path, results)
    page = watched.open(path)
    is_quiet(watched, path)  # the headline is one long word
    ask = page.locator("#list .ask").first
    assert ask.evaluate("e => getComputedStyle(e).direction") == "rtl"
    page.locator("#list .item-head").first.click()
    box = page.locator("#list .item-body .text").bounding_box()
    assert box is not None and box["width"] > 100, "a column's name is no class of the style"


# The page of a run that really ran


@pytest.fixture(scope="module")
def real(whole: Small) -> tuple[Path, Report]:
    """Its page, and what it measured as the store has it."""
    (page,) = (whole.folder / "runs").glob("*/report.html")
    measured = Store(whole.folder / "home" / "store").load(str(whole.steps()["result"]["key"]))
    assert isinstance(measured, Report)
    return page, measured


WIDTHS = pytest.mark.parametrize("watched", [(1280, "light"), (390, "light")], indirect=True)


def plain(text: str | None) -> str:
    """A text with plain spaces and minus signs, in one line."""
    return " ".join((text or "").replace("\u2212", "-").split())


def is_quiet(watched: Watched, path: Path) -> None:
    """It fits, asked for nothing and complained of nothing."""
    wide = watched.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1], "the page scrolls sideways"
    assert set(watched.requests) <= {path.as_uri(), "data:,"}
    assert watched.complaints == []


@WIDTHS
def test_a_real_runs_steps_are_nodes_of_the_picture(
    real: tuple[Path, Report], whole: Small, watched: Watched
) -> None:
    path, _ = real
    page = watched.open(path)
    assert page.locator(".pill").first.inner_text() == "done" and page.locator("h1").inner_text()
    small = page.viewport_size["width"] < 860  # type: ignore[index]
    nodes = page.locator(".graph.rail a.step" if small else ".graph.layered a.step")
    told = {
        plain(t).partition(":")[0]: plain(t) for t in nodes.locator("title").all_text_contents()
    }
    assert set(told) == set(STEPS)
    for name, step in whole.steps().items():
        assert str(step["method"]) in told[name] and str(step["about"]) in told[name]
    assert nodes.locator(".sign").all_text_contents() == ["✓"] * len(STEPS)
    boxes = [n.bounding_box() for n in nodes.all()]
    assert all(b is not None and b["width"] > 100 and b["height"] > 20 for b in boxes)
    assert len({(b["x"], b["y"]) for b in boxes if b}) == len(STEPS)  # none above another
    is_quiet(watched, path)


@WIDTHS
def test_a_real_runs_principles_stand_in_the_table_with_their_intervals(
    real: tuple[Path, Report], watched: Watched
) -> None:
    path, measured = real
    page = watched.open(path)
    page.locator("summary", has_text="The same numbers as a table").click()
    table = page.get_by_role("region", name="Table of before and after")
    shown = {
        plain(row.locator("th").inner_text()): [
            plain(t) for t in row.locator("td").all_inner_texts()
        ]
        for row in table.locator("tbody tr").all()
    }
    by_name = {(m.name, m.category): m for m in measured}
    ids = ["brief", "prose", "whole", "impersonal"]
    assert measured.meta["principles"] == ids
    for id in ids:
        for at, when in ((0, "before"), (2, "after")):
            m = by_name[f"violation rate {when}", id]
            assert shown[id][at] == f"{100 * m.value:.1f} %"
            assert shown[id][at + 1] == f"{100 * m.lo:.1f} % to {100 * m.hi:.1f} %"
            assert m.lo <= m.value <= m.hi and m.lo < m.hi
        assert shown[id][6] == "8"
        # The same two numbers beside the principle's own bar.
        row = page.locator("#result .row", has=page.locator(f".label b:text-is('{id}')")).first
        assert plain(row.locator(".numbers").inner_text()).startswith(
            f"{shown[id][0]} → {shown[id][2]}"
        )
        bar = row.locator("svg").bounding_box()
        assert bar is not None and bar["width"] > 100
    assert {"violations", "ability", "relevance"} <= set(shown)
    is_quiet(watched, path)


@WIDTHS
def test_a_real_runs_curves_are_drawn(
    real: tuple[Path, Report], whole: Small, watched: Watched
) -> None:
    path, _ = real
    lines = [json.loads(s) for s in (path.parent / "metrics.jsonl").read_text().splitlines()]
    last = [m for m in lines if m["at"] == "aligned" and "loss" in m][-1]
    page = watched.open(path)
    boxes = page.locator("#training .curve-box")
    assert boxes.count() >= 4
    for box in boxes.all():
        drawn = [p.bounding_box() for p in box.locator("path.line").all()]
        assert any(b and b["width"] > 100 for b in drawn), "no line crosses the picture"
    titles = page.locator("#training .hit.last title").all_text_contents()
    for name in ("loss", "lr", "grad_norm"):
        wanted = f"step {last['step']:g}: {name} {last[name]:.5g}"
        assert wanted in [plain(t) for t in titles]
    is_quiet(watched, path)


@WIDTHS
def test_a_real_runs_samples_open_and_filter(real: tuple[Path, Report], watched: Watched) -> None:
    path, measured = real
    assert measured.samples is not None
    rows = list(measured.samples)
    page = watched.open(path)
    asked = [plain(str(r["prompt"])) for r in rows]
    assert [plain(t) for t in listed(page)] == asked and len(asked) == 8
    head = page.locator("#list .item-head").nth(2)
    head.click()
    said = page.locator("#list .item-body .said").all_inner_texts()
    assert [plain(t) for t in said] == [
        plain(str(rows[2][side] or "(empty)")) for side in ("before", "after")
    ]
    body = page.locator("#list .item-body").inner_text()
    told = f"truing why 'result/{rows[2]['id']}' --run '{path.parent}'"
    assert told in body and "held_out" in body
    head.click()
    assert not page.locator("#list .item-body").is_visible()
    matched: dict[str, int] = {}
    for id in ("brief", "prose", "whole", "impersonal"):
        page.select_option("#principle", id)
        for outcome in ("fixed", "broken", "still"):
            page.locator(f"label.chip:has(input[value={outcome}])").click()
            wanted = became_of(measured, id, outcome)
            assert [plain(t) for t in listed(page)] == [plain(t) for t in wanted]
            assert page.locator("#count").inner_text() == f"{len(wanted)} of 8 rows match"
            matched[outcome] = matched.get(outcome, 0) + len(wanted)
    assert sum(matched.values()) > 0
    page.locator("label.chip:has(input[value=''])").click()
    page.select_option("#principle", "")
    page.fill("#search", str(rows[5]["id"]))
    assert [plain(t) for t in listed(page)] == [asked[5]]
    page.fill("#search", "")
    page.select_option("#source", label=page.locator("#source option").nth(1).inner_text())
    assert page.locator("#source option").nth(1).inner_text() == "picked: pair rows (16)"
    assert len(listed(page)) == 16
    is_quiet(watched, path)
