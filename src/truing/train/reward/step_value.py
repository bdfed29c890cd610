"""Train a value model: what each step of an answer is still to come to, read off a frozen trunk.

    loss  mean over rows of 1/n sum_t (V_t - v_t)^2,   V_t = w . relu(A h_t + a) + b

h_t is the last hidden state of the token that closes step t (as train/process_reward has it), v_t
the row's label, n how many steps it has. A is D x D, all of the head is float32, and V has no
bounds: labels in hindsight, r_t + gamma^(n-t) z (synthesize/step_labels), may pass 1. The model
itself, a language model or a process reward model, is not changed: its states are computed once,
kept in memory (D numbers a step) and only the head is trained. One recipe serves rewards that can
be verified and those that cannot; which it was is in the labels alone.

Scores of such a model are values as they are, where those of process_reward go through a sigmoid;
`core.judging.answer_steps.step_values` is the one way to ask either.

Source: "Simultaneous Multi-objective Alignment Across Verifiable and Non-verifiable Rewards", arXiv
2510.01167. Difference: batch is 32 rows at once, not 16 and 16.

Shapes: U rows, T steps of a row, M steps of several rows, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from truing.context import current
from truing.core.batch.reading import read_units
from truing.core.engine import train
from truing.core.held_out import INPUT, HeldOut, watching
from truing.core.logprob import states
from truing.core.modelfiles.reach import width_of
from truing.core.objective import Loss, Measurements, Objective
from truing.core.passes.scoring import ScoreHead
from truing.core.plain_task import PlainTask
from truing.core.reference import SWEEP
from truing.core.trainer.held_out_rows import told_apart
from truing.core.training import Training
from truing.core.tree import Node, pack
from truing.datasets import licence_of
from truing.method import method
from truing.models import Loaded, Model
from truing.tables import Table, content_hash

NAME = "step_value"


def squared_errors(values: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """Mean over the steps of each row of (V_t - v_t)^2, [U]; values and labels are [T] each."""
    return torch.stack([(v - y).square().mean() for v, y in zip(values, labels, strict=True)])


def closing_states(loaded: Loaded, trees: Sequence[Node]) -> list[Tensor]:
    """States [T, D] of the tokens that close the steps of each tree, in float32."""
    found: list[Tensor] = []
    for packed in pack(trees, SWEEP, share=True, device=loaded.device):
        # Not in inference mode: what is made there can take no part in training.
        with torch.no_grad(), loaded.run_time():
            rows_ND = states(loaded.module, packed.to(loaded.device)).float()
        rows_MD = rows_ND[packed.place_M.to(rows_ND.device)].cpu()
        for index_T, mask_T in zip(packed.index_UKT[:, 0], packed.mask_UKT[:, 0], strict=True):
            found.append(rows_MD[index_T[mask_T > 0]])
        current().progress(len(found), len(trees), "states of steps")
    return found


def new_head(loaded: Loaded, seed: int) -> ScoreHead:
    """A head of values with a layer as wide as the states, drawn as torch draws linear layers."""
    width = width_of(loaded.module)
    head = ScoreHead(width, width)
    source, bound = torch.Generator().manual_seed(seed), 1 / math.sqrt(width)
    for parameter in head.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=source)
    return head.to(loaded.device)


def _unread(m: Measurements) -> Loss:
    """Stands where an objective has its loss: rows are read as one's are, and nothing more."""
    nothing_U = torch.zeros(len(m.mask_UKT))
    return Loss(nothing_U, nothing_U)


def task_of(
    loaded: Loaded, head: ScoreHead, data: Table, max_length: int, where: str = NAME
) -> PlainTask:
    """The head on the states of these rows, which are computed here."""
    data = data.expect("steps", where=where)
    # Only its rows are read: the head alone is trained, on states that are computed once.
    spec = Objective(where, _unread, "batch", ("scores",), "steps", {"labels": None})
    units, notes = read_units(spec, loaded, data, max_length)
    current().metric(**notes)
    rows = closing_states(loaded, [u.tree() for u in units])
    labels = [torch.tensor(u.numbers["labels"], device=loaded.device) for u in units]

    def losses(numbers: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        given = [labels[i] for i in numbers]
        value_M = head(torch.cat([rows[i] for i in numbers]).to(loaded.device))
        made = value_M.split([len(v) for v in given])
        return squared_errors(made, given), {"value": torch.stack([v.mean() for v in made])}

    return PlainTask(NAME, head, len(units), losses, row_names=[u.id for u in units])


@method(
    paper="mah-dpo",
    needs=("weights", "logprob"),
    rows={"data": ("steps",), "held_out": ("steps",)},
    within={
        "epochs": "(0, inf)",
        "lr": "[0, inf)",
        "batch": (1, None),
        "max_length": (8, None),
        "eval_every": (0, None),
        "patience": (0, None),
    },
)
def step_value(
    model: Model,
    data: Table,
    held_out: Table | None = None,
    *,
    epochs: float = 3.0,
    lr: float = 5e-5,
    batch: int = 32,
    max_length: int = 1024,
    eval_every: int = 0,
    keep_best: bool = False,
    patience: int = 0,
) -> Model:
    """Train a value model: what each step of an answer is still to come to.

    Args:
        held_out: rows like those of `data` that are not trained on, whose loss is measured.
        epochs: passes over the rows; may be a fraction.
        lr: peak learning rate of the head.
        batch: rows of one update.
        max_length: of a prompt and its steps; longer rows are cut there and counted.
    """
    data = data.expect("steps", where=NAME)
    settings = Training(epochs=epochs, lr=lr, batch=batch)
    settings.check(NAME)
    watch = watching(held_out, NAME, eval_every=eval_every, keep_best=keep_best, patience=patience)
    loaded, context = model.load_module("float32"), current()
    key = content_hash([NAME, vars(settings), max_length, model.key, data.key, context.seed], 8)
    head = new_head(loaded, context.stream("head") % 2**31)
    task, held = task_of(loaded, head, data, max_length), None
    if held_out is not None:
        with told_apart():
            apart = task_of(loaded, head, held_out, max_length, f"{NAME} {INPUT}")
        held = HeldOut(apart, [range(len(apart))], watch)
        key = content_hash([key, held_out.key, vars(watch)], 8)
    train(task, settings, key=key, peak=lr, held=held)
    made = head.added_to(model, context.folder / f"{NAME}-{key}", "steps")
    licence = licence_of([data])
    made = made.with_licences([licence] if licence else [])
    return made.called(f"{model.name}+{NAME}")
