"""At the same divergence from the start, do pairs of the model's own answers win more than given?

A two-layer decoder learns to answer by a little grammar. What is good is an exact rule: one point
each for a colour, a number, a thanks and the right home of the animal that was asked for, less a
tenth for each word. 1,024 pairs of answers by the grammar, labelled by the rule, are all that
either side has: offline, IPO is trained on them; online, a reward model is trained on them, and IPO
on pairs of the model's own answers that this reward model ranks. Both have the same prompts, batch,
rate and numbers of updates (15, 45 and 135) under the weights beta (0.1 and 0.5); log-ratios are
summed over answers, as in the paper. Each run ends in a divergence from the start (exact over the
vocabulary) and in a win rate over the best of 4 answers of the starting model, on prompts never
trained on and judged by the rule.

Effect: the best win rate online less the best offline within a budget of divergence, mean over the
budgets 1, 2, 4 and 8 nats, once for each of three seeds. The claim asks for 0.05, and that offline
training lets the chosen answers' log-probability fall. How well each side's log-ratios classify the
held-out pairs stands beside. The replay of the online answers in their own order is not part of
this, since training draws its own order.
"""

from __future__ import annotations

import random
from typing import cast

from _tiny import Outcome, Row, Table, blank, call, drawn, step, taught, vocabulary

from truing.core.rewards import implicit_rewards, score_model
from truing.core.scoring import has_head
from truing.evaluate.win_rate import verdicts
from truing.method import methods
from truing.models import Model

TITLE = "At equal divergence, training on own answers wins more than on given pairs"
METHOD = "evaluate/divergence"
EFFECT = "best win rate within a budget of divergence, online less offline, mean over four budgets"
MARGIN = 0.05
MINUTES = 3
NEEDS_GPU = False
SEEDS = (0, 1, 2)
BETAS, STEPS, BUDGETS = (0.1, 0.5), (15, 45, 135), (1.0, 2.0, 4.0, 8.0)
RATE, BATCH, TOKENS = 1e-3, 16, 20

COLOURS = ["red", "blue", "green", "brown", "white", "black"]
NUMBERS = ["two", "three", "four", "five", "six", "seven"]
THANKS = ["thanks", "please", "welcome"]
HOMES = {"otter": "river", "fox": "den", "owl": "tree", "bee": "hive", "crab": "beach",
         "goat": "hill", "seal": "ice", "bat": "cave"}  # fmt: skip
FILLS = ["the", "a", "very", "old", "small", "quiet", "animal", "often", "seen", "near", "some",
         "and", "then", "here"]  # fmt: skip


def answer(source: random.Random) -> str:
    """Two to ten words, each property in a quarter of the answers or so."""
    words = source.choices(FILLS, k=source.randint(2, 10))
    for group in (COLOURS, NUMBERS, THANKS, list(HOMES.values()), list(HOMES.values())):
        if source.random() < 0.25:
            words.insert(source.randint(0, len(words)), source.choice(group))
    return " ".join(words)


def prompts(source: random.Random, n: int) -> list[str]:
    return [f"the {source.choice(list(HOMES))} and {source.choice(COLOURS)} {source.choice(FILLS)}"
            for _ in range(n)]  # fmt: skip


def good(prompt: str, text: str) -> float:
    """The rule."""
    words = text.split()
    home = HOMES[prompt.split()[1]]
    points = sum(bool(set(words) & set(group)) for group in (COLOURS, NUMBERS, THANKS, [home]))
    return points - 0.1 * len(words)


def pairs(source: random.Random, n: int) -> Table:
    """Two answers by the grammar to each prompt, the better one chosen."""
    rows: list[Row] = []
    while len(rows) < n:
        (prompt,) = prompts(source, 1)
        worse, better = sorted((answer(source), answer(source)), key=lambda t: good(prompt, t))
        if good(prompt, worse) < good(prompt, better):
            rows.append({"prompt": prompt, "chosen": better, "rejected": worse})
    return Table("pair", rows)


def won(model: Model, asked: list[str], against: list[float], seed: int) -> float:
    """Share of prompts on which the model's answer beats the fixed one."""
    texts = drawn(model, asked, seed=seed, max_tokens=TOKENS)
    return sum(verdicts([good(p, t[0]) for p, t in zip(asked, texts)], against)) / len(asked)


