"""At the same divergence from the start, do pairs of the model's own answers win more than given?

A two-layer decoder learns to answer by a little grammar. What is good is an exact rule: one point
each for a colour, a number, a thanks and the right home of the animal that was asked for, less a
tenth for each word. 1,024 pairs of answers by the grammar, labelled by the rule, are all that
either side has: offline, IPO is trained on them; online, a reward model is trained on them until it
tells pairs never seen apart, and IPO on pairs of the model's own answers that this reward model
ranks. Both have the same prompts, batch, rate and numbers of updates under the same weights beta;
log-ratios are summed over answers, as in the paper. Each run ends in a divergence from the start
(exact over the vocabulary) and in a win rate over the best of 4 answers of the starting model, on
prompts never trained on and judged by the rule.

Effect: the best win rate online less the best offline within a budget of divergence, mean over the
budgets 1, 2, 4 and 8 nats, once for each of six seeds. The claim asks for 0.05, and that online is
ahead in more seeds than chance would have it (sign test over the seeds' means, since budgets of one
seed share their runs); that the pairs which one online run made, saved (`synthesize/online_stream`)
and learnt offline in their own order (`train/replay`), are trained on to the same losses (1e-4);
and that offline training lets the log-probability of the given pairs' chosen answers fall. Beside
stands what the paper found and this scale cannot tell from noise: the win rate where the saved
pairs are shuffled, and how well each side's log-ratios tell held-out pairs apart.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from statistics import mean
from typing import Any, NamedTuple, cast

from _tiny import Outcome, Row, Table, blank, call, drawn, step, taught, vocabulary

from truing.context import Context
from truing.core.judging.rewards import held_model, implicit_rewards, score_model
from truing.core.stats import mcnemar, mean_interval
from truing.evaluate.win_rate import verdicts
from truing.method import component, methods
from truing.models import Model, hold
from truing.naming import ModelKey

TITLE = "At equal divergence, training on own answers wins more than on given pairs"
METHOD = "evaluate/divergence"
MODEL = "a decoder of 0.12M, from nothing"
EFFECT = "best win rate within a budget of divergence, online less offline, mean over four budgets"
MARGIN = 0.05
MINUTES = 15
NEEDS_GPU = False
SEEDS = (3, 4, 5, 6, 7, 8)
BETAS, STEPS, BUDGETS = (0.03, 0.1), (5, 10, 20, 40, 80), (1.0, 2.0, 4.0, 8.0)
RATE, BATCH, TOKENS, REFILL = 5e-4, 16, 20, 8
PROXY = {"epochs": 10, "lr": 1e-3, "rank": 0, "batch": BATCH}
REPLAYED = (0.1, 40)  # the online run that is trained on again, offline: beta and updates

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


def sides(data: Iterable[Row]) -> list[list[Row]]:
    """Rows of the chosen and of the rejected answers."""
    rows = list(data)
    return [[{"prompt": r["prompt"], "completion": r[name]} for r in rows]
            for name in ("chosen", "rejected")]  # fmt: skip


def logratios(model: Model, start: Model, data: Iterable[Row]) -> list[list[float]]:
    """Log-ratios to the start of the chosen and of the rejected answers."""
    return [implicit_rewards(model, start, some) for some in sides(data)]


def scored(reward: Model, data: Iterable[Row]) -> list[list[float]]:
    """A reward model's scores of the chosen and of the rejected answers."""
    return [score_model(reward, some) for some in sides(data)]


def right(numbers: Sequence[Sequence[float]]) -> float:
    """Share of pairs whose chosen answer has the larger number."""
    return sum(c > r for c, r in zip(*numbers, strict=True)) / len(numbers[0])


@component("reward")
def rounded_score(rows: list[Row], *, model: ModelKey) -> list[float]:
    """What a reward model says, rounded so that two equal answers have one score.

    Two answers one of which is empty have one score too: there is nothing to be learnt from none.
    """
    scores = [round(s, 4) for s in score_model(held_model(model, "rounded_score"), rows)]
    for at in range(0, len(rows), 2):
        if not all(row["completion"] for row in rows[at : at + 2]):
            scores[at : at + 2] = [0.0, 0.0]
    return scores


def own_answers(proxy: Model, how: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of IPO on pairs of the model's own answers that a reward model ranks."""
    rewards = {"proxy": {"use": "rounded_score", "model": hold(proxy)}}
    return {
        "rewards": rewards, "kind": "ipo", "answers": 2, "temperature": 1.0, "max_tokens": TOKENS,
        "refill": REFILL, **how,
    }  # fmt: skip


def online(
    start: Model, asked: Table, how: Mapping[str, Any], seed: int
) -> tuple[Model, list[float]]:
    """IPO on own answers: the model, and the loss of each update."""
    with step(seed) as context:
        return cast(Model, methods["online_dpo"](start, asked, **how)), losses_of(context)


def losses_of(context: Context) -> list[float]:
    return [float(cast(float, m["loss"])) for m in context.metrics if "loss" in m]


class Asked(NamedTuple):
    """What every model is asked.

    Args:
        start: where all of them began.
        prompts: never trained on, and what the fixed answers to them are worth.
        given: pairs that offline training is given.
        held: pairs never trained on.
    """

    start: Model
    seed: int
    prompts: list[str]
    against: list[float]
    given: Sequence[Row]
    held: Sequence[Row]

    def of(self, model: Model) -> dict[str, float]:
        few = Table("prompt", [{"prompt": p} for p in self.prompts[:64]])
        moved = call("divergence", model, self.start, few, seed=self.seed, max_tokens=TOKENS)
        chosen, rejected = map(mean, logratios(model, self.start, self.given))
        return {
            "divergence": moved.get("divergence").value,
            "win rate": won(model, self.prompts, self.against, self.seed),
            "accuracy": right(logratios(model, self.start, self.held)),
            "chosen": chosen,
            "rejected": rejected,
        }


def replayed(
    start: Model, asked: Table, how: Mapping[str, Any], losses: Sequence[float], seed: int
) -> tuple[dict[str, float], dict[str, Model]]:
    """How far offline training on saved pairs is from the online run, and the models that it makes.

    They are learnt in their own order and shuffled.
    """
    stream = call("online_stream", start, asked, how=dict(how), seed=seed)
    made, again = dict[str, Model](), list[float]()
    for name, order in (("in order", "drawn"), ("shuffled", "shuffled")):
        with step(seed) as context:
            made[name] = cast(Model, methods["replay"](start, stream, how=dict(how), order=order))
        again = again or losses_of(context)
    off = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(again, losses, strict=True))
    return {"updates": float(len(again)), "largest difference of losses": off}, made


