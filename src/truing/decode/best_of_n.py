"""Best of n: the model draws n answers and gives the one that a reward likes best.

    y = argmax_i h(x, y_i),   y_1 .. y_n ~ pi(. | x),   h = sum_j w_j r_j

with r_j the rewards (functions, principles' checks, a reward model; see `core.judging.rewards`);
the first of equal ones is taken, so that n = 1 is plain sampling. The distribution of y lies at
most log n - (n - 1) / n nats from pi (a bound: Theoretical guarantees on the best-of-n alignment
policy, arXiv 2401.01879). Best-of-n as re-ranking: WebGPT, arXiv 2112.09332.

A greedy request has nothing to choose from and is passed on. An answer to several draws is the best
of n candidates of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from truing.core.chat import Prompt
from truing.core.drawing import Base, Completion
from truing.core.judging.rewards import rewarded, rewards_of
from truing.core.sampling import SamplingSettings
from truing.errors import InputError
from truing.method import component, method
from truing.models import Model
from truing.principles import Principles
from truing.tables import Row


def best(scores: Sequence[float]) -> int:
    """Index of the largest score, the first one on ties."""
    return max(range(len(scores)), key=lambda i: (scores[i], -i))


@component("decoder", name="best_of_n")
def draw(
    base: Base,
    model: Model,
    prompts: list[Prompt],
    sampling: SamplingSettings,
    *,
    n: int = 8,
    rewards: dict[str, dict[str, object]] | None = None,
    weights: dict[str, float] | None = None,
) -> list[list[Completion]]:
    """The best of n drawn answers, for every draw that is asked for."""
    value = rewards_of(base.held, rewards, weights, "decode/best_of_n")
    if n == 1 or sampling.greedy:
        return base(prompts, sampling)
    drawn = base(prompts, replace(sampling, n=n * sampling.n))
    rows: list[Row] = [
        {"prompt": prompt, "completion": c.text.strip(), "finished": c.finish == "stop"}
        for prompt, items in zip(prompts, drawn, strict=True)
        for c in items
    ]
    scores = iter(value(rows))
    chosen: list[list[Completion]] = []
    for items in drawn:
        found = [next(scores) for _ in items]
        starts = range(0, len(items), n)
        chosen.append([items[s + best(found[s : s + n])] for s in starts])
    return chosen


@method(needs=("generate",), within={"n": (1, None)})
def best_of_n(
    model: Model,
    principles: Principles | None = None,
    reward_model: Model | None = None,
    *,
    n: int = 8,
    rewards: dict[str, dict[str, object]] | None = None,
    weights: dict[str, float] | None = None,
) -> Model:
    """Best of n: the model draws n answers and gives the one that a reward likes best.

    Args:
        n: answers drawn for each that is asked for.
        rewards: rewards or checks by name, such as {short: {use: max_words, n: 40}}; in a
            plain call functions of rows too.
        weights: by those names, "principles" and "reward_model"; 1 where none is given.
    """
    if n > 1 and not rewards and principles is None and reward_model is None:
        raise InputError(
            "there is nothing to tell answers apart by",
            where="decode/best_of_n",
            fix="Give principles, a reward_model, or rewards: {short: {use: max_words, n: 40}}",
        )
    return rewarded(
        model,
        "best_of_n",
        {"n": n},
        rewards=rewards,
        weights=weights,
        principles=principles,
        reward_model=reward_model,
    )
