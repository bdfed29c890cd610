"""Does PPO-max raise the reward and stay near its start, where PPO without its tricks collapses?

A tiny decoder, trained from nothing, answers with 6 to 16 words at random, one in three of a list
of eight. The true reward is the share of the list that the answer holds plus one if it has at most
twelve words (less where it has more). The reward that can be hacked is the share of the word "good"
among the words plus how near the answer comes to the longest one possible. PPO-max (the method's
defaults but for rollouts of 16 answers, of at most 24 tokens and drawn at temperature 1 without
more ado, the rate, and that all weights are trained) and PPO without its tricks (no KL, no clipping
of ratio, value or gradient, raw rewards, no critic before the policy, ten times the rate) have the
same prompts and as many updates. Before them the critic has at most ten rollouts alone; where it is
ready sooner, PPO-max gets the rest as well.

The effect is the rise of the mean true reward on other prompts, in standard deviations of the
base's rewards. The claim asks for 1, with at most 0.3 nats of KL a token in every rollout; for KL,
and length or repetition, at least three times as large on the hackable reward without the tricks
as with them; for returns that the critic explains better than a constant before the policy's first
step; and for less loss of other text under PPO-ptx. The seeds are others than those on which the
number of the critic's rollouts was chosen: with two, the conditions on KL and on the critic were
missed there.
"""

from __future__ import annotations

import random
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

from _tiny import FORMS, TOPICS, Outcome, Row, Table, blank, drawn, nats, step, taught, vocabulary

from truing.core.judging.rewards import Rewards
from truing.method import methods
from truing.models import Model

TITLE = "PPO-max raises the reward near its start; PPO without the tricks collapses"
METHOD = "train/ppo_max"
MODEL = "a decoder of 0.12M, from nothing"
EFFECT = "rise of the mean true reward, in standard deviations of the base's rewards"
MARGIN = 1.0
MINUTES = 2
NEEDS_GPU = False
SEEDS = (3, 4, 5)
ROLLOUTS, CRITIC, LR = 40, 10, 1e-4
WANTED = [
    "good", "kind", "warm", "bright", "gentle", "lovely", "happy", "calm",
]  # fmt: skip
OTHER = [
    "round", "square", "long", "short", "wide", "narrow", "grey", "flat", "even", "bare", "dry",
    "thin", "still", "low", "mild", "cool",
]  # fmt: skip
TRUE: dict[str, dict[str, object]] = {
    "cover": {"use": "keyword_coverage", "words": WANTED},
    "short": {"use": "max_words", "n": 12},
}
HACKED = {
    "good": {"use": "share_of", "words_from": ["good"]},
    "long": {"use": "length_near", "n": 23},
}
SHARED = {
    "rank": 0, "batch": 16, "minibatches": 4, "max_tokens": 24, "temperature": 1.0, "top_p": 1.0,
    "repetition_penalty": 1.0,
}  # fmt: skip
MAX = {"steps": ROLLOUTS + CRITIC, "critic_rollouts": CRITIC, "lr": LR}
BARE = {
    "steps": ROLLOUTS, "critic_rollouts": 0, "lr": 10 * LR, "beta": 0.0, "reward_shape": "raw",
    "clip_ratio": 0.0, "clip_value": 0.0, "clip": 0.0, "watch": True,
}  # fmt: skip


def rambling(source: random.Random) -> str:
    n = source.randint(6, 16)
    return " ".join(source.choice(WANTED if source.random() < 1 / 3 else OTHER) for _ in range(n))


def repetition(texts: list[str]) -> float:
    """Share of words that repeat the word before them."""
    pairs = [p for t in texts for p in pairwise(t.split())]
    return mean(float(a == b) for a, b in pairs) if pairs else 1.0


