"""Does an evaluator that saw short problems alone choose well among solutions of long ones?

Problems add up to four to a number or take it away, modulo ten, at each of five labels; at those of
a problem that do nothing they add 0, so that a hard problem (four or five steps that do something)
is no longer than an easy one (one to three). A tiny decoder (three layers) is trained from nothing
on easy solutions, half a pass at a time, until it solves four in five of other easy problems: this
is the generator, which then solves some of the hard ones and not all, so that there is something to
choose. With a head it becomes a process reward model, from labelled steps of 500 further easy
problems: two solutions of the generator at temperature 1.3, the right one, and two spoilt ones, in
which a number is changed or steps are left out. A step is right when it follows from the one before
it. On 100 hard problems eight solutions each are drawn at temperature 0.7; the effect is the
accuracy of weighted voting, by the least of a solution's steps, less that of the majority. How many
problems any of their solutions solves, and how many answers differ, say what is there to be won.

Then the paper's PPO trains the generator on 40 further hard problems, by 20 rollouts of 8 prompts
by 8 answers, an update each, after 5 from which the critic alone learns. Its rewards are those of
steps, of which the least counts, as that model sees them, and the penalty for the layout, lower
where the last step shows the answer. GRPO makes as many updates on the same problems, rewarded by
that model's least step alone; it is a figure beside. No answer of a hard problem is used anywhere
but to grade.

The claim asks for 0.03 over the majority and 0.05 over a single solution; for an AUROC of 0.7 of
the hard problems' steps, which falls from easy to hard less than the generator's accuracy does; and
for 0.03 more of the hard problems solved after reinforcement. The world and its settings were
chosen on other seeds, but for the answer's block of its own, which the penalty asks for and which
came later. Worlds in which long problems have longer solutions were left: there a model of this
size fails at the length, not at the steps. So was a generator of a fixed number of passes: by
chance of the seed it gave hard problems one answer in ten, as guessing does, or all of them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import mean
from typing import Any, cast

from _tiny import Outcome, Row, Table, blank, call, drawn, taught, vocabulary

from truing.core.judging.answer_steps import steps_of
from truing.core.passes.scoring import step_scores
from truing.evaluate.easy_to_hard import answer_of, normal
from truing.models import Model, hold
from truing.reports import Report

TITLE = "An evaluator trained on easy problems chooses among solutions of hard ones"
METHOD = "evaluate/easy_to_hard"
MODEL = "a decoder of 0.12M, from nothing"
EFFECT = "accuracy of weighted voting less that of the majority, on hard problems"
MARGIN = 0.03
MINUTES = 7
NEEDS_GPU = False
SEEDS = (0, 1, 2)
LABELS = "pqrst"
MODULUS, LARGEST = 10, 4
EASY, HARD = (1, 2, 3), (4, 5)
TAUGHT, JUDGED, ASKED, REINFORCED = 1200, 500, 100, 40
FIRST, MOST, KNOWN = 3.0, 8.0, 0.8  # passes at least and at most; share of easy problems solved
REWARD = {"rank": 0, "lr": 1e-3, "batch": 32, "epochs": 5}
ROLLOUTS, CRITIC, SPOILT = 20, 5, 2
SOLUTIONS, TOKENS = 8, 72
ANSWER = "# Answer"


def line(name: str, value: int, step: str) -> tuple[str, int]:
    """What stands in a solution for one label, and the value after it."""
    sign, n = step.split()
    after = (value + int(n) if sign == "+" else value - int(n)) % MODULUS
    return f"{name} {value} {step} = {after}", after


def problem(source: random.Random, steps: int) -> Row:
    """A problem with its solution: {"prompt", "completion", "answer", "level"}."""
    start = value = source.randrange(MODULUS)
    taken = source.sample(LABELS, steps)
    does = [
        f"{source.choice('+-')} {source.randrange(1, LARGEST + 1)}" if name in taken else "+ 0"
        for name in LABELS
    ]
    solved = [f"start {start}"]
    for name, step in zip(LABELS, does):
        text, value = line(name, value, step)
        solved.append(text)
    asked = [f"start {start}", *(f"{name} {step}" for name, step in zip(LABELS, does))]
    completion = "\n\n".join([*solved, ANSWER, str(value)])
    return {
        "prompt": " ; ".join(asked), "completion": completion, "answer": str(value),
        "level": str(steps),
    }  # fmt: skip


def problems(source: random.Random, levels: Sequence[int], n: int) -> list[Row]:
    return [problem(source, source.choice(levels)) for _ in range(n)]


def labels(row: Row, steps: Sequence[str]) -> list[float]:
    """1 for each step that follows from the one before it and stands at its place, else 0."""
    start, *does = str(row["prompt"]).split(" ; ")
    found: list[float] = []
    for i, step in enumerate(steps):
        after = i - len(does) - 1  # 0 for the line that announces the answer
        value = steps[i - 1 - (after == 1)].split()[-1] if i else ""
        if i == 0:
            right = start
        elif after == 0:
            right = ANSWER
        elif not value.isdigit() or after > 1:
            right = ""
        elif after == 1:
            right = value
        else:
            name, todo = does[i - 1].split(" ", 1)
            right = line(name, int(value), todo)[0]
        found.append(float(step.split() == right.split()))
    return found


def spoilt(source: random.Random, row: Row) -> list[str]:
    """The right solution with one number changed, or one to three steps left out."""
    steps = steps_of(str(row["completion"]))
    if source.random() < 0.4:
        place = source.randrange(len(steps) - 1)
        later = min(place + source.randrange(1, 4), len(steps) - 1)
        return steps[:place] + steps[later:]
    place = source.choice([i for i, step in enumerate(steps) if step != ANSWER])
    words = steps[place].split()
    at = source.choice([i for i, w in enumerate(words) if w.isdigit()])
    words[at] = str((int(words[at]) + source.randrange(1, MODULUS)) % MODULUS)
    steps[place] = " ".join(words)
    return steps


def judged(source: random.Random, rows: list[Row], own: list[list[str]]) -> Table:
    """Steps with labels: own solutions of each problem, spoilt ones and the right one."""
    made: list[Row] = []
    for row, texts in zip(rows, own):
        several = [steps_of(t) for t in texts]
        several += [spoilt(source, row) for _ in range(SPOILT)]
        several.append(steps_of(str(row["completion"])))
        made += [
            {"prompt": row["prompt"], "steps": s, "labels": labels(row, s)} for s in several if s
        ]
    return Table("steps", made)


def auroc(scores: Sequence[float], right: Sequence[float]) -> float:
    """Probability that a right step scores above a wrong one; one half without either."""
    good = [s for s, r in zip(scores, right) if r]
    bad = [s for s, r in zip(scores, right) if not r]
    if not good or not bad:
        return 0.5
    return mean(1.0 if g > b else 0.5 if g == b else 0.0 for g in good for b in bad)


def told_apart(reward: Model, rows: Sequence[Row], solutions: Sequence[list[str]]) -> float:
    """AUROC of the reward model's scores of all steps of these solutions."""
    scores: list[float] = []
    right: list[float] = []
    for row, texts in zip(rows, solutions):
        parts = [s for s in map(steps_of, texts) if s]
        asked: list[Row] = [{"prompt": row["prompt"], "steps": s} for s in parts]
        for steps, given in zip(parts, step_scores(reward, asked, "\n\n")):
            scores += given
            right += labels(row, steps)
    return auroc(scores, right)


