"""A small image model on real handwritten digits, from a recipe to its report, as text goes.

The images are UCI's Optical Recognition of Handwritten Digits (8 x 8, CC BY 4.0). Methods and model
are those of `digit_methods`, registered by entry points: nothing in the package knows of them.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import digit_methods
import numpy as np
import pytest
import torch

from truing import catalogue
from truing.cli import main
from truing.core import opening
from truing.models import Model
from truing.reports import Report
from truing.runs import Run
from truing.store import Store
from truing.tables import Table

ENTRY_POINTS = """\
[truing.methods]
select/digits_part = digit_methods:digits_part
train/digits = digit_methods:digits
evaluate/digits = digit_methods:accuracy

[truing.components]
builder/digit_reader = digit_methods:digit_reader
"""
RECIPE = """\
name: reading
seed: 3
models: {blank: blank}
steps:
  training: {do: select/digits_part, data: digits, part: train}
  held_out: {do: select/digits_part, data: digits, part: held_out}
  reader: {do: train/digits, model: blank, data: training}
  before: {do: evaluate/digits, model: blank, data: held_out}
  after: {do: evaluate/digits, model: reader, data: held_out}
"""
Json = dict[str, object]


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The metadata that pip writes for a package with these entry points."""
    site = tmp_path_factory.mktemp("site")
    facts = site / "digit_methods-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: digit-methods\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(ENTRY_POINTS)
    sys.path.insert(0, str(site))
    catalogue.entries.cache_clear()
    yield
    sys.path.remove(str(site))
    catalogue.entries.cache_clear()


