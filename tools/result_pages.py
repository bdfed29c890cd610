"""The README's result: what `make demo` measured, from `docs/quickstart.json`.

    python tools/result_pages.py runs/quickstart-...    records a run there

To be run in the checkout whose commit made the run, which is recorded with it; then
`python tools/docs.py --write` writes the README's block.
"""

from __future__ import annotations

import datetime
import json
import sys
import textwrap
from pathlib import Path
from typing import cast

from pagetext import table
from slow import commit

from truing import summary
from truing.context import Json
from truing.pipeline import load_results
from truing.reports import Measure, Report

ROOT = Path(__file__).resolve().parents[1]
RECORD = "docs/quickstart.json"


def record(folder: Path) -> dict[str, Json]:
    """What a finished run of the quickstart says, as it is committed."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    result = load_results(folder)["result"]
    if not isinstance(result, Report):
        raise SystemExit(f"{folder}: its step 'result' made no report")
    if any(step["cached"] for step in manifest["steps"].values()):
        raise SystemExit(f"{folder}: not all of it was computed there; its time is of no use")
    made: dict[str, Json] = {
        "schema_version": 2,
        "command": "make demo",
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "hardware": manifest["hardware"],
        "note": "fresh clone, empty cache: set-up and the model's download are in the seconds",
        "seconds": manifest["seconds"],
        **manifest["result"],
        "texts": result.meta["texts"],
    }
    rounded = [
        {n: round(v, 4) if isinstance(v, float) else v for n, v in one.items()}
        for one in cast("list[dict[str, Json]]", result.to_json()["measures"])
    ]
    return made | {"measures": cast(Json, rounded)}


def readme_results(root: Path) -> str:
    """The block of the README: the table of a recorded run, and how long it took."""
    kept = json.loads((root / RECORD).read_text(encoding="utf-8"))
    report = Report("before and after", [Measure(**m) for m in kept["measures"]])
    head = ("", "before", "after", "difference")
    rows = []
    for label, *values in summary.compared(report):
        _, found, rule = label.partition("violations, ")
        rows.append([f"violations: {kept['texts'][rule]}" if found else label, *values])
    minutes, seconds = divmod(round(kept["seconds"]), 60)
    machine = kept["hardware"]
    said = (
        f"`make demo` took {minutes} min {seconds} s, set-up and download included, on "
        f"{machine['threads']} cores of an {machine['cpu']} (no GPU). Measured on "
        f"{kept['n_prompts']} prompts held out from training; 95 % intervals, the last column's "
        f"paired prompt by prompt ([as recorded](docs/quickstart.json), {kept['date']}):"
    )
    return f"{textwrap.fill(said, 100, break_on_hyphens=False)}\n\n{table(head, rows)}"


if __name__ == "__main__":
    made = record(Path(sys.argv[1]))
    (ROOT / RECORD).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
