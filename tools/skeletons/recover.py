"""My method: what it repairs, in one sentence.

    theta = theta_damaged + share (theta_trusted - theta_damaged)

Say what every symbol means, which paper it is from (title, arXiv id), and where this differs from
the paper and why.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from truing.context import current
from truing.core.batch.same_tokenizer import same_tokens
from truing.core.weights import aligned, replaced
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.tables import content_hash


def restored(damaged: Tensor, trusted: Tensor, share: float) -> Tensor:
    """A tensor brought back towards the trusted one; share 0 leaves it as it is."""
    moved = damaged.float() + share * (trusted.float() - damaged.float())
    return moved.to(damaged.dtype)


@method(paper="my-method", needs=("weights",), within={"share": (0, 1)})
def my_method(model: Model, trusted: Model, *, share: float = 0.5) -> Model:
    """My method: what it repairs, in one sentence.

    Args:
        share: of the way back to the trusted model, 0 to 1.
    """
    where = "recover/my_method"
    if not 0 <= share <= 1:
        raise InputError("is a share", where=f"{where} setting 'share'", seen=share)
    both = {"model": model, "trusted": trusted}
    same_tokens(both, where=where)
    folded = {role: m.folded() for role, m in both.items()}

    def repaired() -> Iterator[tuple[str, Tensor]]:
        for i, (name, theta) in enumerate(aligned(folded, where=where), 1):
            current().progress(i, len(folded["model"]), "restoring tensors")
            yield name, restored(theta["model"], theta["trusted"], share)

    key = content_hash([where, share, model.weights_key, trusted.weights_key], 8)
    result = replaced(model, repaired(), current().folder / f"my_method-{key}")
    return result.with_licences([trusted.licence])
