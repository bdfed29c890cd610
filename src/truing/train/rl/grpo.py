"""Group relative policy optimisation: an answer is as good as it beats the others to its prompt.

    A_i = (R_i - mean_g) / (std_g + 1e-4),  std with n - 1;  ratio_t = pi(y_t) / pi_old(y_t)
    l_t = -min(ratio_t A_i, clip(ratio_t, 1 - e_lo, 1 + e_hi) A_i) + beta KL_t
    grpo      mean over answers of the mean of l_t over their tokens              arXiv 2402.03300
    dr_grpo   A_i = R_i - mean_g; sum of l_t divided by the longest answer        arXiv 2503.20783
    dapo      mean of l_t over all tokens; e_hi above e_lo; groups of equal rewards are replaced;
              answers near the length limit are punished                          arXiv 2503.14476
    gdpo      grpo's loss with A_i = norm(sum_j w_j (R_ij - mean_g) / (std_g + 1e-4)): each reward
              is normalised in its group, their sum by the mean and deviation of the batch;
              ending by itself is one more reward, of weight `missing_end`

KL is k1, k2 or k3 of `core.rl.advantages`, in the loss, or summed over the answer and taken off its
reward. k3_ratio is ratio_t k3, which stays unbiased when a rollout is learnt from more than once;
the ratio is differentiated too, so that even at ratio 1 its gradient is the KL's, which k3's is
not. In the reward it is k3.

grpo's `aggregate` replaces its average: bnpo is the mean over all tokens, luspo the mean over
answers of their sums. Usually bnpo's mean is that of a micro-batch and dapo's that of the whole
generation batch; here both are that of the whole update, since results do not depend on how an
update is split to fit memory. With one minibatch a rollout, the default, an update is the whole
generation batch. luspo is dr_grpo's average times `max_tokens`.

grpo's `opsm` masks off-policy sequences: an answer of negative advantage whose mean log pi_old / pi
is above it has no surrogate, yet stays in every denominator and keeps its KL. No threshold is
usual, so none is the default. pi_old is the policy before the rollout's first update: with one
update a rollout nothing is masked.

`entropy_share` trains on forking tokens alone: those whose distribution, under pi_old, has an
entropy of at least the (1 - share) quantile over all tokens of the rollout ("Beyond the 80/20 Rule:
High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM Reasoning", arXiv
2506.01939, which takes 0.2). The others lose their surrogate, yet stay in every denominator and
keep their KL. TRL calls it `top_entropy_quantile`, and its values are the same. Entropies are
measured in one further pass. All four methods have it. The batch of the usual form is a rollout
here, so that minibatches share one quantile.

Groups of equal rewards have no gradient and are not computed (they are counted, and stay in the
denominators), unless a KL term in the loss gives them one. DAPO's overlong punishment enters before
the advantages. With `drop_unfinished` answers cut off at the limit are kept out of the loss and of
every average in it; their rewards still count in the group's mean. The metric `dropped` is their
share, and where a rollout has no other answer it teaches nothing, which is said once.

Shapes: U groups, K answers, T tokens.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from truing.core.objective import Loss, Measurements
from truing.core.online import (
    Aggregation,
    Update,
    aggregated,
    by_answer,
    by_length,
    by_token,
    clip_fraction,
    clipped,
    kl_loss,
    on_policy,
    online,
    watched,
    weighed,
)
from truing.core.rl.advantages import (
    Estimator,
    Scale,
    dropped,
    ended,
    group_advantage,
    kl_tokens,
    normalised,
    on_high_entropy,
    overlong,
)

Place = Literal["loss", "reward"]


def penalised(r: Measurements, beta: float, kl: Estimator, place: Place = "reward") -> Tensor:
    """Rewards less beta times the KL summed over the answer, [U, K]."""
    if not beta or place == "loss":
        return r["reward"]
    kl_UKT = kl_tokens(r["logp"], r["ref_logp"], kl) * r.mask_UKT
    return r["reward"] - beta * kl_UKT.sum(-1)


@online(paper="preference-losses", needs=("ref_logp", "old_entropy"), least=2)
def grpo(
    r: Measurements,
    *,
    beta: float = 0.0,
    kl: Estimator = "k3",
    kl_in: Place = "loss",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    bound: float = 0.0,
    scale: Scale = "group",
    aggregate: Aggregation = "grpo",
    opsm: float = 0.0,
    drop_unfinished: bool = False,
    entropy_share: float = 1.0,
) -> Update:
    """Group relative policy optimisation: an answer is as good as it beats the others.

    Args:
        beta: strength of the pull towards the reference; 0 does without one.
        kl: estimator of the divergence: k1, k2 or k3; k3_ratio weighs k3 by the ratio of new to old
            probability, and is unbiased.
        kl_in: whether the divergence is in the loss or taken off the reward.
        bound: largest ratio for negative advantages too; 0 for none.
        scale: what centred rewards are divided by: the standard deviation of their group, of the
            batch, or nothing.
        opsm: nats a token by which an answer may have lost probability since it was drawn; beyond,
            it is not pushed down further. 0 for any.
        drop_unfinished: keep answers without a stop token out of the loss.
    """
    in_loss = beta if kl_in == "loss" else 0.0

    def loss(m: Measurements) -> Loss:
        near_UK1, seen = on_policy(m, opsm)
        per_UKT = clipped(m, clip_low, clip_high, bound=bound) * near_UK1
        if in_loss:
            per_UKT = per_UKT + in_loss * kl_loss(m, kl)
        made = aggregated(per_UKT, m, aggregate, ended(m, drop_unfinished))
        return watched(made, clip_fraction=clip_fraction(m, clip_low, clip_high), **seen)

    reward_UK = penalised(r, beta, kl, kl_in)
    advantage_UK, kept_UK = group_advantage(reward_UK, r.there_UK, scale), ended(r, drop_unfinished)
    advantage, high = on_high_entropy(advantage_UK, r, entropy_share, kept_UK)
    return weighed(advantage, loss, beta=in_loss, **high, **dropped(r, drop_unfinished))


@online(paper="preference-losses", needs=("ref_logp", "old_entropy"), least=2)
def dr_grpo(
    r: Measurements,
    *,
    beta: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    drop_unfinished: bool = False,
    entropy_share: float = 1.0,
    max_tokens: int = 64,
) -> Update:
    """GRPO without its two biases: neither the group's deviation nor the length divides.

    Args:
        beta: strength of the pull towards the reference (k3, in the loss); 0 does without one.
        drop_unfinished: keep answers without a stop token out of the loss.
    """

    def loss(m: Measurements) -> Loss:
        per_UKT = clipped(m, clip_low, clip_high)
        if beta:
            per_UKT = per_UKT + beta * kl_loss(m)
        made = by_length(per_UKT, m, max_tokens, ended(m, drop_unfinished))
        return watched(made, clip_fraction=clip_fraction(m, clip_low, clip_high))

    advantage_UK = group_advantage(r["reward"], r.there_UK, "none")
    advantage, high = on_high_entropy(advantage_UK, r, entropy_share, ended(r, drop_unfinished))
    return weighed(advantage, loss, beta=beta, **high, **dropped(r, drop_unfinished))


@online(
    paper="preference-losses",
    needs=("old_entropy",),
    least=2,
    within={"buffer": (1, None), "punish": (0, None)},
)
def dapo(
    r: Measurements,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    buffer: int = 16,
    punish: float = 1.0,
    drop_unfinished: bool = False,
    entropy_share: float = 1.0,
    refill: int = 4,
    max_tokens: int = 64,
) -> Update:
    """Decoupled clipping and dynamic sampling: GRPO on whole batches of tokens that teach.

    Args:
        clip_high: how far above 1 the ratio counts; more room than below keeps unlikely tokens
            alive.
        buffer: tokens before the length limit over which the punishment rises.
        punish: largest punishment of a long answer; 0 for none.
        drop_unfinished: keep answers without a stop token out of the loss.
        refill: rounds of further prompts that may take the place of groups whose rewards, the
            punishment included, are equal. Equal rewards of answers that are punished unequally
            stay and teach length alone; the paper, whose rewards are right and wrong, drops these.
    """
    reward_UK = r["reward"]
    if punish:
        reward_UK = reward_UK + punish * overlong(r.length_UK, max_tokens, min(buffer, max_tokens))

    def loss(m: Measurements) -> Loss:
        made = by_token(clipped(m, clip_low, clip_high), m, ended(m, drop_unfinished))
        return watched(made, clip_fraction=clip_fraction(m, clip_low, clip_high))

    advantage_UK = group_advantage(reward_UK, r.there_UK)
    advantage, high = on_high_entropy(advantage_UK, r, entropy_share, ended(r, drop_unfinished))
    return weighed(advantage, loss, beta=0.0, **high, **dropped(r, drop_unfinished))


@online(paper="preference-losses", needs=("old_entropy",), least=2)
def gdpo(
    r: Measurements,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    drop_unfinished: bool = False,
    entropy_share: float = 1.0,
    weights: dict[str, float] | None = None,
    missing_end: float = 0.0,
) -> Update:
    """GRPO for several rewards, each normalised in its group before they are added.

    Args:
        drop_unfinished: keep answers without a stop token out of the loss.
        missing_end: weight of ending with a stop token, a reward of 1 or 0 beside the others.
    """
    total_UK = missing_end * group_advantage(r["finished"], r.there_UK)
    for name, term_UK in r.columns.items():
        _, part, term = name.partition("reward/")
        if part:
            weight = (weights or {}).get(term, (weights or {}).get(term.split("/")[0], 1.0))
            total_UK = total_UK + weight * group_advantage(term_UK, r.there_UK)

    def loss(m: Measurements) -> Loss:
        made = by_answer(clipped(m, clip_low, clip_high), m, ended(m, drop_unfinished))
        return watched(made, clip_fraction=clip_fraction(m, clip_low, clip_high))

    advantage_UK = normalised(total_UK, r.there_UK)
    advantage, high = on_high_entropy(advantage_UK, r, entropy_share, ended(r, drop_unfinished))
    return weighed(advantage, loss, beta=0.0, **high, **dropped(r, drop_unfinished))
