"""Does DPO, and do its relatives, learn a rule from 64 pairs that holds on pairs never seen?

Pairs are made from sentences of running prose: the chosen answer continues a sentence as written,
the rejected one breaks off and repeats its last words. SmolLM2-135M-Instruct is tuned (LoRA, rank
16, 3e-4) for two passes over 64 pairs; accuracy is the share of pairs whose chosen answer has the
larger implicit reward, log pi - log pi_base. Effect: accuracy on 64 held-out pairs less 0.5, for
DPO and three seeds of order and adapter. IPO, KTO and SimPO are run once each.

The claim asks for accuracy above 0.9 in training and above 0.8 held out, with finite losses.
"""

from __future__ import annotations

import math
from typing import cast

from truing.claims import Outcome, step
from truing.core.judging.rewards import Rewards
from truing.method import methods
from truing.models import Model
from truing.tables import Row, Table

TITLE = "DPO learns a rule from 64 pairs that holds on pairs never seen"
METHOD = "train/dpo"
MODEL = "SmolLM2-135M-Instruct"
EFFECT = "accuracy of the implicit reward on held-out pairs, less one half"
MARGIN = 0.3
MINUTES = 12
NEEDS_GPU = False
SEEDS = (0, 1, 2)
OTHERS = ("ipo", "kto", "simpo")


def pairs() -> tuple[Table, Table]:
    """64 pairs to train on and 64 from other passages."""
    rows: list[list[Row]] = [[], []]
    for number, passage in enumerate(Table.read("prose")):
        words = str(passage["text"]).split()
        for start in range(0, len(words) - 26, 26):
            head, tail = words[start : start + 10], words[start + 10 : start + 26]
            broken = tail[:10] + tail[7:10] * 2
            rows[number % 2].append(
                {
                    "prompt": f"Continue: {' '.join(head)}",
                    "chosen": " ".join(tail),
                    "rejected": " ".join(broken),
                }
            )
    train, held = (Table("pair", r[:64]) for r in rows)
    assert len(train) == len(held) == 64
    return train, held


def accuracy(model: Model, data: Table) -> float:
    implicit = Rewards({}, {}, reward_model=model)
    sides: list[list[float]] = []
    for name in ("chosen", "rejected"):
        rows = [{"prompt": r["prompt"], "completion": r[name]} for r in data]
        sides.append(implicit(rows))
    return sum(c > r for c, r in zip(*sides)) / len(data)


def tuned(name: str, base: Model, train: Table, held: Table, seed: int) -> dict[str, float]:
    with step(seed) as context:
        out = methods[f"train/{name}"](base, train, epochs=2, lr=3e-4, rank=16, batch=8)
        made = cast(Model, out)
        losses = [float(cast(float, m["loss"])) for m in context.metrics if "loss" in m]
        return {
            "train": accuracy(made, train),
            "held_out": accuracy(made, held),
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "finite": float(all(map(math.isfinite, losses))),
        }


def run() -> Outcome:
    base = Model.open("smollm2-135m-instruct")
    train, held = pairs()
    dpo = [tuned("dpo", base, train, held, seed) for seed in SEEDS]
    others = {name: tuned(name, base, train, held, 0) for name in OTHERS}
    every = [*dpo, *others.values()]
    return Outcome(
        effects=[d["held_out"] - 0.5 for d in dpo],
        seeds=SEEDS,
        holds={
            "training pairs above 0.9": min(d["train"] for d in dpo) > 0.9,
            "all losses finite": all(e["finite"] for e in every),
        },
        figures={
            "dpo": {n: [round(d[n], 4) for d in dpo] for n in dpo[0]},
            **{n: {k: round(v, 4) for k, v in o.items()} for n, o in others.items()},
        },
    )
