"""In which type a model is computed: while it is trained (`choose`), and otherwise (`own`).

To train, products of the model's own shapes are timed in float32 and bfloat16, once per process,
and bfloat16 is taken where it is markedly quicker. An adapter's numbers, the optimizer's and sums
over the vocabulary stay in float32 either way. All weights of a model, where they are trained, stay
in float32, too, and are rounded to compute with (`master_weights`).

To draw, to judge and to measure, a GPU computes in the half type that a model's files are in, or
no model would fit into twice its size. Nothing is timed: results depend on the model and the sort
of device alone, which are in a step's key.

What was trained or merged in float32 is rounded in neither case, unless a user names the type of a
model that is trained, or trains all of its weights.

Shapes: N tokens, I input and O output features.
"""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from typing import TYPE_CHECKING

import torch

from truing.changes import Adapter
from truing.core.modelfiles import unmerged
from truing.core.modelfiles.patches import ADAPTER, AdapterPatch
from truing.core.passes.products import times_t
from truing.core.weights import open_weights, same_name

if TYPE_CHECKING:
    from truing.core.training import TextTraining
    from truing.models import Loaded, Model

# How many times as quick products in bfloat16 must be. On a CPU more, since blocks and adapters are
# written by hand for float32 alone: where products were 2.2 times as quick (an EPYC with AVX-512),
# a step of SmolLM2-135M was 1.2 times so.
MARKEDLY = {"cpu": 4.0, "cuda": 1.3}
TOKENS = {"cpu": 128, "cuda": 2048}
MOST = {"cpu": 2**30, "cuda": 2**38}  # multiplications of one product: it must not take long
TIMES = 3  # that each product is timed, after once for warming up
LONG = 0.15  # seconds after which a product is not timed again
HALVES = (torch.bfloat16, torch.float16)
_own: dict[tuple[str, str], str] = {}  # by weights and sort of device: files are opened for it


def seconds_of(dtype: torch.dtype, device: str, shape: tuple[int, int, int]) -> float:
    """Least seconds of x_NI W_OI^T, for `shape` (N, I, O): the processor's own time on a CPU.

    What else runs on the machine then counts less.
    """
    n, i, o = shape
    x_NI = torch.ones(n, i, dtype=dtype, device=device)
    w_OI = torch.ones(o, i, dtype=dtype, device=device)
    clock = time.perf_counter if x_NI.is_cuda else time.process_time
    if x_NI.is_cuda:  # a process's first product starts the library
        times_t(x_NI, w_OI)
        torch.cuda.synchronize(device)
    best, began = math.inf, time.perf_counter()
    for turn in range(1 + TIMES):
        start = clock()
        times_t(x_NI, w_OI)
        if x_NI.is_cuda:
            torch.cuda.synchronize(device)
        took, late = clock() - start, time.perf_counter() - began > LONG
        if turn or late:
            best = min(best, took)
        if late:
            break
    return best


@functools.cache
def probe(device: str, wide: int, narrow: int) -> tuple[float, float]:
    """Seconds in float32 and in bfloat16 of a product with a weight of that size."""
    tokens = TOKENS[device]
    wide = max(1, min(wide, MOST[device] // (tokens * narrow)))
    shape = (tokens, narrow, wide)
    return seconds_of(torch.float32, device, shape), seconds_of(torch.bfloat16, device, shape)


def _largest(model: Model) -> tuple[int, int]:
    """Both sides of the largest weight of a model's blocks, the longer first."""
    stored = open_weights(model.folder)
    shapes = [stored.shape(n) for n in stored if "embed" not in n and "lm_head" not in n]
    sides = [sorted(s[-2:], reverse=True) for s in shapes if len(s) >= 2]
    wide, narrow = max(sides, key=math.prod, default=[1024, 1024])
    return wide, narrow


def choose(model: Model, settings: TextTraining, device: str, *, full: bool = False) -> str:
    """Name of the type that `model` is to be computed in on this machine while it is trained.

    Args:
        full: whether that may be bfloat16 where all weights are trained
        (`core.passes.master_weights`).
    """
    if settings.dtype != "auto":
        return settings.dtype
    # A GPU that only emulates bfloat16 is slower with it.
    able = device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if not able or (finer(model) if settings.rank else not full):
        return "float32"
    whole, half = probe(device, *_largest(model))
    return "bfloat16" if whole > MARKEDLY[device] * half else "float32"


def own(model: Model, device: str) -> str:
    """Name of the type that `model` is computed in on a device where it is not trained.

    float32 on a CPU. On a GPU the half type that most of its base's numbers are stored in, unless
    what was trained would be rounded away in it (see `finer`).
    """
    sort = torch.device(device).type
    if sort == "cpu":
        return "float32"
    key = (model.weights_key, sort)
    if key not in _own:
        _own[key] = _stored(model)
    return _own[key]


def _stored(model: Model) -> str:
    """The half type that most of a model's numbers are stored in, else float32."""
    base = open_weights(model.folder)
    sizes: Counter[torch.dtype] = Counter()
    for name in base:
        tensor = base[name]  # mapped, not read
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.numel()
    most = max(sizes, key=lambda d: sizes[d], default=torch.float32)
    half = most in HALVES and not finer(model)
    return str(most).removeprefix("torch.") if half else "float32"


def unrounded(model: Model, dtype: str, device: str, *, fresh: bool = False) -> Loaded:
    """A module of that type; of float32 where it would round away what was trained."""
    if dtype != "float32" and not finer(model):
        made = model.load_module(dtype, device, fresh=fresh, packed=True)
        if unmerged.stand(model, made.module):
            return made
        del made  # before another one takes its place
    return model.load_module("float32", device, fresh=fresh, packed=True)


def type_of(loaded: Loaded) -> str:
    """Name of the type that a module computes in."""
    return str(next(loaded.module.parameters()).dtype).removeprefix("torch.")


def finer(model: Model) -> bool:
    """Whether changes hold more than fits into a half type: weights trained or merged in float32.

    Adapters do not count, since they stand beside the weights (`core.modelfiles.unmerged`); those
    that bring whole tensors, and weights that were replaced after an adapter was folded in, do.
    """
    names, adapted = set(open_weights(model.folder)), False
    for change in model.weight_changes:
        if isinstance(change, Adapter):
            patch = AdapterPatch(change.path, open_weights(change.path / ADAPTER))
            if patch.whole or patch.config.get("fan_in_fan_out"):
                return True
            adapted = True
            continue
        tensors = open_weights(change.path)
        own = [n for n in tensors if same_name(n.removesuffix(".at").removesuffix(".to"), names)]
        wide = any(tensors[n].dtype in (torch.float32, torch.float64) for n in own)
        if own and (adapted or change.delta or wide):
            return True
    return False
