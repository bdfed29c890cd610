"""Binary classifier optimisation: good and bad answers on either side of a running mean reward.

    bco        good: -logsigmoid(beta r - delta)     bad: -logsigmoid(delta - beta r)
    bco_pair   -logsigmoid(beta r_w) - logsigmoid(-beta r_l)                arXiv 2404.04656

r_y = lp(y|x) - lp_ref(y|x); delta is the mean of all beta r seen so far, this step's included, and
is held constant. Where good and bad answers come from different prompts, a bad row counts
clip(p / (1-p), 0.5, 10) times: p is the probability that its prompt is one of the good ones, from
any classifier, in the optional column `prompt_is_good`. bco_pair has no delta, as in the libraries
that offer it by this name.

Shapes: U rows, K = 1 branch (bco) or U pairs, K = 2 branches.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from truing.core.batch.columns import share
from truing.core.objective import Loss, Measurements, State, objective
from truing.train.preference.dpo import metrics


def moved(state: State | None, values: torch.Tensor) -> State:
    """Mean and count of everything seen, `values` included."""
    zero = torch.zeros((), dtype=torch.float64)
    seen = state or {"mean": zero, "count": zero}
    count = seen["count"] + values.numel()
    mean = seen["mean"] + (values.double().sum() - values.numel() * seen["mean"]) / count
    return {"mean": mean, "count": count}


@objective(
    paper="preference-losses",
    unit="batch",
    needs=("logp", "ref_logp"),
    rows="unpaired",
    columns={"label": None, "prompt_is_good": 0.5},
)
def bco(m: Measurements, state: State | None = None, *, beta: float = 0.1) -> Loss:
    """Binary classifier optimisation: good and bad answers beside a running mean reward."""
    reward_U, good_U, p_U = beta * m.ratio()[:, 0], m["label"], share(m, "prompt_is_good")
    state = moved(state, reward_U.detach())
    delta = state["mean"].to(reward_U)
    weight_U = torch.where(good_U > 0, 1.0, (p_U / (1 - p_U)).clamp(0.5, 10))
    sign_U = 2 * good_U - 1
    per_row = -logsigmoid(sign_U * (reward_U - delta)) * weight_U
    seen = {"delta": delta.expand_as(reward_U), "reward": reward_U.detach()}
    right = {"accuracy": (sign_U * (reward_U - delta) > 0).float().detach()}
    return Loss(per_row, metrics=seen | right, state=state)


@objective(paper="preference-losses", unit="pair", needs=("logp", "ref_logp"), rows="pair")
def bco_pair(m: Measurements, *, beta: float = 0.1) -> Loss:
    """Binary classifier optimisation on pairs, without the running mean."""
    w_U, l_U = (beta * m.ratio()).unbind(1)
    return Loss(-logsigmoid(w_U) - logsigmoid(-l_U), metrics=metrics(m, beta))
