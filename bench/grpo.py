"""GRPO against TRL's GRPOTrainer: the whole step, generation and the rest of it timed apart.

Both sides answer the same prompts in the same order, draw all answers of an update at once from the
weights that it starts with, and reward them by one rule: the share of certain letters. Samples
differ by their random numbers, so agreement is shown on recorded answers, the first of ours: two
updates on them, the second of which has ratios other than 1. The loss of the first is 0 by
construction, so losses are compared on the scale of advantages.

TRL's micro-batch is searched, checkpointing is off, answers are drawn by `generate`. A larger
`generation_batch_size` is not tried: it would answer prompts with weights of an earlier update; nor
is its continuous batching.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from bench import compare, rows
from bench.runner import Json, arguments, command, ended, finish, machine, run, say, write
from bench.training import agreement, job_of, judged, measured, micro_batches, part_of, searched

PROMPTS, ANSWERS, TOKENS = 4, 8, 64  # prompts of an update, answers to each, tokens of each
LETTERS = "e"
TIMES = ("seconds", "generation_seconds", "update_seconds")


def recorded(job: Json, first: list[list[Json]]) -> Json:
    """The job of two updates on the answers to the prompts of the first step."""
    order: list[int] = job["steps"][0]  # type: ignore[index]
    prompts: list[Json] = job["rows"]  # type: ignore[assignment]
    told = [{**prompts[i], "recorded": answers} for i, answers in zip(order, first, strict=True)]
    return part_of({**job, "rows": told, "passes": 2}, len(told))


def row_of(made: Mapping[str, Json], agreed: Json, best: Json) -> Json:
    """The last line: ratios of times, agreement, how many tokens each side drew."""

    def value(run: str, name: str) -> float:
        return float(made[run][name])  # type: ignore[arg-type]

    def ratio(name: str) -> float:
        ours = statistics.mean([value("ours", name), value("ours_again", name)])
        return value("best", name) / ours

    whole, generation, update = map(ratio, TIMES)
    skipped: list[float] = made["ours"]["skipped"]  # type: ignore[assignment]
    return compare.rounded(
        {
            "bench": "grpo",
            "ratio_best": whole,
            "ratio_generation": generation,
            "ratio_update": update,
            "memory_ratio": value("ours", "peak_rss") / value("best", "peak_rss"),
            **agreed,
            "tokens": made["ours"]["tokens"],
            "tokens_trl": made["best"]["tokens"],
            "groups_skipped": statistics.mean(skipped),
            "trl_settings": best,
        }
    )


@command
def main(argv: list[str] | None = None) -> None:
    """Measure the row."""
    parser = arguments("GRPO: time of a step against TRL; --pairs counts prompts", 16)
    parser.add_argument("--answers", type=int, default=ANSWERS, help="to each prompt")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of an answer at most")
    args = parser.parse_args(argv)
    prompts = [{"prompt": p.prompt} for p in rows.read(args.model, args.pairs)]
    where = machine(args.threads)
    batch = min(PROMPTS, len(prompts))
    job = {
        **job_of("grpo", args, [], full=False), "rows": prompts, "batch": batch, "passes": 1,
        "answers": args.answers, "tokens": args.tokens, "letters": LETTERS,
    }  # fmt: skip
    job = part_of(job, len(prompts) // batch * batch)  # TRL leaves an incomplete batch out
    candidates = micro_batches()
    name, _, search = searched(job, candidates, args.again, batch)
    best = candidates[name]
    made = measured(job, best, best, False, args.again)
    told = recorded(job, made["ours"]["first"])  # type: ignore[arg-type]
    checks = ended(
        {
            "ours": run("ours", {**told, "label": "ours, recorded answers"}, again=args.again),
            "trl": run(
                "trl", {**told, "settings": best, "label": "recorded answers"}, again=args.again
            ),
        }
    )
    line = row_of(made, agreement(checks["ours"], checks["trl"], told, least=1.0), best)
    judged("grpo", line)
    hidden = ("folder", "runs", "first")
    details: Json = {
        "prompts": len(prompts), "prompts_of_an_update": batch, "answers": args.answers,
        "tokens_of_an_answer": args.tokens, "learning_rate": job["lr"], "rank": job["rank"],
        "search_on_one_update": search,
        "runs": {n: {k: v for k, v in r.items() if k not in hidden} for n, r in made.items()},
        "recorded": {n: {k: r[k] for k in ("losses", "grad_norms")} for n, r in checks.items()},
    }  # fmt: skip
    if (args.answers, args.tokens) == (ANSWERS, TOKENS):
        write("grpo", line, details, where, args)
    else:
        say("other sizes than the row's: no result is kept")
    finish(line, args.json)


if __name__ == "__main__":
    main()
