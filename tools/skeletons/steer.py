"""My method: what it does for a user, in one sentence.

    v = mean_i h(chosen_i) - mean_i h(rejected_i),   h <- h + strength v

h is what a block gives to the next. Say which paper it is from (title, arXiv id), and where this
differs from the paper and why. Shapes: N pairs, D width of the residual stream.
"""

from __future__ import annotations

from torch import Tensor

from truing.context import current
from truing.core.hooks import Edit, save
from truing.core.trunk import block_list
from truing.datasets import licence_of
from truing.method import method
from truing.models import Edits, Model
from truing.steer.mean_difference import middle_layers, states
from truing.tables import Table, content_hash


def direction(positive_ND: Tensor, negative_ND: Tensor) -> Tensor:
    """What is added to the activations, [D]."""
    return positive_ND.mean(0) - negative_ND.mean(0)


@method(
    paper="my-method",
    needs=("hidden", "generate"),
    rows={"data": ("pair",)},
    within={"strength": "(-inf, inf)"},
)
def my_method(model: Model, data: Table, *, strength: float = 1.0) -> Model:
    """My method: what it does for a user, in one sentence.

    Args:
        strength: of the edit; 0 changes nothing, a negative one steers away.
    """
    data = data.expect("pair", where="steer/my_method")
    layers = middle_layers(len(block_list(model.load_module().module)))
    positive = states(model, data, "chosen", layers, "answer")
    negative = states(model, data, "rejected", layers, "answer")
    edits = [Edit(f"layers.{n}.residual", direction(positive[n], negative[n])) for n in layers]
    key = content_hash(["my_method", model.key, data.key], 8)
    path = save(current().folder / f"edits-{key}.safetensors", edits)
    return model.adding(Edits(path, strength), licence=licence_of([data]))
