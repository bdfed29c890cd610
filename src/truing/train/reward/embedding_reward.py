"""Fit a reward model in seconds: a Bradley-Terry head on a frozen model's last states, by Newton.

    loss(w) = 1/N sum_i -logsigmoid(w . z_i - margin_i) + ridge/2 s^2 |w|^2
    z_i = h(chosen) - h(rejected),   s^2 = mean of the entries of z_i squared

h is the last hidden state of an answer's last token, of a model that is not changed: one pass over
the pairs, and what is left is logistic regression. Its loss is convex, and Newton's steps, halved
until the loss falls, go to the one point at which its gradient is 0, whatever the seed; training
the head by bradley_terry on a trunk that stands still would come to the same. ridge is counted on
states of scale 1, so that it means the same for every model; without it pairs that can all be told
apart, as can fewer than D of them, would have no optimum. `margin` is the optional column of
bradley_terry. The head's constant, which pairs say nothing of, makes the answers' mean score 0.

The model that comes back scores as any other reward model does. It is cheap enough to be fitted
again after every few labels (select/informative_pairs), from several seeds' rows (the reward
`ensemble`), or to see whether a rule can be read off a model at all. What all layers must learn is
for bradley_terry. Pairs of which an answer is empty, or both are the same, are left out and
counted.

Differences: the states' mean over tokens is usual; here the last token's, as heads read here. Of
the heads that the survey lists, one for each user on shared states, and several whose weights a
gate decides (ratings of attributes), are not here: both need rows that say who rated what.
Sources: reward models on embeddings arXiv 2502.04357; in the list of arXiv 2507.13158.

Shapes: N pairs, D hidden size.
"""

from __future__ import annotations

import numpy as np
import torch

from truing.context import current
from truing.core.passes.pair_states import Numbers, differing, pair_states
from truing.core.passes.scoring import ScoreHead, check_linear
from truing.datasets import licence_of
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.tables import Table, content_hash

NAME = "embedding_reward"
STEPS, TOLERANCE = 100, 1e-9  # Newton's steps at most; norm of the gradient that counts as 0
ROUNDING = 1e-12  # of a loss


def loss(w_D: Numbers, z_ND: Numbers, margin_N: Numbers, ridge: float) -> float:
    """Mean of -logsigmoid(w . z - margin) and the penalty."""
    fit = np.logaddexp(0.0, margin_N - z_ND @ w_D).mean()
    return float(fit + ridge / 2 * (w_D @ w_D))


def slopes(w_D: Numbers, z_ND: Numbers, margin_N: Numbers, ridge: float) -> tuple[Numbers, Numbers]:
    """The loss's gradient [D] and its matrix of second derivatives [D, D]."""
    wrong_N = 0.5 - 0.5 * np.tanh((z_ND @ w_D - margin_N) / 2)  # sigmoid of what is missing
    first_D = ridge * w_D - z_ND.T @ wrong_N / len(z_ND)
    second_DD = (z_ND.T * (wrong_N * (1 - wrong_N))) @ z_ND / len(z_ND)
    return first_D, second_DD + ridge * np.eye(len(w_D))


def fitted(z_ND: Numbers, margin_N: Numbers, ridge: float) -> Numbers:
    """The w_D at which the loss is least; ridge is above 0."""
    w_D = np.zeros(z_ND.shape[1])
    for _ in range(STEPS):
        first_D, second_DD = slopes(w_D, z_ND, margin_N, ridge)
        if np.linalg.norm(first_D) <= TOLERANCE:
            break
        down_D = np.linalg.solve(second_DD, first_D)
        here, size = loss(w_D, z_ND, margin_N, ridge), 1.0
        enough = first_D @ down_D / 4  # of what a straight line would fall by
        while loss(w_D - size * down_D, z_ND, margin_N, ridge) > here - size * enough + ROUNDING:
            size /= 2
        w_D = w_D - size * down_D
    return w_D


@method(
    paper="irl-survey",
    needs=("weights", "hidden"),
    rows={"data": ("pair",)},
    within={"ridge": "(0, inf)"},
)
def embedding_reward(model: Model, data: Table, *, ridge: float = 0.1) -> Model:
    """Fit a reward model in seconds: a Bradley-Terry head on a frozen model's last states.

    Args:
        ridge: how strongly weights are drawn to 0; more for fewer or noisier pairs.
    """
    pairs = data.expect("pair", where=NAME)
    places = differing(pairs)
    if not places:
        raise InputError(
            "no pair has two answers that differ",
            where=NAME,
            seen=f"{len(pairs)} rows",
            fix="Give pairs of which one answer is preferred to another",
        )
    pairs = pairs.take(places)
    loaded, context = model.load_module("float32"), current()
    check_linear(loaded)
    margin_N = np.array([margin_of(pairs, i) for i in range(len(pairs))])
    state_NKD = pair_states(loaded, pairs)
    z_ND = state_NKD[:, 0] - state_NKD[:, 1]
    scale = float(np.sqrt((z_ND**2).mean())) or 1.0
    v_D = fitted(z_ND / scale, margin_N, ridge)
    first_D, _ = slopes(v_D, z_ND / scale, margin_N, ridge)
    context.metric(
        rows=len(pairs),
        left_out=len(data) - len(pairs),
        loss=loss(v_D, z_ND / scale, margin_N, ridge),
        gradient=float(np.linalg.norm(first_D)),
        accuracy=float((z_ND @ v_D > 0).mean()),
    )
    head = ScoreHead(len(v_D))
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(v_D / scale)[None])
        head.bias.fill_(-float((state_NKD @ v_D).mean()) / scale)
    key = content_hash([NAME, ridge, model.key, data.key], 8)
    made = head.added_to(model, context.folder / f"{NAME}-{key}", "answers")
    licence = licence_of([data])
    made = made.with_licences([licence] if licence else [])
    return made.called(f"{model.name}+{NAME}")


def margin_of(pairs: Table, i: int) -> float:
    """The row's `margin`, 0 where it has none; an InputError for what is no finite number."""
    value = pairs[i].get("margin")
    if value is None or value != value:
        return 0.0
    if not isinstance(value, (int, float)) or not np.isfinite(value):
        raise InputError(
            "needs a finite number in column 'margin'",
            where=f"{NAME} {pairs.place(i)}",
            seen=value,
            fix="Leave it empty where there is none",
        )
    return float(value)
