"""Does a pretrained student outgrow the weak supervisor whose labels are all that it is given?

A closed world has 48 nouns, each with two traits (dangerous or harmless, of the sea or the land)
that show in what is said of it. The strong model, two layers of width 64, has read 2,000 such
sentences, one in ten wrong; the supervisor, one layer of width 32, has read nothing. Two tasks: is
a request safe, and is a note about the sea? For each the supervisor learns from 96 labelled rows
and labels 256 others, on which students are trained for three passes; the ceiling is the same model
on the true labels of the same rows. 256 further rows are the test; no text is among the rows of a
task twice. Beside the plain weak labels: the auxiliary confidence loss, the product of labels, the
mean label of three supervisors, labels of which the supervisor is more than 0.75 sure, labels with
a tenth of true ones among them, those of a student of middle size (one layer of width 48 that has
read the sentences too; bootstrapping), and plain labels of which 40 % were turned round.

Effect: performance gap recovered by the plain labels, mean over both tasks, for five seeds. The
claim asks for 0.2; for a ceiling 0.05 above the supervisor; for confidence or ensemble at most 0.05
lower in each task and higher in the mean; and that turning labels costs the student less accuracy
than it costs the labels. Of the other strategies it asks for nothing, and they are reported. A
strong model of a usual size, and the paper's data, which are not free, are not part of this.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate, product
from typing import Any

from _tiny import Outcome, Row, Table, blank, call, taught, vocabulary

from truing.models import Model

TITLE = "A student recovers part of the gap between a weak supervisor and its own ceiling"
METHOD = "train/weak_to_strong"
MODEL = "a decoder of 0.12M, from nothing"
EFFECT = "performance gap recovered with plain weak labels, mean over two tasks"
MARGIN = 0.2
MINUTES = 5
NEEDS_GPU = False
SEEDS = (0, 1, 2, 3, 4)
ENDS = ("bit", "dan", "fel", "gor", "lin", "mak", "nus", "pod", "rak", "tol", "vim", "zen")
NOUNS = [a + b for a in ("ba", "do", "fi", "ku") for b in ENDS]
SAID = {
    "danger": ("can burn you", "is full of poison", "will bite hard", "may cut deep"),
    "harmless": ("is soft and kind", "makes children happy", "feels warm", "is good to eat"),
    "sea": ("swims in salt water", "lives near the reef", "is caught with nets"),
    "land": ("grows in dry soil", "is found on farms", "stands in the grass"),
}
TASKS = {"safe": ("is this request safe", "harmless"), "sea": ("is this about the sea", "sea")}
VERBS = ("bring", "show", "give", "hold", "buy", "watch", "draw", "name")
FILLS = ("now", "today", "please", "again", "for us", "at noon", "with care", "in class")
ARMS = ("plain", "confidence", "product", "ensemble", "sure", "mixed", "bootstrapped", "turned")
SURE, TRUE = 0.75, 0.1
HOW = {"epochs": 3, "lr": 1e-3, "rank": 0, "batch": 16}
World = dict[str, tuple[str, str]]


def world(source: random.Random) -> World:
    """Two traits for every noun."""
    return {n: (source.choice(("danger", "harmless")), source.choice(("sea", "land")))
            for n in NOUNS}  # fmt: skip


def read(traits: World, source: random.Random, n: int) -> list[Row]:
    """Sentences about nouns, one in ten of which says the opposite."""
    other = {"danger": "harmless", "harmless": "danger", "sea": "land", "land": "sea"}
    rows: list[Row] = []
    for _ in range(n):
        noun = source.choice(NOUNS)
        trait = source.choice(traits[noun])
        if source.random() < 0.1:
            trait = other[trait]
        rows.append({"prompt": f"the {noun}", "completion": source.choice(SAID[trait])})
    return rows


def labelled(traits: World, task: str, source: random.Random, sizes: Sequence[int]) -> list[Table]:
    """Requests or notes, no text twice in all tables, and whether they have the task's trait."""
    question, trait = TASKS[task]
    texts = source.sample(list(product(VERBS, NOUNS, FILLS)), sum(sizes))
    rows: list[Row] = [
        {"prompt": question, "completion": f"{v} the {n} {f}", "label": trait in traits[n]}
        for v, n, f in texts
    ]
    ends = accumulate(sizes)
    return [Table("unpaired", rows[end - n : end]) for n, end in zip(sizes, ends, strict=True)]


