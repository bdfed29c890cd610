"""Two processes of torchrun train as one does: losses, gradient norms, weights; killed, resumed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import cast

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import distributed_run
from forked import RANKS, TORCHRUN, Started
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from truing import pipeline, recipe, runs
from truing.models import Model
from truing.store import Store

pytestmark = pytest.mark.timeout(900)
TRAINED = (
    "full",
    "single",
    "half",
    "lora",
    "headed",
    "moving",
    "whole",
    "online",
    "critic",
    "beside",
    "own",
    "anew",
    "talks",
    "routed",
    "heads",
    "thumbs",
    "vocabulary",
    "taught",
    "top",
)
KILLED = ("aligned", "turns")  # these are trained in the other tests, too


def start(folder: Path, *commands: list[str], forked: str, often: bool = False) -> Started:
    """These commands in two processes of torchrun, one thread each.

    Args:
        forked: ranks of those processes that are forks.
        often: a checkpoint is written after every update.
    """
    program = str(Path(distributed_run.__file__).resolve())
    words = ["-c", TORCHRUN, "--standalone", "--nproc-per-node", "2", program]
    env = {**os.environ, "TRUING_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    env[RANKS] = forked
    words += [json.dumps(commands), *["often"] * often]
    return Started(words, cwd=folder, env=env)


def metrics(run: Path) -> dict[str, list[dict[str, float]]]:
    """What each step of a run reported of each update, and of held-out rows."""
    found: dict[str, list[dict[str, float]]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "grad_norm" in row or "held_out/loss" in row or "held_out/reward" in row:
            found.setdefault(row.pop("at"), []).append({n: row[n] for n in row if n != "seconds"})
    return found


def run_of(folder: Path) -> Path:
    """The one run in a folder of runs."""
    (found,) = folder.glob("*/manifest.json")
    return found.parent


def drift(one: Model, two: Model, base: Model) -> float:
    """Norm of the difference of two trained models, as a share of what training changed."""
    a, b, start = one.folded(), two.folded(), base.folded()
    assert set(a) == set(b) and set(a.extra) == set(b.extra)
    apart = sum(float((a[n] - b[n]).square().sum()) for n in a)
    apart += sum(float((a.extra[n] - b.extra[n]).square().sum()) for n in a.extra)
    moved = sum(float((a[n] - start[n]).square().sum()) for n in a)
    return (apart / moved) ** 0.5


@pytest.fixture(scope="module")
def folder(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distributed_run.make(tmp_path_factory.mktemp("several"), tiny_path)


@pytest.fixture(scope="module")
def said(folder: Path) -> str:
    """Bad recipes, the recipe and the digits in two processes; what they wrote to stderr.

    One is no fork: sets have another order in it, on which nothing may depend.
    """
    runs_of = [["run", f"{name}.yaml", "--runs", "two"] for name in ("bad", "apart", "r")]
    process = start(folder, *runs_of, ["digits"], forked="0")
    _, err = process.communicate(timeout=800)
    assert process.returncode == 0, err
    assert json.loads((folder / "codes.json").read_text()) == [2, 2, 0, 0]
    for name in ("bad", "apart"):
        shutil.rmtree(next((folder / "two").glob(f"{name}-*")))
    return err


@pytest.fixture(scope="module")
def alone(folder: Path) -> pipeline.Result:
    """The recipe in one process."""
    return pipeline.run(recipe.load(folder / "r.yaml"), folder / "one", store=Store(folder / "st"))


def test_losses_norms_and_weights_are_those_of_one_process(
    folder: Path, said: str, alone: pipeline.Result
) -> None:
    two = run_of(folder / "two")
    ours, theirs = metrics(alone.folder), metrics(two)
    made = pipeline.load_results(two, Store(folder / "home" / "store"))
    base = Model.open(folder / "tiny")
    assert set(ours) == set(theirs) == {*TRAINED, *KILLED}
    for name, updates in ours.items():
        rounded = 30 if name == "half" else 1
        for a, b in zip(updates, theirs[name], strict=True):
            assert set(a) == set(b), name
            if a["step"] <= 1:  # rewards are 0 but for rounding, whose signs it would count
                a, b = ({n: r[n] for n in r if not n.endswith("accuracy")} for r in (a, b))
            assert b == pytest.approx(a, rel=1e-3 * rounded, abs=1e-5), name
        # Held-out rows are measured before the first update, too.
        norms = [
            [r["grad_norm"] for r in rows if "grad_norm" in r] for rows in (updates, theirs[name])
        ]
        assert norms[1][0] == pytest.approx(norms[0][0], rel=1e-4 * rounded)
        model = cast(Model, alone.results[name])
        before = cast(Model, alone.results["experts"]) if name == "routed" else base
        assert drift(model, cast(Model, made[name]), before) < 1e-2 * rounded, name


def test_one_process_speaks_and_blocks_see_whole_weights(folder: Path, said: str) -> None:
    # Of each run, and of the text that one learns beside.
    assert said.count("loss falls on >>>these tokens<<<") == len(TRAINED) + len(KILLED) + 1
    told = [line for line in said.splitlines() if line.startswith("truing: ")]
    assert len(told) == 2 and "no row can be trained on" in told[0], told
    assert "conversation task" in told[1] and "must be the user's opening words" in told[1]
    counts = [json.loads((folder / f"blocks-{rank}.json").read_text()) for rank in range(2)]
    assert [c["cut"] for c in counts] == [0, 0] and min(c["whole"] for c in counts) > 100


def test_episodes_are_played_where_they_were_begun(folder: Path, said: str) -> None:
    """Of three tasks one process has one and the other two; each has four episodes of three turns,
    in three rollouts."""
    counts = [json.loads((folder / f"blocks-{rank}.json").read_text()) for rank in range(2)]
    assert [c["played"] for c in counts] == [1 * 4 * 3 * 3, 2 * 4 * 3 * 3]


def test_digits_through_the_same_loop(folder: Path, said: str, tmp_path: Path) -> None:
    found = json.loads((folder / "digits.json").read_text())
    assert found["equal"] == [True] * 4
    history, state = distributed_run.digits(tmp_path)
    for a, b in zip(history, found["history"], strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
    for name, value in state.items():
        assert torch.allclose(value, torch.tensor(found["state"][name]), atol=1e-5), name


def late(step: str, scratch: Path) -> bool:
    """True when a step is well under way: in the middle of its updates, of a rollout's episodes."""
    if step == "aligned":
        return bool(list(scratch.glob("*/checkpoints-*/step-0000000[2-5]")))
    journals = scratch.glob("*/rollouts-*/00000[12].jsonl")
    return any(b"/reply1" in j.read_bytes() for j in journals)


