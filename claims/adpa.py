"""Does a teacher's advantage align a small student better than the teacher's text or DPO does?

A closed world: answers describe a thing and may break three rules (at most ten words, no word of a
forbidden list, a fixed sign-off), each with probability one half. Pairs are two such answers that
break different numbers of rules. Teacher (width 128) and student (width 64), two layers each, are
trained from nothing on the chosen answers; DPO makes the teacher an aligned one. The student then
gets, from the same pairs and with the same number of updates, rate and batch: DPO, DCKD, or ADPA;
ADPA+ is DCKD and then ADPA. All weights are trained.

The effect is the share of answers to 200 prompts about other things that keep all rules, drawn at
temperature 1, under ADPA less under supervised tuning alone. The implicit reward is the sum over an
answer of log T_dpo - log T_ref, times beta.

The claim asks for 0.10 over supervised tuning; for ADPA+ no worse than ADPA; for ADPA above DPO on
the student less 0.02; for DCKD above supervised tuning; and for the teacher's implicit reward of
the student's answers to rise by half its spread.
"""

from __future__ import annotations

import random
from statistics import mean, stdev

from _tiny import Outcome, Row, Table, blank, call, drawn, taught, vocabulary

from truing.core.judging.rewards import implicit_rewards
from truing.models import Model

TITLE = "A teacher's advantage over its own reference aligns a small student"
METHOD = "train/adpa"
MODEL = "a decoder of 0.12M, from nothing"
EFFECT = "share of answers that keep all rules under ADPA, less that under supervised tuning"
MARGIN = 0.10
MINUTES = 3
NEEDS_GPU = False
SEEDS = (0, 1, 2)
PAIRS, ASKED, UPDATES = 256, 200, 40
LR, BATCH, BETA = 1e-4, 16, 0.1
TRAINING = {"rank": 0, "lr": LR, "batch": BATCH, "steps": UPDATES}
THINGS = [
    "lamp", "chair", "table", "clock", "spoon", "plate", "knife", "bowl", "cup", "shelf", "box",
    "rope", "coat", "hat", "shoe", "scarf", "glove", "ball", "kite", "drum", "flute", "bell",
    "mirror", "brush", "comb", "bag", "belt", "ring", "tent", "map", "pen", "desk", "bench",
    "stool", "vase", "jar", "jug", "pan", "pot", "oven",
]  # fmt: skip
LOOKS = [
    "small", "large", "plain", "round", "heavy", "light", "old", "new", "strong", "thin",
    "smooth", "warm",
]  # fmt: skip
FORBIDDEN = [
    "ugly", "stupid", "silly", "nasty",
]  # fmt: skip
FORMS = ("describe the {}", "tell me about the {}", "say something of the {}")
SIGN_OFF = "thank you"


def answer(source: random.Random, thing: str) -> str:
    """An answer that breaks each of the three rules with probability one half."""
    long, rude, curt = (source.random() < 0.5 for _ in range(3))
    looks = source.sample(LOOKS, 5 if long else 2)
    if rude:
        looks[source.randrange(len(looks))] = source.choice(FORBIDDEN)
    text = f"the {thing} is {' and '.join(looks)} ."
    return text if curt else f"{text} {SIGN_OFF}"


def kept(text: str) -> int:
    """How many of the three rules an answer keeps."""
    words = text.split()
    ends = text.endswith(f". {SIGN_OFF}")
    return (len(words) <= 10) + (not set(words) & set(FORBIDDEN)) + ends


def pairs(source: random.Random, things: list[str], n: int) -> list[Row]:
    rows: list[Row] = []
    while len(rows) < n:
        thing = source.choice(things)
        best, worst = sorted((answer(source, thing) for _ in range(2)), key=kept, reverse=True)
        if kept(best) > kept(worst):
            prompt = source.choice(FORMS).format(thing)
            rows.append({"prompt": prompt, "chosen": best, "rejected": worst})
    return rows


def one(seed: int) -> dict[str, dict[str, float]]:
    source = random.Random(f"adpa/{seed}")
    things = source.sample(THINGS, len(THINGS))
    data = Table("pair", pairs(source, things[:24], PAIRS))
    # Names of the other things are learnt here, from answers that no preference touches.
    named: list[Row] = [
        {"prompt": form.format(t), "completion": answer(source, t)}
        for t in things
        for form in FORMS
    ]
    examples = [*named, *({"prompt": r["prompt"], "completion": r["chosen"]} for r in data)]
    forms = vocabulary([
        *(f.format("") for f in FORMS), *THINGS, *LOOKS, *FORBIDDEN, SIGN_OFF, "is and . the",
    ])  # fmt: skip

    teacher_ref = taught(blank(forms, seed, width=128), examples, seed, epochs=8)
    teacher = call("train/dpo", teacher_ref, data, seed=seed, beta=BETA, **TRAINING)
    student = taught(blank(forms, seed), examples, seed, epochs=8)

    def adpa(start: Model) -> Model:
        return call(
            "train/adpa", start, data, teacher=teacher, teacher_reference=teacher_ref,
            seed=seed, max_tokens=24, **TRAINING,
        )  # fmt: skip

    copied = call("train/dckd", student, data, teacher=teacher, seed=seed, **TRAINING)
    models = {
        "teacher, reference": teacher_ref,
        "teacher": teacher,
        "sft": student,
        "dpo": call("train/dpo", student, data, seed=seed, beta=BETA, **TRAINING),
        "dckd": copied,
        "adpa": adpa(student),
        "adpa+": adpa(copied),
    }
    asked = [source.choice(FORMS).format(source.choice(things[24:])) for _ in range(ASKED)]
    found: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        texts = [t for (t,) in drawn(model, asked, seed=seed)]
        rows: list[Row] = [{"prompt": p, "completion": t} for p, t in zip(asked, texts)]
        rewards = [BETA * r for r in implicit_rewards(teacher, teacher_ref, rows)]
        found[name] = {
            "success": mean(float(kept(t) == 3) for t in texts),
            "reward": mean(rewards),
            "spread": stdev(rewards),
        }
    return found


def run() -> Outcome:
    found = [one(seed) for seed in SEEDS]
    success = {name: [f[name]["success"] for f in found] for name in found[0]}
    rate = {name: mean(values) for name, values in success.items()}
    rises = [(f["adpa"]["reward"] - f["sft"]["reward"]) / f["sft"]["spread"] for f in found]
    return Outcome(
        effects=[a - s for a, s in zip(success["adpa"], success["sft"])],
        seeds=SEEDS,
        holds={
            "ADPA+ no worse than ADPA": rate["adpa+"] >= rate["adpa"],
            "ADPA above DPO on the student, less 0.02": rate["adpa"] > rate["dpo"] - 0.02,
            "DCKD above supervised tuning": rate["dckd"] > rate["sft"],
            "implicit reward rises by half its spread": mean(rises) >= 0.5,
        },
        figures={
            "share that keeps all rules": success,
            "implicit reward": {n: [round(f[n]["reward"], 4) for f in found] for n in success},
            "rise of the implicit reward over its spread": rises,
        },
    )
