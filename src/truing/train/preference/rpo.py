"""DPO with a likelihood term on the chosen answers, and a mixture of three losses.

    rpo   dpo + alpha nll(chosen)                                   arXiv 2404.19733, 2405.16436
    mpo   0.8 dpo + 0.2 bco_pair + 1.0 nll(chosen)                  arXiv 2411.10442

DPO alone may lower the likelihood of both answers; the second term holds the chosen one up. Each
term is a mean of its own: the first over pairs, nll over the chosen tokens of the step. Other sums
are made by the setting `mix` of any objective: `dpo` with mix {sft: a} is rpo with alpha = a.

Shapes: U pairs, K = 2 branches.
"""

from __future__ import annotations

from truing.core.objective import Loss, Measurements, objective
from truing.train.preference.bco import bco_pair
from truing.train.preference.dpo import dpo
from truing.train.supervised.sft import nll


@objective(
    paper="preference-losses",
    unit="pair",
    needs=("logp", "ref_logp"),
    rows="pair",
    within={"alpha": (0, None)},
)
def rpo(m: Measurements, *, beta: float = 0.1, alpha: float = 1.0) -> Loss:
    """DPO plus the likelihood of the chosen answers.

    Args:
        alpha: weight of the likelihood of the chosen answers.
    """
    return dpo(m, beta=beta) + alpha * nll(m)


@objective(
    paper="preference-losses",
    unit="pair",
    needs=("logp", "ref_logp"),
    rows="pair",
    within={"preference": (0, None), "quality": (0, None), "generation": (0, None)},
)
def mpo(
    m: Measurements,
    *,
    beta: float = 0.1,
    preference: float = 0.8,
    quality: float = 0.2,
    generation: float = 1.0,
) -> Loss:
    """Mixed preference optimisation: DPO, BCO on pairs and likelihood, by weights.

    Args:
        preference: weight of DPO.
        quality: weight of BCO.
        generation: weight of the likelihood.
    """
    relative, absolute = dpo(m, beta=beta), bco_pair(m, beta=beta)
    return preference * relative + quality * absolute + generation * nll(m)
