"""Choose the pairs to be labelled next: those that would tell a reward model most.

    entropy        H(p_i),   p_i = sigmoid(s(y_1) - s(y_2)),   H(p) = -p log p - (1-p) log(1-p)
    disagreement   H(mean_k p_ik) - mean_k H(p_ik)             of reward models k = 1 .. K
    design         the i that adds most to log det A, one after the other:
                   log(1 + v_i z_i' A^-1 z_i),   z_i = h(y_1) - h(y_2),   v_i = p_i (1 - p_i)

entropy asks where a reward model is torn, be it that it knows too little or that the answers are
equally good; disagreement, the information gain of arXiv 1112.5745, where models inferred apart
contradict each other, which they do not over equally good answers. design looks at all that is
chosen together: A = ridge I + sum v z z' is the Fisher information of a Bradley-Terry head on the
frozen last states h, so that directions count which no pair has told of yet, and of two alike the
second adds little. p is what the model's own linear head says, 1/2 where it has none: a language
model is enough to begin with. `labelled` are in A from the beginning. States are divided by the
root of their mean square, so that ridge means the same for every model. The greedy choice reaches
1 - 1/e of what any n pairs could add; A^-1 is kept up to date by Sherman and Morrison's formula.

A pair is a row of prompt, chosen and rejected whose order nobody has decided yet, or a guess. Rows
of which an answer is empty, or both are the same, are never chosen. The chosen ones come in the
order of choice, with what each tells in column `information`, in nats. After labelling, train a
model anew (train/embedding_reward takes seconds) and choose again. On Gaussian states of 16
dimensions design needs at most nine tenths of the labels that chance does. Take near-duplicates out
first (select/near_duplicates).

Sources: D-optimal choice of pairs on last states arXiv 2502.04354, for whose past-aware form
`labelled` stands; the list of arXiv 2507.13158. That survey's choice of prompts for a query by
offline inverse reinforcement learning is not here: it needs logs of prompts that were tried.

Shapes: N pairs, K models, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from truing.core.judging.rewards import check_reward_model
from truing.core.passes.pair_states import Numbers, differing, pair_margins, pair_states
from truing.core.passes.scoring import HEAD, check_answers, check_linear
from truing.errors import InputError
from truing.method import method
from truing.models import Loaded, Model
from truing.tables import Table

WHERE = "select/informative_pairs"


def entropy(margin_N: Numbers) -> Numbers:
    """H(sigmoid(m)), in nats, also of margins whose sigmoid is 0 or 1 but for rounding."""
    off_N = np.abs(margin_N)
    return np.log1p(np.exp(-off_N)) + off_N * np.exp(-off_N) / (1 + np.exp(-off_N))


def disagreement(margin_KN: Numbers) -> Numbers:
    """How much entropy of the mean preference is not in the single ones, in nats, [N]."""
    p_N = (0.5 + 0.5 * np.tanh(margin_KN / 2)).mean(0).clip(1e-300, 1 - 1e-16)
    whole_N = -p_N * np.log(p_N) - (1 - p_N) * np.log1p(-p_N)
    return np.maximum(whole_N - entropy(margin_KN).mean(0), 0.0)


def design(
    z_ND: Numbers, weight_N: Numbers, n: int, inverse_DD: Numbers
) -> tuple[list[int], list[float]]:
    """The n rows that one after the other add most to log det A, and what each adds.

    Args:
        weight_N: v of each.
        inverse_DD: A^-1 of what is known already.
    """
    inverse_DD = inverse_DD.copy()
    reach_N = ((z_ND @ inverse_DD) * z_ND).sum(1)
    left_N = np.ones(len(z_ND), bool)
    order: list[int] = []
    gains: list[float] = []
    for _ in range(n):
        gain_N = np.where(left_N, np.log1p(weight_N * reach_N), -np.inf)
        best = int(gain_N.argmax())  # of equal ones the first
        order.append(best)
        gains.append(float(gain_N[best]))
        left_N[best] = False
        moved_D = inverse_DD @ z_ND[best]
        scale = weight_N[best] / (1 + weight_N[best] * reach_N[best])
        inverse_DD -= scale * np.outer(moved_D, moved_D)
        reach_N = np.maximum(reach_N - scale * (z_ND @ moved_D) ** 2, 0.0)
    return order, gains


def variance(loaded: Loaded, z_ND: Numbers) -> Numbers:
    """p (1 - p) of each pair by the model's own head, 1/4 where it has none, [N]."""
    weight = loaded.extra.get(f"{HEAD}.weight")
    if weight is None:
        return np.full(len(z_ND), 0.25)
    # The head's constant is no part of a difference. (1 - tanh^2) / 4 is p (1 - p).
    return 0.25 * (1 - np.tanh(z_ND @ weight[0].double().cpu().numpy() / 2) ** 2)


