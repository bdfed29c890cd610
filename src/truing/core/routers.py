"""Routers of a mixture of experts: reading what they decide, and the values that balance them.

With z [E] a router's logits for one token, p = softmax(z), and over the tokens of a whole step
f_i = the share of them whose first expert is i, m_i = the mean of p_i:

    balance     E sum_i f_i p_i              mean over tokens: E sum_i f_i m_i      (Switch)
    importance  E sum_i m_i (2 p_i - m_i) - 1                  E sum_i m_i^2 - 1 = CV(m)^2
    z           (log sum_i exp z_i)^2

f and m are held constant, so that each is a sum over tokens: its mean and its gradient are those of
the whole step, however that is split. balance is 1 at uniform routing and E when one expert takes
all. Sources: noisy top-k and importance, arXiv 1701.06538; Switch, arXiv 2101.03961; z, arXiv
2202.08906.

Shapes: N tokens, M of them that predict a loss token, E experts, k kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from truing.errors import InputError

KIND = "MixtralTopKRouter"


def routers(module: nn.Module, where: str = "") -> list[nn.Module]:
    """The routers of a module, first layer first; an InputError when there is none."""
    found = [m for m in module.modules() if type(m).__name__ == KIND]
    if not found:
        raise InputError(
            "the model is no mixture of experts that can be read",
            where=where,
            seen=type(module).__name__,
            fix="Make one with merge/mixture_of_experts, or open a Mixtral",
        )
    return found


def top_k_gate(logits_NE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weights [N, k] of the k likeliest experts, which sum to 1, and their numbers."""
    p_NE = torch.softmax(logits_NE, -1, dtype=torch.float32)
    kept_Nk, index_Nk = p_NE.topk(k, -1)
    return kept_Nk / kept_Nk.sum(-1, keepdim=True), index_Nk


@contextlib.contextmanager
def watched(module: nn.Module, noise: float = 0.0, where: str = "") -> Generator[list[Tensor]]:
    """The logits [N, E] of each router in the passes inside the block, in the order of the layers.

    Args:
        noise: standard deviation of what is added to them before experts are chosen.
    """
    seen: list[Tensor] = []

    def read(router: nn.Module, _: object, out: object) -> object:
        logits_NE = cast("tuple[Tensor, Tensor, Tensor]", out)[0]
        seen.append(logits_NE)
        if not noise:
            return None
        loud_NE = logits_NE + noise * torch.randn_like(logits_NE)
        return (logits_NE, *top_k_gate(loud_NE, cast(int, router.top_k)))

    handles = [router.register_forward_hook(read) for router in routers(module, where)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def first_share(logits_ME: Tensor) -> Tensor:
    """f: share of the tokens whose likeliest expert is each, [E]."""
    return nn.functional.one_hot(logits_ME.argmax(-1), logits_ME.shape[1]).float().mean(0)


def balance_value(p_ME: Tensor, f_E: Tensor) -> Tensor:
    """E sum_i f_i p_i of each token, [M]."""
    return len(f_E) * (p_ME * f_E).sum(-1)


def importance_value(p_ME: Tensor, m_E: Tensor) -> Tensor:
    """E sum_i m_i (2 p_i - m_i) - 1 of each token, [M]: its mean is CV(m)^2, with its gradient."""
    return len(m_E) * (m_E * (2 * p_ME - m_E)).sum(-1) - 1


def z_value(logits_ME: Tensor) -> Tensor:
    """Squared log-sum-exp of each token's logits, [M]."""
    return logits_ME.logsumexp(-1).square()


def mutual_information(counts: Sequence[Sequence[float]]) -> float:
    """I(expert; domain) in nats of a table of counts [domains][experts]."""
    joint = torch.tensor(counts, dtype=torch.float64)
    joint = joint / joint.sum()
    apart = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
    there = joint > 0
    return float((joint[there] * (joint[there] / apart[there]).log()).sum())
