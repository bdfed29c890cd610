"""A GPU that is not there: tensors in main memory that carry its device and mix with no others.

Inside `pretended()` torch says that there is one GPU. What is put there stays an ordinary tensor in
main memory, so that all of it computes, and its storage is noted as the GPU's. Two modes stand
between a program and torch: one answers as a GPU's tensors do (`.device`, `.to`, `.cpu`, `device=`
of what is made new) and refuses what they refuse (`.numpy()`); the other sees every operation that
is carried out, in backward passes too, hands the note on to its results, and raises `Mixed` where
CUDA would not have computed it:

    tensors of both devices in one operation, but for numbers without dimensions where it works
    entry by entry, for copies, and for indices that lie in main memory;
    a result that is written to the other device;
    random numbers of a generator of the CPU's;
    kernels that are there for the CPU alone.

Attention is computed by its plain formula, and a mask over heads that share keys is refused: no
kernel of a GPU takes that, so that all scores would be held.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import _allowed_determinism_checks_to_fns

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
MEMORY = 64 * 2**30
COPIES = {"copy_", "_to_copy"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# Work entry by entry, too, though nothing says so of them.
ENTRIES = {"where", "masked_fill", "masked_fill_", "lerp", "fill_", "div_", "float_power"}
WIDER = [(t, t) for t in (torch.bfloat16, torch.float16)]
FOR_CPU = ("mkldnn", "for_cpu", "mkl_")


class Mixed(AssertionError):
    """What CUDA would have refused."""


class _Noted:
    """Storages by their address, which no other one gets while it is noted."""

    def __init__(self) -> None:
        self._held: dict[int, StorageWeakRef] = {}
        self._many = 4096

    def __contains__(self, tensor: Tensor) -> bool:
        try:
            return tensor.untyped_storage()._cdata in self._held
        except NotImplementedError:  # a tensor that only stands for others has no storage
            return False

    def put(self, tensor: Tensor, there: bool) -> Tensor:
        """Note that this tensor lies there, or that it does not."""
        storage = tensor.untyped_storage()
        if not there:
            self._held.pop(storage._cdata, None)
        elif storage._cdata not in self._held:
            self._held[storage._cdata] = StorageWeakRef(storage)
        if len(self._held) > self._many:
            self._held = {k: r for k, r in self._held.items() if not r.expired()}
            self._many = max(4096, 2 * len(self._held))
        return tensor


_noted = _Noted()  # the GPU's
# Made by torch itself in the course of a computation on tensors that it is told lie elsewhere: on
# a GPU they would lie there.
_either = _Noted()
_spoken = [False]  # of the calls that are going on, whether they know no tensor of the GPU
held: list[tuple[int, ...]] = []  # queries of attention that would have held all of its scores
masked: list[tuple[int, ...]] = []  # shapes of attention's masks


def lies_there(tensor: Tensor) -> bool:
    """Whether a tensor is the GPU's."""
    with torch._C.DisableTorchFunction():
        return tensor in _noted


# What is carried out


def _check(func: OpOverload, args: Sequence[object], tensors: Sequence[Tensor]) -> None:
    """Raise `Mixed` unless CUDA computes this; one tensor at least lies there."""
    name = func.overloadpacket.__name__
    if any(part in str(func) for part in FOR_CPU):
        raise Mixed(f"{func} is there for the CPU alone")
    if name in COPIES:
        return
    here = [t for t in tensors if t not in _noted and t not in _either]
    if name in INDEXING:
        own, indices, *values = args
        if cast(Tensor, own) not in _noted:
            raise Mixed(f"{func}: a tensor of the CPU, indices or values of the GPU")
        known = {id(i) for i in cast("Sequence[object]", indices)}
        known |= {id(v) for v in values if isinstance(v, Tensor) and not v.dim()}
        here = [t for t in here if id(t) not in known]
    elif torch.Tag.pointwise in func.tags or name in ENTRIES:
        here = [t for t in here if t.dim()]
    if here:
        shapes = [tuple(t.shape) for t in tensors]
        raise Mixed(f"{func}: {[tuple(t.shape) for t in here]} of {shapes} lie on the CPU")


def _written(func: OpOverload, args: Sequence[object], named: Mapping[str, object]) -> list[Tensor]:
    """The tensors that an operation writes to."""
    found: list[object] = []
    for i, declared in enumerate(func._schema.arguments):
        if declared.alias_info is not None and declared.alias_info.is_write:
            found.append(args[i] if i < len(args) else named.get(declared.name))
    return [t for t in tree_leaves(found) if isinstance(t, Tensor)]


