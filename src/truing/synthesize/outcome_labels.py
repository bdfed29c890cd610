"""Label a model's own solutions by their outcome: what outcome reward models learn from.

    y = 1 iff the solution's final answer is a right one of its problem, 0 else

n solutions of each problem are drawn. Rows of whole solutions, with y as label, train
`outcome_reward`; `sft`, which takes the right ones of them, makes ReST-EM of it. Given a table of
labelled `steps` (from `step_labels`, or by people), the rows are of steps: those of the table, and
after them the solutions, whose steps all carry y. That is the mixture which
`outcome_process_reward` is trained on. Only the right answer is needed, so give easy problems.
Answers are compared as in `evaluate/easy_to_hard`; a solution without a step is left out.

Source: "Easy-to-Hard Generalization: Scalable Alignment Beyond Human Supervision", arXiv
2403.09472.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from truing.context import current
from truing.core.generate import generate
from truing.core.judging.answer_steps import steps_of
from truing.errors import InputError
from truing.evaluate.easy_to_hard import answer_of, normal
from truing.method import method
from truing.models import Model
from truing.synthesize.answer_match import golds_of
from truing.tables import Row, Table, as_prompt

WHERE = "synthesize/outcome_labels"
SEPARATOR = "\n\n"


def is_right(text: str, golds: Sequence[str]) -> bool:
    """True when the answer of a solution is one of the right ones."""
    answer = normal(answer_of(text))
    return bool(answer) and answer in map(normal, golds)


def as_steps(row: Row) -> Row:
    """A whole solution as steps that all carry its outcome."""
    steps = steps_of(str(row["completion"]), SEPARATOR)
    kept = {n: row[n] for n in ("prompt", "level", "lineage") if row.get(n) is not None}
    return kept | {"steps": steps, "labels": [float(bool(row["label"]))] * len(steps)}


@method(
    paper="easy-to-hard",
    needs=("generate",),
    rows={"data": ("prompt",), "steps": ("steps",)},
    within={"n": (1, None), "temperature": "(0, inf)", "max_tokens": (1, None)},
    makes={"unpaired": {"steps": None}, "steps": {}},
)
def outcome_labels(
    model: Model,
    data: Table,
    steps: Table | None = None,
    *,
    n: int = 4,
    temperature: float = 0.7,
    max_tokens: int = 256,
) -> Table:
    """Label a model's own solutions by their outcome: what outcome reward models learn from.

    Args:
        n: solutions drawn of each problem.
        temperature: that they are drawn at.
        max_tokens: longest solution.
    """
    data = data.expect("prompt", where=WHERE)
    golds = [golds_of(r, data.place(i), normal) for i, r in enumerate(data)]
    problems = [as_prompt(r) for r in data]
    mixed = steps.expect("steps", where=WHERE) if steps is not None else None
    drawn = generate(
        model,
        [r["prompt"] for r in problems],
        n=n,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=current().stream("solutions") % 2**31,
    )
    rows: list[Row] = []
    for row, gold, some in zip(problems, golds, drawn, strict=True):
        lineage = {"parents": [row["id"]], "generator": model.name}
        for c in some:
            text = c.text.strip()
            made: Row = {
                "prompt": row["prompt"],
                "completion": text,
                "level": row.get("level"),
                "label": is_right(text, gold),
                "finished": c.finish == "stop",
                "lineage": lineage,
            }
            if steps_of(text, SEPARATOR):
                rows.append(made)
    if not rows:
        raise InputError(
            "no solution has a step",
            where=WHERE,
            seen=f"{len(data)} problems",
            fix="Draw more (n), or use a model whose answers are not empty",
        )
    current().metric(solutions=len(rows), right=sum(bool(r["label"]) for r in rows))
    source = f"outcomes of {data.source}"
    if mixed is None:
        return Table("unpaired", rows, where=source)
    given = [cast(Row, dict(r)) for r in mixed]
    return Table("steps", [*given, *map(as_steps, rows)], where=source)
