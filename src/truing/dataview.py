"""What `truing data ROWS` says: kind and columns; with a model how long rows are, and what is cut.

Rows are read as training reads them (`core.batch.training_rows`): what is counted here is what a
training of that `max_length` counts, and the receipt is the one that it shows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from truing.core import private
from truing.errors import InputError
from truing.output import printable
from truing.readings import READINGS
from truing.renaming import advice
from truing.summary import rows_text
from truing.tables import Table

if TYPE_CHECKING:
    from truing.core.batch.training_rows import Unit
    from truing.core.tree import Node

WHERE = "truing data"
SHARES = (50, 90, 99, 100)  # percent of the rows; all of them are "max"
MEANT = ("example", "pair")  # what columns of other names are taken for
Facts = dict[str, object]


def facts(source: str, model: str = "", max_length: int | None = None) -> Facts:
    """What is known of rows, and with a model of their tokens.

    Args:
        source: a file, a name of `truing data`, ..., as training methods take it.
        model: whose tokenizer and chat template read them; "" for none.
        max_length: of prompt and one answer together; None is the default of training.
    Raises:
        InputError: rows that cannot be read, or that no training takes; a model behind an address.
    """
    if max_length is not None and not model:
        fix = "Give --model NAME, whose tokens are counted"
        raise InputError("a length is counted in tokens of a model", where=WHERE, fix=fix)
    if not source:
        fix = "Name a file of rows, or a set: truing data rows.jsonl --model NAME"
        raise InputError("no rows are named", where=WHERE, fix=fix)
    table = Table.read(source)
    columns = [name for name in table.columns if name not in ("id", "lineage")]
    found: Facts = {
        "data": private.shown(source),
        "kind": table.kind,
        "rows": len(table),
        "columns": columns,
    }
    if table.kind == "record":
        found["advice"] = advice(table.rows, MEANT)
    return found | _lengths(table, model, max_length) if model else found


def _lengths(table: Table, name: str, max_length: int | None) -> Facts:
    from truing.core.batch.row_kinds import as_kind, summed
    from truing.core.batch.training_rows import BRANCHES, Reader
    from truing.core.chat import receipt
    from truing.core.modelfiles.loaded import load_tokenizer
    from truing.core.objective import Loss, Measurements, Objective
    from truing.core.trainer.start import context_of
    from truing.core.training import TextTraining
    from truing.models import Model

    def loss(m: Measurements) -> Loss:
        return Loss(-m.seq())

    kind = "example" if table.kind == "text" else table.kind
    kind = next((to for given, to in READINGS if given == kind), kind)
    if kind not in (*BRANCHES, "group", "steps"):
        table.expect(*MEANT, where=WHERE)
    asked = TextTraining.max_length if max_length is None else max_length
    TextTraining(max_length=asked).check(WHERE)
    scores: dict[str, float | None] = {"scores": None} if kind == "group" else {}
    spec = Objective(WHERE, loss, "token", (), kind, scores)  # what decides how rows are read
    model = Model.open(name)
    tokenizer, context = load_tokenizer(model), context_of(model)
    limit = min(asked, context or asked)
    rows, notes = as_kind(table, kind, WHERE, texts=True)
    whole = [_parts(unit) for unit in Reader(tokenizer, spec, sys.maxsize).read(rows)]
    reader = Reader(tokenizer, spec, limit)
    units = reader.units(rows)  # none of them, where max_length has no room for any
    told = {n: c for n, c in sorted(reader.counts.items()) if c}
    counts = summed({"cut": 0, "left_out_long": 0, **told}, notes)
    return {
        "model": name,
        "context": context,
        "max_length": limit,
        "tokens": {
            "prompt": _shares([prompt for prompt, _ in whole]),
            "answer": _shares([n for _, answers in whole for n in answers]),
            "together": _shares([prompt + max(answers, default=0) for prompt, answers in whole]),
        },
        "used": len(units),
        "counts": counts,
        "receipt": receipt(tokenizer, [_tree(units[0])]) if units else "",
    }


def _tree(unit: Unit) -> Node:
    """What is read of a row; a prompt alone has no branch."""
    from truing.core.tree import Node

    if unit.dialogue is None and not unit.answers:
        return Node(unit.prompt, (False,) * len(unit.prompt))
    return unit.tree()


def _parts(unit: Unit) -> tuple[int, list[int]]:
    """Tokens without loss of a row's longest branch, and those with loss of each branch."""
    branches = list(_tree(unit).rows())
    answers = [sum(loss) for _, loss in branches if any(loss)]
    return max(len(ids) - sum(loss) for ids, loss in branches), answers


def _shares(lengths: Sequence[int]) -> dict[str, int]:
    """For each share of the rows the least length that so many of them do not exceed."""
    found = sorted(lengths)
    at = {share: math.ceil(share / 100 * len(found)) - 1 for share in SHARES if found}
    return {"max" if share == 100 else str(share): found[i] for share, i in at.items()}


def text(found: Facts) -> str:
    """The same for people."""
    columns = ", ".join(cast("list[str]", found["columns"]))
    lines = [f"{found['data']}: {found['rows']:,} rows of kind {found['kind']} ({columns})"]
    if "advice" in found:
        lines.append(f"No training takes rows of such columns. {found['advice']}")
    if "tokens" not in found:
        return "\n".join(lines)
    tokens = cast("dict[str, dict[str, int]]", found["tokens"])
    heads = [f"{s}%" if s < 100 else "max" for s in SHARES]
    table = [("tokens", *heads), *((n, *map(str, v.values())) for n, v in tokens.items() if v)]
    counts = cast("Mapping[str, object]", found["counts"])
    told = ", ".join(f"{name}: {count}" for name, count in counts.items())
    used = f"at max_length {found['max_length']} {found['used']:,} rows are used"
    lines += ["", rows_text(table), "", f"{used} ({told})" if told else used]
    if found["max_length"] == found["context"]:
        lines.append("which is the model's context")
    if found["receipt"]:
        lines += ["", "loss falls on >>>these tokens<<<:", printable(str(found["receipt"]))]
    return "\n".join(lines)
