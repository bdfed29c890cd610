"""Direct preference optimisation: learn from pairs by classifying chosen against rejected.

    r_y = lp(y|x) - lp_ref(y|x),   d = r_w - r_l,   w = chosen, l = rejected
    dpo          -logsigmoid(beta d)                                              arXiv 2305.18290
    cdpo         -(1-e) logsigmoid(beta d) - e logsigmoid(-beta d)
    robust_dpo   [-(1-e) logsigmoid(beta d) + e logsigmoid(-beta d)] / (1-2e)     arXiv 2403.00409
    hinge        relu(1 - beta d)                                                 arXiv 2309.06657
    dpo_norm     dpo with each log-ratio divided by the length of its answer

beta is the strength of the pull towards the reference, e the share of labels that are wrong: cdpo
treats it as smoothing and settles at d = log((1-e)/e) / beta, robust_dpo corrects for it without
bias. beta r_y is the implicit reward, d beta the margin that is recorded.

Shapes: U pairs, K = 2 branches.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from truing.core.objective import Loss, Measurements, objective, reward_metrics
from truing.errors import InputError


def difference(m: Measurements) -> Tensor:
    """d = r_w - r_l, [U]."""
    r_UK = m.ratio()
    return r_UK[:, 0] - r_UK[:, 1]


def smoothed(z_U: Tensor, e: float) -> Tensor:
    """-(1-e) logsigmoid(z) - e logsigmoid(-z), [U]."""
    if not 0 <= e < 0.5:
        raise InputError("setting 'label_smoothing' must be in [0, 0.5)", seen=e)
    return -(1 - e) * logsigmoid(z_U) - e * logsigmoid(-z_U)


def metrics(m: Measurements, beta: float) -> dict[str, Tensor]:
    """Implicit rewards, and the log-probability of the chosen answer, which DPO may let fall."""
    r_UK = beta * m.ratio()
    found = reward_metrics(r_UK[:, 0], r_UK[:, 1])
    return found | {"logp_chosen": m.seq()[:, 0].detach()}


@objective(paper="preference-losses", unit="pair", needs=("logp", "ref_logp"), rows="pair")
def dpo(m: Measurements, *, beta: float = 0.1) -> Loss:
    """Direct preference optimisation: learn from pairs by classifying chosen against rejected."""
    return Loss(-logsigmoid(beta * difference(m)), metrics=metrics(m, beta))


@objective(paper="preference-losses", unit="pair", needs=("logp", "ref_logp"), rows="pair")
def cdpo(m: Measurements, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Loss:
    """DPO with smoothed labels: a share of them may be wrong."""
    return Loss(smoothed(beta * difference(m), label_smoothing), metrics=metrics(m, beta))


@objective(paper="preference-losses", unit="pair", needs=("logp", "ref_logp"), rows="pair")
def robust_dpo(m: Measurements, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Loss:
    """DPO made unbiased under a known share of flipped labels."""
    e, z_U = label_smoothing, beta * difference(m)
    if not 0 <= e < 0.5:
        raise InputError("setting 'label_smoothing' must be in [0, 0.5)", seen=e)
    per_pair = (-(1 - e) * logsigmoid(z_U) + e * logsigmoid(-z_U)) / (1 - 2 * e)
    return Loss(per_pair, metrics=metrics(m, beta))


@objective(paper="preference-losses", unit="pair", needs=("logp", "ref_logp"), rows="pair")
def hinge(m: Measurements, *, beta: float = 0.1) -> Loss:
    """Hinge in place of DPO's logistic: pairs beyond the margin have no gradient."""
    return Loss(relu(1 - beta * difference(m)), metrics=metrics(m, beta))


@objective(paper="preference-losses", unit="pair", needs=("logp", "ref_logp"), rows="pair")
def dpo_norm(m: Measurements, *, beta: float = 0.1) -> Loss:
    """DPO on log-ratios per token, so that long answers do not weigh more."""
    r_UK = m.ratio() / m.length_UK
    return Loss(-logsigmoid(beta * (r_UK[:, 0] - r_UK[:, 1])), metrics=metrics(m, beta))