class _Carried(TorchDispatchMode):
    """Sees every operation."""

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        named = kwargs or {}
        with torch._C.DisableTorchFunction():
            given = tree_leaves((args, named))
            tensors = [x for x in given if isinstance(x, Tensor)]
            if not any(t in _noted for t in tensors):
                made = func(*args, **named)
                either = all(t in _either for t in tensors) if tensors else not _spoken[-1]
                found = tree_leaves(made) if either else _written(func, args, named)
                for leaf in found:
                    if isinstance(leaf, Tensor) and not leaf.is_meta:
                        _either.put(leaf, either)
                return made
            _check(func, args, tensors)
            if any(isinstance(x, torch.Generator) for x in given):
                raise Mixed(f"{func}: random numbers of the CPU's generator")
            own = _written(func, args, named)
            if func.overloadpacket.__name__ != "copy_":
                if not all(t in _noted or t in _either for t in own):
                    raise Mixed(f"{func}: the result is written to a tensor of the CPU")
                for tensor in own:
                    _noted.put(tensor, True)
            made = func(*args, **named)
            kept = {t.untyped_storage()._cdata for t in own}
            for leaf in tree_leaves(made):
                if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in kept:
                    _noted.put(leaf, True)
            return made


# What is said of tensors, and what makes or moves them


class _Moved(torch.autograd.Function):
    """A copy on the other device; its gradient comes back to this one."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, there: bool) -> Tensor:  # type: ignore[override]
        with torch._C.DisableTorchFunction():
            ctx.back = x in _noted  # type: ignore[attr-defined]
            return _noted.put(x.clone(), there)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, up: Tensor) -> tuple[object, ...]:  # type: ignore[override]
        with torch._C.DisableTorchFunction():
            return _noted.put(up.clone(), cast(bool, ctx.back)), None  # type: ignore[attr-defined]


def _is_there(device: object) -> bool:
    return isinstance(device, int) or torch.device(cast(str, device)).type == "cuda"


def _to(x: Tensor, *args: object, **named: object) -> Tensor:
    """`Tensor.to`, whatever it is given."""
    dtype, device = named.get("dtype"), named.get("device")
    there = x in _noted
    for one in args:
        if isinstance(one, Tensor):
            dtype, there = one.dtype, one in _noted
        elif isinstance(one, torch.dtype):
            dtype = one
        elif isinstance(one, (str, torch.device)) or (type(one) is int):
            device = one
    if device is not None:
        there = _is_there(device)
    made = x if dtype in (None, x.dtype) else x.to(cast(torch.dtype, dtype))
    if there != (made in _noted):
        return cast(Tensor, _Moved.apply(made, there))
    return made.clone() if named.get("copy") and made is x else made


def _as_numpy(x: Tensor, *args: object, **named: object) -> object:
    if x in _noted:
        raise Mixed("a tensor of the GPU does not become an array: .cpu() first")
    return torch.Tensor.numpy(x, *args, **named)  # type: ignore[arg-type]


def _array(x: Tensor, *args: object, **named: object) -> object:
    if x in _noted:
        raise Mixed("a tensor of the GPU does not become an array: .cpu() first")
    return torch.Tensor.__array__(x, *args, **named)  # type: ignore[arg-type]


def _new_tensor(x: Tensor, data: object, **named: object) -> Tensor:
    device = named.pop("device", None)
    made = x.new_tensor(data, **named)  # type: ignore[arg-type]
    return _noted.put(made, x in _noted if device is None else _is_there(device))


def _grad_set(x: Tensor, value: Tensor | None) -> None:
    if value is not None and (value in _noted) != (x in _noted):
        raise Mixed("a gradient on another device than its tensor")
    x.grad = value


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by its formula, where it is the GPU's."""
    if query not in _noted:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if query.shape[-3] != key.shape[-3]:
        if attn_mask is not None:
            raise Mixed("no kernel takes a mask over heads that share keys: all scores are held")
        if query.dtype.itemsize > 2 or torch.cuda.get_device_capability() < (8, 0):
            held.append(tuple(query.shape))
    if attn_mask is not None:
        masked.append(tuple(attn_mask.shape))
    if is_causal:  # else it would be made on the device that tensors really lie on
        attn_mask = query.new_ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril_()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        zero = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = zero.masked_fill(~attn_mask, -torch.inf)
    formula = torch.ops.aten._scaled_dot_product_attention_math
    return formula(
        query, key, value, attn_mask, dropout_p, False, None, scale=scale, enable_gqa=enable_gqa
    )[0]


def _mm(a: Tensor, b: Tensor, *args: object, **named: object) -> Tensor:
    """`torch.mm`, which gives float32 of half types where it is asked to, on a GPU alone."""
    if not args and "out_dtype" not in named:
        return torch.mm(a, b, **named)  # type: ignore[arg-type]
    if a not in _noted or (a.dtype, b.dtype) not in WIDER:
        raise Mixed("a product of half types in float32 is there for GPUs alone")
    return a.float() @ b.float()


