"""What the tests of several processes run, alone and under torchrun: recipes and a digits task.

As a script it runs commands in turn, such as `[["run", "r.yaml"], ["digits"]]`. What each gave,
how the hand-written block saw its weights and where environments were played, and which process has
a rank, goes to files in the current folder: `codes.json`, `digits.json`, `blocks-RANK.json`,
`pid-RANK`. With `often` as its second word it writes a checkpoint after every update.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from truing.cli import main
from truing.context import Context, Json, use
from truing.core import engine
from truing.core.passes import block, fused
from truing.core.plain_task import PlainTask
from truing.core.rollout import Step
from truing.core.together import together
from truing.core.trainer import distributed
from truing.core.training import Training
from truing.fields.agent.running_sum import RunningSum
from truing.tables import Table

# Shares that are uneven or empty, several micro-batches in one process and one in the other, every
# way in which parameters lie, every unit of an objective, episodes with and without a second role.
# In bfloat16 another batch would round otherwise, and other tokens would be drawn: but for one step
# it is left out.
RECIPE = """\
name: several
models: {base: tiny}
steps:
  full: {do: train/sft, model: base, data: examples.jsonl, rank: 0, steps: 2, batch: 5, lr: 1.0e-3,
    budget: 64, clip: 0.5, dtype: float32}
  single: {do: train/sft, model: base, data: examples.jsonl, rank: 0, steps: 2, batch: 1,
    lr: 1.0e-3, dtype: float32}
  half: {do: train/sft, model: base, data: examples.jsonl, rank: 0, steps: 2, batch: 5, lr: 1.0e-3,
    budget: 64, dtype: bfloat16}
  lora: {do: train/dpo, model: full, data: pairs.jsonl, rank: 4, steps: 3, batch: 3, lr: 1.0e-3,
    dtype: float32}
  headed: {do: train/bradley_terry, model: base, data: pairs.jsonl, rank: 0, steps: 2, batch: 4,
    lr: 1.0e-3, budget: 100, dtype: float32}
  moving: {do: train/tr_dpo, model: base, data: pairs.jsonl, rank: 0, steps: 3, batch: 4,
    lr: 1.0e-3, every: 2, gradient_checkpointing: always, dtype: float32}
  whole: {do: train/bco, model: base, data: pairs.jsonl, rank: 4, steps: 3, batch: 5, lr: 1.0e-3,
    budget: 100, dtype: float32, held_out: held.jsonl, eval_every: 2}
  online: {do: train/grpo, model: base, data: pairs.jsonl, rank: 4, steps: 2, batch: 3, answers: 4,
    max_tokens: 12, lr: 1.0e-3, beta: 0.1, dtype: float32, rewards: {short: {use: max_words, n: 2}},
    held_out: held.jsonl, eval_every: 2}
  critic: {do: train/ppo, model: base, data: pairs.jsonl, rank: 0, steps: 2, batch: 3, passes: 2,
    answers: 2, max_tokens: 8, rewards: {short: {use: max_words, n: 2}}}
  beside: {do: train/ppo_max, model: base, data: pairs.jsonl, mix_data: examples.jsonl,
    mix: {sft: 0.5}, rank: 4, steps: 2, batch: 3, minibatches: 1, answers: 2, max_tokens: 8,
    critic_rollouts: 0, lr: 1.0e-3, budget: 64, dtype: float32,
    rewards: {short: {use: max_words, n: 2}}}
  talks: {do: train/ppo, model: base, partner: base, data: pairs.jsonl, rank: 4, steps: 2, batch: 3,
    answers: 2, passes: 2, max_tokens: 6, turns: 2, environment: {use: conversation, turns: 2},
    dtype: float32, rewards: {short: {use: max_words, n: 1}}, held_out: held.jsonl}
  experts: {do: merge/mixture_of_experts, models: {one: base}}
  routed: {do: train/balanced_experts, model: experts, data: examples.jsonl, rank: 0, steps: 2,
    batch: 4, lr: 1.0e-3, budget: 100, bias_step: 0.01, dtype: float32}
  own: {do: train/gkd_on_policy, model: base, teacher: full, data: examples.jsonl, rank: 4,
    steps: 2, batch: 3, lr: 1.0e-3, max_tokens: 8, dtype: float32}
  anew: {do: train/d2o, model: base, data: pairs.jsonl, rank: 4, steps: 3, batch: 3, samples: 2,
    max_tokens: 6, refresh: 2, lr: 1.0e-3, dtype: float32}
  heads: {do: train/mah_dpo, model: base, data: pairs.jsonl, rank: 4, head_rank: 4, steps: 2,
    batch: 3, lr: 1.0e-3, dtype: float32}
  thumbs: {do: train/kto, model: base, data: pairs.jsonl, rank: 4, steps: 2, batch: 3, lr: 1.0e-3,
    dtype: float32}
  vocabulary: {do: train/tdpo2, model: base, data: pairs.jsonl, rank: 4, steps: 2, batch: 3,
    lr: 1.0e-3, dtype: float32}
  taught: {do: train/adpa, model: base, teacher: full, teacher_reference: base,
    data: examples.jsonl, rank: 4, steps: 2, batch: 3, samples: 1, max_tokens: 6, top_k: 8,
    lr: 1.0e-3, dtype: float32}
  top: {do: train/dpo, model: base, data: pairs.jsonl, rank: 0, layers: 1, steps: 2, batch: 3,
    lr: 1.0e-3, dtype: float32}