def designed(
    model: Model, pairs: Table, labelled: Table | None, n: int, ridge: float
) -> tuple[list[int], list[float]]:
    """`design` on a model's states, with what is labelled already."""
    check_answers(model, WHERE)
    loaded = model.load_module()
    check_linear(loaded)
    state_NKD = pair_states(loaded, pairs)
    z_ND = state_NKD[:, 0] - state_NKD[:, 1]
    weight_N = variance(loaded, z_ND)
    scale = float(np.sqrt((z_ND**2).mean())) or 1.0
    a_DD = ridge * np.eye(z_ND.shape[1])
    if labelled is not None and len(labelled):
        known_NKD = pair_states(loaded, labelled)
        known_ND = known_NKD[:, 0] - known_NKD[:, 1]
        a_DD += (known_ND.T * variance(loaded, known_ND)) @ known_ND / scale**2
    return design(z_ND / scale, weight_N, n, np.asarray(np.linalg.inv(a_DD), np.float64))


def _check(others: Mapping[str, Model] | None, labelled: Table | None, by: str) -> None:
    """Raise InputError for an input that is missing, or that counts for nothing."""
    if by == "disagreement" and not others:
        raise InputError(
            "a model alone does not disagree",
            where=f"{WHERE} input 'others'",
            fix="Give the same reward inferred again, with another seed or from other rows",
        )
    for name, given, use in (("others", others, "disagreement"), ("labelled", labelled, "design")):
        if given and by != use:
            raise InputError(
                f"input {name!r} counts for nothing by {by}",
                where=WHERE,
                fix=f"Leave it out, or choose by={use}",
            )


@method(
    paper="irl-survey",
    needs=("hidden",),
    rows={"data": ("pair",), "labelled": ("pair",)},
    within={"n": (1, None), "ridge": "(0, inf)"},
    makes="data",
)
def informative_pairs(
    data: Table,
    reward_model: Model,
    others: dict[str, Model] | None = None,
    labelled: Table | None = None,
    *,
    n: int = 100,
    by: Literal["entropy", "disagreement", "design"] = "design",
    ridge: float = 1.0,
) -> Table:
    """Choose the pairs to be labelled next: those that would tell a reward model most.

    Args:
        reward_model: what is to be told more; for design a language model as well.
        others: for disagreement, the same reward inferred again, by name.
        labelled: for design, pairs whose labels are known already.
        n: pairs to choose.
        by: what tells most.
        ridge: for design, what is known of each direction before any label.
    """
    _check(others, labelled, by)
    pairs = data.expect("pair", where=WHERE)
    places = differing(pairs)
    if n > len(places):
        raise InputError(
            "cannot choose so many pairs whose answers differ",
            where=f"{WHERE} setting 'n'",
            seen=f"{n} of {len(places)}",
            fix=f"Set n to {len(places)} or less",
        )
    pairs = pairs.take(places)
    if by == "design":
        known = labelled.expect("pair", where=WHERE) if labelled is not None else None
        known = known.take(differing(known)) if known is not None else None
        order, told = designed(reward_model, pairs, known, n, ridge)
    else:
        models = [reward_model, *(others or {}).values()]
        for one in models:
            check_reward_model(one, WHERE)
        margin_KN = np.stack([pair_margins(one, pairs) for one in models])
        value_N = entropy(margin_KN[0]) if by == "entropy" else disagreement(margin_KN)
        order = np.argsort(-value_N, kind="stable")[:n].tolist()
        told = value_N[order].tolist()
    found = data.take(places[i] for i in order)
    for row, value in zip(found, told, strict=True):  # its own rows, not those of `data`
        row["information"] = value
    return found.with_lineage(filter=f"informative_pairs by {by}")
