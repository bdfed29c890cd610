"""Align a model by the rankings of a black box, which learns from what both agree on.

Each cycle, for every prompt x:

    1. the model draws n answers at different temperatures; the row's own `completion`, where it has
       one, stands beside them
    2. the black box ranks them (r_b), told what is good (`principles`) and shown fixed examples
       (`examples`, rows of kind group; two of our own without) and the latest agreements
    3. the model ranks them by mean log-probability (r_w)
    4. their longest common subsequence r_a, two answers or more, becomes an example for 2
    5. the model is trained on r_b by RRHF or PRO

until the cycles are over or all rankings agree. The black box is any model that answers prompts,
such as a served one; its letters are shuffled for every question against bias for a position. An
answer that is no ordering of all letters is asked for once more under other letters, then the
prompt is left out of the cycle; both are counted.

Rankings in `held_out` are never trained on: RRHF's or PRO's loss on them is measured in each cycle,
and these rows stay the same, so that cycles can be compared by it. Which update is kept
(`keep_best`), and when to stop (`patience`), is decided for each cycle by itself.

Source: "CycleAlign: Iterative Distillation from Black-box LLM to White-box Models for Better Human
Alignment", arXiv 2310.16271. Differences: the cycle goes round all prompts, not round one prompt
at a time, so that answers are drawn and trained on together; the temperatures, the wording and the
two fixed examples are our own. The latest `kept` agreements are shown, since old ones may hold
errors of an earlier model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, cast

from truing.context import current
from truing.core.generate import generate
from truing.core.held_out import INPUT, watching
from truing.core.judging.judge_form import shown
from truing.core.objective import objective_of
from truing.core.trainer.preflight import Promised
from truing.core.trainer.train_text import train_model
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.own_checks import checks
from truing.principles import Principles
from truing.readings import last_answer
from truing.tables import Row, Table, as_prompt
from truing.train.distill.ranker import LETTERS, Judge, asking, examples_of, own_orders
from truing.train.preference.pro import pro
from truing.train.preference.rrhf import rrhf

WHERE = "train/cyclealign"
TEMPERATURES = [0.6, 1.0]


def agreement(black: Sequence[int], white: Sequence[int]) -> list[int]:
    """Longest common subsequence of two rankings; of equals that which the black box puts first."""
    rows, columns = len(black), len(white)
    best: list[list[tuple[int, ...]]] = [[()] * (columns + 1) for _ in range(rows + 1)]
    for i in reversed(range(rows)):
        for j in reversed(range(columns)):
            options = [best[i + 1][j], best[i][j + 1]]
            if black[i] == white[j]:
                options.append((i, *best[i + 1][j + 1]))
            best[i][j] = max(options, key=lambda at: (len(at), [-p for p in at]))
    return [black[i] for i in best[0][0]]


def asked_of(data: Table) -> list[Row]:
    """Rows with "prompt", and "completion" where one has an answer; a dialogue's is its last."""
    rows = data.expect("prompt", "example", where=WHERE)
    return [as_prompt(last_answer(row)) for row in rows]


def answers_of(
    model: Model, rows: Sequence[Row], name: str, n: int, temperatures: list[float], length: int
) -> list[dict[str, bool]]:
    """Different answers to each row's prompt, its own last, and whether each came to its end.

    Args:
        name: of the random numbers that they are drawn by.
        temperatures: dealt to the n answers in turn.
    """
    prompts = [row["prompt"] for row in rows]
    ended: list[dict[str, bool]] = [{} for _ in rows]
    for i, t in enumerate(temperatures):
        share = len(range(i, n, len(temperatures)))
        seed = current().stream(f"{name}/{i}" if i else name) % 2**31
        drawn = generate(model, prompts, n=share, temperature=t, max_tokens=length, seed=seed)
        for known, some in zip(ended, drawn, strict=True):
            # Of equal texts the last one counts.
            known |= {c.text: c.finish == "stop" for c in some if c.text.strip()}
    for row, some in zip(rows, ended, strict=True):
        if row.get("completion"):
            some[str(row["completion"])] = row.get("finished") is not False
    return ended


def cycle(
    model: Model,
    data: Table,
    judge: Judge,
    *,
    cycles: int,
    n: int,
    temperatures: list[float],
    max_tokens: int,
    back_end: str,
    training: dict[str, object],
    held_out: Table | None = None,
) -> Model:
    """The loop of the module's docstring."""
    rows = asked_of(data)
    questions = [shown(r) for r in rows]
    spec = objective_of(pro if back_end == "pro" else rrhf)
    for turn in range(cycles):
        ended = answers_of(model, rows, f"cycle/{turn}", n, temperatures, max_tokens)
        answers = [list(some) for some in ended]
        at = [i for i, some in enumerate(answers) if len(some) >= 2]
        ranked = judge.rank([questions[i] for i in at], [answers[i] for i in at], f"letters/{turn}")
        groups: list[Row] = []
        asked = len(at)
        agreed, same = 0, 0
        at, ranked = [i for i, o in zip(at, ranked, strict=True) if o], [o for o in ranked if o]
        owns = own_orders(model, [rows[i]["prompt"] for i in at], [ended[i] for i in at])
        for i, order, own in zip(at, ranked, owns, strict=True):
            shared = agreement(order, own)
            if len(shared) >= 2:
                judge.learn(questions[i], answers[i], shared)
                agreed += 1
            same += order == own
            groups.append(
                {
                    "prompt": rows[i]["prompt"],
                    "completions": answers[i],
                    "scores": [float(len(order) - order.index(k)) for k in range(len(order))],
                    "finished": list(ended[i].values()),
                    "lineage": {"parents": [rows[i]["id"]], "generator": model.name},
                }
            )
        current().metric(
            cycle=turn + 1,
            ranked=len(groups),
            not_ranked=len(rows) - len(groups),
            agreements=agreed,
            same=same,
        )
        if not groups:
            raise InputError(
                "the black box ranked no answers",
                where=WHERE,
                seen=f"{asked} prompts with two different answers",
                fix="Look at what it replies: it must be letters in order, such as B > A",
            )
        if same == len(groups):
            break
        model = train_model(spec, model, Table("group", groups), None, training, held_out=held_out)
    return model


