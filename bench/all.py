"""All benchmarks, one after the other; what was measured in full is passed over."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from bench.runner import RESULTS, ROOT, Json, finish, say

ROWS: dict[str, list[str]] = {
    "dpo": ["bench.dpo"],
    "dpo_long": ["bench.dpo", "--long", "--pairs", "32"],
    "dpo_full": ["bench.dpo", "--full"],
    "sft": ["bench.sft"],
    "sampling": ["bench.sampling"],
    "beta_sweep": ["bench.beta_sweep"],
}


def main(argv: list[str] | None = None) -> None:
    """Run what is asked for; exit code 1 when a row fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help=", ".join(ROWS))
    parser.add_argument("--again", action="store_true", help="measure again what was measured")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no such row: {sorted(unknown)[0]}; rows are {', '.join(ROWS)}")
    line: Json = {"bench": "all"}
    for name in args.rows or ROWS:
        module, *flags = ROWS[name]
        path = RESULTS / f"{name}.json"
        if not path.exists() or args.again:
            say(name)
            command = [sys.executable, "-m", module, *flags, "--json"]
            again = ["--again"] * args.again
            done = subprocess.run([*command, *again], cwd=ROOT, stdout=subprocess.PIPE, check=False)
            if done.returncode:
                line[name] = f"failed with exit code {done.returncode}"
                continue
        found = json.loads(path.read_text())
        line[name] = {k: v for k, v in found.items() if "ratio" in k or k == "peak_fraction"}
    finish(line, args.json)
    raise SystemExit(any(isinstance(v, str) and v.startswith("failed") for v in line.values()))


if __name__ == "__main__":
    main()
