"""What the benchmarks of training share: one job for both sides, TRL's settings searched."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from bench import compare, rows, work
from bench.rows import Pair
from bench.runner import WORK, Json, machine, peak_gflops, run, say

RANK, BATCH, SEED = 16, 8, 0
LR, LR_FULL = 2e-4, 1e-5
MICRO = (1, 2, 4, 8)
SEARCH = 16  # rows that TRL's settings are searched on
DEFAULTS: Json = {"defaults": True, "micro_batch": 8}


def adapter_folder(model: str) -> Path:
    """The adapter that both sides begin with: A drawn once, B zero; in PEFT's format."""
    import torch

    from truing.core import lora
    from truing.models import Model

    opened = Model.open(model)
    folder = WORK / f"adapter-{opened.weights_key[:12]}"
    module = opened.load_module("float32", "cpu", fresh=True).module
    with torch.no_grad():
        lora.attach(module, RANK, 2.0 * RANK, seed=SEED).save(folder, base=model)
    return folder


def job_of(task: str, args: argparse.Namespace, pairs: list[Pair], full: bool) -> Json:
    """What both sides are told."""
    from truing.models import Model

    return {
        "task": task,
        "model": str(Model.open(args.model).folder),
        "rows": [vars(p) for p in pairs],
        "steps": rows.steps_of(len(pairs), BATCH, SEED),
        "batch": BATCH,
        "seed": SEED,
        "rank": 0 if full else RANK,
        "lr": LR_FULL if full else LR,
        "adapter": "" if full else str(adapter_folder(args.model)),
        "betas": [0.1],
        "most": rows.MOST,
        "threads": args.threads,
    }


def part_of(job: Json, count: int) -> Json:
    """The same job on its first `count` rows."""
    few = list(job["rows"])[:count]  # type: ignore[call-overload]
    return {**job, "rows": few, "steps": rows.steps_of(len(few), BATCH, SEED)}


def searched(job: Json, candidates: dict[str, Json], again: bool) -> tuple[str, str, Json]:
    """TRL's fastest settings, found on a part of the rows, and what each candidate took.

    The second name is the fastest of those that keep the rows of an update together, which packing
    does not: with these the two sides are compared step by step.
    """
    found: Json = {}
    few = part_of(job, SEARCH)
    for name, settings in candidates.items():
        found[name] = run("trl", {**few, "settings": settings, "label": name}, again=again)
    same = {n: r for n, r in found.items() if not candidates[n].get("packing")}
    kept = ("seconds", "peak_rss", "error")
    took: Json = {
        n: {k: v for k, v in r.items() if k in kept}  # type: ignore[attr-defined]
        for n, r in found.items()
    }
    return compare.fastest(found), compare.fastest(same), took  # type: ignore[arg-type]


def measured(job: Json, best: Json, same: Json, defaults: bool, again: bool) -> dict[str, Json]:
    """Both sides, ours before and after TRL's best, so that a drift of the machine shows."""
    ours = {**job, "settings": {}, "label": "ours"}
    made = {"ours": run("ours", {**ours, "turn": 1}, again=again)}
    made["best"] = run("trl", {**job, "settings": best, "label": f"best {best}"}, again=again)
    made["same"] = made["best"]
    if same != best:
        made["same"] = run("trl", {**job, "settings": same, "label": f"same {same}"}, again=again)
    made["ours_again"] = run("ours", {**ours, "turn": 2}, again=again)
    if defaults:
        made["default"] = run(
            "trl", {**job, "settings": DEFAULTS, "label": "defaults"}, again=again
        )
    for name, result in made.items():
        if "error" in result:
            raise SystemExit(f"{name} failed: {result['error']} ({result['log']})")
    return made


def cosine_of(made: dict[str, Json], job: Json) -> dict[str, float]:
    """Cosines between the final adapters (or weights), whole and as changes since the start."""
    from safetensors.torch import load_file

    sides = [
        load_file(Path(str(made[n]["folder"])) / "trained.safetensors") for n in ("ours", "same")
    ]
    if job["adapter"]:
        start = load_file(Path(str(job["adapter"])) / "adapter_model.safetensors")
    else:
        start = load_file(Path(str(job["model"])) / "model.safetensors")
        start = {n: start[n] for n in sides[0]}
    return {
        "whole": compare.cosine(sides[0], sides[1]),
        "change": compare.cosine(sides[0], sides[1], start),
    }


