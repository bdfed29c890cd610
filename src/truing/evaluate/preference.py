"""How often a model finds the chosen answer likelier than the rejected one, on held-out pairs.

    s(y) = lp(y|x) / |y|          accuracy = mean_i [s(y_w) > s(y_l)]  (ties count one half)
    margin = mean_i (s(y_w) - s(y_l))   in nats per token

lp is the log-probability of the answer with the token that ends it. It is divided by the length,
as in SimPO (arXiv 2405.14734), so that short answers do not win by being short. The measure knows
nothing of a training objective, so models from any of them, steered, prompted or merged ones too,
compare: edits, prefix and rewriter are in force, decoders are no part of it.
Intervals: Wilson for the accuracy, bootstrap over pairs for the margin, in which the pairs of one
prompt go together. Our own measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from truing.context import Json, current
from truing.core.batch.training_rows import Reader, Unit
from truing.core.chat import Prompt
from truing.core.generate import rewritten
from truing.core.logprob import measure
from truing.core.objective import Objective
from truing.core.stats import mean_of
from truing.core.tree import pack
from truing.errors import InputError
from truing.method import method
from truing.models import Loaded, Model
from truing.reports import Measure, Report
from truing.tables import Row, Table, prompt_of

BUDGET = 2048  # tokens computed at once


def accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> list[float]:
    """1 where the chosen answer scores higher, 0 where it does not, 0.5 on ties."""
    return [0.5 if c == r else float(c > r) for c, r in zip(chosen, rejected, strict=True)]


def mean_logps(loaded: Loaded, units: Sequence[Unit]) -> list[list[float]]:
    """Mean log-probability of each answer of each unit, [unit][answer], in nats per token."""
    found: list[list[float]] = []
    with loaded.run_time():
        for packed in pack([u.tree() for u in units], BUDGET, share=True, device=loaded.device):
            made = measure(loaded.module, packed.to(loaded.device), grad=False)
            mean_UK = made["logp"].sum(-1) / made["mask"].sum(-1)
            found += mean_UK.tolist()
            current().progress(len(found), len(units), "pairs")
    return found


def _pairs(loaded: Loaded, data: Table, max_length: int) -> tuple[list[Unit], dict[str, Json]]:
    spec = Objective("evaluate/preference", accuracy, "pair", ("logp",), "pair", {})
    reader = Reader(loaded.tokenizer, spec, max_length)
    asked = rewritten(loaded.model, [cast(Prompt, prompt_of(row)) for row in data])
    rows = [{**row, "prompt": prompt} for row, prompt in zip(data, asked, strict=True)]
    units = reader.read(data.remade("pair", rows, range(len(data))))
    return units, {n: c for n, c in sorted(reader.counts.items()) if c}


@method(needs=("logprob", "weights"), rows={"data": ("pair",)}, within={"max_length": (8, None)})
def preference(model: Model, data: Table, *, max_length: int = 1024) -> Report:
    """How often a model finds the chosen answer likelier than the rejected one, on held-out pairs.

    Args:
        max_length: longest row; answers are cut there.
    """
    loaded = model.load_module()
    data = data.expect("pair", where="evaluate/preference")
    units, counts = _pairs(loaded, data, max_length)
    scores = mean_logps(loaded, units)
    chosen, rejected = [s[0] for s in scores], [s[1] for s in scores]
    won = accuracy(chosen, rejected)
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    if not won:
        raise InputError("no pair to compare", where="evaluate/preference")
    by_id = {str(r["id"]): r for r in data}
    asked = [by_id[u.id]["prompt"] for u in units]
    measures = [
        Measure("preference", *mean_of(won, asked), "share", "", "higher"),
        Measure("margin", *mean_of(margins, asked, None), "nats per token", "", "higher"),
    ]
    rows: list[Row] = [
        {
            "prompt": by_id[u.id]["prompt"],
            "chosen": by_id[u.id]["chosen"],
            "rejected": by_id[u.id]["rejected"],
            "margin": m,
            "lineage": {"parents": [u.id]},
        }
        for u, m in zip(units, margins, strict=True)
    ]
    facts: dict[str, Json] = {"kind": "preference", "model": model.name, "model_key": model.key}
    return Report("preference on held-out pairs", measures, Table("pair", rows), facts | counts)
