"""Does selecting for complexity, quality and difference keep junk out, and teach more?

A pool of 240 instructions with answers: 120 as written (Alpaca, from TRUING_DATA), 72 with the
answer's words shuffled or cut off, 48 near-copies. Complexity is the length of the instruction (at
most 20 words, so that length alone does not win), quality the inverse perplexity of the answer
under the model to be tuned. 60 rows are selected by deita and at random; SmolLM2-135M-Instruct is
tuned on either for one pass, and the loss on 40 other answers is compared. The effect is the
relative gain in that loss, one value for each seed of pool and tuning.

The claim asks for at least 2 %; for a share of junk in the selection of at most a third of the
pool's; and for no near-copy beside its original.
"""

from __future__ import annotations

import random
from typing import cast

from truing.claims import Outcome, step
from truing.method import methods
from truing.models import Model
from truing.recover.task_value import token_probability
from truing.tables import Row, Table

TITLE = "Data selected for complexity, quality and difference keeps junk out and teaches more"
METHOD = "select/deita"
MODEL = "SmolLM2-135M-Instruct"
EFFECT = "relative gain in held-out loss of tuning on 60 selected rows over 60 random ones"
MARGIN = 0.02
MINUTES = 8
NEEDS_GPU = False
SEEDS = (0, 1, 2)
SELECT = 60


def clean_rows() -> list[Row]:
    """Short instructions with answers, as written."""
    rows = []
    for r in Table.read("alpaca"):
        answer = " ".join(str(r.get("completion") or "").split()[:40])
        asked = str(r.get("prompt") or "")
        if len(answer.split()) >= 8 and 3 <= len(asked.split()) <= 30:
            rows.append({"prompt": asked, "completion": answer})
    return rows


def damaged(row: Row, source: random.Random) -> Row:
    words = str(row["completion"]).split()
    if source.random() < 0.5:
        source.shuffle(words)
    else:
        words = words[: max(2, len(words) // 4)]
    return row | {"completion": " ".join(words), "sort": "junk"}


def pool(seed: int) -> tuple[Table, Table]:
    """240 rows with their sort, and 40 clean ones held out."""
    source = random.Random(seed)
    rows = source.sample(clean_rows(), 120 + 72 + 40)
    good = [r | {"sort": "clean"} for r in rows[:120]]
    junk = [damaged(r, source) for r in rows[120:192]]
    copies = [
        r | {"prompt": str(r["prompt"]).rstrip(".?! ") + " please", "sort": "copy"}
        for r in source.sample(good, 48)
    ]
    mixed = [*good, *junk, *copies]
    source.shuffle(mixed)
    return Table("example", mixed), Table("example", rows[192:])


def loss(model: Model, held: Table) -> float:
    import math

    return -math.log(token_probability(model.load_module(), held.rows))


def junk(rows: Table) -> float:
    return sum(r["sort"] == "junk" for r in rows) / len(rows)


def one(seed: int, base: Model) -> dict[str, float]:
    data, held = pool(seed)
    with step(seed):
        made = methods["deita"](
            data, base, m=SELECT, tau=0.9,
            complexity={"use": "length", "of": "prompt", "most": 20},
            quality={"use": "perplexity", "of": "completion", "sign": "low", "max_length": 64},
        )  # fmt: skip
    chosen = cast(Table, made)
    drawn = Table("example", random.Random(seed + 100).sample(data.rows, len(chosen)))
    found = {"junk_pool": junk(data), "junk_deita": junk(chosen), "junk_random": junk(drawn)}
    answers = [str(r["completion"]) for r in chosen]
    found["copies"] = float(len(answers) - len(set(answers)))
    found["rows"] = float(len(chosen))
    for name, rows in (("deita", chosen), ("random", drawn)):
        with step(seed):
            made = methods["sft"](base, rows, epochs=1, lr=2e-4, rank=16, batch=8, max_length=128)
            found[f"loss_{name}"] = loss(cast(Model, made), held)
    found["loss_base"] = loss(base, held)
    return found


def run() -> Outcome:
    base = Model.open("smollm2-135m-instruct")
    found = [one(seed, base) for seed in SEEDS]
    return Outcome(
        effects=[(f["loss_random"] - f["loss_deita"]) / f["loss_random"] for f in found],
        seeds=SEEDS,
        holds={
            "junk at most a third of the pool's share": all(
                f["junk_deita"] <= f["junk_pool"] / 3 for f in found
            ),
            "no copies": all(f["copies"] == 0 for f in found),
        },
        figures={n: [round(f[n], 4) for f in found] for n in found[0]},
    )
