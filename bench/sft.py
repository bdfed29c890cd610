"""SFT on answers only against TRL: padded at micro-batch 1 to 8, and packed."""

from __future__ import annotations

from bench import rows
from bench.runner import arguments, command, finish, write
from bench.training import job_of, measure, micro_batches


@command
def main(argv: list[str] | None = None) -> None:
    """Measure the row."""
    args = arguments("SFT (LoRA, loss on answers): rows per second against TRL", 64).parse_args(
        argv
    )
    job = job_of("sft", args, rows.read(args.model, args.pairs), full=False)
    candidates = micro_batches() | {"packed": {"micro_batch": 1, "packing": True}}
    line, details, where = measure("sft", job, candidates, defaults=True, again=args.again)
    write("sft", line, details, where, args)
    finish(line, args.json)


if __name__ == "__main__":
    main()
