"""DPO against TRL: `python -m bench.dpo --pairs 64 --json`; also `--long` and `--full`."""

from __future__ import annotations

from bench import rows
from bench.runner import arguments, command, finish, write
from bench.training import job_of, measure, micro_batches


@command
def main(argv: list[str] | None = None) -> None:
    """Measure one row."""
    parser = arguments("DPO: pairs per second against TRL at its fastest and at its defaults", 64)
    parser.add_argument("--long", action="store_true", help="prompts of 600 tokens and more")
    parser.add_argument("--full", action="store_true", help="train all weights")
    parser.add_argument("--no-defaults", action="store_true", help="leave TRL's defaults out")
    args = parser.parse_args(argv)
    name = "dpo" + "_long" * args.long + "_full" * args.full
    pairs = rows.read(args.model, args.pairs, args.long)
    job = job_of("dpo", args, pairs, args.full)
    line, details, where = measure(
        name, job, micro_batches(), defaults=not args.no_defaults, again=args.again
    )
    write(name, line, details, where, args)
    finish(line, args.json)


if __name__ == "__main__":
    main()
