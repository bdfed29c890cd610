"""Does an evaluator that saw short problems alone choose well among solutions of long ones?

Problems add and take away numbers up to four, modulo ten, one step after the other. A tiny decoder
(three layers), trained from nothing on solutions of one to three steps, generates; the same weights
with a head become a process reward model, from right and wrong solutions of easy problems: its own,
drawn at temperature 1.3, and right ones in which one result is changed or one step left out. Some
dots stand behind short problems, so that only the number of steps is new in long ones. On 60
problems of four and five steps, eight solutions each are drawn at temperature 0.7. The effect is
the accuracy of weighted voting, by the least of a solution's steps, less that of the majority.

Then GRPO (20 rollouts of 8 prompts by 8 answers) trains the generator on 40 further hard problems,
rewarded by that model alone; no answer of a hard problem is used anywhere but to grade.

The card asks for 0.03 over the majority and 0.05 over a single solution; for an AUROC of 0.7 of the
hard problems' steps, which falls from easy to hard less than the generator's accuracy does; and for
0.03 more of the hard problems solved after reinforcement.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import mean
from typing import cast

from _tiny import Outcome, Row, Table, blank, call, drawn, taught, vocabulary

from truing.core.scoring import step_scores
from truing.models import Model, hold
from truing.reports import Report
from truing.train.reward.process_reward import steps_of

TITLE = "An evaluator trained on easy problems chooses among solutions of hard ones"
METHOD = "evaluate/easy_to_hard"
EFFECT = "accuracy of weighted voting less that of the majority, on hard problems"
MARGIN = 0.03
MINUTES = 4
NEEDS_GPU = False
SEEDS = (0, 1, 2)
LABELS = "pqrst"
EASY, HARD = (1, 2, 3), (4, 5)
TAUGHT, JUDGED, ASKED, REINFORCED = 1200, 300, 60, 40
EPOCHS, ROLLOUTS = 12, 20
SOLUTIONS, TOKENS = 8, 56


def problem(source: random.Random, steps: int) -> Row:
    """A problem with its solution: {"prompt", "completion", "answer", "level"}."""
    value = source.randrange(10)
    asked, solved = [f"start {value}"], [f"start {value}"]
    taken = source.sample(LABELS, steps)
    for name in LABELS:
        if name not in taken:
            asked.append(f"{name} rest")
            continue
        sign, n = source.choice("+-"), source.randrange(1, 5)
        value = (value + n if sign == "+" else value - n) % 10
        asked.append(f"{name} {sign} {n}")
        solved.append(f"{name} {sign} {n} = {value}")
    text = "\n\n".join([*solved, f"# Answer {value}"])
    # Dots behind short problems, so that a long solution holds no distance that is new.
    dots = source.randrange(17) if steps in EASY else 0
    prompt = " ".join([" ; ".join(asked), *"." * dots])
    return {"prompt": prompt, "completion": text, "answer": str(value), "level": str(steps)}


def problems(source: random.Random, levels: Sequence[int], n: int) -> list[Row]:
    return [problem(source, source.choice(levels)) for _ in range(n)]


def labels(row: Row, steps: Sequence[str]) -> list[float]:
    """1 for each step that stands at its place in the right solution, else 0."""
    right = steps_of(str(row["completion"]))
    right += [""] * len(steps)
    return [float(s.split() == r.split()) for s, r in zip(steps, right)]


def spoilt(source: random.Random, row: Row) -> list[str]:
    """The right solution with one result changed, or one step left out."""
    steps = steps_of(str(row["completion"]))
    place = source.randrange(len(steps))
    if source.random() < 0.3 and place < len(steps) - 1:
        return [s for i, s in enumerate(steps) if i != place]
    words = steps[place].split()
    words[-1] = str((int(words[-1]) + source.randrange(1, 10)) % 10)
    steps[place] = " ".join(words)
    return steps


def judged(source: random.Random, rows: list[Row], own: list[list[str]]) -> Table:
    """Steps with labels: two own solutions of each problem, a spoilt one and the right one."""
    made: list[Row] = []
    for row, texts in zip(rows, own):
        several = [steps_of(t) for t in texts]
        several += [spoilt(source, row), steps_of(str(row["completion"]))]
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


def one(seed: int) -> dict[str, float]:
    source = random.Random(f"easy_to_hard/{seed}")
    rows = problems(source, EASY, TAUGHT)
    words = vocabulary(
        ["start rest ; . + - = # Answer \n\n", " ".join(LABELS), *map(str, range(10))]
    )
    generator = taught(blank(words, seed, layers=3), rows, seed, epochs=EPOCHS)

    easy = problems(source, EASY, JUDGED)
    own = drawn(
        generator, [r["prompt"] for r in easy], n=2, seed=seed, temperature=1.3, max_tokens=TOKENS
    )
    reward = cast(
        Model,
        call(
            "train/process_reward", generator, judged(source, easy, own), seed=seed, rank=0,
            lr=1e-3, batch=32, epochs=3,
        ),
    )  # fmt: skip

    hard, other = problems(source, HARD, ASKED), problems(source, EASY, ASKED)
    report = cast(
        Report,
        call(
            "evaluate/easy_to_hard", generator, reward, Table("record", hard), seed=seed,
            n=SOLUTIONS, temperature=0.7, max_tokens=TOKENS,
        ),
    )  # fmt: skip
    found = {way: report.get(way).value for way in ("single", "majority", "best of n")}
    found["weighted voting"] = report.get("weighted voting").value
    chosen = [cast("list[str]", s["completions"]) for s in report.samples]
    found["auroc, hard"] = told_apart(reward, hard, chosen)
    drawn_easy = drawn(
        generator, [r["prompt"] for r in other], n=SOLUTIONS, seed=seed + 1, temperature=0.7,
        max_tokens=TOKENS,
    )  # fmt: skip
    found["auroc, easy"] = told_apart(reward, other, drawn_easy)
    found["greedy, easy"], found["greedy, hard"] = (
        solved(generator, some, seed) for some in (other, hard)
    )
    prompts = Table("prompt", [{"prompt": r["prompt"]} for r in problems(source, HARD, REINFORCED)])
    trained = call(
        "train/grpo", generator, prompts, seed=seed, rank=0, lr=2e-4, batch=8, steps=ROLLOUTS,
        answers=8, new_tokens=TOKENS,
        rewards={"steps": {"use": "step_reward", "model": hold(reward)}},
    )  # fmt: skip
    found["greedy, hard, after GRPO"] = solved(trained, hard, seed)
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
            "0.03 more solved after reinforcement": mid["greedy, hard, after GRPO"]
            >= mid["greedy, hard"] + 0.03,
        },
        figures={name: [round(f[name], 4) for f in found] for name in found[0]},
    )