"""
# These two alone are killed, too.
ALIGNED = """\
  aligned: {do: train/dpo, model: base, data: pairs.jsonl, rank: 0, steps: 6, batch: 5,
    lr: 1.0e-3, budget: 128, held_out: held.jsonl, eval_every: 3, keep_best: true, dtype: float32}
"""
# Three tasks for two processes.
TURNS = """\
  turns: {do: train/grpo, model: base, data: pairs.jsonl, rank: 4, steps: 3, batch: 3, answers: 4,
    max_tokens: 8, lr: 1.0e-3, turns: 3, environment: {use: running_sum, terms: 3, tries: 1},
    dtype: float32, rewards: {short: {use: max_words, n: 1}}}
"""
KILLED = """\
name: killed
models: {base: tiny}
steps:
"""
# Its last task cannot be begun, which is met in one process only.
APART = """\
name: apart
models: {base: tiny}
steps:
  talks: {do: train/grpo, model: base, partner: base, data: talks.jsonl, max_tokens: 8,
    environment: {use: conversation}, rewards: {short: {use: max_words, n: 2}}}
"""
BAD = """\
name: bad
models: {base: tiny}
steps:
  aligned: {do: train/dpo, model: base, data: pairs.jsonl, max_length: 8}
"""


def make(folder: Path, model: Path) -> Path:
    """A copy of the model, rows of different lengths, and the recipes."""
    shutil.copytree(model, folder / "tiny")
    pairs = [
        {
            "prompt": f"What is {i}{'?' * (i % 5)}",
            "chosen": f"It is {i * i} " * (1 + i % 3),
            "rejected": f"no {i}" + " x" * (i % 4),
            "objective": int(i % 3 == 0),  # a process's share may have none of the second
        }
        for i in range(13)
    ]
    held = [{"prompt": f"And {i}?", "chosen": f"it is {i}", "rejected": "no"} for i in range(5)]
    examples = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs]
    talks = [{"prompt": str(i)} for i in range(3)] + [{"prompt": " "}]
    for name, rows in (("pairs", pairs), ("examples", examples), ("talks", talks), ("held", held)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for name, text in recipes().items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def recipes() -> dict[str, str]:
    """All recipes, by the names of their files."""
    found = {"r": RECIPE + ALIGNED + TURNS, "bad": BAD, "apart": APART}
    found |= {"aligned": KILLED + ALIGNED, "turns": KILLED + TURNS}
    return found | {"killed": KILLED + ALIGNED + TURNS}


def digits(folder: Path, normed: bool = False) -> tuple[list[dict[str, object]], dict[str, Tensor]]:
    """A small network on real digits: what each step reported, and its final state."""
    table = Table.read("digits")
    images = torch.stack([torch.as_tensor(r["image"]).float().reshape(1, 8, 8) for r in table])
    images, labels = images / 16, torch.tensor([int(str(r["label"])) for r in table])
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8) if normed else nn.Identity()]
    module = nn.Sequential(*layers, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10))

    def losses(rows: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        scores, at = module(images[list(rows)]), labels[list(rows)]
        loss = nn.functional.cross_entropy(scores, at, reduction="none")
        return loss, {"accuracy": (scores.argmax(1) == at).float()}

    with use(Context(seed=1, folder=folder / f"digits-{normed}")):
        task = PlainTask("digits", module, len(images), losses, micro=32)
        done = engine.train(task, Training(steps=12, lr=4e-3, batch=75, clip=0.5))
    return done.history, module.state_dict()


def digits_together(folder: Path) -> int:
    """The same in all processes, whose states must then be equal."""
    with together():
        history, state = digits(folder)
        _, normed = digits(folder, normed=True)
        equal = [
            all(torch.equal(mine[n], other[n]) for n in mine if "num_batches" not in n)
            for mine in (state, normed)
            for other in distributed.everyone(mine)
        ]
        if distributed.leads():
            weights = {n: t.tolist() for n, t in state.items()}
            text = json.dumps({"history": history, "state": weights, "equal": equal})
            (folder / "digits.json").write_text(text)
    return 0


def watch_blocks() -> dict[str, int]:
    """Count calls of the hand-written block by how its weights lie."""
    seen, run = {"whole": 0, "cut": 0}, fused.run

    def watched(part: nn.Module, layout: object, *rest: Tensor) -> Tensor:
        tensors = block.plan_of(part, layout).tensors()
        seen["cut" if any(isinstance(t, DTensor) for t in tensors) else "whole"] += 1
        return run(part, layout, *rest)

    fused.run = watched
    return seen


def watch_episodes(seen: dict[str, int]) -> None:
    """Count the actions that environments take here."""
    seen["played"], step = 0, RunningSum.step

    def watched(one: RunningSum, action: Json) -> Step:
        seen["played"] += 1
        return step(one, action)

    RunningSum.step = watched


if __name__ == "__main__":
    Path(f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    faulthandler.register(signal.SIGUSR1)  # whoever waits for it in vain can ask where it stands
    if "often" in sys.argv[2:]:  # a kill then finds every state that there can be
        engine.CHECKPOINT_SECONDS, engine.CHECKPOINT_SHARE = -1.0, 1e9
    seen = watch_blocks()
    watch_episodes(seen)
    codes = [
        digits_together(Path()) if c == ["digits"] else main(c) for c in json.loads(sys.argv[1])
    ]
    Path(f"blocks-{os.environ['RANK']}.json").write_text(json.dumps(seen))
    if os.environ["RANK"] == "0":
        Path("codes.json").write_text(json.dumps(codes))
    sys.exit(codes[-1])