def solved(model: Model, rows: Sequence[Row], seed: int) -> float:
    texts = drawn(model, [r["prompt"] for r in rows], greedy=True, seed=seed, max_tokens=TOKENS)
    answers = [t.split()[-1:] for (t,) in texts]
    return mean(float(a == [r["answer"]]) for a, r in zip(answers, rows))


def half_learnt(
    words: Sequence[str], rows: Sequence[Row], other: Sequence[Row], seed: int
) -> tuple[Model, float]:
    """A decoder taught until it solves enough of other easy problems, and the passes that it took.

    From one pass to the next such a decoder goes from knowing nothing to knowing all: how many it
    takes differs from seed to seed.
    """
    how = {"lr": 2e-3, "schedule": "constant"}
    model = taught(
        blank(words, seed, layers=3, exact=True), rows, seed, epochs=FIRST, warmup=0.05, **how
    )
    passes = FIRST
    while solved(model, other, seed) < KNOWN and passes < MOST:
        again = 1000 * (seed + 1) + int(2 * passes)
        model = taught(model, rows, again, epochs=0.5, warmup=0.0, **how)
        passes += 0.5
    return model, passes


def evaluator(generator: Model, source: random.Random, seed: int) -> Model:
    """A process reward model from the generator, by labelled steps of easy problems."""
    easy = problems(source, EASY, JUDGED)
    own = drawn(
        generator, [r["prompt"] for r in easy], n=2, seed=seed, temperature=1.3, max_tokens=TOKENS
    )
    data = judged(source, easy, own)
    return cast(Model, call("train/process_reward", generator, data, seed=seed, **REWARD))


