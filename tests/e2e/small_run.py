"""A whole pipeline at a small size, as a process: what the end-to-end tests kill, fill and race.

Principles, pairs by principles, SFT, DPO, evaluation before and after, on the tiny model. Sentence
vectors come from an encoder of one random layer in the place of the real one, so that nothing is
fetched.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

RECIPE = """\
name: small
models: {base: tiny}
steps:
  rules: {do: specify/principles_file, path: rules.yaml}
  pairs:
    do: synthesize/principle_pairs
    model: base
    prompts: prompts.jsonl
    principles: rules
    k: 8
    max_tokens: 24
    margin: 0.0
    on_topic: -1.0
  warm: {do: train/sft, model: base, data: pairs, epochs: 3, batch: 4, rank: 0}
  aligned: {do: train/dpo, model: warm, data: pairs, epochs: 6, batch: 4, lr: 1.0e-3}
  before:
    do: evaluate/adherence
    model: base
    prompts: held.jsonl
    principles: rules
    max_tokens: 10
  after:
    do: evaluate/adherence
    model: aligned
    prompts: held.jsonl
    principles: rules
    max_tokens: 10
  result: {do: evaluate/before_after, before: before, after: after}
"""
RULES = """\
- {id: short, text: Use one word., check: {use: max_words, n: 1}}
- {id: asks, text: Do not ask., check: {use: no_question}}
"""
STEPS = 7
# A checkpoint after every update: a kill then finds every state that there can be.
PROGRAM = """
import sys
from truing.core import engine
engine.CHECKPOINT_SECONDS, engine.CHECKPOINT_SHARE = -1.0, 1e9
from truing.cli import main
sys.exit(main(sys.argv[1:]))
"""


def make(folder: Path) -> Path:
    """A folder with the recipe, its data and a home that holds the encoder."""
    import torch
    from transformers import BertConfig, BertModel

    from truing.core.tiny import tiny_folder, tiny_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tiny_folder(folder / "tiny")
    for name, first, count in (("prompts", 0, 32), ("held", 100, 8)):
        rows = [json.dumps({"prompt": f"What is {first + i}?"}) + "\n" for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    (folder / "rules.yaml").write_text(RULES)
    (folder / "r.yaml").write_text(RECIPE)
    encoder = folder / "home" / "models" / "minilm"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=259, hidden_size=384, num_hidden_layers=1, num_attention_heads=6,
        intermediate_size=64, max_position_embeddings=256,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(encoder)
    tiny_tokenizer().save_pretrained(encoder)
    return folder


@dataclass
class Small:
    """One copy of the folder, in which runs are started."""

    folder: Path

    @classmethod
    def copy(cls, template: Path, folder: Path) -> Small:
        """A copy with an empty store."""
        shutil.copytree(template, folder, ignore=shutil.ignore_patterns("store", "bases", "runs"))
        return cls(folder)

    def start(self, runs: str = "runs") -> subprocess.Popen[str]:
        """`truing run r.yaml --json`, in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "run", "r.yaml", "--runs", runs, "--json"],
            cwd=self.folder, env=self.env(), text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def env(self) -> dict[str, str]:
        """One thread, so that the same work gives the same bits; a home of its own."""
        return {**os.environ, "TRUING_HOME": str(self.folder / "home"), "OMP_NUM_THREADS": "1"}

    def finish(self, runs: str = "runs") -> dict[str, object]:
        """Run to the end; the last line."""
        process = self.start(runs)
        out, err = process.communicate(timeout=280)
        assert process.returncode == 0, err
        return json.loads(out.splitlines()[-1])

    def manifest(self, runs: str = "runs") -> dict[str, object]:
        """The run's manifest, {} while there is none."""
        found = list((self.folder / runs).glob("*/manifest.json"))
        return json.loads(found[0].read_text()) if found else {}

    def steps(self, runs: str = "runs") -> dict[str, dict[str, object]]:
        """The manifest's steps."""
        return cast("dict[str, dict[str, object]]", self.manifest(runs).get("steps") or {})

    def hashes(self, runs: str = "runs") -> dict[str, tuple[object, object]]:
        """Key and content of what every step made."""
        return {n: (s["key"], s["artefact"]) for n, s in self.steps(runs).items()}

    def made(self) -> dict[str, int]:
        """When each artefact was put into the store, by key."""
        found = (self.folder / "home" / "store" / "artefacts").glob("??/*/artefact.json")
        whole = [p for p in found if not p.parent.name.startswith(".")]
        return {p.parent.name: p.stat().st_mtime_ns for p in whole}

    def wait_until_running(self, process: subprocess.Popen[str], step: str) -> None:
        """Until a step has begun, or was found in the store."""
        until = time.monotonic() + 120
        while self.manifest().get("status") != "running" or (
            self.steps()[step]["status"] not in ("running", "done")
        ):
            assert process.poll() is None and time.monotonic() < until, "it ended before"
            time.sleep(0.005)

    def verify(self) -> None:
        """The store's own check; and nothing in it but whole artefacts."""
        from truing.store import Store

        store = Store(self.folder / "home" / "store")
        assert store.verify() == []
