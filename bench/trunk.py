"""DPO on a frozen trunk, its states kept, against DPO on all blocks: the same rows and epochs.

Both are ours. What the trunk says of a row is computed once and read from disk in later epochs, so
the more epochs, the more is saved; the time of computing and keeping is counted. The two train
other weights, which is why their last losses are given beside the times.
"""

from __future__ import annotations

import statistics

from bench import compare, rows
from bench.runner import Json, arguments, command, ended, finish, machine, run, write
from bench.training import job_of

LAYERS = 6  # of SmolLM2-135M's 30
EPOCHS = 3


def end_of(made: Json) -> float:
    """Mean loss of the last epoch."""
    losses: list[float] = made["losses"]  # type: ignore[assignment]
    return statistics.mean(losses[-len(losses) // EPOCHS :])


@command
def main(argv: list[str] | None = None) -> None:
    """Measure the row."""
    args = arguments("DPO of the top blocks on kept states, against all blocks", 32).parse_args(
        argv
    )
    pairs = rows.read(args.model, args.pairs)
    where = machine(args.threads)
    job = job_of("dpo", args, pairs, full=False)
    # Drawn by the engine: the file that other benchmarks begin with holds adapters of all blocks.
    job = {**job, "adapter": "", "epochs": EPOCHS, "settings": {}}
    jobs = {
        "all blocks": {**job, "layers": 0, "label": "all blocks"},
        "top blocks": {**job, "layers": LAYERS, "label": f"top {LAYERS} blocks"},
    }
    made = ended({n: run("ours", j, again=args.again) for n, j in jobs.items()})
    whole, top = made["all blocks"], made["top blocks"]
    line = compare.rounded(
        {
            "bench": "trunk",
            "ratio": float(whole["seconds"]) / float(top["seconds"]),  # type: ignore[arg-type]
            "memory_ratio": float(top["peak_rss"]) / float(whole["peak_rss"]),  # type: ignore[arg-type]
            "seconds_all": whole["seconds"],
            "seconds_top": top["seconds"],
            "trunk_seconds": top["trunk_seconds"],
            "loss_all": end_of(whole),
            "loss_top": end_of(top),
            "layers": LAYERS,
            "epochs": EPOCHS,
        }
    )
    runs = {n: {k: v for k, v in r.items() if k not in ("folder", "runs")} for n, r in made.items()}
    details: Json = {"rows": args.pairs, "rank": job["rank"], "runs": runs}
    write("trunk", line, details, where, args)
    finish(line, args.json)


if __name__ == "__main__":
    main()