def classified(model: Model, start: Model, held: Table) -> float:
    """Share of pairs whose chosen answer has the larger log-ratio, or score of a reward model."""
    rows = [[{"prompt": r["prompt"], "completion": r[n]} for r in held]
            for n in ("chosen", "rejected")]  # fmt: skip
    scored = has_head(model)
    sides = [score_model(model, r) if scored else implicit_rewards(model, start, r) for r in rows]
    return sum(c > r for c, r in zip(*sides)) / len(held)


def one(seed: int) -> dict[str, list[dict[str, float]]]:
    """Every run of both sides: divergence, win rate, accuracy on held-out pairs."""
    source = random.Random(seed)
    words = vocabulary([" ".join([*COLOURS, *NUMBERS, *THANKS, *HOMES, *HOMES.values(), *FILLS])])
    said = [{"prompt": p, "completion": answer(source)} for p in prompts(source, 2048)]
    start = taught(blank(words, seed), said, seed)
    data, held = pairs(source, 1024), pairs(source, 128)
    asked = prompts(source, 128)
    proxy = call("bradley_terry", start, data, seed=seed, epochs=3, lr=1e-3, rank=0, batch=BATCH)
    four = drawn(start, asked, seed=seed + 1000, n=4, max_tokens=TOKENS)
    against = [max(good(p, t) for t in texts) for p, texts in zip(asked, four)]
    own = Table("prompt", [{"prompt": r["prompt"]} for r in data])
    seen = Table("prompt", [{"prompt": p} for p in asked[:64]])
    accurate = classified(proxy, start, held)
    base = {"proxy": accurate, "divergence": 0.0, "win rate": won(start, asked, against, seed)}
    found: dict[str, list[dict[str, float]]] = {"start": [base], "offline": [], "online": []}
    for side in ("offline", "online"):
        for beta in BETAS:
            for steps in STEPS:
                how = {"beta": beta, "steps": steps, "batch": BATCH, "lr": RATE, "rank": 0,
                       "schedule": "constant", "warmup": 0.0}  # fmt: skip
                with step(seed) as context:
                    if side == "offline":
                        made = methods["ipo"](start, data, length_normalise=False, **how)
                    else:
                        made = methods["online_dpo"](
                            start, own, reward_model=proxy, kind="ipo", answers=2,
                            temperature=1.0, new_tokens=TOKENS, **how,
                        )  # fmt: skip
                    last = [m for m in context.metrics if "loss" in m][-1]
                moved = call("divergence", made, start, seen, seed=seed, max_tokens=TOKENS)
                found[side].append(
                    {"beta": beta, "updates": steps, "divergence": moved.get("divergence").value,
                     "win rate": won(made, asked, against, seed),
                     "accuracy": classified(made, start, held),
                     "reward_chosen": float(cast(float, last["reward_chosen"]))}
                )  # fmt: skip
    return found


def best(runs: list[dict[str, float]], budget: float) -> float:
    return max(r["win rate"] for r in runs if r["divergence"] <= budget)


def run() -> Outcome:
    every = [one(seed) for seed in SEEDS]
    gaps = [[best(e["start"] + e["online"], k) - best(e["start"] + e["offline"], k)
             for k in BUDGETS] for e in every]  # fmt: skip
    longest = [[r for r in e["offline"] if r["updates"] == max(STEPS)] for e in every]
    apart = [max(o["accuracy"] for o in e["offline"]) - max(o["accuracy"] for o in e["online"])
             for e in every]  # fmt: skip
    return Outcome(
        effects=[sum(g) / len(g) for g in gaps],
        seeds=SEEDS,
        holds={
            "offline, the chosen answers' log-probability falls": all(
                r["reward_chosen"] < 0 for runs in longest for r in runs
            ),
        },
        figures={
            "budgets": list(BUDGETS),
            "online less offline at each": gaps,
            "best win rate online": [max(r["win rate"] for r in e["online"]) for e in every],
            "best win rate offline": [max(r["win rate"] for r in e["offline"]) for e in every],
            "accuracy on held-out pairs, offline less online": apart,
            "runs": [{n: [{k: round(v, 4) for k, v in r.items()} for r in runs]
                      for n, runs in e.items()} for e in every],
        },
    )  # fmt: skip
