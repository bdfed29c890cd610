"""Train a reward model on pairs some of which are ties: answers that nobody could tell apart.

    rao_kupper   P(w above l) = sigmoid(s_w - s_l - log theta)
                 P(tie) = (theta^2 - 1) P(w above l) P(l above w)
    davidson     P(w above l) = e^{s_w} / Z,   P(tie) = nu e^{(s_w+s_l)/2} / Z,
                 Z = e^{s_w} + e^{s_l} + nu e^{(s_w+s_l)/2}
    loss         -log P of what was seen

s is a linear head on the last hidden state of an answer's last token. A row is a tie where its
optional column `tie` is 1; which of its answers is called the chosen one then says nothing. log
theta is how far apart two scores must be before the better one is likelier than not to be seen as
such, nu the weight of ties. Both leave equal scores a tie in (theta - 1) / (theta + 1) and in
nu / (nu + 2) of the cases: theta = 2 and nu = 1 say one in three. With theta = 1 and with nu = 0
nothing ties, and both are Bradley-Terry, which makes scores differ less than they should where ties
are broken by a coin and, if the first is true, more where they are left out.

Sources: P. V. Rao and L. L. Kupper 1967, and R. R. Davidson 1970; for reward models arXiv
2410.05328, which has the first. Those fit theta and nu with the scores; here they are settings. In
the table of reward models of arXiv 2507.13158.

Shapes: U rows, K = 2 branches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from truing.core.objective import Loss, Measurements, objective, reward_metrics
from truing.errors import InputError

LEAST = 1e-30  # stands for a weight of 0, whose logarithm is no number


def check(name: str, value: float, none: float, tie_U: Tensor) -> None:
    """An InputError for a setting below that under which nothing ties; at it where rows are ties.

    Args:
        name: of the setting; none: its value under which nothing ties.
    """
    if value < none or (value == none and bool(tie_U.any())):
        raise InputError(
            f"setting {name!r} must be above {none:g} where rows are ties",
            seen=value,
            fix="Raise it, or leave out rows whose column 'tie' is 1",
        )


@objective(
    paper="irl-survey",
    unit="pair",
    needs=("scores",),
    rows="pair",
    columns={"tie": 0.0},
    within={"theta": (1, None)},
)
def rao_kupper(m: Measurements, *, theta: float = 2.0) -> Loss:
    """Train a reward model on pairs some of which are ties, told apart from a threshold on.

    Args:
        theta: log theta is the threshold; 1 leaves no room for ties.
    """
    tie_U = m["tie"] > 0
    check("theta", theta, 1.0, tie_U)
    w_U, l_U = m.last("scores").unbind(1)
    above_U = logsigmoid(w_U - l_U - math.log(theta))
    below_U = logsigmoid(l_U - w_U - math.log(theta))
    tied_U = above_U + below_U + math.log(max((theta - 1) * (theta + 1), LEAST))
    return Loss(-torch.where(tie_U, tied_U, above_U), metrics=reward_metrics(w_U, l_U))


@objective(
    paper="irl-survey",
    unit="pair",
    needs=("scores",),
    rows="pair",
    columns={"tie": 0.0},
    within={"nu": (0, None)},
)
def davidson(m: Measurements, *, nu: float = 1.0) -> Loss:
    """Train a reward model on pairs some of which are ties.

    Args:
        nu: weight of ties; 0 leaves none room.
    """
    tie_U = m["tie"] > 0
    check("nu", nu, 0.0, tie_U)
    w_U, l_U = m.last("scores").unbind(1)
    middle_U = (w_U + l_U) / 2 + math.log(max(nu, LEAST))
    z_U = torch.stack([w_U, l_U, middle_U]).logsumexp(0)
    per_pair = z_U - torch.where(tie_U, middle_U, w_U)
    return Loss(per_pair, metrics=reward_metrics(w_U, l_U))
