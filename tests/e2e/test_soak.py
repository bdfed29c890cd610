"""Long use: memory, open files and threads stay where they were after the first rounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

COMMON = """
import gc, json, os, sys, threading
import torch
torch.set_num_threads(1)
folder = sys.argv[1]

def now():
    gc.collect()
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {
        "rss_mib": int(status["VmRSS"].split()[0]) / 1024,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }

def report(rounds, before):
    print(json.dumps({"rounds": rounds, "before": before, "after": now()}))
"""

TRAINING = """
from truing.context import Context, use
from truing.method import methods
from truing.models import Model
from truing.tables import Table

model = Model.open(folder)
rows = Table("pair", [
    {"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": f"{i} {i} {i} who knows?"}
    for i in range(16)
])
for round in range(60):
    if round == 15:
        before = now()
    with use(Context(seed=round)):
        methods["train/dpo"](model, rows, epochs=2, batch=4, lr=1e-3)
report(round + 1, before)
"""

SERVER = """
import concurrent.futures, httpx
from truing.models import Model
from truing.serve.openai import serving

with serving(Model.open(folder).called("tiny")) as made:
    headers = {"Authorization": f"Bearer {made.token}"}

    def ask(i):
        with httpx.Client(base_url=made.url, headers=headers, timeout=300) as client:
            body = {
                "model": "tiny", "max_tokens": 4 + i % 13, "temperature": i % 2, "seed": i,
                "messages": [{"role": "user", "content": f"Tell me of {i}"}],
            }
            if i % 7 == 0:  # a client that goes away in the middle
                with client.stream("POST", "/chat/completions", json={**body, "stream": True}) as r:
                    next(r.iter_lines())
                return "left"
            reply = client.post("/chat/completions", json=body)
            reply.raise_for_status()
            return reply.json()["choices"][0]["finish_reason"]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for round in range(16):
            if round == 4:
                before = now()
            said = set(pool.map(ask, range(100 * round, 100 * round + 100)))
            assert said <= {"left", "stop", "length"}, said
        report(1600, before)
"""


def soak(program: str, model: Path, home: Path) -> dict[str, dict[str, float]]:
    """Run a program in a process of its own; what it measured after some rounds and at the end."""
    done = subprocess.run(
        [sys.executable, "-c", COMMON + program, str(model)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRUING_HOME": str(home)},
        capture_output=True, text=True, timeout=1700,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("program", [TRAINING, SERVER], ids=["training", "server"])
def test_nothing_grows(program: str, tiny_path: Path, tmp_path: Path) -> None:
    made = soak(program, tiny_path, tmp_path)
    before, after = made["before"], made["after"]
    assert after["rss_mib"] - before["rss_mib"] < 48, made
    assert after["files"] <= before["files"] + 4, made
    assert after["threads"] <= before["threads"] + 2, made
