"""Run one side in a process of its own, keep what was measured, describe the machine."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
WORK = ROOT / "build" / "bench"
VENV = ROOT / ".venv-trl"
MODEL = "smollm2-135m-instruct"
# What the other environment is made of, and which TRL that is: the extra `trl`.
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PEERS: list[str] = PROJECT["optional-dependencies"]["trl"]
TRL = next(text.removeprefix("trl==") for text in PEERS if text.startswith("trl=="))
TORCH, TRANSFORMERS = "torch", ("transformers", "peft", "tokenizers", "safetensors", "numpy")
THREADS = 2
LIMIT = 45 * 60  # seconds that one run may take

Json = dict[str, object]


def say(text: str) -> None:
    """A line for people: on stderr."""
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def command(main: Callable[[list[str] | None], None]) -> Callable[..., None]:
    """A benchmark's main: what a user can mend is told in one line, with `truing`'s exit code."""

    @functools.wraps(main)
    def told(argv: list[str] | None = None) -> None:
        from truing.errors import TruingError

        try:
            main(argv)
        except TruingError as error:
            print(f"bench: {error}", file=sys.stderr)
            raise SystemExit(error.exit_code) from None

    return told


def pinned() -> dict[str, str]:
    """Versions in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def trl_python() -> Path:
    """The interpreter of TRL's own environment, made on first use."""
    python, ready = VENV / "bin" / "python", VENV / f".trl-{TRL}"
    if ready.exists():
        return python
    say(f"making {VENV.name} with trl {TRL} (once)")
    versions = pinned()
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # PyTorch first and by its exact version: the CPU build is chosen by pip's own configuration.
    quiet = {"check": True, "stdout": sys.stderr}
    subprocess.run([*pip, f"{TORCH}=={versions[TORCH]}"], **quiet)  # type: ignore[call-overload]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        names = (TORCH, *TRANSFORMERS)
        file.write("".join(f"{n}=={versions[n]}\n" for n in names if n in versions))
        file.flush()
        subprocess.run(  # type: ignore[call-overload]
            [*pip, "-c", file.name, *PEERS, "transformers"], **quiet
        )
    ready.touch()
    return python


def environment(home: Path, threads: int) -> dict[str, str]:
    """What both sides see: the same threads, no network, no caches of earlier runs."""
    # PyTorch and MKL take their threads from here.
    counts = {n: str(threads) for n in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRUING_"))},
        **counts,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1",
        "TRUING_HOME": str(home / "truing"),
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "PYTHONPATH": str(ROOT),
    }


def key_of(job: Mapping[str, object], code: Sequence[str]) -> str:
    """Identity of a job: everything that it is told, and the files or folders that do it."""
    digest = hashlib.blake2b(json.dumps(job, sort_keys=True).encode(), digest_size=6)
    for name in code:
        path = ROOT / name
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def run(side: str, job: Json, *, again: float = 0.0) -> Json:
    """Run a job on a side ("ours", "trl", "generate") and return what it measured.

    A job that was measured is not run again, unless that was before `again`, a time in seconds. A
    run that fails says so in "error".
    """
    script = ROOT / "bench" / f"side_{side}.py"
    python = trl_python() if side == "trl" else Path(sys.executable)
    own = [] if side == "trl" else ["src/truing/core", "src/truing/train"]
    key = key_of({"side": side, **job}, [f"bench/side_{side}.py", *own])
    folder = WORK / key
    out = folder / "measured.json"
    if out.exists() and out.stat().st_mtime >= again:
        say(f"  {side} {job.get('label', '')}: measured before")
        return json.loads(out.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    (folder / "job.json").write_text(json.dumps({**job, "folder": str(folder)}))
    with tempfile.TemporaryDirectory() as home, (folder / "log.txt").open("w") as log:
        seen = environment(Path(home), int(str(job["threads"])))
        try:
            done = subprocess.run(
                [str(python), str(script), str(folder / "job.json")],
                stdout=log, stderr=log, env=seen, timeout=LIMIT, check=False,
            )  # fmt: skip
            failed = "" if done.returncode == 0 else f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            failed = f"more than {LIMIT} seconds"
    if failed:
        tail = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
        return {"error": f"{failed}: {' '.join(tail)}", "log": str(folder / "log.txt")}
    made = json.loads((folder / "made.json").read_text())
    made["folder"] = str(folder)
    out.write_text(json.dumps(made))
    say(f"  {side} {job.get('label', '')}: {made.get('seconds', 0):.1f} s")
    return made


def ended(made: dict[str, Json]) -> dict[str, Json]:
    """These runs; ends the benchmark where one of them failed."""
    for name, result in made.items():
        if "error" in result:
            raise SystemExit(f"{name} failed: {result['error']} ({result['log']})")
    return made


def peak_gflops(threads: int) -> float:
    """Best rate of float32 matrix products of this machine with so many threads, in GFLOP/s.

    By the quicker of the two libraries that PyTorch ships, at the size that suits it best.
    """
    program = (
        "import time, torch\n"
        "from truing.core.passes.products import times_t\n"
        "best = 0.0\n"
        "for size in (1024, 2048, 3072):\n"
        "    a, b = torch.randn(size, size), torch.randn(size, size)\n"
        "    for product in (torch.mm, times_t):\n"
        "        end = time.perf_counter() + 1\n"
        "        while (t := time.perf_counter()) < end:\n"
        "            product(a, b)\n"
        "            best = max(best, 2 * size**3 / (time.perf_counter() - t) / 1e9)\n"
        "print(best)\n"
    )
    with tempfile.TemporaryDirectory() as home:
        made = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True,
            env=environment(Path(home), threads),
        )  # fmt: skip
    return float(made.stdout)


def machine(threads: int) -> Json:
    """What the numbers were measured on."""
    from truing.doctor import hardware

    with contextlib.suppress(OSError):
        commit = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
            capture_output=True, text=True, check=False,
        ).stdout.strip()  # fmt: skip
    return {
        **hardware(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": {n: v for n, v in pinned().items() if n in (TORCH, *TRANSFORMERS)},
        "trl": TRL,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def asked(model: str, pairs: int, threads: int) -> Json:
    """What a result is for: a smoke run must not pass for a measurement."""
    return {"model": model, "pairs": pairs, "threads": threads}


def write(name: str, line: Json, details: Json, where: Json, args: argparse.Namespace) -> None:
    """Write a result: the line, what was asked, what stands behind it, the machine."""
    told = {"asked": asked(args.model, args.pairs, args.threads)}
    data = {"schema_version": 1, **line, **told, "details": details, "machine": where}
    keep(RESULTS / f"{name}.json", data)


def keep(path: Path, data: Json) -> None:
    """Write JSON that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(path)


def arguments(about: str, pairs: int) -> argparse.ArgumentParser:
    """Flags that all benchmarks share."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--pairs", type=int, default=pairs, help="rows to train on")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, no table")
    parser.add_argument(
        "--again", metavar="SINCE", nargs="?", type=float, default=0.0, const=time.time(),
        help="measure again what was measured; or what was before SINCE, in seconds since 1970",
    )  # fmt: skip
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--threads", type=int, default=THREADS)
    return parser


def finish(line: Json, json_only: bool) -> None:
    """The table for people, and the last line for machines."""
    if not json_only:
        width = max(map(len, line))
        for name, value in line.items():
            print(f"{name:<{width}}  {value}")
    print(json.dumps(line))


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Say how long something took."""
    began = time.monotonic()
    yield
    say(f"{what}: {time.monotonic() - began:.0f} s")