def _bmm(a: Tensor, b: Tensor, *args: object, **named: object) -> Tensor:
    """`torch.bmm`, as `_mm`."""
    if not args and "out_dtype" not in named:
        return torch.bmm(a, b, **named)  # type: ignore[arg-type]
    if a not in _noted or (a.dtype, b.dtype) not in WIDER or not a.dim() == b.dim() == 3:
        raise Mixed("products of half types in float32 are there for GPUs alone")
    return a.float() @ b.float()


def _histc(x: Tensor, *args: object, **named: object) -> Tensor:
    """`torch.histc`, which counts whole numbers on a GPU alone."""
    made = torch.histc(x if x.is_floating_point() else x.float(), *args, **named)  # type: ignore[arg-type]
    return made.to(x.dtype)


SAID: dict[object, Callable[..., object]] = {
    torch.Tensor.device.__get__: lambda x, *_: GPU if x in _noted else x.device,
    torch.Tensor.is_cuda.__get__: lambda x, *_: x in _noted,
    torch.Tensor.is_cpu.__get__: lambda x, *_: x not in _noted,
    torch.Tensor.grad.__set__: _grad_set,
    torch.Tensor.to: _to,
    torch.Tensor.cpu: lambda x, *_, **__: _to(x, CPU),
    torch.Tensor.cuda: lambda x, *_, **__: _to(x, GPU),
    torch.Tensor.numpy: _as_numpy,
    torch.Tensor.__array__: _array,
    torch.Tensor.new_tensor: _new_tensor,
    torch.mm: _mm,
    torch.bmm: _bmm,
    torch.histc: _histc,
    torch.as_tensor: lambda x, **named: (
        _to(x, **named) if isinstance(x, Tensor) else _anew(torch.as_tensor, (x,), named)
    ),
    torch.nn.functional.scaled_dot_product_attention: _attention,
}


def _anew(
    func: Callable[..., object], args: tuple[object, ...], named: dict[str, object]
) -> object:
    """What a function makes on the device that it is told, if any."""
    device = named.get("device")
    if device is None or not (isinstance(device, (int, str, torch.device))):
        return func(*args, **named)
    there = _is_there(device)
    if there and isinstance(named.get("generator"), torch.Generator):
        raise Mixed(f"{func}: random numbers of the CPU's generator")
    made = func(*args, **{**named, "device": "cpu" if there else device})
    for leaf in tree_leaves(made):
        if isinstance(leaf, Tensor) and not leaf.is_meta:
            _noted.put(leaf, there)
    return made


@contextlib.contextmanager
def _speaking(makes: bool) -> Generator[None]:
    _spoken.append(makes)
    try:
        yield
    finally:
        _spoken.pop()


class _Spoken(TorchFunctionMode):
    """Answers in place of torch's interface."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        named = kwargs or {}
        if func is torch.Tensor.backward:  # whose functions speak, too
            slope = named.pop("gradient", None)
            with self, _speaking(False):
                return torch.autograd.backward(*args, slope, **named)  # type: ignore[arg-type]
        said = SAID.get(func)
        given = tree_leaves((args, named))
        known = (isinstance(x, Tensor) and (x in _noted or x in _either) for x in given)
        with _speaking(not any(known)):
            return said(*args, **named) if said is not None else _anew(func, args, named)


@contextlib.contextmanager
def pretended() -> Generator[None]:
    """Inside the block there is a GPU of `MEMORY` bytes."""
    facts = SimpleNamespace(total_memory=MEMORY, major=9, minor=0, name="pretended")
    state = torch.zeros(16, dtype=torch.uint8)
    answers: dict[str, object] = {
        "is_available": True, "device_count": 1, "current_device": 0, "memory_reserved": 0,
        "memory_allocated": 0, "mem_get_info": (MEMORY, MEMORY), "get_device_properties": facts,
        "get_device_name": "pretended", "is_bf16_supported": True, "synchronize": None,
        "get_device_capability": (9, 0),
        "get_rng_state": state, "set_rng_state": None, "manual_seed_all": None,
        "manual_seed": None, "empty_cache": None,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
        # Else gradients are taken where nobody listens.
        patch.setattr(torch.autograd, "has_torch_function", lambda _: False)
        # It compares what is said of tensors in the middle of an operation and outside of any.
        patch.setitem(_allowed_determinism_checks_to_fns, "default", lambda x: (x.shape, x.dtype))
        plans = torch.backends.cuda.cudnn_sdp_enabled()
        try:
            with _Carried(), _Spoken():
                yield
        finally:
            torch.backends.cuda.enable_cudnn_sdp(plans)
