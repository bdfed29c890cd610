"""Trust-region DPO: the reference follows the policy, so that training can go further.

    every k updates  ref <- share * policy + (1 - share) * ref,  then DPO's loss    arXiv 2404.09656

`share` is the paper's alpha (TRL's `ref_model_mixup_alpha`), `every` its tau (TRL's
`ref_model_sync_steps`).
share = 1 replaces the reference (the paper's hard update), less is its soft one. Of adapters the
two factors are mixed, whose product is the mixture of the products at share = 1 alone; `rank=0`
mixes the weights themselves. A run of fewer than `every` updates is plain DPO. Held-out rows have
the model as it was at the start for their reference, so that their losses compare with each other.

Shapes: U pairs, K = 2 branches.
"""

from __future__ import annotations

from truing.core.objective import Loss, Measurements, objective
from truing.train.preference.dpo import dpo


@objective(
    paper="preference-losses",
    unit="pair",
    needs=("logp", "ref_logp"),
    rows="pair",
    hook="moving_reference",
)
def tr_dpo(m: Measurements, *, beta: float = 0.1) -> Loss:
    """Trust-region DPO: the reference follows the policy, so that training can go further."""
    return dpo(m, beta=beta)
