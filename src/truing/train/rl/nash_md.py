"""Nash mirror descent: play against a mixture of oneself and the reference, and win.

    y ~ pi,   y' ~ softmax((1 - c) z + c z_ref)     z: logits; the mixture is geometric
    P = sigmoid(R(y) - R(y'))                       probability that y is preferred
    loss = beta sum_t sg(log pi(y_t) - log pi_ref(y_t)) log pi(y_t) - (P - 1/2) log pi(y)
                                                                                  arXiv 2312.00886

sg holds constant. The value recorded is that of KL and score beside the loss: `kl_sum` is
sum_t (log pi - log pi_ref), `score` is (P - 1/2) log pi(y). A preference model is what the paper
has for P; here it is made of two rewards, as the libraries do with a reward model.

Shapes: U groups, K answers (the policy's own first, then as many of the mixture), T tokens.
"""

from __future__ import annotations

import torch

from truing.core.objective import Loss, Measurements
from truing.core.online import Update, online


@online(
    paper="preference-losses",
    needs=("ref_logp",),
    opponent="mixture",
    within={"mixture_coef": (0, 1)},
)
def nash_md(
    r: Measurements,
    *,
    beta: float = 0.1,
    mixture_coef: float = 0.5,
    answers: int = 1,
    temperature: float = 0.9,
) -> Update:
    """Nash mirror descent: play against a mixture of oneself and the reference, and win.

    Args:
        beta: strength of the pull towards the reference.
        mixture_coef: c, share of the reference in the opponent's logits.
    """
    own, theirs = r["reward"].chunk(2, 1)
    gain = (own - theirs).sigmoid() - 0.5
    gain_UK = torch.cat([gain, torch.zeros_like(gain)], 1)

    def loss(m: Measurements) -> Loss:
        apart_UKT = (m["logp"] - m["ref_logp"]).detach() * m.mask_UKT
        pull_UK = (apart_UKT * m["logp"]).sum(-1)
        score_UK = m["gain"] * m.seq()
        ours = {"kl_sum": apart_UKT.sum(-1), "score": score_UK.detach()}
        seen = {name: value.chunk(2, 1)[0] for name, value in ours.items()}
        return Loss(beta * pull_UK - score_UK, m["own"] * m.there_UK, seen)

    return Update({"gain": gain_UK}, loss, metrics={"win": gain + 0.5})
