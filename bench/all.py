"""All benchmarks, one after the other; what was measured in full is passed over."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from bench.runner import MODEL, RESULTS, ROOT, THREADS, Json, asked, finish, say

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
    """The result of a row, if it is there and was measured in full."""
    path, (_, pairs, flags) = RESULTS / f"{name}.json", ROWS[name]
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    whole = "--no-defaults" in flags or found.get("ratio_default", 0) is not None
    return found if whole and found.get("asked") == asked(MODEL, pairs, THREADS) else None


def origin(found: Json) -> str:
    """When, on what and at which commit a result was recorded."""
    where: Json = found["machine"]  # type: ignore[assignment]
    return f"recorded on {where['date']}, {where['cpu']}, at {where['commit']}"


def main(argv: list[str] | None = None) -> None:
    """Run what is asked for; exit code 1 when a row fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help=", ".join(ROWS))
    parser.add_argument("--again", action="store_true", help="measure here what has a result")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no such row: {sorted(unknown)[0]}; rows are {', '.join(ROWS)}")
    line: Json = {"bench": "all"}
    for name in args.rows or ROWS:
        module, pairs, flags = ROWS[name]
        found = None if args.again else measured(name)
        if found is None:
            say(name)
            command = [sys.executable, "-m", module, "--pairs", str(pairs), *flags, "--json"]
            again = ["--again"] * args.again
            done = subprocess.run([*command, *again], cwd=ROOT, stdout=subprocess.PIPE, check=False)
            found = None if done.returncode else measured(name)
        else:
            say(f"{name}: {origin(found)}; --again measures it here")
        if found is None:
            line[name] = "failed"
            continue
        line[name] = {k: v for k, v in found.items() if "ratio" in k or k == "peak_fraction"}
    finish(line, args.json)
    raise SystemExit(any(v == "failed" for v in line.values()))


if __name__ == "__main__":
    main()