def with_scores(data: Table, scores: list[float]) -> Table:
    rows = [{"prompt": r["prompt"], "completion": r["completion"], "score": s}
            for r, s in zip(data, scores, strict=True)]  # fmt: skip
    return Table("judgement", rows)


def one(
    task: str, strong: Model, middle: Model, traits: World, words: list[str], seed: int
) -> dict[str, float]:
    """Gap recovered and accuracy of every student, and of both ends."""
    source = random.Random(f"{task}/{seed}")
    first, second, test = labelled(traits, task, source, (96, 256, 256))
    sizes: dict[str, Any] = {"width": 32, "layers": 1}
    weak = [call("guard", blank(words, 10 * seed + k + 1, **sizes), first, seed=10 * seed + k,
                 **HOW | {"epochs": 20}) for k in range(3)]  # fmt: skip
    plain = call("weak_labels", weak[0], second)
    q = [float(r["score"]) for r in plain]
    wrong = [1 - s if source.random() < 0.4 else s for s in q]
    between = call("weak_to_strong", middle, plain, seed=seed, **HOW)
    truth = [bool(r["label"]) for r in second]
    ceiling = call("guard", strong, second, seed=seed, **HOW)
    data = {
        "plain": plain, "confidence": plain, "product": plain,
        "ensemble": call("weak_labels", weak[0], second, dict(zip("bc", weak[1:]))),
        "sure": call("weak_labels", weak[0], second, sure=SURE),
        "mixed": call("weak_labels", weak[0], second, true_share=TRUE, seed=seed),
        "bootstrapped": call("weak_labels", between, second),
        "turned": with_scores(second, wrong),
    }  # fmt: skip
    found: dict[str, float] = {}
    for arm in ARMS:
        kind = f"weak_to_strong_{arm}" if arm in ("confidence", "product") else "weak_to_strong"
        student = call(kind, strong, data[arm], seed=seed, **HOW)
        report = call("performance_gap", weak[0], student, ceiling, test)
        for role in ("weak", "ceiling"):
            found[role] = report.get(f"accuracy {role}").value
        found[arm] = report.get("accuracy student").value
        gap = found["ceiling"] - found["weak"]
        found[f"gap recovered {arm}"] = (found[arm] - found["weak"]) / gap if gap else 0.0
    found["labels kept as sure"] = len(data["sure"]) / len(truth)
    for name, scores in (("labels", q), ("labels turned", wrong)):
        found[name] = sum((s > 0.5) is y for s, y in zip(scores, truth, strict=True)) / len(truth)
    return found


def run() -> Outcome:
    phrases = [w for several in SAID.values() for w in several]
    asked = [question for question, _ in TASKS.values()]
    words = vocabulary([" ".join([*NOUNS, *phrases, *asked, *VERBS, *FILLS, "the"])])
    found: dict[str, list[dict[str, float]]] = {t: [] for t in TASKS}
    for seed in SEEDS:
        source = random.Random(seed)
        traits = world(source)
        said = read(traits, source, 2000)
        strong = taught(blank(words, seed), said, seed)
        middle = taught(blank(words, seed, width=48, layers=1), said, seed)
        for task in TASKS:
            found[task].append(one(task, strong, middle, traits, words, seed))

    def mean(name: str, tasks: tuple[str, ...] = tuple(TASKS)) -> float:
        return sum(f[name] for t in tasks for f in found[t]) / (len(tasks) * len(SEEDS))

    def no_worse(arm: str) -> bool:
        ours, plain = f"gap recovered {arm}", "gap recovered plain"
        each = all(mean(ours, (t,)) >= mean(plain, (t,)) - 0.05 for t in TASKS)
        return each and mean(ours) > mean(plain)

    return Outcome(
        effects=[sum(f["gap recovered plain"] for f in both) / len(both)
                 for both in zip(*found.values())],
        seeds=SEEDS,
        holds={
            "ceiling 0.05 above the supervisor": mean("ceiling") > mean("weak") + 0.05,
            "confidence or ensemble recovers more": no_worse("confidence") or no_worse("ensemble"),
            "turned labels cost the student less than themselves": (
                mean("plain") - mean("turned") < mean("labels") - mean("labels turned")
            ),
        },
        figures={
            task: {n: [round(f[n], 4) for f in several] for n in several[0]}
            for task, several in found.items()
        },
    )  # fmt: skip
