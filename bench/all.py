"""All benchmarks, one after the other; what was measured in full is passed over."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

from bench import compare
from bench.runner import (
    MODEL,
    RESULTS,
    ROOT,
    THREADS,
    WORK,
    Json,
    asked,
    command,
    finish,
    keep,
    say,
)

STAMP = WORK / "again.json"  # of a run with --again that has not ended
MISTAKE = 2  # exit code of a row for what a user can mend, which would be told of every row

ROWS: dict[str, tuple[str, int, list[str]]] = {  # module, rows, flags
    "dpo": ("bench.dpo", 64, []),
    "dpo_long": ("bench.dpo", 16, ["--long", "--no-defaults"]),
    "dpo_full": ("bench.dpo", 32, ["--full"]),
    "sft": ("bench.sft", 64, []),
    "sampling": ("bench.sampling", 64, []),
    "beta_sweep": ("bench.beta_sweep", 64, []),
    "trunk": ("bench.trunk", 32, []),
    "reward": ("bench.reward", 64, []),
    "objectives": ("bench.objectives", 24, []),
    "grpo": ("bench.grpo", 16, []),
}


def measured(name: str) -> Json | None:
    """The result of a row, if it is there, was measured in full and its two sides agree."""
    path, (_, pairs, flags) = RESULTS / f"{name}.json", ROWS[name]
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    if "max_loss_rel_diff" in found and not compare.agree(found):
        return None
    whole = "--no-defaults" in flags or found.get("ratio_default", 0) is not None
    return found if whole and found.get("asked") == asked(MODEL, pairs, THREADS) else None


def origin(found: Json) -> str:
    """When, on what and at which commit a result was recorded."""
    where: Json = found["machine"]  # type: ignore[assignment]
    return f"recorded on {where['date']}, {where['cpu']}, at {where['commit']}"


def begun(rows: list[str]) -> Json:
    """Since when these rows are measured again, and which are done; a stopped run goes on."""
    told: Json = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    if told.get("rows") == rows:
        say("goes on with the run that was stopped")
        return told
    told = {"rows": rows, "since": time.time(), "done": []}
    keep(STAMP, told)
    return told


def measure(name: str, again: list[str]) -> Json | None:
    """Have a row measured; None where that failed, or its two sides do not agree."""
    module, pairs, flags = ROWS[name]
    say(name)
    words = [sys.executable, "-m", module, "--pairs", str(pairs), *flags, "--json", *again]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, check=False)
    if done.returncode == MISTAKE:
        raise SystemExit(MISTAKE)
    return None if done.returncode else measured(name)


@command
def main(argv: list[str] | None = None) -> None:
    """Run what is asked for; exit code 1 when a row fails, 2 for what a user can mend."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help=", ".join(ROWS))
    parser.add_argument("--again", action="store_true", help="measure here what has a result")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no such row: {sorted(unknown)[0]}; rows are {', '.join(ROWS)}")
    line: Json = {"bench": "all"}
    rows: list[str] = args.rows or list(ROWS)
    told: Json = begun(rows) if args.again else {"done": rows}
    done: list[str] = told["done"]  # type: ignore[assignment]
    again = [f"--again={told['since']}"] if args.again else []
    for name in rows:
        found = measured(name) if name in done else None
        if found is not None:
            say(f"{name}: {origin(found)}" + "; --again measures it here" * (not args.again))
        elif (found := measure(name, again)) is None:
            line[name] = "failed"
            continue
        elif args.again:
            done.append(name)
            keep(STAMP, told)
        line[name] = {k: v for k, v in found.items() if "ratio" in k or k == "peak_fraction"}
    if args.again:
        STAMP.unlink()
    finish(line, args.json)
    raise SystemExit(any(v == "failed" for v in line.values()))


if __name__ == "__main__":
    main()
