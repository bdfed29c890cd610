"""Rows of logits for statistics that compare with a teacher, and their slopes by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from truing.core.logprob import Rows, Statistic


def rows(logits_CV: Tensor, **extras: Tensor) -> Rows:
    return Rows(logits_CV.log_softmax(1), torch.zeros(len(logits_CV), dtype=torch.long), extras)


def slopes(statistic: Statistic, logits_CV: Tensor, **extras: Tensor) -> tuple[Tensor, Tensor]:
    """(values, slopes), the slopes checked against the derivative of the values."""
    leaf = logits_CV.clone().requires_grad_()
    value_C, _ = statistic(rows(leaf, **extras), False)
    (want_CV,) = torch.autograd.grad(value_C.sum(), leaf)
    again_C, slope_CV = statistic(rows(logits_CV, **extras), True)
    assert slope_CV is not None and torch.allclose(again_C, value_C.detach(), atol=1e-6)
    assert torch.allclose(slope_CV, want_CV, atol=1e-5)
    return again_C, slope_CV


def drawn(seed: int, rows: int = 5, vocab: int = 7) -> Tensor:
    return 1.5 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)).double()