def chosen(
    generator: Model, reward: Model, hard: Sequence[Row], seed: int
) -> tuple[dict[str, float], list[list[str]]]:
    """Accuracy by each way of choosing among solutions of hard problems, and the solutions."""
    report = cast(
        Report,
        call(
            "evaluate/easy_to_hard", generator, reward, Table("record", hard), seed=seed,
            n=SOLUTIONS, temperature=0.7, max_tokens=TOKENS,
        ),
    )  # fmt: skip
    ways = ("single", "majority", "best of n", "weighted voting")
    found = {way: report.get(way).value for way in ways}
    texts = [cast("list[str]", s["completions"]) for s in report.samples or ()]
    answers = [[normal(answer_of(t)) for t in some] for some in texts]
    found["solved by any"] = mean(float(r["answer"] in a) for r, a in zip(hard, answers))
    found["different answers"] = mean(len(set(a)) for a in answers)
    return found, texts


def reinforced(
    generator: Model, reward: Model, source: random.Random, seed: int
) -> dict[str, Model]:
    """The generator after PPO as in the paper, and after as many updates of GRPO."""
    hard = [{"prompt": r["prompt"]} for r in problems(source, HARD, REINFORCED)]
    prompts = Table("prompt", hard)
    shared: dict[str, Any] = {
        "seed": seed, "rank": 0, "lr": 1e-4, "batch": 8, "answers": 8, "max_tokens": TOKENS
    }  # fmt: skip
    steps = {"use": "step_reward", "model": hold(reward)}
    return {
        "PPO": call(
            "train/easy_to_hard_ppo", generator, prompts, reward, steps=CRITIC + ROLLOUTS,
            critic_rollouts=CRITIC, minibatches=1, **shared,
        ),
        "GRPO": call(
            "train/grpo", generator, prompts, steps=ROLLOUTS, beta=0.05, rewards={"steps": steps},
            **shared,
        ),
    }  # fmt: skip


def one(seed: int) -> dict[str, float]:
    source = random.Random(f"easy_to_hard/{seed}")
    rows = problems(source, EASY, TAUGHT)
    words = vocabulary((str(r[n]) for r in rows for n in ("prompt", "completion")), exact=True)
    generator, passes = half_learnt(words, rows, problems(source, EASY, ASKED), seed)
    reward = evaluator(generator, source, seed)

    hard, other = problems(source, HARD, ASKED), problems(source, EASY, ASKED)
    found, texts = chosen(generator, reward, hard, seed)
    found["passes"] = passes
    found["auroc, hard"] = told_apart(reward, hard, texts)
    drawn_easy = drawn(
        generator, [r["prompt"] for r in other], n=SOLUTIONS, seed=seed + 1, temperature=0.7,
        max_tokens=TOKENS,
    )  # fmt: skip
    found["auroc, easy"] = told_apart(reward, other, drawn_easy)
    found["greedy, easy"], found["greedy, hard"] = (
        solved(generator, some, seed) for some in (other, hard)
    )
    found |= {
        f"greedy, hard, after {name}": solved(model, hard, seed)
        for name, model in reinforced(generator, reward, source, seed).items()
    }
    return found


def run() -> Outcome:
    found = [one(seed) for seed in SEEDS]
    mid = {name: mean(f[name] for f in found) for name in found[0]}
    gap = mid["greedy, easy"] - mid["greedy, hard"]
    return Outcome(
        effects=[f["weighted voting"] - f["majority"] for f in found],
        seeds=SEEDS,
        holds={
            "0.05 over a single solution": mid["weighted voting"] >= mid["single"] + 0.05,
            "AUROC of hard steps at least 0.7": min(f["auroc, hard"] for f in found) >= 0.7,
            "the evaluator loses less from easy to hard than the generator": mid["auroc, easy"]
            - mid["auroc, hard"]
            < gap,
            "0.03 more solved after reinforcement": mid["greedy, hard, after PPO"]
            >= mid["greedy, hard"] + 0.03,
        },
        figures={name: [round(f[name], 4) for f in found] for name in found[0]},
    )
