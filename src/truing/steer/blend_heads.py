"""Choose between objectives at inference: blend the heads of a model from `mah_dpo` by weights.

    logits = sum_i w_i head_i(h),   w normalised to sum 1

Heads are linear, so the blend is one head again and the result an ordinary model. It is a change of
as many numbers as there are heads: no weights are copied, and weights are chosen anew on the result
as on the model before. A weight of 1 for one head and 0 for the others is that head alone.
Source: arXiv 2510.01167.
"""

from __future__ import annotations

import math
import re

from truing.context import current
from truing.core.passes.vocab_heads import blended
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.tables import content_hash

BLENDED = re.compile(r"\+blend\([^)]*\)")


@method(paper="mah-dpo", needs=("weights",))
def blend_heads(model: Model, *, weights: list[float]) -> Model:
    """Choose between objectives at inference: blend the heads of a model by weights.

    Args:
        weights: of each head, none negative; only their ratios count, [1, 1] takes two alike.
    """
    where = "steer/blend_heads"
    total = math.fsum(weights)
    if not weights or min(weights) < 0 or not math.isfinite(total) or total <= 0:
        raise InputError("weights must not be negative, and one above 0", where=where, seen=weights)
    shares = [w / total for w in weights]
    folder = current().folder / f"heads-{content_hash(shares, 8)}"
    made = blended(model, shares, folder, where)
    said = f"+blend({', '.join(f'{s:.2g}' for s in shares)})"
    name, again = BLENDED.subn(said, model.name)
    return made.called(name if again else f"{name}{said}")
