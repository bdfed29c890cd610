"""A second DPO run with another beta, whose reference is cached, against the first."""

from __future__ import annotations

from bench import rows
from bench.runner import arguments, command, ended, finish, machine, run, write
from bench.training import job_of

BETAS = [0.1, 0.5]


@command
def main(argv: list[str] | None = None) -> None:
    """Measure the row."""
    args = arguments("DPO again with another beta, its reference cached", 64).parse_args(argv)
    pairs = rows.read(args.model, args.pairs)
    where = machine(args.threads)
    job = job_of("dpo", args, pairs, full=False)
    job = {**job, "betas": BETAS, "settings": {}, "label": "two betas"}
    made = ended({"two betas": run("ours", job, again=args.again)})["two betas"]
    first, second = made["runs"]  # type: ignore[misc]
    line = {
        "bench": "beta_sweep",
        "ratio": first["seconds"] / second["seconds"],
        "seconds_first": first["seconds"],
        "seconds_second": second["seconds"],
        "reference_seconds_first": first["reference_seconds"],
        "reference_seconds_second": second["reference_seconds"],
        "betas": BETAS,
    }
    write("beta_sweep", line, {"rows": args.pairs, "runs": made["runs"]}, where, args)
    finish(line, args.json)


if __name__ == "__main__":
    main()
