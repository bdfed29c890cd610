"""Token-level DPO: the margin also counts how far each answer drifts from the reference.

    tdpo1   -logsigmoid(beta (d - (KL_l - KL_w)))                                 arXiv 2404.11999
    tdpo2   -logsigmoid(beta (d - alpha (KL_l - stopgrad(KL_w))))
    KL_y = sum_t KL(ref(.|x, y_<t) || policy(.|x, y_<t)) over the tokens of the answer

d = (lp - lp_ref)(y_w) - (lp - lp_ref)(y_l). The divergences are over the whole vocabulary, computed
a few rows at a time. tdpo2 keeps the chosen answer's divergence fixed and only limits the other's.

Shapes: U pairs, K = 2 branches.
"""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from truing.core.objective import Loss, Measurements, objective
from truing.train.preference.dpo import difference, metrics


@objective(
    paper="preference-losses", unit="pair", needs=("logp", "ref_logp", "ref_kl_vocab"), rows="pair"
)
def tdpo1(m: Measurements, *, beta: float = 0.1) -> Loss:
    """Token-level DPO: the margin also counts how far each answer drifts from the reference."""
    kl_w_U, kl_l_U = m.seq("ref_kl_vocab").unbind(1)
    z_U = beta * (difference(m) - (kl_l_U - kl_w_U))
    seen = {"kl_chosen": kl_w_U.detach(), "kl_rejected": kl_l_U.detach()}
    return Loss(-logsigmoid(z_U), metrics=metrics(m, beta) | seen)


@objective(
    paper="preference-losses",
    unit="pair",
    needs=("logp", "ref_logp", "ref_kl_vocab"),
    rows="pair",
    within={"alpha": (0, None)},
)
def tdpo2(m: Measurements, *, beta: float = 0.1, alpha: float = 0.5) -> Loss:
    """Token-level DPO that leaves the chosen answer's divergence alone.

    Args:
        alpha: weight of the divergences' difference.
    """
    kl_w_U, kl_l_U = m.seq("ref_kl_vocab").unbind(1)
    z_U = beta * (difference(m) - alpha * (kl_l_U - kl_w_U.detach()))
    seen = {"kl_chosen": kl_w_U.detach(), "kl_rejected": kl_l_U.detach()}
    return Loss(-logsigmoid(z_U), metrics=metrics(m, beta) | seen)
