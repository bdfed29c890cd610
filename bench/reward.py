"""A reward model against TRL's RewardTrainer: LoRA and a score head, Bradley-Terry on pairs.

Both sides score the last token of prompt and answer, which closes the answer, with a linear head
that begins with the same weights. TRL's padding token is another than the one that closes answers,
or its trainer would score the token before.
"""

from __future__ import annotations

from bench import rows
from bench.runner import arguments, command, finish, write
from bench.training import REWARD, job_of, measure, micro_batches


@command
def main(argv: list[str] | None = None) -> None:
    """Measure the row."""
    parser = arguments("Reward model (LoRA and head): pairs per second against TRL", 64)
    parser.add_argument("--no-defaults", action="store_true", help="leave TRL's defaults out")
    args = parser.parse_args(argv)
    job = job_of(REWARD, args, rows.read(args.model, args.pairs), full=False)
    line, details, where = measure(
        "reward", job, micro_batches(), defaults=not args.no_defaults, again=args.again
    )
    write("reward", line, details, where, args)
    finish(line, args.json)


if __name__ == "__main__":
    main()
