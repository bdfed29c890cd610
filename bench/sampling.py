"""Sampling 64 prompts x 4 answers x 64 tokens against `transformers.generate` at its best batch."""

from __future__ import annotations

import statistics

from bench import compare, rows
from bench.runner import Json, arguments, command, ended, finish, machine, run, write

DRAWS, TOKENS = 4, 64
SIZES = (2, 4, 8, 16, 32, 64)  # prompts of a batch, four rows each
SEARCH = 16  # prompts that the batch size is searched on, at least
WORSE = 1.25  # times the quickest: where the search ends


@command
def main(argv: list[str] | None = None) -> None:
    """Measure the row."""
    args = arguments("Sampling against transformers.generate", 64).parse_args(argv)
    from truing.models import Model

    prompts = [p.prompt for p in rows.read(args.model, args.pairs)]
    where = machine(args.threads)
    job: Json = {
        "model": str(Model.open(args.model).folder), "prompts": prompts, "draws": DRAWS,
        "tokens": TOKENS, "threads": args.threads, "ours": True, "label": "ours",
    }  # fmt: skip
    found: dict[str, Json] = {}
    for size in [s for s in SIZES if s <= len(prompts)]:
        # A batch of that size out of the middle lengths, and as many as make up the search.
        few = sorted(prompts, key=len)
        count = min(len(few), max(size, SEARCH))
        start = (len(few) - count) // 2
        part = {**job, "ours": False, "prompts": few[start : start + count], "size": size}
        made = run("generate", {**part, "label": f"generate, {size} prompts"}, again=args.again)
        if "error" not in made:
            made["seconds"] = float(made["seconds"]) / count  # type: ignore[arg-type]
        found[str(size)] = made
        quickest = found[compare.fastest(found)]["seconds"]
        if "error" in made or made["seconds"] > WORSE * quickest:  # type: ignore[operator]
            break  # larger batches only lose from here on
    best = int(compare.fastest(found))
    other = {**job, "ours": False, "size": best, "label": f"generate, {best} prompts, all"}
    runs = ended(
        {
            "ours": run("generate", {**job, "turn": 1}, again=args.again),
            "generate": run("generate", other, again=args.again),
            "ours_again": run("generate", {**job, "turn": 2}, again=args.again),
        }
    )
    seconds = {n: float(m["seconds"]) for n, m in runs.items()}  # type: ignore[arg-type]
    ours = statistics.mean([seconds["ours"], seconds["ours_again"]])
    line: Json = {
        "bench": "sampling",
        "ratio": seconds["generate"] / ours,
        "tokens_per_second": float(runs["ours"]["tokens"]) / ours,  # type: ignore[arg-type]
        "tokens_per_second_generate": float(runs["generate"]["tokens"]) / seconds["generate"],  # type: ignore[arg-type]
        "memory_ratio": float(runs["ours"]["peak_rss"]) / float(runs["generate"]["peak_rss"]),  # type: ignore[arg-type]
        "generate_prompts_per_batch": best,
    }
    search = {n: m.get("seconds", m.get("error")) for n, m in found.items()}
    details: Json = {
        "prompts": len(prompts), "draws": DRAWS, "tokens": TOKENS,
        "runs": {n: {k: v for k, v in m.items() if k != "folder"} for n, m in runs.items()},
        "search_seconds_per_prompt": search,
    }  # fmt: skip
    write("sampling", line, details, where, args)
    finish(line, args.json)


if __name__ == "__main__":
    main()
