"""Recover a damaged model: copy back the few trusted weights that restore its refusals.

H(x) is the hidden state of the last token of prompt x after block e = floor(share L) of L blocks.
With d_harm = mean H over prompts to refuse in the trusted model W_a, and d_ben = mean H over task
prompts in the damaged model W_f, each step
1. takes g = d/dW sum_batches -cos(mean H(batch; W), d_harm), summed over batches (and, outside
   rollback, over steps with `accumulate`: as the released code does);
2. calls a weight eligible when moving it to its trusted value descends: (W - W_a) g > 0. Norms,
   embeddings, head and blocks from e on never are;
3. of the eligible ones restores those with |g| above the n-th largest, n = ceil(rate N), N the
   number of weights of the whole model: W = W_a there, bit by bit.
After `warmup` steps the task is measured. If it lost more than `drop` of its value, everything
restarts from W_f in rollback mode: after each recovery step, among the weights just restored those
where the damaged value descends on -cos(mean H(task batch; W), d_ben) are eligible, and the
ceil(rollback_rate n_eligible) with largest |g| (again strictly above the last) are given back. The
result is the latest checkpoint whose task value lost no more than `drop`, else the one that lost
least. Alleviating the Fear of Losing Alignment in LLM Fine-tuning, arXiv 2504.09757.

Differences: prompts are padded on the right under a causal mask, which gives the same last-token
states; norms are skipped by any name, not only "layernorm"; the default task value is the mean
probability of a reference token, exp(-loss), so that no text need be generated.
The paper's baselines are merges: merge/linear with weights 1 - l and l (interpolation) or
1, 1 and -1 (RESTA).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from truing.context import current
from truing.core.batch.same_tokenizer import same_tokens
from truing.core.chat import prompt_ids
from truing.core.trunk import Trunk, share_of
from truing.core.weights import patched
from truing.errors import InputError
from truing.method import method
from truing.models import Loaded, Model, run_time_of
from truing.recover.repair_loop import Loop, Notes
from truing.recover.task_value import task_value
from truing.tables import Table, content_hash

Mask = dict[str, Tensor]
Named = Mapping[str, Tensor]  # weights of the first blocks


def direction_loss(hidden_BD: Tensor, direction_D: Tensor) -> Tensor:
    """-cos between the batch's mean hidden state and a direction; in [-1, 1]."""
    return -torch.nn.functional.cosine_similarity(hidden_BD.mean(0), direction_D, dim=0)


def eligible(weight: Tensor, target: Tensor, grad: Tensor) -> Tensor:
    """Where moving `weight` to `target` lowers the loss to first order: (w - t) g > 0."""
    diff = weight - target
    return ((diff > 0) & (grad > 0)) | ((diff < 0) & (grad < 0))


def nth_largest(sizes: Sequence[Tensor], n: int) -> float:
    """The n-th largest of all numbers, n clamped to their count; infinity for n = 0 or none."""
    best_N: Tensor | None = None
    for size in sizes:
        both_N = size.flatten().float()
        both_N = both_N if best_N is None else torch.cat([best_N, both_N])
        best_N = both_N.topk(min(n, len(both_N))).values
    return float(best_N[-1]) if best_N is not None and len(best_N) else math.inf


def choose(allowed: Mapping[str, Tensor], grads: Mapping[str, Tensor], n: int) -> Mask:
    """Among the allowed places, those whose |g| lies strictly above the n-th largest of them."""
    cut = nth_largest([grads[k].abs()[allowed[k]] for k in allowed], n)
    return {k: mask & (grads[k].abs() > cut) for k, mask in allowed.items()}


class Restorer:
    """The model under repair: current weights, the two originals, the moves of the algorithm."""

    def __init__(self, trunk: Trunk, damaged: Named, trusted: Named) -> None:
        self.trunk, self.weights = trunk, trunk.parameters()
        self.damaged, self.trusted = damaged, trusted
        for parameter in trunk.module.parameters():
            parameter.requires_grad_(False)
        for weight in self.weights.values():
            weight.requires_grad_(True)
        self.total = sum(p.numel() for p in trunk.module.parameters())

    def clear(self) -> None:
        """Forget all gradients."""
        for weight in self.weights.values():
            weight.grad = None

    def restart(self) -> None:
        """Back to the damaged weights."""
        self.clear()
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.damaged[name])

    def _move(
        self, towards: Mapping[str, Tensor], rate: Callable[[int], int], within: Mask | None
    ) -> Mask:
        grads = {n: cast(Tensor, w.grad) for n, w in self.weights.items()}
        allowed = {n: eligible(w.detach(), towards[n], grads[n]) for n, w in self.weights.items()}
        if within is not None:
            allowed = {n: m & within[n] for n, m in allowed.items()}
        chosen = choose(allowed, grads, rate(sum(int(m.sum()) for m in allowed.values())))
        with torch.no_grad():
            for name, mask in chosen.items():
                weight = self.weights[name]
                weight.copy_(torch.where(mask, towards[name], weight))
        return chosen

    def restore(self, rate: float) -> Mask:
        """One recovery move by the gradients at hand; the places that were restored."""
        return self._move(self.trusted, lambda _: math.ceil(rate * self.total), None)

    def give_back(self, rate: float, restored: Mask) -> Mask:
        """Give back part of what was just restored, by the gradients at hand."""
        return self._move(self.damaged, lambda found: math.ceil(rate * found), restored)

    def places(self) -> dict[str, Tensor]:
        """Flat places at which the weights now differ from the damaged ones."""
        return {
            n: (w.detach() != self.damaged[n]).flatten().nonzero()[:, 0]
            for n, w in self.weights.items()
        }


