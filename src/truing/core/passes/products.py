"""Matrix products of float32 on the CPU by the quicker of PyTorch's two libraries.

PyTorch multiplies float32 matrices with MKL. oneDNN, which it ships as well, is up to twice as
quick from eight rows on (most of all on processors of other makers than Intel and where one side is
narrow), and can add a residual to the product as it is written. Elsewhere (fewer rows, small
products, other dtypes and devices) these are plain PyTorch products. Nothing here is
differentiable: callers are autograd functions with gradients of their own, or need none.

Shapes: N rows, I input and O output features; D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

ROWS = 8  # from which on oneDNN is the quicker
# So are products of this many multiplications: oneDNN first compiles one for each new shape, in 0.7
# to 1.5 ms, and every call takes 15 us more.
WORK = 1 << 22
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _fits(x: Tensor, y: Tensor) -> bool:
    plain = x.dtype == y.dtype == torch.float32 and x.device.type == y.device.type == "cpu"
    return _ONEDNN and plain and torch.backends.mkldnn.enabled and _large(x, y)


def _large(x: Tensor, y: Tensor) -> bool:
    width = x.shape[-1]
    return x.numel() >= ROWS * width and x.numel() * y.numel() >= WORK * width


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


def _gives_float32(x: Tensor) -> bool:
    """Whether a product of half precision can be had in float32."""
    return x.is_cuda and x.dtype.itemsize == 2 and not torch.version.hip


def logits(x_ND: Tensor, w_VD: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """x w^T + bias, [N, V]; of half precision in float32 where a GPU's product can give that.

    A logit of 20 that is rounded to bfloat16 is off by up to 1/16, and its log-probability with it.
    """
    if _gives_float32(x_ND):
        made = torch.mm(x_ND, w_VD.t(), out_dtype=torch.float32)
        return made if bias_V is None else made.add_(bias_V)
    return times_t(x_ND, w_VD, bias_V)


def scores(query: Tensor, key: Tensor) -> Tensor:
    """q k^T over the last two dimensions; of half precision in float32, as `logits`.

    A score of 40 that is rounded to bfloat16 is off by up to 1/8, and its weight by 13 %.
    """
    if _gives_float32(query):
        each = (x.flatten(0, -3) for x in (query, key.transpose(-2, -1)))
        made = torch.bmm(*each, out_dtype=torch.float32)
        return made.view(*query.shape[:-1], key.shape[-2])
    return query @ key.transpose(-2, -1)


def quick_linears(module: nn.Module) -> list[nn.Linear]:
    """Stock linear layers of a module that `quick` can speed up: float32 on the CPU."""
    return [
        m
        for m in module.modules()
        if type(m) is nn.Linear
        and "forward" not in vars(m)
        and m.weight.dtype == torch.float32
        and m.weight.device.type == "cpu"
    ]


@contextlib.contextmanager
def quick(linears: Sequence[nn.Linear]) -> Generator[None]:
    """Compute these layers by `times_t` inside the block: for passes without gradients only."""

    def forward_of(layer: nn.Linear) -> object:
        def forward(input: Tensor) -> Tensor:
            return times_t(input, layer.weight, layer.bias)

        return forward

    for layer in linears:
        layer.__dict__["forward"] = forward_of(layer)
    try:
        yield
    finally:
        for layer in linears:
            del layer.__dict__["forward"]
