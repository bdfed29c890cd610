"""What several processes that train one model do together: divide, sum, shard, gather.

`torchrun` starts the processes, `core.together` brings them into one piece of work; outside
it, and in a single process, every function here is the identity. Then the step stays what it is for
one:

    loss = sum over all rows of the step of loss * weight  /  sum of weights

Each process takes a run of the step's rows with its share of the tokens, its gradients are those of
its own sum, and gradients are added up over processes (never averaged) before the one division by
the weight of the whole step. So neither objectives nor settings know how many processes there are.

Which parameters lie where: small ones (adapters, heads, whole modules of a plain task) are the same
in every process, and their gradients are summed once a step. All weights of a language model, when
they are trained, are sharded by FSDP2 (`fully_shard`): a block's weights are gathered while it is
computed, and its gradients are summed and cut as it is left. Collectives are part of those passes,
so every process must make as many: one with fewer micro-batches repeats one at no weight.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import MethodType
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from truing.core.files import home
from truing.core.trainer.meeting import meet
from truing.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

PATIENCE = timedelta(hours=6)  # a process may wait so long for one that samples or writes
PIECE = 1 << 26  # numbers of gradients that are summed at once, and are there twice meanwhile
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Those that work together now: how many, and which this one is."""

    rank: int = 0
    size: int = 1


_now = Processes()
_all: Processes | None = None
_store: dist.Store | None = None


def now() -> Processes:
    """The processes at work together: one, outside a block of `joined`."""
    return _now


def leads() -> bool:
    """True in the one process that writes files and speaks."""
    return _now.rank == 0


def neighbours() -> int:
    """How many of them share this machine's memory, itself among them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _now.size > 1 else 1


def begin() -> tuple[Processes, dist.Store]:
    """Meet the processes that `torchrun` started, once; and a store for messages between them.

    Raises:
        InputError: fewer GPUs than processes, or folders that not all of them see.
    """
    global _all, _store
    if _all is None or _store is None:
        from torch.distributed.rendezvous import rendezvous

        backend = "gloo"
        if torch.cuda.is_available():
            local = int(os.environ["LOCAL_RANK"])
            if local >= torch.cuda.device_count():
                raise InputError(
                    "there are more processes than GPUs on this machine",
                    where="torchrun --nproc-per-node",
                    seen=f"{local + 1} or more, and {torch.cuda.device_count()} GPUs",
                    fix=f"Start it with --nproc-per-node {torch.cuda.device_count()}",
                )
            torch.cuda.set_device(local)
            backend = "cpu:gloo,cuda:nccl"
        found, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        found = dist.PrefixStore("truing", found)
        found = dist.PrefixStore(meet(found, rank, size), found)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", found),
            rank=rank,
            world_size=size,
            timeout=PATIENCE,
        )
        _all, _store = Processes(rank, size), dist.PrefixStore("words", found)
        with joined():
            _check_home()
    return _all, _store


def end() -> None:
    """Part from the others."""
    global _all, _store
    if _all is not None:
        _all = _store = None
        dist.destroy_process_group()


def _check_home() -> None:
    """Raise where processes have other folders for models and artefacts than the first."""
    here = home() / f".seen-{agree(os.getpid())}"
    if leads():
        here.parent.mkdir(parents=True, exist_ok=True)
        here.touch()
    barrier()
    seen = everyone(here.is_file())
    if leads():
        here.unlink(missing_ok=True)
    if not all(seen):
        raise InputError(
            "not all processes see the folder of models and artefacts",
            where="TRUING_HOME",
            seen=f"{home()}, absent for process {seen.index(False)}",
            fix="Put it on a disk that all machines share, under one path",
        )


@contextlib.contextmanager
def joined() -> Generator[None]:
    """Let all functions of this module act on all processes inside the block."""
    with _as(_all or Processes()):
        yield


@contextlib.contextmanager
def alone() -> Generator[None]:
    """Let them act on this process only inside the block."""
    with _as(Processes()):
        yield


@contextlib.contextmanager
def _as(processes: Processes) -> Generator[None]:
    global _now
    before, _now = _now, processes
    try:
        yield
    finally:
        _now = before


# Words


def agree(value: T) -> T:
    """The first process's value, in all."""
    if _now.size == 1:
        return value
    box: list[object] = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return cast(T, box[0])


def everyone(value: T) -> list[T]:
    """Each process's value, in their order, in all."""
    if _now.size == 1:
        return [value]
    found: list[object] = [None] * _now.size
    dist.all_gather_object(found, _on_cpu(value))
    return cast("list[T]", found)


def gathered(items: list[T]) -> list[T]:
    """All processes' items in their order, in all."""
    return [item for some in everyone(items) for item in some]


def _on_cpu(value: object) -> object:
    """The value with its tensors where every process can have them."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_on_cpu, cast("list[object]", value)))
    if isinstance(value, dict):
        return {k: _on_cpu(v) for k, v in cast("dict[object, object]", value).items()}
    return value


def barrier() -> None:
    """Wait until all are here."""
    everyone(None)


@contextlib.contextmanager
def first_alone() -> Generator[None]:
    """Let the first process go through the block before all others, who then find its files."""
    if not leads():
        barrier()
    yield
    if leads():
        barrier()


# Division


def shares(sizes: Sequence[int]) -> list[slice]:
    """Runs of items, one for each process in order, of about equal size; some may be empty."""
    total, before = sum(sizes), 0
    owner: list[int] = []
    for size in sizes:
        # By where its middle falls.
        owner.append(min(_now.size - 1, (2 * before + size) * _now.size // max(1, 2 * total)))
        before += size
    cuts = [sum(o < rank for o in owner) for rank in range(_now.size + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]


def share(sizes: Sequence[int]) -> slice:
    """This process's run."""
    return shares(sizes)[_now.rank]


