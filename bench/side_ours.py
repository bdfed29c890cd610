"""Our side of a training benchmark: runs of the engine, timed from token ids to the last update.

Called with the path of a job; writes made.json beside it and the trained tensors.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from truing.context import Context, use
from truing.core import engine
from truing.core.batch.training_rows import Unit
from truing.core.drawing import Completion
from truing.core.judging.rewards import Rewards
from truing.core.modelfiles import lora
from truing.core.objective import Objective, objective_of
from truing.core.online import online_of
from truing.core.online_training import OnlineTraining
from truing.core.passes.frozen_trunk import FrozenTrunk, attach
from truing.core.passes.scoring import HEAD, ScoreHead
from truing.core.reference import Reference
from truing.core.rl.collect import Asked, Collector, Draw, Reward
from truing.core.rl.online_task import OnlineTask
from truing.core.rl.train_online import Players
from truing.core.sampling import SamplingSettings
from truing.core.trainer.text_task import TextTask
from truing.core.training import Hook, TextTraining
from truing.core.tree import BUDGET
from truing.method import methods
from truing.models import Model

Json = dict[str, object]


def begin(adapters: lora.Lora, folder: str) -> None:
    """Give the adapters the values that both sides begin with."""
    begun = load_file(Path(folder) / lora.WEIGHTS)
    with torch.no_grad():
        for name, parameter in adapters.named_parameters():
            parameter.copy_(begun[name])


class Clock:
    """The time of the last update."""

    last = 0.0

    def __call__(self, _: object) -> None:
        self.last = time.perf_counter()


class Answers:
    """The policy's answers, timed; or those that were recorded with their prompts.

    Args:
        draw: what answers prompts.
        recorded: answers by prompt; without them `draw` is asked.
    """

    def __init__(self, draw: Draw, recorded: dict[tuple[int, ...], list[Json]]) -> None:
        self.draw, self.recorded = draw, recorded
        self.seconds, self.tokens = 0.0, 0
        self.first: list[list[Json]] = []

    def __call__(
        self,
        prompts: list[tuple[int, ...]],
        sampling: SamplingSettings,
        first: list[int],
    ) -> list[list[Completion]]:
        began = time.perf_counter()
        if self.recorded:
            made = [[Completion(**c) for c in self.recorded[ids]] for ids in prompts]  # type: ignore[arg-type]
        else:
            made = self.draw(prompts, sampling, first)
        self.seconds += time.perf_counter() - began
        self.tokens += sum(len(c.ids) for items in made for c in items)
        self.first = self.first or [[asdict(c) for c in items] for items in made]
        return made


def units_of(job: Json, spec: Objective) -> list[Unit]:
    """Rows as the engine's units."""
    names = ("chosen", "rejected") if spec.rows == "pair" else ("chosen",)
    numbers = {n: v for n, v in spec.columns.items() if v is not None}
    rows: list[dict[str, list[int]]] = job["rows"]  # type: ignore[assignment]
    return [
        Unit(str(i), tuple(r["prompt"]), tuple(tuple(r[n]) for n in names), numbers)
        for i, r in enumerate(rows)
    ]


def head_of(job: Json, spec: Objective, width: int) -> ScoreHead | None:
    """The score head that both sides begin with, where the objective has one."""
    if "scores" not in spec.needs:
        return None
    head = ScoreHead(width)
    with torch.no_grad():
        head.weight.copy_(load_file(str(job["head"]))[f"{HEAD}.weight"])
    return head


def shared(job: Json) -> dict[str, object]:
    """Settings of every run."""
    return {
        "lr": float(job["lr"]), "batch": int(job["batch"]), "rank": int(job["rank"]),  # type: ignore
        "schedule": "constant", "warmup": 0.0, "clip": 1.0,
    }  # fmt: skip


def trained(task: engine.Task, training: TextTraining, clock: Clock, path: Path) -> Json:
    """Run the engine to its end and keep what it trained."""
    made = engine.train(task, training, key="bench", peak=training.lr)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # What is added to both scores of a pair has no effect, and other sides have no such number.
    kept = {n: p for n, p in task.trained().items() if n != f"{HEAD}.bias"}
    save_file({n: p.detach().contiguous() for n, p in kept.items()}, path)
    return {
        "end": clock.last,
        "losses": [h["loss"] for h in made.history],
        "grad_norms": [h["grad_norm"] for h in made.history],
        "skipped": [h["skipped"] for h in made.history if "skipped" in h],
        "peak_rss": peak,
    }


