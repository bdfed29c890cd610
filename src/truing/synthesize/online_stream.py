"""The pairs that an online run learns from, saved in the order in which it learnt from them.

Runs `train/online_dpo` and keeps, instead of the model, what it drew and how it was rewarded:

    D_online = (x, y_w, y_l) of rollout 0, of rollout 1, ...

one row for each prompt whose answers differ in reward. Beside the texts a row has the number of its
`rollout` (of `rollouts` in all), the token ids of prompt and answers as they were drawn, and both
rewards. Rows are pairs like all others: `train/replay` learns them in their own order, which gives
the online run again, or in another one; `evaluate/implicit_preference` asks how well a model tells
them apart. The same model, data, settings and seed draw the same answers as the training itself
does, so that a recipe gives both the same mapping.

Source: hypothesis 1 of "Understanding the performance gap between online and offline alignment
algorithms", arXiv 2405.08448.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from truing.context import Context, current, use
from truing.core.rl.stream import check_how, kept_in, pairs_of, settings_of
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.own_checks import checks
from truing.principles import Principles
from truing.tables import Table, content_hash
from truing.train.rl.online_dpo import online_dpo  # what it runs is part of a step's key


@method(
    paper="online-offline-gap",
    needs=("weights", "logprob", "generate"),
    rows={"data": ("prompt",)},
    makes="pair",
)
@checks(check_how)
def online_stream(
    model: Model,
    data: Table,
    reference: Model | None = None,
    reward_model: Model | None = None,
    principles: Principles | None = None,
    *,
    how: dict[str, object],
) -> Table:
    """The pairs that an online run learns from, saved in the order in which it learnt from them.

    Args:
        how: settings of train/online_dpo, by name.
    """
    where, chosen = "synthesize/online_stream", settings_of(how)
    nouns = {"reference": reference, "reward_model": reward_model, "principles": principles}
    given = {name: noun for name, noun in nouns.items() if noun is not None}
    data = data.expect("prompt", where=where)
    keys = [model.weights_key, data.key, {n: noun.key for n, noun in given.items()}]
    outer = current()
    folder = outer.folder / f"online-{content_hash([chosen, keys, outer.seed], 8)}"
    train = cast("Callable[..., Model]", online_dpo.__dict__["__truing_entry__"])
    inner = Context(
        outer.seed, folder, outer.progress, lambda seen: outer.metric(**seen), outer.name
    )
    with use(inner) as context:
        journal = context.journal("stream")
        with kept_in(journal):
            made = train(model, data, **given, **chosen)
    updates = [cast(int, m["step"]) for m in inner.metrics if "step" in m]
    rows = pairs_of(journal, max(updates, default=0), made.name)
    if not rows:
        raise InputError(
            "no rollout made a pair: the answers to each prompt have equal rewards",
            where=where,
            fix="Draw more answers, or reward by something that tells them apart",
        )
    return Table("pair", rows, where=f"online answers to {data.source}")