def one(seed: int) -> dict[str, list[dict[str, float]]]:
    """Every run of both sides, as it was measured, and the replay of one."""
    source = random.Random(seed)
    words = vocabulary([" ".join([*COLOURS, *NUMBERS, *THANKS, *HOMES, *HOMES.values(), *FILLS])])
    said: list[Row] = [{"prompt": p, "completion": answer(source)} for p in prompts(source, 2048)]
    start = taught(blank(words, seed, shown=True), said, seed)
    data, held = pairs(source, 1024), pairs(source, 256)
    asked = prompts(source, 256)
    proxy = cast(Model, call("bradley_terry", start, data, seed=seed, **PROXY))
    four = drawn(start, asked, seed=seed + 1000, n=4, max_tokens=TOKENS)
    against = [max(good(p, t) for t in texts) for p, texts in zip(asked, four)]
    prompted = Table("prompt", [{"prompt": r["prompt"]} for r in data])
    question = Asked(start, seed, asked, against, list(data)[:128], list(held))
    accurate = right(scored(proxy, held))
    found: dict[str, list[dict[str, float]]] = {
        "start": [{"proxy": accurate, "divergence": 0.0,
                   "win rate": won(start, asked, against, seed)}],
        "offline": [], "online": [], "replay": [],
    }  # fmt: skip
    for beta, steps in product(BETAS, STEPS):
        how: dict[str, Any] = {
            "beta": beta, "steps": steps, "batch": BATCH, "lr": RATE, "rank": 0,
            "schedule": "constant", "warmup": 0.0,
        }  # fmt: skip
        given = cast(Model, call("ipo", start, data, length_normalise=False, seed=seed, **how))
        drawing = own_answers(proxy, how)
        own, losses = online(start, prompted, drawing, seed)
        for side, made in (("offline", given), ("online", own)):
            ran = {"beta": beta, "updates": float(steps)}
            found[side].append(ran | question.of(made))
        if (beta, steps) == REPLAYED:
            again, models = replayed(start, prompted, drawing, losses, seed)
            rates = {f"win rate, {n}": question.of(m)["win rate"] for n, m in models.items()}
            found["replay"].append(again | rates)
    return found


def best(runs: list[dict[str, float]], budget: float) -> float:
    return max(r["win rate"] for r in runs if r["divergence"] <= budget)


def sign_test(gaps: Sequence[float]) -> float:
    """Chance of so many differences of one sign, or more, where either sign is as likely."""
    some = [g > 0 for g in gaps if g]
    return mcnemar([not ahead for ahead in some], some)


def run() -> Outcome:
    every = [one(seed) for seed in SEEDS]
    gaps = [[best(e["start"] + e["online"], k) - best(e["start"] + e["offline"], k)
             for k in BUDGETS] for e in every]  # fmt: skip
    means = [mean(g) for g in gaps]
    chance = sign_test(means)
    # Where the pull to the start is least, and after the last update.
    moved = [next(r for r in e["offline"] if (r["beta"], r["updates"]) == (min(BETAS), max(STEPS)))
             for e in every]  # fmt: skip
    apart = [max(o["accuracy"] for o in e["offline"]) - max(o["accuracy"] for o in e["online"])
             for e in every]  # fmt: skip
    replays = [r for e in every for r in e["replay"]]
    lower = [r["win rate, in order"] - r["win rate, shuffled"] for r in replays]
    return Outcome(
        effects=means,
        seeds=SEEDS,
        holds={
            "online ahead in more seeds than by chance": chance < 0.05 and mean(means) > 0,
            "the saved pairs in their order give the online losses": all(
                r["updates"] == REPLAYED[1] and r["largest difference of losses"] <= 1e-4
                for r in replays
            ),
            "offline, the chosen answers' log-probability falls": all(
                r["chosen"] < 0 for r in moved
            ),
        },
        figures={
            "budgets": list(BUDGETS),
            "online less offline at each": gaps,
            "sign test over the seeds' means": chance,
            "sign test over budgets and seeds": sign_test([g for some in gaps for g in some]),
            "best win rate online": [max(r["win rate"] for r in e["online"]) for e in every],
            "best win rate offline": [max(r["win rate"] for r in e["offline"]) for e in every],
            "win rate of saved pairs, in order less shuffled": [mean(lower), *mean_interval(lower)],
            "accuracy on held-out pairs, offline less online": [mean(apart), *mean_interval(apart)],
            "runs": [{n: [{k: round(v, 6) for k, v in r.items()} for r in runs]
                      for n, runs in e.items()} for e in every],
        },
    )  # fmt: skip
