"""Matrix products of float32 on the CPU by the quicker of PyTorch's two libraries.

PyTorch multiplies float32 matrices with MKL. oneDNN, which it ships as well, is a tenth quicker on
processors of other makers than Intel and where one side is narrow (low-rank gradients, few rows on
a large head), and can add a residual to the product as it is written. Elsewhere (other dtypes and
devices) these are plain PyTorch products. Nothing here is differentiable: callers are autograd
functions with gradients of their own.

Shapes: N rows, I input and O output features.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import linear

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _fits(x: Tensor, y: Tensor) -> bool:
    plain = x.dtype == y.dtype == torch.float32 and x.device.type == y.device.type == "cpu"
    return _ONEDNN and plain and torch.backends.mkldnn.enabled and x.numel() > 0


def times_t(x_NI: Tensor, w_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x w^T + bias, [N, O]."""
    if _fits(x_NI, w_OI):
        op = torch.ops.mkldnn._linear_pointwise.default
        return cast(Tensor, op(x_NI, w_OI, bias_O, "none", [], ""))
    return linear(x_NI, w_OI, bias_O)


def times_t_plus(x_NI: Tensor, w_OI: Tensor, bias_O: Tensor | None, plus_NO: Tensor) -> Tensor:
    """x w^T + bias + plus, [N, O]."""
    if _fits(x_NI, w_OI):
        op = torch.ops.mkldnn._linear_pointwise.binary
        return cast(Tensor, op(x_NI, plus_NO, w_OI, bias_O, "add"))
    return linear(x_NI, w_OI, bias_O).add_(plus_NO)


def times(x_NO: Tensor, w_OI: Tensor, plus_NI: Tensor | None = None) -> Tensor:
    """x w (+ plus), [N, I]."""
    if plus_NI is not None:
        return times_t_plus(x_NO, w_OI.t(), None, plus_NI)
    return times_t(x_NO, w_OI.t())
