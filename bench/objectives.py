"""Five preference losses on the same pairs: one process and one reference pass against five of TRL.

    dpo, ipo, hinge    TRL's DPOTrainer, a run each; it can keep reference log-probabilities of data
                       sets that lie in files, so the ratio counts its pass once ("ratio_best") and,
                       as it is with data in memory, three times ("ratio_pass_each")
    simpo, cpo         TRL's CPOTrainer, a run each

TRL's micro-batch is searched for each of the trainers. CPO is taken without its likelihood term,
which in TRL is a mean over the tokens of a micro-batch and here of a step: the two are the same
with whole batches alone, which need more than 24 GB. ORPO is not among the five, since TRL's takes
the likelihood of the prompt too, and KTO is not, since TRL's draws its mismatched answers from the
micro-batch.

The line also names the online and unpaired methods for which TRL has no trainer to compare with.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from bench import compare, rows
from bench.runner import Json, arguments, command, ended, finish, machine, run, write
from bench.training import agreement, job_of, judged, micro_batches, searched

LOSSES: dict[str, dict[str, float]] = {
    "dpo": {"beta": 0.1},
    "ipo": {"beta": 0.1},
    "hinge": {"beta": 0.1},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "cpo": {"beta": 0.1, "alpha": 0.0},
}
TRAINERS = {"dpo": ("dpo", "ipo", "hinge"), "simpo": ("simpo", "cpo")}  # searched: all it serves
OTHERS = ("ppo", "xpo", "nash_md", "bco")


def totals(made: Mapping[str, Json]) -> tuple[float, float]:
    """Seconds of TRL's five runs with one reference pass in all, and with one in each."""

    def whole(name: str) -> float:
        return sum(float(r[name]) for r in made.values())  # type: ignore[arg-type]

    first = float(made["dpo"]["reference_seconds"])  # type: ignore[arg-type]
    return whole("seconds") - whole("reference_seconds") + first, whole("seconds")


def worst(found: Mapping[str, Json]) -> Json:
    """The largest differences and the smallest cosine of all losses."""
    made: Json = {}
    for name in ("max_loss_rel_diff", "max_gradnorm_rel_diff"):
        made[name] = max(float(f[name]) for f in found.values())  # type: ignore[arg-type]
    made["adapter_cosine"] = min(float(f["adapter_cosine"]) for f in found.values())  # type: ignore[arg-type]
    return made


def without_opponent(offered: Sequence[str]) -> list[str]:
    """Methods of ours that none of these trainers offers."""
    return [n for n in OTHERS if n not in offered]


@command
def main(argv: list[str] | None = None) -> None:
    """Measure the row."""
    args = arguments("Five preference losses: total time against TRL", 24).parse_args(argv)
    pairs = rows.read(args.model, args.pairs)
    where = machine(args.threads)
    job = job_of("dpo", args, pairs, full=False)
    candidates = micro_batches()
    best: dict[str, Json] = {}
    search: Json = {}
    for trainer, losses in TRAINERS.items():
        name, _, search[trainer] = searched(
            {**job, "task": trainer, "losses": {trainer: LOSSES[trainer]}}, candidates, args.again
        )
        best |= dict.fromkeys(losses, candidates[name])

    def theirs(loss: str, settings: Json) -> Json:
        label = f"{loss} {settings}"
        told = {**job, "task": loss, "losses": {loss: LOSSES[loss]}}
        told |= {"settings": settings, "label": label}
        return run("trl", told, again=args.again)

    def ours(turn: int) -> Json:
        told = {**job, "losses": LOSSES, "settings": {}, "label": "five losses", "turn": turn}
        return run("ours", told, again=args.again)

    mine = [ours(1)]
    made = {loss: theirs(loss, best[loss]) for loss in LOSSES}
    mine.append(ours(2))
    ended({"ours": mine[0], "ours_again": mine[1]} | made)

    agreed = {loss: agreement(mine[0], made[loss], job, number=i) for i, loss in enumerate(LOSSES)}
    seconds = statistics.mean(float(m["seconds"]) for m in mine)  # type: ignore[arg-type]
    once, each = totals(made)
    memory = max(float(r["peak_rss"]) for r in made.values())  # type: ignore[arg-type]
    last: Json = mine[0]["runs"][-1]  # type: ignore[index]
    line = compare.rounded(
        {
            "bench": "objectives",
            "ratio_best": once / seconds,
            "ratio_pass_each": each / seconds,
            "memory_ratio": float(last["peak_rss"]) / memory,  # type: ignore[arg-type]
            **worst(agreed),
            "losses": list(LOSSES),
            "without_opponent": without_opponent(made["dpo"]["offered"]),  # type: ignore[arg-type]
            "trl_settings": best,
        }
    )
    judged("objectives", line)
    runs = {f"trl {n}": r for n, r in made.items()}
    details: Json = {
        "rows": args.pairs, "settings": LOSSES, "learning_rate": job["lr"], "rank": job["rank"],
        "batch": job["batch"], "search_on_16_rows": search, "agreement": agreed,
        "ours": mine[0]["runs"], "ours_again": mine[1]["runs"],
        "runs": {n: {k: v for k, v in r.items() if k != "folder"} for n, r in runs.items()},
    }  # fmt: skip
    write("objectives", line, details, where, args)
    finish(line, args.json)


if __name__ == "__main__":
    main()