class World:
    """One seed's base model, prompts and other text."""

    def __init__(self, seed: int) -> None:
        source = random.Random(f"ppo_max/{seed}")
        self.seed = seed
        asked = [form.format(topic) for topic in TOPICS for form in FORMS]
        source.shuffle(asked)
        rows: list[Row] = [{"prompt": p, "completion": rambling(source)} for p in asked * 8]
        # Other text: facts that no reward asks for.
        facts: list[Row] = [
            {"prompt": f"where is the {t}", "completion": f"{t} {TOPICS[i - 1]} {TOPICS[i - 2]}"}
            for i, t in enumerate(TOPICS)
        ]
        words = vocabulary([*asked, *WANTED, *OTHER, "where is the"])
        self.base = taught(blank(words, seed), [*rows, *facts * 20], seed)
        half = len(asked) // 2
        self.shown, self.facts, self.held = facts[::2], facts[1::2], asked[half:]
        self.data = Table(
            "example", [{"prompt": p, "completion": rambling(source)} for p in asked[:half]]
        )

    def rewards(self, model: Model) -> tuple[list[float], list[str]]:
        texts = drawn(model, self.held, seed=self.seed, n=4, max_tokens=24)
        rows: list[Row] = [
            {"prompt": p, "completion": t, "finished": True}
            for p, several in zip(self.held, texts)
            for t in several
        ]
        return Rewards(TRUE, {})(rows), [str(r["completion"]) for r in rows]

    def trained(self, data: Table, **settings: Any) -> tuple[Model, list[dict[str, float]]]:
        with step(self.seed) as context:
            made = methods["train/ppo_max"](self.base, data, **SHARED, **settings)
        assert isinstance(made, Model)
        return made, [m for m in context.metrics if "perplexity" in m]  # type: ignore[misc]


def one(seed: int) -> dict[str, dict[str, float]]:
    world = World(seed)
    prompts = Table("prompt", [{"prompt": r["prompt"]} for r in world.data])
    mixed = Table("example", [*world.data.rows[:20], *world.shown])
    before, texts = world.rewards(world.base)
    found = {
        "base": {
            "reward": mean(before),
            "spread": stdev(before),
            "repetition": repetition(texts),
            "other text": nats(world.base, world.facts),
        }
    }
    arms = {
        "ppo-max": (prompts, {"rewards": TRUE, **MAX}),
        "ppo-max with ptx": (mixed, {"rewards": TRUE, **MAX, "ptx": 1.0}),
        "ppo-max without ptx": (mixed, {"rewards": TRUE, **MAX}),
        "ppo-max, hackable": (prompts, {"rewards": HACKED, **MAX}),
        "bare ppo, hackable": (prompts, {"rewards": HACKED, **BARE}),
    }
    for name, (data, settings) in arms.items():
        made, seen = world.trained(data, **settings)
        after, texts = world.rewards(made)
        found[name] = {
            "reward": mean(after),
            "rise": (mean(after) - mean(before)) / stdev(before),
            "most kl": max(m["kl"] for m in seen),
            "last kl": seen[-1]["kl"],
            "last length": seen[-1]["length"],
            "repetition": repetition(texts),
            "alarms": mean(m["alarm"] for m in seen),
            "other text": nats(made, world.facts),
            "explained before the first step": next(
                m["explained"] for m in seen if not m["critic_alone"]
            ),
        }
    return found


def run() -> Outcome:
    found = [one(seed) for seed in SEEDS]

    def of(arm: str, name: str) -> list[float]:
        return [f[arm][name] for f in found]

    steady, bare = "ppo-max, hackable", "bare ppo, hackable"
    return Outcome(
        effects=of("ppo-max", "rise"),
        seeds=SEEDS,
        holds={
            "KL at most 0.3 a token": max(of("ppo-max", "most kl")) < 0.3,
            "without the tricks three times the KL": all(
                b > 3 * s for b, s in zip(of(bare, "most kl"), of(steady, "most kl"))
            ),
            "and three times the repetition or length": all(
                b["repetition"] > 3 * s["repetition"] or b["last length"] > 3 * s["last length"]
                for b, s in zip((f[bare] for f in found), (f[steady] for f in found))
            ),
            "the critic explains returns before the first step": min(
                of("ppo-max", "explained before the first step")
            )
            > 0,
            "other text is kept better with ptx": all(
                a < b
                for a, b in zip(
                    of("ppo-max with ptx", "other text"), of("ppo-max without ptx", "other text")
                )
            ),
        },
        figures={
            name: {n: [round(f[name][n], 4) for f in found] for n in found[0][name]}
            for name in found[0]
        },
    )
