"""The report of a run: one HTML page, pictures first, that needs nothing but a browser.

    truing.report.write(folder, results)      folder/report.html, from its manifest and metrics
    truing.report.render(manifest, metrics, results)      the same page as text, without script

The page opens from a file, loads nothing and sends nothing: style and script are inline and named
by hash in its Content-Security-Policy, so that no other script can run, whatever a model wrote.
Every text is escaped where it enters the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from truing.report.facts import read_manifest, read_metrics

if TYPE_CHECKING:
    from truing.models import Model
    from truing.principles import Principles
    from truing.reports import Report
    from truing.tables import Table

    Noun = Model | Table | Principles | Report

__all__ = ["render", "write"]


def render(
    manifest: Mapping[str, object],
    metrics: Iterable[Mapping[str, object]],
    results: Mapping[str, Noun],
    *,
    script: bool = False,
) -> str:
    """The page as text.

    Args:
        manifest: of the run, as its manifest.json has it.
        metrics: rows of its metrics.jsonl.
        results: what each finished step made, by the step's name.
        script: with the browser of samples; without it the page shows the first samples only.
    Raises:
        InputError: the manifest is of another schema.
    """
    from truing.report import page

    return page.render(manifest, list(metrics), results, script=script)


def write(folder: Path, results: Mapping[str, Noun]) -> Path:
    """Write `report.html` of the run in `folder`, in one rename.

    Args:
        folder: of the run, with its manifest.json and, once something was observed, metrics.jsonl.
        results: what each finished step made, by the step's name.
    Returns:
        the page's path.
    Raises:
        InputError: the manifest is missing, damaged or of another schema.
    """
    from truing.core.files import write_text

    folder = Path(folder)
    manifest = read_manifest(folder / "manifest.json")
    metrics = read_metrics(folder / "metrics.jsonl")
    path = folder / "report.html"
    write_text(path, render(manifest, metrics, results, script=True))
    return path
