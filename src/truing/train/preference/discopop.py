"""DiscoPOP: the log-ratio modulated loss that a language model discovered.

    z = beta d, g = sigmoid(z / tau):   (1-g) (-logsigmoid(z)) + g exp(-z)      arXiv 2406.08414

d = (lp - lp_ref)(y_w) - (lp - lp_ref)(y_l). It is not monotone: the slope at z = 0 is
(1 - ln 2) / (4 tau) - 3/4, positive for tau below 0.102. So with the paper's tau of 0.05 descent
from the reference first moves the wrong way; use 0.2 or more where the model starts there. The
last term is computed as exp(logsigmoid(z / tau) - z), since far below 0 its factors are 0 and
infinite; that exponent grows without end where tau is above 1, and is clamped at 80.

Shapes: U pairs, K = 2 branches.
"""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from truing.core.objective import Loss, Measurements, objective
from truing.core.passes.exponentials import exp_up_to
from truing.train.preference.dpo import difference, metrics


@objective(
    paper="preference-losses",
    unit="pair",
    needs=("logp", "ref_logp"),
    rows="pair",
    within={"tau": "(0, inf)"},
)
def discopop(m: Measurements, *, beta: float = 0.1, tau: float = 0.05) -> Loss:
    """DiscoPOP: the log-ratio modulated loss that a language model discovered.

    Args:
        tau: width of the switch between the two terms; see above.
    """
    z_U = beta * difference(m)
    per_pair = (-z_U / tau).sigmoid() * -logsigmoid(z_U)
    per_pair = per_pair + exp_up_to(logsigmoid(z_U / tau) - z_U)
    return Loss(per_pair, metrics=metrics(m, beta))
