"""Training any module on numbered rows: a function that takes rows and gives a loss is enough.

Several processes hold the module whole and divide the rows. Buffers such as running means of batch
norms are averaged over them after each step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from truing.core.batch.parts import Part
from truing.core.trainer import distributed
from truing.core.training import State
from truing.errors import InputError

Losses = Callable[[Sequence[int]], tuple[Tensor, Mapping[str, Tensor]]]


class PlainTask:
    """Rows whose losses are independent of each other, such as images with labels.

    Args:
        name: used in errors and progress.
        module: all of its parameters that require a gradient are trained.
        rows: how many there are.
        losses: given numbers of rows, the loss of each and further values of each to report.
        micro: rows computed at once; the result does not depend on it.
        row_names: how errors call the rows.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        rows: int,
        losses: Losses,
        *,
        micro: int = 64,
        row_names: Sequence[str] | None = None,
    ) -> None:
        self.name, self.module, self.losses, self.micro = name, module, losses, micro
        self._rows, self._names = rows, row_names

    def __len__(self) -> int:
        """Number of rows."""
        return self._rows

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters of the module that require a gradient."""
        return {n: p for n, p in self.module.named_parameters() if p.requires_grad}

    def parts(self, rows: Sequence[int], step: int) -> Iterator[Part]:
        """Micro-batches of a step."""
        rows = rows[distributed.share([1] * len(rows))]
        for start in range(0, len(rows), self.micro):
            some = rows[start : start + self.micro]
            with _as_measured(self.module):
                values, metrics = self.losses(some)
            if values.shape != (len(some),):
                raise InputError(
                    "there must be one loss a row", where=self.name, seen=tuple(values.shape)
                )
            means = {n: (v.detach().float().sum(), float(len(some))) for n, v in metrics.items()}
            yield Part(values.sum(), float(len(some)), means, per_row=(some, values.detach()))

    def after_step(self, step: int) -> None:
        """Keep buffers the same in all processes."""
        distributed.mean_(list(self.module.buffers()))

    def state(self) -> State:
        """Buffers, such as running means of batch norms."""
        return dict(self.module.named_buffers())

    def load_state(self, state: State) -> None:
        """Put buffers back."""
        own = dict(self.module.named_buffers())
        for name, value in state.items():
            own[name].copy_(value)

    def row_name(self, row: int) -> str:
        """The name given, else its number from 1."""
        return self._names[row] if self._names is not None else f"row {row + 1}"


@contextlib.contextmanager
def _as_measured(module: nn.Module) -> Generator[None]:
    """The module without dropout and the like inside the block, where gradients are off."""
    training = [] if torch.is_grad_enabled() else [m for m in module.modules() if m.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
