"""Low-rank adapters on stock linear layers: y = x (W + s B A)^T, with s = alpha / rank.

Source: LoRA, arXiv 2106.09685. Only A [R, I] and B [O, R] are trained. A float32 layer computes
with the merged weight W' = W + s B A, made once per optimizer step and shared by all its
micro-batches; its one autograd function keeps the input alone and gives, for the upstream G,

    dX = G W'        dB = s G^T (X A^T)        dA = s (G B)^T X

so no gradient of W is ever formed. Layers of lower precision add the low-rank term in float32
instead, since merging would round it away; so do those of 4 bits (`nf4`), which cannot be merged
with. Modules keep their names and classes: only `forward` of
the instance is replaced, and `detach` gives it back. Files are PEFT's. Layers of GPT-2 (Conv1D) are
linear ones that hold their weight as [I, O], which PEFT calls `fan_in_fan_out`.

Shapes: N tokens, I input and O output features, R rank.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from truing.core.modelfiles.nf4 import Linear4
from truing.core.passes.products import times, times_t
from truing.core.trunk import blocks_of
from truing.errors import InputError, nearest

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
ALL = "all-linear"  # PEFT's name for all linear layers but the head


class _Linear(torch.autograd.Function):
    """y = x W'^T + b with the gradients of A and B."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        merged_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
    ) -> Tensor:
        """The product with the merged weight; A and B take part by their gradients only."""
        ctx.save_for_backward(x, merged_OI, a_RI, b_OR)
        ctx.scale = scale  # type: ignore[attr-defined]
        return times_t(x, merged_OI, bias_O)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, up: Tensor) -> tuple[object, ...]:  # type: ignore[override]
        """dX, dA and dB."""
        x, merged_OI, a_RI, b_OR = cast("tuple[Tensor, ...]", ctx.saved_tensors)  # type: ignore[attr-defined]
        up_NO, x_NI = up.flatten(0, -2), x.flatten(0, -2)
        d_x = times(up, merged_OI) if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
        scale = cast(float, ctx.scale)  # type: ignore[attr-defined]
        d_b_OR = times(up_NO.T, times_t(x_NI, a_RI)).mul_(scale)
        d_a_RI = times(times(up_NO, b_OR).T, x_NI).mul_(scale)
        return d_x, None, None, d_a_RI, d_b_OR, None


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as [O, I], itself or a view of it."""
    weight = cast(Tensor, layer.weight)
    return weight if isinstance(layer, nn.Linear) else weight.T


def sides(layer: nn.Module) -> tuple[int, int]:
    """O and I of a linear layer; a packed one is not unpacked for it."""
    if isinstance(layer, Linear4):
        return layer.out_features, layer.in_features
    outputs, inputs = weight_of(layer).shape
    return outputs, inputs


def merges(layer: nn.Module) -> bool:
    """Whether an adapter on a layer computes with a merged weight."""
    return not isinstance(layer, Linear4) and weight_of(layer).dtype == torch.float32


class Adapter:
    """A and B of one linear layer, and its weight as merged with them.

    Args:
        below: one that stands on the layer already and is not trained, where nothing is merged.
    """

    def __init__(
        self, linear: nn.Module, rank: int, scale: float, below: Adapter | None = None
    ) -> None:
        outputs, inputs = sides(linear)
        device = (linear.packed if isinstance(linear, Linear4) else weight_of(linear)).device
        self.linear, self.scale = linear, scale
        self.a_RI = nn.Parameter(torch.empty(rank, inputs, device=device))
        self.b_OR = nn.Parameter(torch.zeros(outputs, rank, device=device))
        self.merges = merges(linear)
        self._merged_OI: Tensor | None = None
        self._versions = (-1, -1, -1)
        self.active, self.below = True, below

    def merged(self) -> Tensor:
        """W + s B A, made anew when W, A or B has been written to since."""
        weight_OI = weight_of(self.linear)
        versions = (weight_OI._version, self.a_RI._version, self.b_OR._version)
        if self._merged_OI is None or versions != self._versions:
            # Made while sampling, it may be used in training: so never an inference tensor.
            with torch.inference_mode(False), torch.no_grad():
                out = self._merged_OI
                self._merged_OI = torch.addmm(
                    weight_OI, self.b_OR, self.a_RI, alpha=self.scale, out=out
                )
            self._versions = versions
        return self._merged_OI

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output, with the adapter unless it is off."""
        if self.active and self.merges:
            made = _Linear.apply(
                input, self.merged(), self.linear.bias, self.a_RI, self.b_OR, self.scale
            )
            return cast(Tensor, made)
        plain = partial(type(self.linear).forward, self.linear)
        base = (self.below.forward if self.below is not None else plain)(input)
        if not self.active:
            return base
        low = (input.to(self.a_RI.dtype) @ self.a_RI.T) @ self.b_OR.T
        return base + low.mul(self.scale).to(base.dtype)


