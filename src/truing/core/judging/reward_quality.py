"""What is measured of a reward: order, calibration, length, over-optimisation, what is open in it.

All of it works on scores that are at hand; intervals are over prompts, Wilson's of outcomes, else
bootstraps. `evaluate/reward_diagnostics` gets the scores and says what they mean.

Shapes: U prompts, K draws, N margins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from truing.core.stats import SEED, mean_of, reflected, resampled, shares, spearman, unpaired
from truing.reports import Measure

BINS = 10
Scores = NDArray[np.float64]
Places = NDArray[np.int64]
Statistic = Callable[[Places], float]  # of the prompts at these places


def kl_best_of(n: int) -> float:
    """Divergence of the best of n from the policy that drew them, in nats."""
    return math.log(n) - (n - 1) / n


def best_of(proxy_K: Scores, value_K: Scores, n: int) -> float:
    """Expected value of the draw that the proxy likes best among n of the K; ties share."""
    order_K = np.argsort(proxy_K, kind="stable")
    size = len(order_K)
    weight_K = np.array([math.comb(i, n - 1) / math.comb(size, n) for i in range(size)])
    _, place_K = np.unique(proxy_K[order_K], return_inverse=True)
    shared_K = np.bincount(place_K, weight_K) / np.bincount(place_K)
    return float((shared_K[place_K] * value_K[order_K]).sum())


def won(margin: Scores) -> Scores:
    """1 where a margin is above 0, 0 where it is below, 1/2 at 0."""
    return np.where(margin == 0, 0.5, margin > 0)


def calibration_error(margin_N: Scores) -> float:
    """How far the share of right orders is from how sure the reward is, over ten even bins."""
    sure_N = 1 / (1 + np.exp(-np.abs(margin_N)))
    bin_N = np.minimum(((sure_N - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gap_B = np.bincount(bin_N, won(margin_N) - sure_N, minlength=BINS)
    return float(np.abs(gap_B).sum()) / len(margin_N)


def unidentified(score_UK: Scores) -> float:
    """Share of the scores' variance that lies between prompts; 0 where they are all one.

    The variance of the prompts' means less what the draws' own brings into them: scores that do not
    depend on the prompt would show 1 / K without that.
    """
    if len(score_UK) < 2:
        return 0.0
    inside = float(score_UK.var(1, ddof=1).mean())
    apart = max(float(score_UK.mean(1).var(ddof=1)) - inside / score_UK.shape[1], 0.0)
    return apart / (apart + inside) if apart else 0.0


def alike(one_K: Scores, two_K: Scores) -> float:
    """Share of the pairs of draws that two rewards order alike; a tie of one counts one half."""
    at = np.triu_indices(len(one_K), 1)
    a_P, b_P = (np.sign(s_K[:, None] - s_K[None])[at] for s_K in (one_K, two_K))
    return float(((a_P * b_P + 1) / 2).mean())


def within_prompts(one_UK: Scores, two_UK: Scores, at: Places) -> float:
    """Spearman's correlation of two values less the means of their prompts, of these prompts."""
    sides = (v_UK[at] - v_UK[at].mean(1, keepdims=True) for v_UK in (one_UK, two_UK))
    return spearman(*(v_UK.reshape(-1) for v_UK in sides))


@dataclass(frozen=True)
class Compared:
    """Scores of answers that are to be preferred, and of others to the same prompts.

    Args:
        first: of those to be preferred, [U].
        others: of the others, [U, K].
    """

    first: Scores
    others: Scores

    @property
    def margins(self) -> Scores:
        """How much higher each is than each of its others, [U, K]."""
        return self.first[:, None] - self.others

    @property
    def right(self) -> Scores:
        """Share of its others that each is above, [U]."""
        return won(self.margins).mean(1)


def measured(
    name: str, n: int, statistic: Statistic, unit: str, category: str = "", better: str = ""
) -> Measure:
    """A statistic of n prompts with its 95 % interval by a bootstrap over them."""
    value, (low, high) = statistic(np.arange(n)), resampled(statistic, n)
    return Measure(name, value, low, high, n, unit, category, better)