def trees_of(job: Json) -> list[tuple[int, list[int]]]:
    """Lengths of prompt and answers of each row."""
    names = ("chosen", "rejected") if job["task"] == "dpo" else ("chosen",)
    return [(len(r["prompt"]), [len(r[n]) for n in names]) for r in job["rows"]]  # type: ignore


def row_of(name: str, job: Json, made: dict[str, Json], best: Json, peak: float) -> Json:
    """The last line: ratios, agreement and the share of the machine's peak."""
    from transformers import AutoConfig

    def number(run: str, what: str) -> float:
        return float(made[run][what])  # type: ignore[arg-type]

    def numbers(run: str, what: str) -> list[float]:
        return [float(v) for v in made[run][what]]  # type: ignore[attr-defined]

    ours = statistics.mean([number("ours", "seconds"), number("ours_again", "seconds")])
    shape = work.shape_of(AutoConfig.from_pretrained(str(job["model"])))
    done = work.flops(
        shape,
        trees_of(job),
        rank=int(job["rank"]),
        reference=job["task"] == "dpo",  # type: ignore
    )
    losses = numbers("ours", "losses")
    line: Json = {
        "bench": name,
        "ratio_best": number("best", "seconds") / ours,
        "ratio_default": number("default", "seconds") / ours if "default" in made else None,
        "memory_ratio": number("ours", "peak_rss") / number("best", "peak_rss"),
        "max_loss_rel_diff": compare.largest_difference(losses, numbers("same", "losses")),
        "max_gradnorm_rel_diff": compare.largest_difference(
            numbers("ours", "grad_norms"), numbers("same", "grad_norms")
        ),
        "adapter_cosine": cosine_of(made, job)["change"],
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "peak_fraction": done / ours / 1e9 / peak,
        "trl_settings": best,
    }
    for key, value in line.items():
        if isinstance(value, float):
            line[key] = float(f"{value:.6g}")
    return line


def details_of(job: Json, made: dict[str, Json], search: Json, peak: float) -> Json:
    """What stands behind the line."""
    count = len(job["rows"])  # type: ignore[arg-type]
    runs = {
        n: {
            **{k: v for k, v in r.items() if k not in ("folder", "runs")},
            "rows_per_second": count / float(r["seconds"]),  # type: ignore[arg-type]
        }
        for n, r in made.items()
    }
    return {
        "rows": count,
        "tokens": sum(p + sum(a) for p, a in trees_of(job)),
        "learning_rate": job["lr"],
        "rank": job["rank"],
        "batch": job["batch"],
        "peak_gflops": peak,
        "cosines": cosine_of(made, job),
        "search_on_16_rows": search,
        "runs": runs,
    }


def measure(
    name: str, job: Json, candidates: dict[str, Json], *, defaults: bool, again: bool
) -> tuple[Json, Json, Json]:
    """Search TRL's settings, run both sides: (line, details, machine)."""
    threads = int(str(job["threads"]))
    where = machine(threads)
    say(f"{name}: {len(job['rows'])} rows, {sum(p + sum(a) for p, a in trees_of(job))} tokens")  # type: ignore[arg-type]
    peaks = [peak_gflops(threads)]
    chosen, same, search = searched(job, candidates, again)
    made = measured(job, candidates[chosen], candidates[same], defaults, again)
    peaks.append(peak_gflops(threads))
    peak = max(peaks)
    line = row_of(name, job, made, candidates[chosen], peak)
    if not compare.agree(line):
        say(f"{name}: the two sides do not agree, so the row does not count")
    return line, details_of(job, made, search, peak), where


def micro_batches() -> dict[str, Json]:
    """TRL's settings to search: micro-batches of these sizes, accumulated to the same batch."""
    return {f"micro-batch {m}": {"micro_batch": m} for m in MICRO}