def adapter_of(linear: nn.Module, *, always: bool = False) -> Adapter | None:
    """The adapter on a layer; None where there is none or, unless `always`, it is off."""
    found = cast("Adapter | None", vars(linear).get("truing_adapter"))
    return found if found is not None and (found.active or always) else None


def _put(adapter: Adapter) -> None:
    adapter.linear.__dict__["truing_adapter"] = adapter
    adapter.linear.forward = adapter.forward


class Lora:
    """The adapters of a module.

    Args:
        adapters: by the name of their linear layer.
        rank, alpha: of all of them.
    """

    def __init__(
        self, module: nn.Module, adapters: dict[str, Adapter], rank: int, alpha: float
    ) -> None:
        self.module, self.adapters, self.rank, self.alpha = module, adapters, rank, alpha
        self.stock = all(isinstance(a.linear, nn.Linear) for a in adapters.values())
        for adapter in adapters.values():
            _put(adapter)

    def parameters(self) -> Iterator[nn.Parameter]:
        """A and B of each layer, in the order of the layers."""
        for adapter in self.adapters.values():
            yield adapter.a_RI
            yield adapter.b_OR

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same by the names they have in PEFT's file."""
        for name, adapter in self.adapters.items():
            yield f"base_model.model.{name}.lora_A.weight", adapter.a_RI
            yield f"base_model.model.{name}.lora_B.weight", adapter.b_OR

    @contextlib.contextmanager
    def off(self) -> Generator[None]:
        """The module without its adapters inside the block: the reference."""
        before = [adapter.active for adapter in self.adapters.values()]
        for adapter in self.adapters.values():
            adapter.active = False
        try:
            yield
        finally:
            for adapter, active in zip(self.adapters.values(), before):
                adapter.active = active

    def save(self, folder: str | Path, *, base: str = "") -> None:
        """Write PEFT's adapter_config.json and adapter_model.safetensors into `folder`."""
        tensors = {n: p.detach().cpu().contiguous() for n, p in self.named_parameters()}
        more = {"base_model_name_or_path": base, "fan_in_fan_out": not self.stock}
        write(folder, tensors, self.rank, self.alpha, self.adapters, more)

    def detach(self) -> None:
        """Give the module its own forward passes back; its weights were never touched."""
        for adapter in self.adapters.values():
            del adapter.linear.forward, adapter.linear.__dict__["truing_adapter"]
            if adapter.below is not None:
                _put(adapter.below)


