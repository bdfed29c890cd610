"""Learn the pairs of an online run offline: in the order in which they were drawn, or in another.

    step s:  mean over the pairs of rollout sigma(s) of
             (d - 1 / (2 beta))^2  or  -logsigmoid(beta d)
    d = lp(y_w) - lp_ref(y_w) - lp(y_l) + lp_ref(y_l),  summed over tokens

`data` is what `synthesize/online_stream` saved, `how` the settings that it was given. In the order
`drawn` every update sees the pairs that it saw online, so that the run comes out again: nothing is
drawn here, and nothing rewarded. `shuffled` deals all pairs anew, `windows` those of every `window`
rollouts among each other; each update keeps its number of pairs. The data are the same then, and so
is what they cover: where training on them in another order falls behind, it was their being the
model's own at the time that the online run gained by.

Source: hypothesis 1 of "Understanding the performance gap between online and offline alignment
algorithms", arXiv 2405.08448.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from truing.context import current
from truing.core.held_out import INPUT, watching
from truing.core.objective import objective_of
from truing.core.rl.stream import check_how, settings_of
from truing.core.trainer.replay import WHERE, check_stream, rollouts_of, train_replay
from truing.method import method
from truing.models import Model
from truing.own_checks import checks
from truing.tables import Table
from truing.train.preference.dpo import dpo
from truing.train.preference.ipo import ipo

Order = Literal["drawn", "shuffled", "windows"]


def dealt(rollouts: Sequence[Sequence[int]], window: int, seed: int) -> list[list[int]]:
    """Rows dealt anew among every `window` rollouts, each of which keeps its number of them."""
    made: list[list[int]] = []
    for start in range(0, len(rollouts), window):
        block = rollouts[start : start + window]
        rows = [row for one in block for row in one]
        random.Random(f"{seed}/{start}").shuffle(rows)
        for one in block:
            made.append(rows[: len(one)])
            rows = rows[len(one) :]
    return made


@method(
    paper="online-offline-gap",
    needs=("weights", "logprob"),
    rows={"data": ("pair",), "held_out": ("pair", "dialogue_pair", "group")},
    within={"window": (1, None), "eval_every": (0, None), "patience": (0, None)},
)
@checks(check_how)
def replay(
    model: Model,
    data: Table,
    reference: Model | None = None,
    held_out: Table | None = None,
    *,
    how: dict[str, object],
    order: Order = "drawn",
    window: int = 4,
    eval_every: int = 0,
    keep_best: bool = False,
    patience: int = 0,
) -> Model:
    """Learn the pairs of an online run offline: in the order in which they were drawn, or another.

    Args:
        held_out: pairs that are not trained on, of a stream or any others, or groups, of which the
            best and the worst answer count: the loss on them is measured meanwhile.
        how: settings of the online run, by name; those of drawing and rewarding mean nothing here.
        order: as the pairs were drawn; all shuffled; or shuffled within windows of rollouts.
        window: rollouts of a window.
    """
    watch = watching(held_out, WHERE, eval_every=eval_every, keep_best=keep_best, patience=patience)
    if held_out is not None:
        held_out = held_out.expect("pair", "dialogue_pair", "group", where=f"{WHERE} {INPUT}")
    data, chosen = data.expect("pair", where=WHERE), settings_of(how)
    check_stream(data)
    steps = rollouts_of(data)
    if order != "drawn":
        size = len(steps) if order == "shuffled" else window
        steps = dealt(steps, size, current().stream("order"))
    own: dict[str, object] = {"beta": chosen["beta"]}
    if chosen["kind"] == "ipo":
        own["length_normalise"] = False
    spec = objective_of(ipo if chosen["kind"] == "ipo" else dpo)
    return train_replay(spec, own, model, data, reference, chosen, steps, held_out, watch)