# Sums


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Add up the gradients of parameters that every process holds whole.

    A parameter without a gradient in some process counts as zero there, and without one in all
    stays so. Those of sharded parameters have been summed in the backward pass.
    """
    whole = [] if _now.size == 1 else [p for p in parameters if not _sharded(p)]
    if not whole:
        return
    has_P = torch.tensor([p.grad is not None for p in whole], dtype=torch.uint8)
    dist.all_reduce(has_P, op=dist.ReduceOp.MAX)
    used = [p for p, has in zip(whole, has_P.tolist(), strict=True) if has]
    kinds = dict.fromkeys((p.dtype, p.device) for p in used)
    for kind in kinds:
        some = [p for p in used if (p.dtype, p.device) == kind]
        ends = itertools.accumulate(p.numel() for p in some)
        for _, run in itertools.groupby(zip(some, ends, strict=True), lambda one: one[1] // PIECE):
            piece = [p for p, _ in run]
            flat = torch.cat(
                [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in piece]
            )
            dist.all_reduce(flat)
            parts = flat.split([p.numel() for p in piece])
            for parameter, part in zip(piece, parts, strict=True):
                parameter.grad = part.view_as(parameter)


def mean_(tensors: Sequence[Tensor]) -> None:
    """Put the mean over all processes into floating-point tensors."""
    for tensor in tensors if _now.size > 1 else ():
        if tensor.is_floating_point():
            dist.all_reduce(tensor)
            tensor.div_(_now.size)


def alike(parameters: Sequence[nn.Parameter]) -> list[dict[str, list[nn.Parameter]]]:
    """Groups for an optimizer: sharded parameters and whole ones are not updated in one call."""
    cut = [p for p in parameters if _now.size > 1 and _sharded(p)]
    held = {id(p) for p in cut}
    groups = [[p for p in parameters if id(p) not in held], cut]
    return [{"params": g} for g in groups if g]


def norm(grads: Sequence[Tensor]) -> Tensor:
    """Norm of the whole gradient."""
    if _now.size == 1:
        return torch.nn.utils.get_total_norm(grads)
    cut = [local(g) for g in grads if _sharded(g)]
    whole = [g for g in grads if not _sharded(g)]
    square = torch.nn.utils.get_total_norm(cut).double().square()
    if cut:
        dist.all_reduce(square)
    return (square + torch.nn.utils.get_total_norm(whole).double().square()).sqrt().float()


# Shards


def _sharded(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; writing to it writes to the tensor."""
    return cast("DTensor", tensor).to_local() if _now.size > 1 and _sharded(tensor) else tensor


def full(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, detached: gathered into the first process's memory, and none elsewhere."""
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if _now.size > 1 and _sharded(tensor):
            tensor = cast("DTensor", tensor).full_tensor()
            tensor = tensor.cpu() if leads() else tensor
        if leads():
            made[name] = tensor
    return made


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` cut as the parameter is; numbers, such as counts of steps, stay whole."""
    value = value.to(parameter.device)
    if _now.size == 1 or not value.dim() or not _sharded(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    shape = cast("DTensor", parameter)
    return distribute_tensor(value, shape.device_mesh, shape.placements, src_data_rank=None)


def put(tensor: Tensor, value: Tensor) -> None:
    """Write a whole value into a tensor that may be cut."""
    with torch.no_grad():
        local(tensor).copy_(local(like(tensor, value)))


def shard(module: nn.Module, *, half: bool = False) -> None:
    """Shard a causal language model's weights over the processes, block by block.

    From then on it is computed within `forward_of`, where blocks see whole, plain weights.

    Args:
        half: gather weights in bfloat16, while shards and sums of gradients stay in float32.
    """
    if _now.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    from truing.core.passes.attention import tree_attention
    from truing.core.passes.fused import HALVED, fused
    from truing.core.trunk import block_list

    with tree_attention(module), fused(module, 0):
        pass  # blocks are tried against the hand-written one now, while their weights are whole
    policy = MixedPrecisionPolicy()
    if half:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        module.__dict__[HALVED] = True
    mesh = init_device_mesh(next(module.parameters()).device.type, (_now.size,))
    # The root's too: between passes nothing but shards must be there, for whoever reads or writes.
    for part in [*block_list(cast(nn.Module, module.base_model)), module]:
        fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)  # sums, not means
            part.set_force_sum_reduction_for_comms(True)
    module.__dict__["truing_forward"] = MethodType(_call, module)
    register_fsdp_forward_method(module, "truing_forward")
    # Of views that are written to afterwards; no block's output is.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)


def _call(module: nn.Module, function: Callable[[], T]) -> T:
    return function()


def is_sharded(module: nn.Module) -> bool:
    """True when `shard` has been here."""
    return "truing_forward" in vars(module)


def forward_of(module: nn.Module, function: Callable[[], T]) -> T:
    """The result of `function`, tensors by name, which computes with `module`'s weights."""
    if not is_sharded(module):
        return function()
    return cast("Callable[[Callable[[], T]], T]", module.truing_forward)(function)
