"""ReMax: REINFORCE whose baseline is what the policy's own greedy answer to the prompt is worth.

    y' = the answer of likeliest tokens, drawn with each rollout
    A_i = R(y_i) - beta sum_t (log pi_old(y_it) - log pi_ref(y_it)) - R(y')       arXiv 2310.10505
    loss = mean over answers of the sum of -min(ratio_t A_i, clip(ratio_t, 1 - e, 1 + e) A_i)

No critic, no group: one answer of the policy and one greedy one to each prompt are enough. The
baseline depends on the prompt alone, so that the gradient stays unbiased; it is sum_t A_i grad
log pi(y_it) at ratio 1, and the clipping is for rollouts that are learnt from more than once. The
greedy answer costs its drawing and its reward. It is not trained on and in no average; `answers`
does not count it, and neither does `reward` in the record, where `reward_greedy` is its own.

Answers as good as the greedy one teach nothing and are not computed; `refill` may replace them.

Only the baseline is the paper's. The rest is ours: the average (luspo) and the clipping are those
of the estimator above, the divergence is RLOO's, off by default. It is not taken off R(y'), since
it is estimated from drawn tokens, and greedy ones are not drawn.

Shapes: U groups, K answers, T tokens.
"""

from __future__ import annotations

from truing.core.objective import Loss, Measurements
from truing.core.online import (
    Aggregation,
    Update,
    aggregated,
    clip_fraction,
    clipped,
    online,
    watched,
    weighed,
)
from truing.train.rl.grpo import penalised


@online(paper="preference-losses", needs=("ref_logp",), opponent="greedy")
def remax(
    r: Measurements,
    *,
    beta: float = 0.0,
    clip_ratio: float = 0.2,
    aggregate: Aggregation = "luspo",
    answers: int = 1,
) -> Update:
    """ReMax: REINFORCE whose baseline is what the policy's own greedy answer is worth.

    Args:
        beta: strength of the pull towards the reference, in the reward; 0 does without one.
    """

    def loss(m: Measurements) -> Loss:
        made = aggregated(clipped(m, clip_ratio, clip_ratio), m, aggregate)
        return watched(made, clip_fraction=clip_fraction(m, clip_ratio, clip_ratio))

    advantage_UK = (penalised(r, beta, "k1") - r["greedy"][:, None]) * r.there_UK
    return weighed(advantage_UK, loss, reward_greedy=r["greedy"])
