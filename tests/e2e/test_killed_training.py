"""kill -9 within a training, a rollout and episodes: resumed, the same comes out."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from forked import Started

from truing.tables import Table

# What the steps of a training say is written to `said` as they say it.
TRAINING = """
import json, sys
from pathlib import Path
from truing.context import Context, use
from truing.core import engine
from truing.core.rl import collect
from truing.method import methods
from truing.models import Model
from truing.tables import Table

engine.CHECKPOINT_SECONDS, engine.CHECKPOINT_SHARE, collect.BLOCK = -1.0, 1e9, 6
folder, name, tiny, data, settings = sys.argv[1:]
def metric(row):
    with open(Path(folder) / "said", "a") as file:
        file.write(json.dumps(row) + "\\n")
with use(Context(seed=4, folder=Path(folder), on_metric=metric)):
    print(methods[name](Model.open(tiny), Table.load(data), **json.loads(settings)).key)
"""
# How many agents are asked at once, and in how many rounds, is what it prints besides the key.
EPISODES = """
import json, os, signal, sys
from pathlib import Path
from truing.context import Context, use
from truing.core.rollout import Speaker, rollout
from truing.core.sampling import SamplingSettings
from truing.models import Model
from truing.tables import Table

folder, tiny, dies = sys.argv[1:]
calls = []
class Counted(Speaker):
    def __call__(self, asked):
        calls.append(len(asked))
        if len(calls) == int(dies):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(asked)
tasks = Table("record", [{"name": str(i)} for i in range(5)])
with use(Context(seed=5, folder=Path(folder))):
    speaker = Counted(Model.open(tiny), SamplingSettings(max_tokens=5))
    made = rollout({"use": "running_sum", "terms": 4}, tasks, {"policy": speaker}, n=2)
print(json.dumps([made.key, calls]))
"""


def start(*words: object) -> Started:
    return Started(["-c", *map(str, words)], env={**os.environ, "OMP_NUM_THREADS": "1"})


def printed(*words: object) -> str:
    process = start(*words)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out.strip()


def killed_once(middle: Callable[[], bool], *words: object) -> None:
    """Start it and kill it as soon as it is in the middle."""
    process, until = start(*words), time.monotonic() + 120
    try:
        while not middle():
            assert time.monotonic() < until, "it was never in the middle"
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL


def losses(folder: Path) -> dict[int, float]:
    """Loss of each update, of which the last says counts."""
    lines = [json.loads(x) for x in (folder / "said").read_text().splitlines() if x[:1] == "{"]
    return {m["step"]: m["loss"] for m in lines if "loss" in m}


def folders(tmp_path: Path) -> tuple[Path, Path]:
    made = tmp_path / "whole", tmp_path / "cut"
    for folder in made:
        folder.mkdir()
    return made


def test_a_training(tiny_path: Path, tmp_path: Path) -> None:
    whole, cut = folders(tmp_path)
    rows = [{"prompt": f"what is {i}?", "chosen": f"{i}.", "rejected": f"no {i}"} for i in range(9)]
    Table("pair", rows).save(tmp_path / "data")
    # Its reference moves, and must be found again.
    settings = json.dumps({"steps": 20, "batch": 4, "lr": 1e-3, "every": 4})
    job = "tr_dpo", tiny_path, tmp_path / "data", settings
    said = cut / "said"
    killed_once(lambda: said.exists() and said.read_text().count("\n") > 8, TRAINING, cut, *job)
    assert printed(TRAINING, cut, *job) == printed(TRAINING, whole, *job)
    assert losses(cut) == losses(whole) and len(losses(whole)) == 20


def test_a_rollout(tiny_path: Path, tmp_path: Path) -> None:
    whole, cut = folders(tmp_path)
    Table("prompt", [{"prompt": f"say {i}"} for i in range(8)]).save(tmp_path / "data")
    settings = {
        "steps": 16, "batch": 4, "answers": 3, "max_tokens": 8, "lr": 2e-3, "beta": 0.1,
        "rewards": {"letters": {"use": "share_of", "letters": "abcdefghijklmnop"}},
    }  # fmt: skip
    job = "grpo", tiny_path, tmp_path / "data", json.dumps(settings)

    def middle() -> bool:  # the second block of the third rollout or later
        files = sorted(cut.glob("rollouts-*/*.jsonl"))
        return bool(files) and int(files[-1].stem) > 1 and files[-1].read_bytes().count(b"\n") == 1

    killed_once(middle, TRAINING, cut, *job)
    assert printed(TRAINING, cut, *job) == printed(TRAINING, whole, *job)


def test_episodes(tiny_path: Path, tmp_path: Path) -> None:
    whole, cut = folders(tmp_path)
    process = start(EPISODES, cut, tiny_path, 4)
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    key, rounds = json.loads(printed(EPISODES, whole, tiny_path, 0))
    again, left = json.loads(printed(EPISODES, cut, tiny_path, 0))
    assert again == key and rounds == [10] * 8
    assert left == rounds[3:]  # three rounds were kept