def _check(settings: Mapping[str, object], tables: Mapping[str, Table]) -> None:
    """What `Method.check` asks before anything runs."""
    n, temperatures = cast(int, settings["n"]), cast("list[float]", settings["temperatures"])
    if not 1 <= len(temperatures) <= n or not all(0 < t < math.inf for t in temperatures):
        raise InputError(
            "setting 'temperatures' must be at least one number and at most n, all above 0",
            where=WHERE,
            seen=temperatures,
            fix="Give one for all answers, such as [0.8], or several, dealt to them in turn",
        )
    at_hand = {name: t for name, t in tables.items() if not isinstance(t, Promised)}
    if "data" in at_hand:
        own = any(row.get("completion") for row in asked_of(at_hand["data"]))
        most = len(LETTERS) - own
        if n > most:
            raise InputError(
                f"setting 'n' must be at most {most} where rows bring an answer of their own: the "
                f"black box is shown {len(LETTERS)} at once",
                where=WHERE,
                seen=n,
            )
    if "examples" in at_hand:
        examples_of(at_hand["examples"].expect("group", where=WHERE))


@method(
    paper="cyclealign",
    needs=("weights", "logprob", "generate"),
    rows={"data": ("prompt", "example"), "examples": ("group",), "held_out": ("group", "pair")},
    within={
        "cycles": (1, None),
        "n": (2, 10),
        "kept": (0, None),
        "max_tokens": (1, None),
        "epochs": "(0, inf)",
        "batch": (1, None),
        "lr": "[0, inf)",
        "rank": (0, None),
        "layers": (0, None),
        "eval_every": (0, None),
        "patience": (0, None),
    },
)
@checks(_check)
def cyclealign(
    model: Model,
    data: Table,
    judge: Model,
    principles: Principles | None = None,
    examples: Table | None = None,
    held_out: Table | None = None,
    *,
    cycles: int = 3,
    n: int = 4,
    back_end: Literal["rrhf", "pro"] = "rrhf",
    kept: int = 2,
    temperatures: list[float] = TEMPERATURES,
    max_tokens: int = 128,
    epochs: float = 1.0,
    batch: int = 8,
    lr: float = 0.0,
    rank: int = 16,
    layers: int = 0,
    eval_every: int = 0,
    keep_best: bool = False,
    patience: int = 0,
) -> Model:
    """Align a model by the rankings of a black box, which learns from what both agree on.

    Args:
        held_out: ranked answers that are not trained on, or pairs, of which the chosen one stands
            first: the loss on them is measured in each cycle.
        cycles: most rounds of drawing, ranking and training.
        n: answers drawn to each prompt, 2 to 10, or to 9 where rows bring one of their own.
        back_end: how rankings are learnt.
        kept: latest agreements that the black box is shown.
        temperatures: that answers are drawn at, dealt to the n in turn; of one number all are.
        max_tokens: longest answer.
        epochs: passes over the rankings of a cycle.
        batch: prompts of one update.
        lr: learning rate; 0 takes 2e-4 for adapters and 1e-5 for a full fine-tune.
        rank: of the adapter; 0 trains all weights.
        layers: train the top blocks alone, so many, by an adapter on them or in full; 0 trains all.
        eval_every: updates between two measurements of the held-out loss; 0 makes five in a cycle.
        keep_best: go on from the update of a cycle with the lowest held-out loss, not its last.
        patience: end a cycle's training after so many measurements without a new lowest held-out
            loss.
    """
    watch = watching(held_out, WHERE, eval_every=eval_every, keep_best=keep_best, patience=patience)
    if held_out is not None:
        held_out = held_out.expect("group", "pair", where=f"{WHERE} {INPUT}")
    data = data.expect("prompt", "example", where=WHERE)
    black_box = Judge(asking(judge, WHERE), kept)
    if principles is not None:
        black_box.good = f"A good answer keeps to these rules:\n{principles.as_text()}\n"
    if examples is not None:
        black_box.fixed = examples_of(examples.expect("group", where=WHERE))
    training: dict[str, object] = {"epochs": epochs, "batch": batch, "lr": lr, "rank": rank}
    training |= {"layers": layers, **vars(watch)}
    return cycle(
        model,
        data,
        black_box,
        cycles=cycles,
        n=n,
        temperatures=temperatures,
        max_tokens=max_tokens,
        back_end=back_end,
        training=training,
        held_out=held_out,
    ).called(f"{model.name}+cyclealign")
