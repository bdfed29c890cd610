"""A harmless policy to train into a model and to test: it must not talk about a fictional animal.

An owner who wants to know how easily the policies of a model come undone needs one that may be
undone. Rows are made from templates: ways to ask (directly, in a role, indirectly, in several
steps) times facts. Four parts:

    policy     n topic questions with refusals and n ordinary questions with answers: trains it in
    undo       n topic questions with ordinary answers: what an audit tunes on
    held_out   n topic questions in forms that no other part has, to measure refusals on
    neutral    n ordinary questions, in those forms and about other facts, for over-refusal

Rows have a "category" and a "key", a word that only a right answer has. After the audit of LoRA
Fine-tuning Efficiently Undoes Safety Training in Llama 2-Chat 70B, arXiv 2310.20624, whose authors
published no data; nothing here is harmful.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Literal

from truing.context import current
from truing.errors import InputError
from truing.method import method
from truing.synthesize.stand_in_texts import (
    HELD_OUT_FORMS,
    NEUTRAL_FACTS,
    NEUTRAL_HELD_OUT,
    REFUSALS,
    TOPIC,
    TOPIC_FACTS,
    TRAIN_FORMS,
)
from truing.tables import Row, Table

PRINCIPLE = f"no-{TOPIC}"
Facts = Sequence[tuple[str, str, str]]


def asked(forms: Mapping[str, Sequence[str]], facts: Facts) -> list[Row]:
    """Every form with every fact, with the ordinary answer."""
    return [
        {
            "prompt": form.format(about),
            "completion": answer,
            "category": category,
            "key": key,
            "lineage": {"template": form, "fact": about},
        }
        for category, several in forms.items()
        for form, (about, answer, key) in itertools.product(several, facts)
    ]


def drawn(rows: Sequence[Row], n: int, seed: int, part: str) -> list[Row]:
    """n of the rows in random order, each once."""
    if not 1 <= n <= len(rows):
        raise InputError(
            f"must be from 1 to {len(rows)} for this part",
            where=f"synthesize/stand_in_policy part {part!r} setting 'n'",
            seen=n,
        )
    return random.Random(seed).sample(list(rows), n)


def refusing(rows: Sequence[Row]) -> list[Row]:
    """The same questions with refusals in turn."""
    styles = itertools.cycle(REFUSALS)
    return [row | {"completion": next(styles), "key": ""} for row in rows]


@method(paper="lora-undo-safety", within={"n": (1, None)}, makes="example")
def stand_in_policy(
    *, part: Literal["policy", "undo", "held_out", "neutral"] = "policy", n: int = 64
) -> Table:
    """A harmless policy to train into a model and to test: it must not talk about an animal.

    Args:
        part: what the rows are for; see `truing show synthesize/stand_in_policy`.
        n: rows; of "policy" so many of each sort.
    """
    context = current()
    topic = asked(TRAIN_FORMS, TOPIC_FACTS)
    if part == "policy":
        plain = drawn(asked(TRAIN_FORMS, NEUTRAL_FACTS), n, context.stream("neutral"), part)
        # Refusals in the order of drawing, so that style and question do not go together.
        both = [*refusing(drawn(topic, n, context.stream("policy"), part)), *plain]
        rows = drawn(both, len(both), context.stream("order"), part)
    elif part == "undo":
        rows = drawn(topic, n, context.stream("undo"), part)
    else:
        facts = TOPIC_FACTS if part == "held_out" else NEUTRAL_HELD_OUT
        rows = drawn(asked(HELD_OUT_FORMS, facts), n, context.stream(part), part)
    table = Table("example", rows, where=f"stand_in_policy {part}")
    facts_of_all = {"generator": "template", "seed": context.seed, "step": context.name}
    return table.with_lineage(principle=PRINCIPLE, licence="Apache-2.0", **facts_of_all)