def test_one_killed_stops_all_and_any_number_goes_on(
    folder: Path, said: str, alone: pipeline.Result, tmp_path: Path
) -> None:
    """In the middle of updates, and where that run goes on, in a rollout's episodes."""
    for name in ("tiny", "pairs.jsonl", "held.jsonl", *(f"{n}.yaml" for n in ("killed", *KILLED))):
        (tmp_path / name).symlink_to(folder / name)
    command = ["run", "killed.yaml", "--runs", "runs", "--watch", "tensorboard"]
    scratch = tmp_path / "home" / "store" / "scratch"
    for step in KILLED:
        process, until = (
            start(tmp_path, command, forked="0 1", often=True),
            time.monotonic() + 300,
        )
        while not late(step, scratch):
            assert process.poll() is None and time.monotonic() < until, step
            time.sleep(0.02)
        os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        if process.poll() is None:  # torchrun kills it after 30
            os.kill(int((tmp_path / "pid-0").read_text()), signal.SIGUSR1)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 1
        told = [line for line in err.splitlines() if line.startswith("truing: ")]
        assert len(told) == 1, err
        assert "The same command goes on from the last checkpoint" in told[0], err
        assert runs.read(run_of(tmp_path / "runs"))["status"] == "stopped"
        assert list(scratch.glob("*/checkpoints-*/step-*"))
        shutil.copytree(tmp_path / "home", tmp_path / step)

    _, err = (process := start(tmp_path, command, forked="0 1")).communicate(timeout=400)
    assert process.returncode == 0, err
    again = cast(dict[str, dict[str, object]], runs.read(run_of(tmp_path / "runs"))["steps"])
    whole = cast(dict[str, dict[str, object]], runs.read(run_of(folder / "two"))["steps"])
    found, expected = metrics(run_of(tmp_path / "runs")), metrics(run_of(folder / "two"))
    curves = EventAccumulator(str(run_of(tmp_path / "runs") / "tensorboard")).Reload()
    base = Model.open(folder / "tiny")
    for step in KILLED:
        # One process told of each update, and once.
        drawn = [(e.step, e.value) for e in curves.Scalars(f"{step}/grad_norm")]
        rows = [r for r in found[step] if "grad_norm" in r]
        assert drawn == [(r["step"], pytest.approx(r["grad_norm"])) for r in rows]
        assert again[step]["artefact"] == whole[step]["artefact"]  # the same bits
        assert found[step] == expected[step]
        store = Store(tmp_path / step / "store")
        one = pipeline.run(recipe.load(tmp_path / f"{step}.yaml"), tmp_path / "one", store=store)
        model = cast(Model, one.results[step])
        assert drift(model, cast(Model, alone.results[step]), base) < 1e-2
