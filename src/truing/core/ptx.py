"""PPO-ptx: text of its own that a policy learns beside each update from its answers.

    loss of an update  +  ptx * mean over the tokens of a batch of the text of -log pi(token)

The text (input `ptx_data`) is examples, whose answers carry loss, or raw text, all tokens of which
do but the first; both are cut at `max_tokens`, and counted. Each update of the policy takes the
next ceil(batch / minibatches) rows of permutations laid end to end, which seed and update alone
decide, so that nothing of it has to be saved to resume. It is differentiated apart from the
answers, at temperature 1. While the critic learns alone there is none.

Source: "Training language models to follow instructions with human feedback", arXiv 2203.02155.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from truing.context import Context, Json, current
from truing.core import distributed
from truing.core.chat import receipt
from truing.core.engine import Order, Part
from truing.core.logprob import measure
from truing.core.measure import lengths
from truing.core.objective import Objective
from truing.core.row_kinds import as_kind, summed
from truing.core.training_rows import Reader
from truing.core.tree import Node, pack
from truing.errors import InputError
from truing.tables import Table

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from truing.core.online import Online
    from truing.core.online_training import OnlineTraining
    from truing.core.start import Start

INPUT = "ptx_data"


def takes(spec: Online) -> bool:
    """True for methods whose `ptx` weighs the likelihood of text: not a divergence on it."""
    return bool(spec.given) and "ptx" in spec.settings and not spec.anchored({"ptx": 1.0})


def check_text(table: Table, settings: Mapping[str, object], where: str) -> None:
    """Raise an InputError for rows that are no text to learn from, or that count for nothing."""
    if not settings["ptx"]:
        raise InputError(
            f"setting 'ptx' is 0, so that {INPUT} counts for nothing",
            where=where,
            seen=table.source,
            fix="Give ptx a weight, such as 1",
        )
    as_kind(table, "example", f"{where} {INPUT}", texts=True)


def text_trees(
    table: Table, tokenizer: PreTrainedTokenizerBase, limit: int, where: str
) -> tuple[list[Node], dict[str, Json]]:
    """The rows as trees of at most `limit` tokens, and what to say of them."""
    rows, notes = as_kind(table, "example", where, texts=True)
    spec = Objective(where, text_trees, "token", ("logp",), "example", {})
    reader = Reader(tokenizer, spec, limit)
    trees = [unit.tree() for unit in reader.read(rows)]
    return trees, summed({n: c for n, c in sorted(reader.counts.items()) if c}, notes)


class Ptx:
    """The text and its share in each update.

    Args:
        trees: the text.
        weight: of its mean negative log-probability.
        rows: trees of an update.
        notes: what to say of it.
    """

    def __init__(
        self, trees: Sequence[Node], weight: float, rows: int, notes: Mapping[str, Json]
    ) -> None:
        self.trees, self.weight, self.notes = trees, weight, dict(notes)
        # Permutations of its own: a table of as many prompts must not go in step with it.
        self.order = Order(len(trees), rows, Context(seed=current().stream("ptx")))

    @property
    def largest(self) -> int:
        """Tokens of the longest text."""
        return max(tree.size for tree in self.trees)

    def parts(self, module: nn.Module, step: int, units: int, budget: int) -> Iterator[Part]:
        """This process's micro-batches, of `budget` tokens, of the text of update `step`.

        Args:
            units: weight of the update's other parts, which the engine divides all of them by.
        """
        end = (step + 1) * self.order.batch
        trees = [self.trees[i] for i in self.order.step(step, end)]
        tokens = float(lengths(trees).sum())
        own = trees[distributed.share([tree.size for tree in trees])]
        device = next(module.parameters()).device
        for packed in pack(own, budget, share=True) if own else []:
            found = measure(module, packed.to(device), ("logp",))
            nats = -(found["logp"] * found["mask"]).sum()
            seen = {"ptx_nats": (nats.detach(), float(found["mask"].sum()))}
            yield Part(nats * (self.weight * units / tokens), 0.0, seen)


def text_beside(
    table: Table | None, values: Mapping[str, object], settings: OnlineTraining, start: Start
) -> Ptx | None:
    """The text that is learnt beside, read, and shown as it will be learnt; None without any."""
    if table is None:
        return None
    where, tokenizer = f"{start.where} {INPUT}", start.loaded.tokenizer
    trees, counts = text_trees(table, tokenizer, start.limit, where)
    if distributed.leads():
        shown = receipt(tokenizer, trees, 1)
        print(f"{where}: loss falls on >>>these tokens<<<:\n{shown}", file=sys.stderr)
    rows = math.ceil(settings.batch / settings.minibatches)
    notes = {"ptx_rows": len(trees), **{f"ptx_{n}": v for n, v in counts.items()}}
    return Ptx(trees, float(cast(float, values["ptx"])), rows, notes)