def run(job: Json, name: str, own: Json, folder: Path, path: Path) -> Json:
    """One run of an objective on rows."""
    model = Model.open(str(job["model"]))
    loaded = model.load_module("float32", "cpu", fresh=True)
    spec = objective_of(methods[name].declared)
    settings = {n: p.default for n, p in spec.settings.items()} | own
    training = TextTraining(
        **shared(job), epochs=int(job.get("epochs") or 1), layers=int(job.get("layers") or 0)
    )  # type: ignore  # fmt: skip
    units, clock = units_of(job, spec), Clock()
    head = head_of(job, spec, int(loaded.module.config.hidden_size))  # type: ignore
    with use(Context(seed=int(job["seed"]), folder=folder, on_metric=clock)):  # type: ignore[call-overload]
        began = time.perf_counter()
        reference = Reference(model.weights_key, "float32")
        task = TextTask(
            spec, settings, Hook(), units, loaded.module, reference,
            budget=int(job.get("budget") or BUDGET), head=head,  # type: ignore[call-overload]
        )  # fmt: skip
        if spec.with_reference:
            task.measure_reference(loaded.module, job["steps"])  # type: ignore[arg-type]
        referenced = time.perf_counter()
        if adapters := attach(loaded.module, training, int(job["seed"])):  # type: ignore[call-overload]
            if job["adapter"]:
                begin(adapters, str(job["adapter"]))
            task.adapt(adapters)
        attached = time.perf_counter()
        if training.layers:
            trunk = FrozenTrunk(loaded.module, training.layers, model.weights_key, "float32")
            task.stand_on(trunk, job["steps"])  # type: ignore[arg-type]
        kept = time.perf_counter()
        made = trained(task, training, clock, path)
    return {
        "objective": name,
        "seconds": float(made.pop("end")) - began,  # type: ignore[arg-type]
        "reference_seconds": referenced - began,
        "trunk_seconds": kept - attached,
        "reference_computed": reference.computed,
        **made,
    }


def run_online(job: Json, folder: Path, path: Path) -> Json:
    """One run of GRPO on prompts, generation timed apart from the rest."""
    model = Model.open(str(job["model"]))
    loaded = model.load_module("float32", "cpu", fresh=True)
    spec = online_of(methods["grpo"].declared)
    training = OnlineTraining(
        answers=job["answers"], max_tokens=job["tokens"], passes=job["passes"],
        max_length=job["most"], **shared(job),
    )  # type: ignore  # fmt: skip
    rows: list[dict[str, list[int]]] = job["rows"]  # type: ignore[assignment]
    asked = [Asked({"id": str(i), "prompt": ""}, tuple(r["prompt"])) for i, r in enumerate(rows)]
    recorded = {tuple(r["prompt"]): r["recorded"] for r in rows if "recorded" in r}
    rule = {"use": "share_of", "letters": job["letters"]}
    clock = Clock()
    with use(Context(seed=int(job["seed"]), folder=folder, on_metric=clock)) as context:  # type: ignore[call-overload]
        began = time.perf_counter()
        adapters = lora.attach(loaded.module, training.rank, 2.0 * training.rank)
        begin(adapters, str(job["adapter"]))
        answers = Answers(Players(loaded, adapters, None).policy, recorded)  # type: ignore[arg-type]
        collector = Collector(
            asked, [answers], Reward(Rewards({"rule": rule}, {}, where="grpo")), None,  # type: ignore
            loaded.tokenizer, folder / "rollouts", context,
        )  # fmt: skip
        task = OnlineTask(
            spec, {n: p.default for n, p in spec.settings.items()}, training, collector,
            loaded.module, lora=adapters, other=None, critic=None, compare=False,
        )  # fmt: skip
        made = trained(task, training, clock, path)
    seconds = float(made.pop("end")) - began  # type: ignore[arg-type]
    return {
        "objective": "grpo",
        "seconds": seconds,
        "generation_seconds": answers.seconds,
        "update_seconds": seconds - answers.seconds,
        "tokens": answers.tokens,
        "first": answers.first,
        **made,
    }


def wanted(job: Json) -> list[tuple[str, Json]]:
    """(objective, its settings) of each run: several losses, or one with several betas."""
    if "losses" in job:
        return list(job["losses"].items())  # type: ignore[attr-defined]
    name = str(job["task"])
    return [(name, {"beta": b} if name == "dpo" else {}) for b in job["betas"]]  # type: ignore[attr-defined]


def main() -> None:
    """Run the job; later runs find the reference of the first in the cache."""
    job = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(job["folder"])
    torch.set_num_threads(int(job["threads"]))
    shutil.rmtree(folder / "step", ignore_errors=True)
    if job["task"] == "grpo":
        runs = [run_online(job, folder / "step", folder / "trained.safetensors")]
    else:
        runs = [
            run(job, name, own, folder / "step" / str(i), folder / f"trained{i or ''}.safetensors")
            for i, (name, own) in enumerate(wanted(job))
        ]
    seconds = sum(float(r["seconds"]) for r in runs)  # type: ignore[arg-type]
    made = {**runs[0], "seconds": seconds, "runs": runs}
    (folder / "made.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main()
