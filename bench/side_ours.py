"""Our side of a training benchmark: one run of the engine, timed from token ids to the last update.

Called with the path of a job; writes made.json beside it and the trained tensors.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from truing.context import Context, use
from truing.core import engine, lora
from truing.core.objective import objective_of
from truing.core.reference import Reference
from truing.core.text_task import TextTask
from truing.core.training import Hook, TextTraining
from truing.core.training_rows import Unit
from truing.core.tree import BUDGET
from truing.models import Model
from truing.train.preference.dpo import dpo
from truing.train.supervised.sft import sft


def units_of(job: dict[str, object]) -> list[Unit]:
    """Rows as the engine's units."""
    names = ("chosen", "rejected") if job["task"] == "dpo" else ("chosen",)
    rows: list[dict[str, list[int]]] = job["rows"]  # type: ignore[assignment]
    return [
        Unit(str(i), tuple(r["prompt"]), tuple(tuple(r[n]) for n in names), {})
        for i, r in enumerate(rows)
    ]


def run(job: dict[str, object], beta: float, folder: Path) -> dict[str, object]:
    """One training run in this process."""
    model = Model.open(str(job["model"]))
    rank, name = int(job["rank"]), str(job["task"])  # type: ignore[call-overload]
    loaded = model.load_module("float32", "cpu", fresh=True)
    spec = objective_of({"dpo": dpo, "sft": sft}[name])
    settings = {n: p.default for n, p in spec.settings.items()}
    if name == "dpo":
        settings["beta"] = beta
    training = TextTraining(
        lr=float(job["lr"]), batch=int(job["batch"]), rank=rank, schedule="constant",  # type: ignore
        warmup=0.0, clip=1.0,
    )  # fmt: skip
    units = units_of(job)
    last = 0.0

    def told(_: object) -> None:
        nonlocal last
        last = time.perf_counter()

    with use(Context(seed=int(job["seed"]), folder=folder, on_metric=told)):  # type: ignore[arg-type, call-overload]
        began = time.perf_counter()
        reference = Reference(model.weights_key, "float32")
        task = TextTask(
            spec, settings, Hook(), units, loaded.module, reference,
            budget=int(job.get("budget") or BUDGET),  # type: ignore[call-overload]
        )  # fmt: skip
        if spec.with_reference:
            task.measure_reference(loaded.module, [])
        referenced = time.perf_counter()
        if rank:
            adapters = lora.attach(loaded.module, rank, 2.0 * rank)
            adapters.load(str(job["adapter"]))
            task.adapt(adapters)
        made = engine.train(task, training, key="bench", peak=training.lr)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    save_file(
        {n: p.detach().contiguous() for n, p in task.trained().items()},
        Path(str(job["folder"])) / "trained.safetensors",
    )
    return {
        "seconds": last - began,
        "reference_seconds": referenced - began,
        "reference_computed": reference.computed,
        "losses": [h["loss"] for h in made.history],
        "grad_norms": [h["grad_norm"] for h in made.history],
        "peak_rss": peak,
    }


def main() -> None:
    """Run the job; a second beta, where it has one, with the reference of the first."""
    job = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(job["folder"])
    torch.set_num_threads(int(job["threads"]))
    import shutil

    shutil.rmtree(folder / "step", ignore_errors=True)
    betas = job.get("betas") or [0.1]
    runs = [run(job, beta, folder / "step" / str(i)) for i, beta in enumerate(betas)]
    (folder / "made.json").write_text(json.dumps({**runs[0], "runs": runs}))


if __name__ == "__main__":
    main()
