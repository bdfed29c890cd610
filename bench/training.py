"""What the benchmarks of training share: one job for both sides, TRL's settings searched."""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import replace
from pathlib import Path

from bench import compare, rows, work
from bench.rows import Pair
from bench.runner import WORK, Json, ended, machine, peak_gflops, run, say

RANK, BATCH, SEED = 16, 8, 0
LR, LR_FULL = 2e-4, 1e-5
MICRO = (1, 2, 4, 8)
SEARCH = 16  # rows that TRL's settings are searched on
WORSE = 1.25  # times the quickest: where the search ends
DEFAULTS: Json = {"defaults": True, "micro_batch": 8}
REWARD = "bradley_terry"
SCALE = 0.02  # of the score head that both sides begin with


def adapter_folder(model: str) -> Path:
    """The adapter that both sides begin with: A drawn once, B zero; in PEFT's format."""
    import torch

    from truing.core.modelfiles import lora
    from truing.models import Model

    opened = Model.open(model)
    folder = WORK / f"adapter-{opened.weights_key[:12]}"
    module = opened.load_module("float32", "cpu", fresh=True).module
    with torch.no_grad():
        lora.attach(module, RANK, 2.0 * RANK, seed=SEED).save(folder, base=model)
    return folder


def head_file(model: str, folder: Path) -> Path:
    """The score head that both sides begin with, drawn once."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    width = int(AutoConfig.from_pretrained(model).hidden_size)
    source = torch.Generator().manual_seed(SEED)
    path = folder / "head.safetensors"
    save_file({"reward_head.weight": SCALE * torch.randn(1, width, generator=source)}, path)
    return path


def job_of(task: str, args: argparse.Namespace, pairs: list[Pair], full: bool) -> Json:
    """What both sides are told."""
    from truing.models import Model

    model = str(Model.open(args.model).folder)
    adapter = "" if full else str(adapter_folder(args.model))
    head = {"head": str(head_file(model, Path(adapter)))} if task == REWARD else {}
    return {
        "task": task,
        "model": model,
        "rows": [vars(p) for p in pairs],
        "steps": rows.steps_of(len(pairs), BATCH, SEED),
        "batch": BATCH,
        "seed": SEED,
        "rank": 0 if full else RANK,
        "lr": LR_FULL if full else LR,
        "adapter": adapter,
        "betas": [0.1],
        "most": rows.MOST,
        "threads": args.threads,
        **head,
    }


def part_of(job: Json, count: int) -> Json:
    """The same job on its first `count` rows."""
    few = list(job["rows"])[:count]  # type: ignore[call-overload]
    return {**job, "rows": few, "steps": rows.steps_of(len(few), int(str(job["batch"])), SEED)}


def searched(
    job: Json, candidates: dict[str, Json], again: float, count: int = SEARCH
) -> tuple[str, str, Json]:
    """TRL's fastest settings, found on `count` of the rows, and what each candidate took.

    The second name is the fastest of those that keep the rows of an update together, which packing
    does not: with these the two sides are compared step by step.
    """
    found: Json = {}
    few = part_of(job, min(count, max(BATCH, len(job["rows"]) // 2)))  # type: ignore[arg-type]
    lost = False  # larger micro-batches only lose from here on
    for name, settings in candidates.items():
        if lost and not settings.get("packing"):
            continue
        found[name] = run("trl", {**few, "settings": settings, "label": name}, again=again)
        ended = [float(r["seconds"]) for r in found.values() if "seconds" in r]  # type: ignore[index, operator]
        lost = bool(ended) and float(found[name].get("seconds", math.inf)) > WORSE * min(ended)  # type: ignore[attr-defined]
    same = {n: r for n, r in found.items() if not candidates[n].get("packing")}
    kept = ("seconds", "peak_rss", "error")
    took: Json = {
        n: {k: v for k, v in r.items() if k in kept}  # type: ignore[attr-defined]
        for n, r in found.items()
    }
    return compare.fastest(found), compare.fastest(same), took  # type: ignore[arg-type]


def measured(job: Json, best: Json, same: Json, defaults: bool, again: float) -> dict[str, Json]:
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
    return ended(made)


def cosine_of(ours: Json, theirs: Json, job: Json, number: int = 0) -> dict[str, float]:
    """Cosines between the final adapters (or weights), whole and as changes since the start.

    Args:
        number: of our run, where one process made several.
    """
    from safetensors.torch import load_file

    names = (f"trained{number or ''}.safetensors", "trained.safetensors")
    sides = [load_file(Path(str(r["folder"])) / n) for r, n in zip((ours, theirs), names)]
    if job["adapter"]:
        start = load_file(Path(str(job["adapter"])) / "adapter_model.safetensors")
        start |= load_file(str(job["head"])) if "head" in job else {}
    else:
        start = load_file(Path(str(job["model"])) / "model.safetensors")
        start = {n: start[n] for n in sides[0]}
    return {
        "whole": compare.cosine(sides[0], sides[1]),
        "change": compare.cosine(sides[0], sides[1], start),
    }


def agreement(
    ours: Json, theirs: Json, job: Json, *, number: int = 0, least: float = compare.TINY
) -> Json:
    """Whether two runs computed the same: losses, gradient norms, what was trained.

    Args:
        number: of our run, where one process made several.
        least: what a difference of losses is measured against at least.
    """

    def values(run: Json, what: str) -> list[float]:
        return [float(v) for v in run[what]]  # type: ignore[attr-defined]

    mine = ours["runs"][number]  # type: ignore[index]
    losses = values(mine, "losses"), values(theirs, "losses")
    norms = values(mine, "grad_norms"), values(theirs, "grad_norms")
    return {
        "max_loss_rel_diff": compare.largest_difference(*losses, least=least),
        "max_gradnorm_rel_diff": compare.largest_difference(*norms),
        "adapter_cosine": cosine_of(ours, theirs, job, number)["change"],
    }


def trees_of(job: Json) -> list[tuple[int, list[int]]]:
    """Lengths of prompt and answers of each row."""
    names = ("chosen",) if job["task"] == "sft" else ("chosen", "rejected")
    return [(len(r["prompt"]), [len(r[n]) for n in names]) for r in job["rows"]]  # type: ignore


def row_of(name: str, job: Json, made: dict[str, Json], best: Json, peak: float) -> Json:
    """The last line: ratios, agreement and the share of the machine's peak."""
    from transformers import AutoConfig

    def number(run: str, what: str) -> float:
        return float(made[run][what])  # type: ignore[arg-type]

    ours = statistics.mean([number("ours", "seconds"), number("ours_again", "seconds")])
    shape = work.shape_of(AutoConfig.from_pretrained(str(job["model"])))
    if job["task"] == REWARD:
        shape = replace(shape, vocab=1)  # a head of one output
    done = work.flops(
        shape,
        trees_of(job),
        rank=int(job["rank"]),  # type: ignore[call-overload]
        reference=job["task"] == "dpo",
    )
    losses: list[float] = made["ours"]["losses"]  # type: ignore[assignment]
    line: Json = {
        "bench": name,
        "ratio_best": number("best", "seconds") / ours,
        "ratio_default": number("default", "seconds") / ours if "default" in made else None,
        "memory_ratio": number("ours", "peak_rss") / number("best", "peak_rss"),
        **agreement(made["ours"], made["same"], job),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "peak_fraction": done / ours / 1e9 / peak,
        "trl_settings": best,
    }
    return compare.rounded(line)


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
        "cosines": cosine_of(made["ours"], made["same"], job),
        "search_on_some_rows": search,
        "runs": runs,
    }


def measure(
    name: str, job: Json, candidates: dict[str, Json], *, defaults: bool, again: float
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
    judged(name, line)
    return line, details_of(job, made, search, peak), where


def judged(name: str, line: Json) -> None:
    """Say so where a row does not count."""
    if not compare.agree(line):
        say(f"{name}: the two sides do not agree, so the row does not count")


def micro_batches() -> dict[str, Json]:
    """TRL's settings to search: micro-batches of these sizes, accumulated to the same batch."""
    return {f"micro-batch {m}": {"micro_batch": m} for m in MICRO}
