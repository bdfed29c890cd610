"""Train a reward model on pairs whose answers also carry absolute scores, which anchor its scale.

    loss = -logsigmoid(r_w - r_l) + alpha ((r_w - s_w)^2 + (r_l - s_l)^2)

r is the head's score at an answer's last token, s the annotated score in [0, 1] (`score_chosen`,
`score_rejected`; a missing one, null or NaN, has no term, so that annotated and bare pairs mix).
Pairs alone say nothing of what all answers to a prompt share, and let the scores grow without end:
the second term fixes both, so that perfect against bad differs more than bad against bad. A small
alpha (0.1) is worse than none: the anchor is too weak to hold the scale and only pulls against it.
With alpha = 0 it is Bradley-Terry. Scores of several annotators should be normalised by annotator.

Source: "Baichuan Alignment Technical Report", arXiv 2410.14940, section on the reward model; its
alpha is not published, 1 is ours.

Shapes: U rows, K = 2 branches.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from truing.core.objective import Loss, Measurements, objective, reward_metrics
from truing.errors import InputError


def anchor(r_U: Tensor, s_U: Tensor, name: str) -> Tensor:
    """(r - s)^2 where s was given, 0 elsewhere; an InputError for scores outside [0, 1]."""
    there_U = s_U != -torch.inf  # which stands for a score that was not given
    wrong_U = there_U & ((s_U < 0) | (s_U > 1))
    if bool(wrong_U.any()):
        raise InputError(
            "an absolute score lies in [0, 1]",
            where=f"column {name!r}",
            seen=float(s_U[wrong_U][0]),
            fix="Divide by the best score, for each annotator",
        )
    # A difference to infinity would have no gradient, even where it is not taken.
    off_U = r_U - torch.where(there_U, s_U, 0.0)
    return torch.where(there_U, off_U.square(), 0.0)


@objective(
    paper="baichuan-alignment",
    unit="pair",
    needs=("scores",),
    rows="pair",
    columns={"score_chosen": -1e999, "score_rejected": -1e999},
)
def absolute_scores(m: Measurements, *, alpha: float = 1.0) -> Loss:
    """Train a reward model on pairs with absolute scores, which anchor its scale.

    Args:
        alpha: weight of the squared distance to the given scores; 0 is Bradley-Terry.
    """
    if alpha < 0:
        raise InputError("setting 'alpha' must not be negative", seen=alpha)
    w_U, l_U = m.last("scores").unbind(1)
    off_U = anchor(w_U, m["score_chosen"], "score_chosen")
    off_U = off_U + anchor(l_U, m["score_rejected"], "score_rejected")
    metrics = {**reward_metrics(w_U, l_U), "squared_error": off_U.detach()}
    return Loss(-logsigmoid(w_U - l_U) + alpha * off_U, metrics=metrics)
