"""TensorBoard: curves, seconds and measures of a run in its folder, `tensorboard --logdir runs`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from truing import jsontext
from truing.context import Json
from truing.reports import Measure
from truing.summary import measured
from truing.watchers import Watcher, intervals, numbers

FLUSH_SECONDS = 10  # how late a page that is open may be


class TensorBoard(Watcher):
    """Scalars STEP/NAME by update, seconds/STEP and measures/STEP/NAME; settings as text.

    A run that goes on writes all of it anew, so that no update is there twice.
    """

    writer: SummaryWriter
    seen: Counter[str]  # numbers of what is of no update

    def start(self, folder: Path, manifest: Mapping[str, Json]) -> None:
        """Open the folder tensorboard/ of the run, without what an earlier start left there."""
        place = folder / "tensorboard"
        for left in place.glob("events.out.tfevents.*"):
            left.unlink()
        # A page that is open would go on showing what it has read of them.
        self.writer = SummaryWriter(str(place), purge_step=0, flush_secs=FLUSH_SECONDS)
        self.seen = Counter()
        self.writer.add_text("run/manifest", _code(jsontext.dumps(manifest, indent=1, default=str)))

    def metric(self, step: str, values: Mapping[str, Json]) -> None:
        """Each number is a point of its curve, at its update or behind those before."""
        update = values.get("step")
        for tag, value in numbers(step, values).items():
            self.writer.add_scalar(
                tag, value, update if isinstance(update, int) else self.seen[tag]
            )
            self.seen[tag] += 1

    def step(self, step: str, facts: Mapping[str, Json], measures: Sequence[Measure]) -> None:
        """How long it took and what it measured."""
        for tag, value in {
            f"seconds/{step}": facts["seconds"],
            **intervals(step, measures),
        }.items():
            self.writer.add_scalar(tag, value, 0)
        if measures:
            self.writer.add_text(f"measures/{step}", _code(measured(measures)))
        self.writer.flush()

    def end(self, manifest: Mapping[str, Json], page: Path) -> None:
        """How it ended, and where its page is."""
        self.writer.add_text("run/report", f"{manifest['status']}: {page.resolve()}")
        self.writer.close()


def _code(text: str) -> str:
    """Markdown that shows a text as it stands."""
    return "".join(f"    {line}\n" for line in text.splitlines())
