"""Exploratory preference optimisation: online DPO with a bonus for leaving the reference.

    pair = (answer of the policy, answer of the reference), ranked by reward
    loss = -logsigmoid(beta d) + alpha lp(answer of the reference)                arXiv 2405.21046

d as in `online_dpo`. The second term is the paper's optimism: lowering the likelihood of what the
reference says moves mass to answers not seen yet. The i-th answer of the policy meets the i-th of
the reference; two answers of one player are never a pair. Pairs of equal reward keep the second
term alone.

Shapes: U groups, K = 2 P answers (the policy's own first, then as many of the reference), P pairs,
T tokens.
"""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from truing.core.objective import Loss, Measurements, reward_metrics
from truing.core.online import Update, online


@online(
    paper="preference-losses",
    needs=("ref_logp",),
    opponent="reference",
    tempered=False,
    within={"alpha": (0, None)},
)
def xpo(
    r: Measurements,
    *,
    beta: float = 0.1,
    alpha: float = 1e-5,
    answers: int = 1,
    temperature: float = 0.9,
) -> Update:
    """Exploratory preference optimisation: online DPO with a bonus for leaving the reference.

    Args:
        alpha: weight of the bonus.
    """
    own_UP, theirs_UP = r["reward"].chunk(2, 1)
    sign_UP = (own_UP - theirs_UP).sign()  # 1 where the policy's answer is preferred

    def loss(m: Measurements) -> Loss:
        own_UP, theirs_UP = (beta * m.ratio()).chunk(2, 1)
        better_UP = m["sign"] > 0
        w_UP, l_UP = own_UP.where(better_UP, theirs_UP), theirs_UP.where(better_UP, own_UP)
        differ_UP = m["sign"] != 0  # the others are no pairs, and say nothing of accuracy
        seen = reward_metrics(w_UP[differ_UP], l_UP[differ_UP])
        dpo = Loss(-logsigmoid(w_UP - l_UP), differ_UP.float(), seen)
        bonus_U = m.seq().chunk(2, 1)[1].mean(1)
        return dpo + alpha * Loss(bonus_U)

    active_U = None if alpha else sign_UP.abs().amax(1) > 0
    return Update({"sign": sign_UP}, loss, active_U)
