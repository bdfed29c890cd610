"""Leave experts of a mixture out: routers pass them over, and what only they know is gone.

    chosen = the k experts with the largest p_i + b_i,   b_e = -inf for every e that is left out

The others' weights are as their gate has them, so a token that would have gone to a masked expert
goes to the next likeliest. The mask is a bias of the choice beside the weights
(`core.passes.routers`): no weight changes, training moves no masked expert back, and the model
without the mask is the one before. On a mixture made of tuned models (`merge/mixture_of_experts`)
an expert has the same number in every layer, that of the model it was made of.

Which experts answer a forbidden prompt says `evaluate/router_report` on rows whose `domain` tells
them from others; how much of the refusals they carry says `evaluate/refusal_rate` before and after
the mask, and `evaluate/ability` what else they carried.
Source: the safety questions of "A Comprehensive Survey of Mixture-of-Experts", arXiv 2503.07137.

Shapes: E experts.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from truing.context import current
from truing.core.passes.routers import bias_of, routers, with_biases
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.tables import content_hash

WHERE = "steer/mask_experts"


def known(setting: str, given: list[int], count: int) -> list[int]:
    """The numbers in order, each once.

    Raises:
        InputError: one of them is not below `count`.
    """
    wrong = [n for n in given if not 0 <= n < count]
    if wrong:
        raise InputError(
            f"setting {setting!r} names what the model has not",
            where=WHERE,
            seen=wrong,
            fix=f"Give numbers from 0 to {count - 1}",
        )
    return sorted(set(given))


@method(paper="moe-survey", needs=("weights",))
def mask_experts(model: Model, *, experts: list[int], layers: list[int] | None = None) -> Model:
    """Leave experts of a mixture out, to see what they carry or to take it away.

    Args:
        experts: numbers of those to be left out, from 0.
        layers: numbers of the layers where they are, from 0; none for all.
    """
    found = routers(model.load_module().module, WHERE)
    count, k = len(cast(Tensor, found[0].weight)), cast(int, found[0].top_k)
    gone = known("experts", experts, count)
    where = known("layers", layers or [], len(found)) or list(range(len(found)))
    biases = {}
    for i in where:
        before_E = bias_of(found[i])
        bias_E = torch.zeros(count) if before_E is None else before_E.detach().cpu().clone()
        bias_E[gone] = -math.inf
        biases[i] = bias_E
    left = min(int(bias_E.isfinite().sum()) for bias_E in biases.values())
    if not gone or left < k:
        raise InputError(
            "setting 'experts' must leave as many as a token chooses, and leave out one",
            where=WHERE,
            seen={"left": left, "chosen": k},
            fix=f"Name 1 to {count - k} of the {count}",
        )
    folder = current().folder / f"mask-{content_hash([model.weights_key, gone, where], 8)}"
    said = f"+mask({', '.join(map(str, gone))})"
    return with_biases(model, biases, folder).called(f"{model.name}{said}")
