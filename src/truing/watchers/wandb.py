"""Weights & Biases: a run there for each start of a run here; WANDB_MODE=offline keeps it local."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb  # pyright: ignore[reportMissingImports]  # an extra of its own

from truing.context import Json
from truing.reports import Measure
from truing.watchers import Watcher, intervals, numbers

PROJECT = "truing"  # unless WANDB_PROJECT says another


class WandB(Watcher):
    """Curves STEP/NAME over STEP/step, summary values seconds/STEP and measures/STEP/NAME.

    A run that goes on is a new one there, whole and in the same group: no update is in one twice.
    """

    run: Any
    curves: set[str]  # steps whose updates have an axis

    def start(self, folder: Path, manifest: Mapping[str, Json]) -> None:
        """Begin a run in the group that is called as the folder is."""
        # What an earlier start left to be uploaded is told again, as part of a whole.
        shutil.rmtree(folder / "wandb", ignore_errors=True)
        self.curves = set()
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=folder.name,
            group=folder.name,
            dir=folder,
            config=dict(manifest),
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )

    def metric(self, step: str, values: Mapping[str, Json]) -> None:
        """The numbers of a line together, beside the update that they belong to."""
        line: dict[str, Json] = dict(numbers(step, values))
        if "step" in values:
            if step not in self.curves:
                self.curves.add(step)
                self.run.define_metric(f"{step}/step", hidden=True)
                self.run.define_metric(f"{step}/*", step_metric=f"{step}/step")
            line[f"{step}/step"] = values["step"]
        if line:
            self.run.log(line)

    def step(self, step: str, facts: Mapping[str, Json], measures: Sequence[Measure]) -> None:
        """How long it took and what it measured."""
        self.run.summary.update({f"seconds/{step}": facts["seconds"], **intervals(step, measures)})

    def end(self, manifest: Mapping[str, Json], page: Path) -> None:
        """How it ended, and where its page is."""
        self.run.summary.update({"status": manifest["status"], "report": str(page.resolve())})
        self.run.finish(exit_code=int(manifest["status"] != "done"))
