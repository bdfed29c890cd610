"""All weights of a model trained in float32 while it computes in bfloat16.

    w16 = bf16(w)        g = sum over micro-batches of dL/dw16, in float32        w <- AdamW(w, g)

The optimizer with its moments, clipping, sums over processes and checkpoints see w and g alone. So
an update far smaller than the last bit of w16 is not lost, and many small gradients add up to what
they are. bfloat16 has the exponents of float32, so that the loss needs no scaling. What is written
in the end is w; weights that are not trained keep the values that they were read with.

Source: "Mixed Precision Training", arXiv 1710.03740.

It costs 2 bytes for each weight more than training in float32 does. Sharded weights need none of
this: FSDP2 does the same with its own shards (`distributed.shard`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Masters:
    """The float32 values behind a module's weights.

    Args:
        module: in float32; from now on its weights are their roundings to bfloat16.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._behind: dict[nn.Parameter, nn.Parameter] = {}
        self._handles: list[RemovableHandle] = []
        for parameter in module.parameters():  # tied ones come once
            if parameter.dtype == torch.float32:
                self._behind[parameter] = nn.Parameter(parameter.data)
                parameter.data = parameter.data.to(torch.bfloat16)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the optimizer changes, by the names of the module's parameters that are trained."""
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                yield name, self._behind.get(parameter, parameter)

    def listen(self) -> None:
        """Collect gradients from now on, once it is known which parameters are trained."""
        for parameter in self._behind:
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(self._collect)
                self._handles.append(handle)

    def _collect(self, parameter: torch.Tensor) -> None:
        """Add the gradient of a backward pass to those of the passes before, in float32."""
        behind = self._behind[parameter]  # type: ignore[index]
        if parameter.grad is not None:
            gradient = parameter.grad.float()
            behind.grad = gradient if behind.grad is None else behind.grad.add_(gradient)
            parameter.grad = None

    def write(self) -> None:
        """Round the values as they are now into the module."""
        with torch.no_grad():
            for parameter, behind in self._behind.items():
                if parameter.requires_grad:
                    parameter.copy_(behind)

    def release(self) -> None:
        """Give the module its float32 weights; nothing stands behind them any more."""
        for handle in self._handles:
            handle.remove()
        for parameter, behind in self._behind.items():
            parameter.data = behind.data
        self._behind, self._handles = {}, []