class Place:
    """A folder with the recipe and a model that has learnt nothing; a home of its own."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, **builder: object) -> None:
        self.folder, self.runs, self.patch = folder, folder / "runs", patch
        torch.manual_seed(0)
        module = digit_methods.digit_reader(**builder)
        made = {"use": "digit_reader", **builder}
        opening.create(folder / "blank", made, module.state_dict().items(), name="blank")
        (folder / "blank" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        (folder / "reading.yaml").write_text(RECIPE)

    def run(self, *words: str) -> int:
        """`truing run reading.yaml`; the exit code."""
        self.patch.setenv("TRUING_HOME", str(self.folder / "home"))
        recipe, runs = str(self.folder / "reading.yaml"), str(self.runs)
        return main(["run", recipe, "--runs", runs, "--json", *words])

    def read(self, name: str) -> str:
        (path,) = self.runs.glob(f"*/{name}")
        return path.read_text()

    @property
    def steps(self) -> dict[str, Json]:
        return json.loads(self.read("manifest.json"))["steps"]

    def made(self, step: str) -> object:
        """What a step made, from the store."""
        return Store(self.folder / "home" / "store").load(str(self.steps[step]["key"]))

    def updates(self) -> list[Json]:
        """What training observed, without times."""
        rows = [json.loads(line) for line in self.read("metrics.jsonl").splitlines()]
        kept = [r for r in rows if r["at"] == "reader" and "step" in r]
        return [{n: v for n, v in r.items() if n != "seconds"} for r in kept]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A run that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        place = Place(tmp_path_factory.mktemp("whole"), patch)
        assert place.run() == 0
        yield place


def test_it_learns_and_what_it_reads_is_measured(whole: Place) -> None:
    losses = [float(str(u["loss"])) for u in whole.updates()]
    assert [u["step"] for u in whole.updates()] == list(range(1, 67)) and losses[-1] < losses[0] / 4
    reader, before, after = (whole.made(s) for s in ("reader", "before", "after"))
    assert isinstance(reader, Model) and isinstance(before, Report) and isinstance(after, Report)
    assert reader.can == {"hidden", "weights"} and [c.kind for c in reader.changes] == ["weights"]
    assert reader.licence == "CC BY 4.0"
    assert before.get("accuracy").value < 0.3 < 0.8 < after.get("accuracy").value

    # By hand: the rows of the file that were held out, and Wilson's interval in plain numbers.
    rows = list(Table.read("digits"))[1400:]
    images = torch.tensor(np.stack([np.asarray(r["image"]) for r in rows]))[:, None].float() / 16
    with torch.no_grad():
        said = reader.load_module(fresh=True).module(images).argmax(1).tolist()
    p, n, z = sum(s == r["label"] for s, r in zip(said, rows)) / 397, 397, 1.959964
    middle, half = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    m = after.get("accuracy")
    ends = [(middle + side * half) / (1 + z * z / n) for side in (-1, 1)]
    assert (m.value, m.n) == (p, n) and [m.lo, m.hi] == pytest.approx(ends, abs=1e-6)
    assert after.samples is not None and after.samples.column("said") == said
    assert np.array_equal(after.samples[7]["image"], rows[7]["image"])


def test_the_report_shows_curves_and_measures(whole: Place) -> None:
    page, after = whole.read("report.html"), whole.made("after")
    assert isinstance(after, Report)
    m = after.get("accuracy")
    share, lo, hi = (f"{100 * v:.1f}\u00a0%" for v in (m.value, m.lo, m.hi))
    assert f"after: accuracy {share} (95 % interval {lo} to {hi})." in page
    updates = whole.updates()
    for name, ends in (("loss", (updates[0]["loss"], updates[-1]["loss"])), ("accuracy", None)):
        assert f"reader, {name}: from " in page, "a curve's description"
        if ends:
            assert "from {:.4g} to {:.4g} in 66 updates".format(*ends) in page
    assert "chosen above rejected" not in page, "that is an accuracy of pairs"
    assert "array of float32, [8, 8]" in page  # a sample, by its shape
    assert page.count("accuracy \u2192 7") >= 1  # a digit's own share


def test_a_second_run_costs_nothing_and_the_store_is_whole(
    whole: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {n: (s["key"], s["artefact"]) for n, s in whole.steps.items()}
    assert whole.run() == 0
    assert json.loads(capsys.readouterr().out)["cached_steps"] == 5
    assert {n: (s["key"], s["artefact"]) for n, s in whole.steps.items()} == before
    assert Store(whole.folder / "home" / "store").verify() == []
    after = whole.made("after")
    assert isinstance(after, Report) and after.samples is not None
    (folder,) = whole.runs.iterdir()
    assert main(["why", str(after.samples[0]["id"]), "--run", str(folder)]) == 0
    assert "digits/digits row 1401" in capsys.readouterr().out


def test_interrupted_in_training_it_goes_on_to_the_same_bits(
    whole: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, always_save: Callable[[], None]
) -> None:
    """Running means of the batch norm and the dropout's masks included."""
    always_save()
    metric = Run.metric

    def interrupted(run: Run, step: str, values: Json) -> None:
        metric(run, step, values)  # type: ignore[arg-type]
        if values.get("step") == 31:
            raise KeyboardInterrupt

    place = Place(tmp_path, monkeypatch)
    monkeypatch.setattr(Run, "metric", interrupted)
    assert place.run() == 3
    steps = place.steps
    assert [s["status"] for s in steps.values()] == [
        "done",
        "done",
        "stopped",
        "pending",
        "pending",
    ]
    page = place.read("report.html")
    assert "The run stopped at step reader" in page and "in 31 updates" in page
    monkeypatch.setattr(Run, "metric", metric)
    assert place.run() == 0
    assert place.updates() == whole.updates()
    assert {n: s["artefact"] for n, s in place.steps.items()} == {
        n: s["artefact"] for n, s in whole.steps.items()
    }
    cached = {n for n, s in place.steps.items() if s["cached"]}
    assert cached == {n for n, s in steps.items() if s["status"] == "done"}
    assert not list((place.folder / "home" / "store" / "scratch").glob("*"))


def test_a_broken_image_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = list(Table.read("digits"))[:64]
    rows[5] = {"image": np.full((8, 8), np.nan, np.float32), "label": 3}
    Table("record", rows).write(tmp_path / "broken.parquet")
    place = Place(tmp_path, monkeypatch, norm=False)  # a batch norm would spread it over the batch
    words = ["training.data", str(tmp_path / "broken.parquet")]
    assert place.run("--set", "=".join(words), "--set", "training.held_out=4") == 3
    told = json.loads(capsys.readouterr().out)["error"]
    assert str(Table("record", rows)[5]["id"]) in told and "not finite at step 1" in told