def mean_measure(
    name: str, value_U: Scores, unit: str, category: str = "", better: str = ""
) -> Measure:
    """The mean of what each prompt has; of shares that are outcomes with Wilson's interval."""
    found = mean_of(value_U.tolist(), between=(0.0, 1.0) if unit == "share" else None)
    return Measure(name, *found, unit, category, better)


def order_measures(side: Compared, category: str, beta: float = 1.0) -> list[Measure]:
    """Accuracy, margin and calibration error; beta times a margin is the logit of its order."""
    margin_UK = side.margins

    def error(at: Places) -> float:
        return calibration_error(beta * margin_UK[at].reshape(-1))

    sure = measured("calibration error", len(margin_UK), error, "share", category, "lower")
    low, high = reflected(sure.value, (sure.lo, sure.hi), most=1.0)
    return [
        mean_measure("accuracy", side.right, "share", category, "higher"),
        mean_measure("margin", margin_UK.mean(1), "score", category, "higher"),
        replace(sure, lo=low, hi=high),
    ]


def accuracy_lost(known: Compared, unseen: Compared) -> Measure:
    """Accuracy on data of the reward's own domain less that on the other, drawn apart."""
    a, b = float(known.right.mean()), float(unseen.right.mean())
    ends = unpaired(a, shares(known.right.tolist()), b, shares(unseen.right.tolist()))
    n, name = len(unseen.right), "accuracy lost on unseen"
    return Measure(name, a - b, *ends, n, "share", "", "lower")


def best_elsewhere(value_NS: Scores) -> Scores:
    """Each row's value in the column that is largest over the other half of the rows, [N].

    The largest of several means lies too high by chance alone. Here each half takes the column of
    the other; a single row, which has no other half, takes the last. Halves are drawn, always
    alike: rows of two sorts may stand in turns.
    """
    made_N = value_NS[:, -1].copy()
    drawn_N = np.random.default_rng(SEED).permutation(len(value_NS))
    for one, other in ((0, 1), (1, 0)):
        if len(value_NS) > 1:
            best = int(value_NS[drawn_N[other::2]].mean(0).argmax())
            made_N[drawn_N[one::2]] = value_NS[drawn_N[one::2], best]
    return made_N


def lost_past_peak(gold_US: Scores) -> Scores:
    """How far each prompt's gold falls from the peak of the other half to the largest N, [U].

    A peak found on the prompts that it is measured on would always show a loss. Here the mean over
    a gold that only wavers is 0, and may be below.
    """
    return best_elsewhere(gold_US) - gold_US[:, -1]


def best_of_measures(proxy_UK: Scores, gold_UK: Scores | None) -> list[Measure]:
    """Proxy and gold of the best of 1, 2, 4, ... draws; and what is lost past the gold's peak."""
    n, draws = proxy_UK.shape
    sizes = [2**i for i in range(draws.bit_length())]
    curves: dict[str, Scores] = {}
    for name, value_UK in {"proxy": proxy_UK, "gold": gold_UK}.items():
        if value_UK is not None:
            rows = zip(proxy_UK, value_UK, strict=True)
            curves[name] = np.array([[best_of(p_K, v_K, s) for s in sizes] for p_K, v_K in rows])
    made: list[Measure] = []
    for i, size in enumerate(sizes):
        within, kl = f"best of {size}", kl_best_of(size)
        for name, value_US in curves.items():
            made.append(mean_measure(name, value_US[:, i], "score", within, "higher"))
        made.append(Measure("divergence", kl, kl, kl, n, "nats", within, ""))
    if gold_UK is None:
        return made
    gold_US = curves["gold"]

    def peak(at: Places) -> float:
        return float(sizes[int(gold_US[at].mean(0).argmax())])

    def together(at: Places) -> float:
        return within_prompts(proxy_UK, gold_UK, at)

    lost_U = lost_past_peak(gold_US)
    return [
        *made,
        measured("peak of gold", n, peak, "draws", "", ""),
        mean_measure("gold lost past the peak", lost_U, "score", "", "lower"),
        measured("proxy with gold", n, together, "correlation", "", "higher"),
    ]
