"""Train a strong classifier on a weak supervisor's labels, so that it outgrows its teacher.

    q = P(good) by the weak supervisor, s the score of the student's head, p = sigmoid(s)
    weak_to_strong              CE(q)             CE(t) = -t logsigmoid(s) - (1 - t) logsigmoid(-s)
    weak_to_strong_confidence   CE((1 - c) q + c h)
    weak_to_strong_product      CE(t),   t = p^b q^a / (p^b q^a + (1 - p)^b (1 - q)^a)

h is the student's own hard label: 1 iff p is at least the (1 - mean q) quantile of p over the step
(interpolated linearly), so that its share of good answers follows the weak labels'. Of
weak_to_strong_confidence c is `confidence` times the share of the training that is done while that
is below `warmup_share`, and `confidence` afterwards: with the usual 0.1 it rises to a tenth and
jumps, as in the original's code; a `warmup_share` of 1 has it rise all the way.
Targets carry no gradient. With c = 0, or b = 0 and a = 1, both are the first form.

Rows are judgements: prompt, completion, and the weak probability as `score` in [0, 1]. What else
makes a student outgrow its teacher changes these labels, see `weak_labels`: those of an ensemble,
confident ones alone, some true ones among them. Bootstrapping is steps of a recipe: a student of
middle size is a supervisor for the next larger one. `performance_gap` measures what it comes to.

Sources: "Weak-to-Strong Generalization beyond Accuracy", arXiv 2410.12621; the auxiliary
confidence loss is that of arXiv 2312.09390.

Shapes: U rows, K = 1 branch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from truing.core.batch.columns import share
from truing.core.objective import Loss, Measurements, State, objective
from truing.errors import InputError


def weak_labels_of(m: Measurements) -> Tensor:
    """q of each row, [U]; an InputError when they are no probabilities."""
    return share(m, "score", "a weak label is a probability, which")


def soft_loss(s_U: Tensor, target_U: Tensor, q_U: Tensor) -> Loss:
    """Cross-entropy to soft targets, which are held constant."""
    t_U = target_U.detach()
    per_row = -t_U * logsigmoid(s_U) - (1 - t_U) * logsigmoid(-s_U)
    agree_U = ((s_U > 0) == (q_U > 0.5)).float().detach()
    return Loss(per_row, metrics={"agreement": agree_U, "score": s_U.detach()})


def hard_labels(p_U: Tensor, q_U: Tensor) -> Tensor:
    """1 where p, or its log-odds, is at least its (1 - mean q) quantile, [U]."""
    return (p_U >= torch.quantile(p_U, (1 - q_U.mean()).clamp(0, 1))).float()


@objective(
    paper="weak-to-strong",
    unit="token",
    needs=("scores",),
    rows="judgement",
    columns={"score": None},
)
def weak_to_strong(m: Measurements) -> Loss:
    """Train a strong classifier on a weak supervisor's labels, as they are."""
    q_U = weak_labels_of(m)
    return soft_loss(m.last("scores")[:, 0], q_U, q_U)


@objective(
    paper="weak-to-strong",
    unit="batch",
    needs=("scores",),
    rows="judgement",
    columns={"score": None},
)
def weak_to_strong_confidence(
    m: Measurements,
    state: State | None = None,
    *,
    confidence: float = 0.5,
    warmup_share: float = 0.1,
    total_steps: int = 0,
) -> Loss:
    """Train on weak labels mixed with what the student itself is sure of.

    Args:
        confidence: c, the weight of the student's own hard labels.
        warmup_share: of the training, in which c is `confidence` times the share that is done.
        total_steps: of the training; 0 takes the number of updates that will be made.
    """
    for name, value in (("confidence", confidence), ("warmup_share", warmup_share)):
        if not 0 <= value <= 1:
            raise InputError(f"setting {name!r} must be in [0, 1]", seen=value)
    done = float((state or {}).get("steps", torch.zeros(())))
    share = done / total_steps if total_steps else 1.0
    c = confidence * (share if share < warmup_share else 1.0)
    q_U, s_U = weak_labels_of(m), m.last("scores")[:, 0]
    h_U = hard_labels(s_U.detach(), q_U)  # of p, which float32 rounds to 1 from 17 on, many tie
    loss = soft_loss(s_U, (1 - c) * q_U + c * h_U, q_U)
    return Loss(loss.per_unit, metrics=loss.metrics, state={"steps": torch.tensor(done + 1)})


@objective(
    paper="weak-to-strong",
    unit="token",
    needs=("scores",),
    rows="judgement",
    columns={"score": None},
)
def weak_to_strong_product(
    m: Measurements, *, weak_power: float = 1.0, student_power: float = 0.5
) -> Loss:
    """Train on the renormalised product of weak labels and the student's own.

    Args:
        weak_power: a, of the weak supervisor's probabilities.
        student_power: b, of the student's.
    """
    q_U, s_U = weak_labels_of(m), m.last("scores")[:, 0]
    # The log-odds of the product are the weighted sum of the two log-odds.
    odds_U = student_power * s_U.detach() + weak_power * torch.logit(q_U, eps=1e-6)
    return soft_loss(s_U, odds_U.sigmoid(), q_U)
