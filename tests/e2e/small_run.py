"""The quick start at a small size, as a process: what the end-to-end tests kill, fill and race.

`recipes/quickstart.yaml` itself, with `--set` for its sizes and its model. That is the tiny model
with a vocabulary of words, taught for seconds to ask and to answer: what it writes passes the
recipe's own checks, and keeps and breaks its principles. Sentence vectors come from an encoder that
adds up random vectors of tokens, in the place of the real one, so that nothing is fetched.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import yaml
from forked import Started

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
STEPS = list(yaml.safe_load(RECIPE.read_text())["steps"])
# Checkpoints of megabytes, as those of a real model: a full disk must find something to refuse.
SIZES = (
    "models.base=tiny", "drawn.n=160", "held_out.held_out=8", "training.held_out=8", "picked.m=16",
    "aligned.batch=4", "aligned.rank=128", "ability_before.limit=4", "ability_after.limit=4",
)  # fmt: skip
RUN = ["run", str(RECIPE), *(word for size in SIZES for word in ("--set", size)), "--json"]
# A checkpoint after every update: a kill then finds every state that there can be.
PROGRAM = """
import sys
from truing.core import engine
engine.CHECKPOINT_SECONDS, engine.CHECKPOINT_SHARE = -1.0, 1e9
from truing.cli import main
sys.exit(main(sys.argv[1:]))
"""

THINGS = "moon river garden engine castle market winter mirror bridge kitchen forest story".split()
TRAITS = "bright quiet heavy useful old warm strange deep simple famous".split()
ASKED = (
    "Why is the {0} so {1} in the {2}?",
    "How do people make the {0} {1} for a {2}?",
    "What is the most {1} part of the {0} and the {2}?",
    "Tell me about a {1} {0} near the {2} that you know.",
    "The {0} of the {2} was so {1} that the",  # which the recipe's checks drop
)
SAID = (
    "The {0} is {1} because the {2} is part of it.",
    "People know that the {0} and the {2} are {1}.",
    "I know the {0} in my {2} and it is {1}.",
    "For me the {0} is the most {1} part of the {2}",
    "1. the {0} is {1}\n2. the {2} is {1}",
)


def wordy_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny model's, with the words of the sentences above as tokens."""
    from truing.core.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    words = {w for text in (*ASKED, *SAID) for w in text.split(" ") if "{" not in w}
    plain = [w.strip(".?") for w in (*words, *THINGS, *TRAITS)]
    tokenizer.add_tokens(sorted({w for p in plain for w in (p, f" {p}") if len(w) > 1}))
    return tokenizer


def talk(source: random.Random) -> list[dict[str, str]]:
    """A question and an answer to it."""
    a, c = source.sample(THINGS, 2)
    b = source.choice(TRAITS)
    ask, say = source.choice(ASKED).format(a, b, c), source.choice(SAID).format(a, b, c)
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]


def taught_folder(folder: Path, steps: int = 50) -> Path:
    """A model of two blocks that has learnt to ask and to answer."""
    import torch
    from transformers import LlamaForCausalLM

    from truing.core.modelfiles.stock import quiet
    from truing.core.tiny import STD, fill, tiny_config, tiny_folder

    tiny_folder(folder)  # whose card and generation settings stay
    tokenizer, config, source = wordy_tokenizer(), tiny_config(), random.Random(0)
    config.num_hidden_layers, config.vocab_size = 2, len(tokenizer)
    module = LlamaForCausalLM(config)
    fill(module, STD, 0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=4e-3)
    for _ in range(steps):
        texts = [tokenizer.apply_chat_template(talk(source), tokenize=False) for _ in range(16)]
        rows = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
        width = max(map(len, rows))
        ids = torch.tensor([[*r, *[0] * (width - len(r))] for r in rows])
        labels = torch.tensor([[*r, *[-100] * (width - len(r))] for r in rows])
        module(input_ids=ids, labels=labels).loss.backward()  # padding stands on the right
        optimizer.step()
        optimizer.zero_grad()
    with quiet():
        module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bag_of_tokens(folder: Path) -> None:
    """An encoder whose vectors are means of random vectors, one for each token of the text."""
    import torch
    from transformers import BertConfig, BertModel

    from truing.core.modelfiles.stock import quiet

    tokenizer = wordy_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=384, num_hidden_layers=1, num_attention_heads=6,
        intermediate_size=64, max_position_embeddings=256,
    )  # fmt: skip
    module = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        module.embeddings.word_embeddings.weight.normal_()
    with quiet():
        module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make(folder: Path) -> Path:
    """A folder with the model and a home that holds the encoder."""
    folder.mkdir(parents=True, exist_ok=True)
    taught_folder(folder / "tiny")
    bag_of_tokens(folder / "home" / "models" / "minilm")
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

    @classmethod
    def until(cls, whole: Small, step: str, folder: Path) -> Small:
        """A copy whose store has what a whole run had made when it came to a step."""
        small = cls.copy(whole.folder, folder)
        for name in STEPS[: STEPS.index(step)]:
            key = str(whole.steps()[name]["key"])
            place = Path("home", "store", "artefacts", key[:2], key)
            shutil.copytree(whole.folder / place, folder / place)
        return small

    def start(self, runs: str = "runs") -> Started:
        """`truing run quickstart.yaml --set ... --json`, in a process of its own."""
        return Started(["-c", PROGRAM, *RUN, "--runs", runs], cwd=self.folder, env=self.env())

    def env(self) -> dict[str, str]:
        """One thread, so that the same work gives the same bits; a home of its own."""
        return {**os.environ, "TRUING_HOME": str(self.folder / "home"), "OMP_NUM_THREADS": "1"}

    def finish(self) -> dict[str, object]:
        """Run to the end; the last line."""
        process = self.start()
        out, err = process.communicate(timeout=280)
        assert process.returncode == 0, err
        return json.loads(out.splitlines()[-1])

    def finish_as_user(self) -> dict[str, object]:
        """The same by the command itself, as a user types it."""
        done = subprocess.run(
            [Path(sys.executable).with_name("truing"), *RUN], cwd=self.folder, env=self.env(),
            capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

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

    def wait_until_running(self, process: Started, step: str) -> None:
        """Until a step has begun, or was found in the store."""
        until = time.monotonic() + 120
        while self.manifest().get("status") != "running" or (
            self.steps()[step]["status"] not in ("running", "done")
        ):
            assert process.poll() is None and time.monotonic() < until, "it ended before"
            time.sleep(0.02)

    def verify(self) -> None:
        """The store's own check; and nothing in it but whole artefacts."""
        from truing.store import Store

        store = Store(self.folder / "home" / "store")
        assert store.verify() == []