def _batches(loaded: Loaded, table: Table, n: int, size: int) -> list[list[list[int]]]:
    rows = table.rows[:n]
    ids = [prompt_ids(loaded.tokenizer, cast(str, row["prompt"])) for row in rows]
    return [ids[i : i + size] for i in range(0, len(ids), size)]


def _checked(table: Table, name: str) -> Table:
    """Prompts, of which there is one at least and none without text."""
    if not len(table):
        raise InputError(f"the table {name!r} is empty", where="recover/weight_restore")
    missing = [i for i, row in enumerate(table) if not row.get("prompt")]
    if missing:
        raise InputError(f"table {name!r} needs the field 'prompt'", where=table.place(missing[0]))
    return table


def _loop(
    model: Model,
    trusted: Model,
    refuse: Table,
    task: Table,
    layers: float,
    prompts: int,
    batch: int,
    task_check: dict[str, object] | None,
    key: str,
) -> Loop:
    """The algorithm on the weights of both models and the first `prompts` rows of both tables."""
    notes = Notes(key)
    # One after the other: of both originals only the weights that may be restored are kept.
    reference = trusted.load_module("float32", fresh=True)
    harmful = _batches(reference, refuse, prompts, batch)
    trunk = share_of(reference.module, layers)
    harm_D, wanted = notes.direction("harm", trunk, harmful), trunk.values()
    del reference, trunk
    before = share_of(model.load_module("float32", fresh=True).module, layers).values()
    own = model.load_module("float32", fresh=True)
    rows = task.rows[:prompts]
    return Loop(
        Restorer(share_of(own.module, layers), before, wanted),
        harm_D,
        direction_loss,
        refuse=harmful,
        task=_batches(own, task, prompts, batch),
        value=lambda name: task_value(own, rows, task_check, note=f"{key}/{name}"),
        notes=notes,
    )


@method(
    paper="alignment-recovery-rollback",
    needs=("weights", "hidden"),
    rows={"refuse": ("prompt",), "task": ("prompt",)},
    within={
        "rate": (0, 1),
        "rollback_rate": (0, 1),
        "steps": (1, None),
        "warmup": (1, None),
        "save_every": (1, None),
        "drop": (0, 1),
        "layers": "(0, 1]",
        "prompts": (1, None),
        "batch": (1, None),
    },
)
def weight_restore(
    model: Model,
    trusted: Model,
    refuse: Table,
    task: Table,
    *,
    rate: float = 0.002,
    rollback_rate: float = 0.2,
    steps: int = 20,
    warmup: int = 5,
    save_every: int = 5,
    drop: float = 0.05,
    layers: float = 4 / 6,
    prompts: int = 256,
    batch: int = 8,
    accumulate: bool = True,
    task_check: dict[str, object] | None = None,
    keep: str = "",
) -> Model:
    """Recover a damaged model: copy back the few trusted weights that restore its refusals.

    Args:
        model: the damaged model W_f.
        trusted: the aligned model W_a that it was tuned from.
        refuse: prompts that must be refused.
        task: prompts of the task to keep, with completions unless `task_check` is given.
        rate: weights restored a step, as a share of all weights of the model.
        rollback_rate: share of the eligible restored weights that is given back a step.
        steps: recovery steps in all.
        warmup: steps before the task is measured and the mode chosen.
        save_every: steps between checkpoints, each of which is measured on the task.
        drop: allowed relative loss of the task value.
        layers: share of the blocks, from the first on, that is looked at and restored.
        prompts: rows used of each table.
        batch: prompts in a batch.
        accumulate: sum gradients over steps too, outside rollback mode.
        task_check: component of kind "check" that scores generated answers to the task; None takes
            the mean probability of the completions' tokens.
        keep: "model" or "trusted": whose run-time changes the result carries, where they differ.
    """
    where = "recover/weight_restore"
    pair = {"model": model, "trusted": trusted}
    same_tokens(pair, where=where)
    kept = run_time_of(pair, keep, where=where)
    refuse = _checked(refuse.expect("prompt", where=where), "refuse")
    task = _checked(task.expect("prompt", where=where), "task")
    how = (rate, rollback_rate, steps, warmup, save_every, drop, accumulate)
    used = [refuse.rows[:prompts], task.rows[:prompts], layers, batch, task_check]
    facts = [where, model.weights_key, trusted.weights_key]
    key = content_hash([*facts, *used, *how], 8)
    loop = _loop(model, trusted, refuse, task, layers, prompts, batch, task_check, key)
    best = loop.recover(*how)
    entries = {
        name: (places.cpu(), loop.repair.trusted[name].flatten()[places].cpu().float())
        for name, places in best.items()
    }
    found = {name: [at.numpy(), values.numpy()] for name, (at, values) in entries.items()}
    key = content_hash([*facts, found], 8)
    result = patched(model, entries, current().folder / f"restored-{key}")
    return result.with_changes([*result.weight_changes, *kept]).with_licences([trusted.licence])