def write(
    folder: str | Path,
    tensors: dict[str, Tensor],
    rank: int,
    alpha: float,
    targets: Iterable[str],
    more: Mapping[str, object],
) -> None:
    """Write an adapter's tensors and their configuration as PEFT does into `folder`.

    Args:
        targets: the names of its layers.
        more: fields of the configuration that differ from these, the base's name among them.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    (folder / CONFIG).write_text(json.dumps({**config, **more}, indent=2) + "\n")


def linears_of(
    module: nn.Module, targets: str | Sequence[str] = ALL, layers: int = 0
) -> dict[str, nn.Module]:
    """The linear layers that adapters go on, by name.

    Args:
        targets: "all-linear" (all but the head), or ends of layer names such as "q_proj", as a list
            or parted by commas.
        layers: of the top blocks alone, so many; 0 takes the whole module.
    Raises:
        InputError: a name that no layer among them has.
    """
    from transformers.pytorch_utils import Conv1D

    head = getattr(module, "get_output_embeddings", lambda: None)()
    parts = [module]
    if layers:
        parts = list(blocks_of(module))[-layers:]
    there = {id(m) for part in parts for m in part.modules()}
    linears: dict[str, nn.Module] = {
        n: m
        for n, m in module.named_modules()
        if isinstance(m, (nn.Linear, Conv1D)) and m is not head and id(m) in there
    }
    ends = names_of(targets)
    return linears if ends == [ALL] else _chosen(linears, ends)


def names_of(targets: str | Sequence[str]) -> list[str]:
    """Names of layers from a list, or from a text that parts them by commas."""
    parts = targets.split(",") if isinstance(targets, str) else targets
    return [name for part in parts if (name := part.strip())]


def attach(
    module: nn.Module,
    rank: int = 16,
    alpha: float = 32.0,
    targets: str | Sequence[str] = ALL,
    seed: int = 0,
    layers: int = 0,
) -> Lora:
    """Freeze a module and put adapters on its linear layers; outputs do not change yet.

    Args:
        rank: R; alpha: the scale is alpha / rank.
        targets, layers: which; see `linears_of`.
        seed: of A's Kaiming-uniform draw, PEFT's own; B begins at zero.
    """
    if rank < 1:
        raise InputError("the rank of an adapter is at least 1", seen=rank, fix="Use 16")
    chosen = linears_of(module, targets, layers)
    if not chosen:
        raise InputError(
            "the model has no linear layers that adapters could go on",
            seen=type(module).__name__,
            fix="Train its weights: rank 0",
        )
    if len({isinstance(layer, nn.Linear) for layer in chosen.values()}) > 1:
        # PEFT's file says once for all of them how their weights lie.
        raise InputError(
            "the model has linear layers of two sorts, and an adapter can only go on one",
            seen=type(module).__name__,
            fix="Name those of one sort in targets, or train its weights: rank 0",
        )
    module.requires_grad_(False)
    source = torch.Generator().manual_seed(seed)
    adapters: dict[str, Adapter] = {}
    for name, linear in chosen.items():
        below = adapter_of(linear, always=True)
        if "forward" in vars(linear) and (below is None or below.a_RI.requires_grad):
            raise InputError("the layer already has an adapter", where=name)
        adapters[name] = adapter = Adapter(linear, rank, alpha / rank, below)
        # Kaiming-uniform with slope sqrt(5), as in PEFT: bounds of 1 / sqrt(I).
        inputs = adapter.a_RI.shape[1]
        bound = 1.0 / math.sqrt(inputs)
        drawn = torch.empty(rank, inputs).uniform_(-bound, bound, generator=source)
        with torch.no_grad():
            adapter.a_RI.copy_(drawn)
    return Lora(module, adapters, rank, alpha)


def _chosen(linears: dict[str, nn.Module], ends: Sequence[str]) -> dict[str, nn.Module]:
    made = {n: m for n, m in linears.items() if any(n == e or n.endswith(f".{e}") for e in ends)}
    for end in ends:
        if not any(n == end or n.endswith(f".{end}") for n in linears):
            known = sorted({n.rsplit(".", 1)[-1] for n in linears})
            close = nearest(end, known)
            raise InputError(
                f"setting 'targets': no linear layer is called {end!r}",
                fix=f"Did you mean {close!r}?" if close else "Known: " + ", ".join(known),
            )
    return made
