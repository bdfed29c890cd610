"""Continuations by a weak supervisor, toxic ones left out, for a strong student to learn from.

    kept: the first of n continuations with toxicity at most `threshold`,   toxicity = 1 - P(good)

P(good) is what a guard says of prompt and continuation (a classifier from train/guard, since no
scorer of toxicity is at hand everywhere); without a guard the first continuation is kept. Prompts
all of whose continuations are toxic are left out and counted. The supervisor is fine-tuned before
by `sft` on non-toxic continuations of other prompts, the student by `sft` on these rows, its
ceiling on true continuations of the same prompts; `toxicity_gap` measures all three.

Source: "Weak-to-Strong Generalization beyond Accuracy", arXiv 2410.12621. Difference: pairs of
words may come twice, which its code forbids.
"""

from __future__ import annotations

from truing.context import current
from truing.core.generate import generate
from truing.core.judging.rewards import probabilities
from truing.core.passes.scoring import has_head
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.tables import Row, Table, as_prompt

WHERE = "synthesize/weak_continuations"


def toxicities(guard: Model, rows: list[Row]) -> list[float]:
    """1 - P(good) of each row's completion; an InputError for a guard without a head."""
    if not has_head(guard):
        raise InputError(
            "the guard has no score head",
            where=guard.name,
            seen="a language model",
            fix="Train one with guard",
        )
    return [1 - p for p in probabilities(guard, rows, WHERE)]


@method(
    paper="weak-to-strong",
    needs=("generate",),
    rows={"data": ("prompt",)},
    within={
        "n": (1, None),
        "threshold": (0.0, 1.0),
        "temperature": "(0, inf)",
        "top_p": "(0, 1]",
        "top_k": (0, None),
        "max_tokens": (1, None),
    },
    makes="example",
)
def weak_continuations(
    model: Model,
    data: Table,
    guard: Model | None = None,
    *,
    n: int = 4,
    threshold: float = 0.5,
    temperature: float = 0.7,
    top_p: float = 0.95,
    top_k: int = 50,
    max_tokens: int = 100,
) -> Table:
    """Continuations by a weak supervisor, toxic ones left out, for a strong student to learn from.

    Args:
        n: continuations drawn of each prompt, where a guard chooses.
        threshold: largest toxicity that is kept.
        temperature: that they are drawn at.
        top_p: share of the probability that they are drawn from.
        top_k: tokens that they are drawn from; 0 for all.
        max_tokens: longest continuation.
    """
    prompts = [as_prompt(r) for r in data.expect("prompt", where=WHERE)]
    drawn = generate(
        model,
        [r["prompt"] for r in prompts],
        n=n if guard is not None else 1,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_tokens=max_tokens,
        seed=current().stream("continuations") % 2**31,
    )
    found: list[Row] = [
        {
            "prompt": row["prompt"],
            "completion": c.text,
            "finished": c.finish == "stop",
            "lineage": {"parents": [row["id"]], "generator": model.name},
        }
        for row, some in zip(prompts, drawn, strict=True)
        for c in some
    ]
    bad = [0.0] * len(found) if guard is None else toxicities(guard, found)
    made: list[Row] = []
    size = len(drawn[0]) if drawn else 1
    for start in range(0, len(found), size):
        kept = [i for i in range(start, start + size) if str(found[i]["completion"]).strip()]
        clean = next((i for i in kept if bad[i] <= threshold), None)
        if clean is not None:
            told: Row = {} if guard is None else {"toxicity": bad[clean]}
            made.append(found[clean] | told)
    current().metric(prompts=len(prompts), kept=len(made))
    if not made:
        raise InputError(
            "setting 'threshold': every continuation is more toxic, or empty",
            where=WHERE,
            seen=threshold,
            fix="Raise it, or draw more (n)",
        )
    return Table("example", made, where=f"weak continuations of {data.source}")
