"""Weights of 4 bits under an adapter: the linear layers of a model's blocks as NF4.

    w = c[q] a_b        a_b = m + d[p_b] s_g

Of 64 numbers in a row of memory each is one of 16 levels c, the quantiles of a normal distribution,
times the largest of them, a_b. Those factors are 8 bits themselves (double quantisation): 256 of
them are levels d times one s_g, around the mean m of all. A number takes 4.13 bits.

Only what stands beside such weights can be trained: a gradient goes through them, by

    y = x W^T        dX = G W

where W is unpacked for each of the two products and kept by neither. Embeddings, norms, biases and
the head stay as they are stored. Unpacked numbers are rounded to the type of the base's files, in
every type that is computed in: a module with packed layers, one with dense ones and an export have
the same weights.

Source: QLoRA, arXiv 2305.14314; packed and unpacked by bitsandbytes, with its blocks and levels.

Shapes: N tokens, I input and O output features.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from truing.changes import Weights
from truing.core.passes.products import times, times_t
from truing.core.weights import Folded, Stored, open_weights, same_name
from truing.errors import InputError, MissingExtra

if TYPE_CHECKING:
    from truing.core.modelfiles.bases import Folder
    from truing.models import Model

BITS = 4
BLOCK = 64  # numbers that share a factor
GROUP = 256  # factors that share one
BYTES = 0.5 + 1 / BLOCK + 4 / (BLOCK * GROUP)  # of a number
# Matrices of numbered blocks: all but embeddings, the head, and what stands before or behind them.
_OF_BLOCK = re.compile(r"\.\d+\..*\.weight$")
_NO_PRODUCT = re.compile(r"norm|embed")


def check(model: Model, bits: int) -> None:
    """Raise an InputError where a model cannot be packed into so many bits."""
    if bits != BITS:
        raise InputError(
            "weights are packed into 4 bits",
            where=model.name,
            seen=bits,
            fix="Write ?bits=4 behind the model's name, or nothing for weights as they are stored",
        )
    if model.builder:
        raise InputError(
            "only the architectures of transformers are packed into 4 bits",
            where=model.name,
            fix="Leave out ?bits=4",
        )
    _check_installed(model.name)
    stored = Rounded(open_weights(model.folder))
    own = [c for c in model.weight_changes if isinstance(c, Weights)]
    if stored.packs and stored.packs <= Folded(stored, own).changed:
        raise InputError(
            "its weights were trained or merged, and 4 bits are made of the base's files alone",
            where=model.name,
            fix="Export it, Model.export(FOLDER) or `truing store export`, and name that folder "
            "with ?bits=4",
        )


def _check_installed(where: str = "") -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "quant", where=where)


@cache
def _library() -> Any:
    """bitsandbytes.functional; it takes seconds to import, so that only packed weights ask for it.

    It tells of a faster product that needs another package; its own products are not used here.
    """
    _check_installed()
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    finally:
        log.setLevel(level)
    return functional


def packed(weight_OI: Tensor) -> tuple[Tensor, Any]:
    """A matrix's numbers as bytes [O I / 2, 1], and what unpacks them.

    The library gets rows of whole blocks: a CPU's kernel counts the blocks of each row anew.
    """
    width = BLOCK if weight_OI.numel() % BLOCK == 0 else weight_OI.numel()
    rows, pack = weight_OI.reshape(-1, width), _library().quantize_4bit
    made = pack(rows, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    return cast("tuple[Tensor, Any]", made)


def unpacked(bytes_B1: Tensor, state: Any, shape: Sequence[int]) -> Tensor:
    """The matrix of that shape, [O, I], in the type that it was packed from."""
    return cast(Tensor, _library().dequantize_4bit(bytes_B1, state)).view(*shape)


class _Product(torch.autograd.Function):
    """y = x W^T + b, with the gradient of x alone."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, layer: Linear4) -> Tensor:  # type: ignore[override]
        """The product with the weight as it is unpacked now."""
        ctx.layer = layer  # type: ignore[attr-defined]
        return times_t(x, layer.weight, layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, up: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """dX, with the weight unpacked again."""
        return times(up, cast(Linear4, ctx.layer).weight), None  # type: ignore[attr-defined]


class Linear4(nn.Linear):
    """A linear layer whose weight is packed: `weight` unpacks it each time, and is not written to.

    Args:
        weight_OI: as the base's files have it.
        bias_O: frozen.
        dtype: that it computes in.
        device: where it is packed, which takes long on a CPU; the layer begins on the CPU.
    """

    def __init__(
        self, weight_OI: Tensor, bias_O: nn.Parameter | None, dtype: torch.dtype, device: str
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight_OI.shape
        self.dtype, self.bias = dtype, bias_O
        bytes_B1, self.state = packed(weight_OI.to(device))
        self.state.to("cpu")
        self.packed: Tensor
        self.register_buffer("packed", bytes_B1.cpu(), persistent=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[O, I] in the type that is computed in."""
        shape = (self.out_features, self.in_features)
        return unpacked(self.packed, self.state, shape).to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear4:
        """Move what unpacks the weight with it; no type but its own fits it."""
        super()._apply(fn, recurse)
        self.state.to(self.packed.device)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output; see the module's docstring for the gradient."""
        return cast(Tensor, _Product.apply(input, self))


class _Over(Stored):
    """Another reading of stored tensors, of the same names and shapes."""

    def __init__(self, stored: Stored) -> None:
        self._files, self._opened = stored._files, stored._opened


class Rounded(_Over):
    """A base's tensors as they are once the linear layers of its blocks were packed."""

    def __init__(self, stored: Stored) -> None:
        super().__init__(stored)
        self.plain = stored
        self.packs = {n for n in stored if _packs(n, stored)}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.plain[name]
        return unpacked(*packed(tensor), tensor.shape) if name in self.packs else tensor

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor: packed or not, that of the files."""
        return self.plain.dtype(name)


class Blank(_Over):
    """A base's tensors with nothing in the place of those that `pack` puts there."""

    def __init__(self, rounded: Rounded, names: set[str], dtype: torch.dtype) -> None:
        super().__init__(rounded)
        self.rounded, self.names, self.number = rounded, names, dtype

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            return self.rounded[name]
        return torch.zeros((), dtype=self.number).expand(self.shape(name))  # which takes no memory


def _packs(name: str, stored: Stored) -> bool:
    fits = _OF_BLOCK.search(name) is not None and _NO_PRODUCT.search(name) is None
    return fits and len(stored.shape(name)) == 2


def weights_of(base: Folder) -> Stored:
    """A base's weights as it computes with them."""
    stored = open_weights(base.path)
    return Rounded(stored) if base.bits else stored


def blank(folded: Folded, dtype: torch.dtype) -> Blank:
    """The base without what is packed; what changes touch stays dense, and rounded below them."""
    rounded = cast(Rounded, folded.base)
    return Blank(rounded, rounded.packs - folded.changed, dtype)


def rounded_in(folded: Folded) -> set[str]:
    """Names of the weights that were packed, or are to be."""
    base = folded.base.rounded if isinstance(folded.base, Blank) else folded.base
    return base.packs if isinstance(base, Rounded) else set()


def pack(module: nn.Module, folded: Folded, dtype: torch.dtype, device: str, where: str) -> None:
    """Put packed layers in the place of a module's blank ones; see `blank`.

    Raises:
        InputError: a weight that was to be packed belongs to no linear layer of the module.
    """
    blank = cast(Blank, folded.base)
    left = set(blank.names)
    for name, linear in list(module.named_modules()):
        stored = same_name(f"{name}.weight", left)
        if stored is None or type(linear) is not nn.Linear:
            continue
        left.discard(stored)
        made = Linear4(blank.rounded.plain[stored], linear.bias, dtype, device)
        module.set_submodule(name, made)
    if left:
        raise InputError(
            "the architecture has blocks that are not packed into 4 bits: only linear layers are",
            where=where,
            seen=sorted(left)[:3],
            fix="Name the model without ?bits=4; experts that lie in one tensor, and GPT-2's "
            "layers, stay as they are",
        )


def bytes_of(folded: Folded, names: Iterable[str], width: int) -> int:
    """Bytes of some weights in memory, with packed ones where the base is `Blank`.

    Args:
        width: bytes of a number of all others.
    """
    small = folded.base.names if isinstance(folded.base, Blank) else set[str]()
    return math.ceil(
        sum((BYTES if n in small else width) * math.prod(folded.shape(n)) for n in names)
    )


def packed_in(module: nn.Module) -> list[Linear4]:
    """The packed layers of a module."""
    return [m for m in module.modules() if isinstance(m, Linear4)]
