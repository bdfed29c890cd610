"""What was found out by trying a module, kept for every further one of its kind.

Whether an architecture is computed exactly in another way (as packed trees, with shared prompts, by
the hand-written block) shows in a few tokens. It is a matter of code, configuration, shapes and
dtypes, and of no weight, so that what holds of one module holds of all that are alike in these,
adapters included. A module in which anything else listens, acts in the place of a stock part, or is
of no class of PyTorch's or transformers', has no kind: it is tried itself. So is each one of a kind
that did not pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from torch import nn

from truing.core.modelfiles.lora import adapter_of

T = TypeVar("T")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
STOCK = ("torch.nn.", "transformers.")  # of what a package brings that was fetched it is no prefix


def kind_of(module: nn.Module) -> Hashable | None:
    """What a model's computation follows from besides its weights; None where that is not known."""
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return None
    code: set[Hashable] = set()
    for part in module.modules():
        own, adapter = type(part), adapter_of(part, always=True)
        acts = vars(part).get("forward")
        stock = acts is None if adapter is None else acts == adapter.forward and not adapter.below
        if not stock or not own.__module__.startswith(STOCK):
            return None
        if any(getattr(part, name) for name in HOOKS):
            return None
        low = () if adapter is None else (adapter.a_RI.shape, adapter.merges, adapter.active)
        code.add((own, own.forward, low))
    told = {n: v for n, v in config.to_dict().items() if n != "_name_or_path"}
    told["attention"] = getattr(config, "_attn_implementation", None)
    numbers = tuple(
        (n, p.shape, p.dtype, p.device.type, p.requires_grad) for n, p in module.named_parameters()
    )
    return frozenset(code), repr(told), numbers, module.training


class Tried(Generic[T]):
    """Results of one trial: by module as long as it lives, by kind for good where it passed."""

    def __init__(self) -> None:
        self._own: weakref.WeakKeyDictionary[nn.Module, T] = weakref.WeakKeyDictionary()
        self._kinds: dict[Hashable, T] = {}

    def __call__(
        self,
        module: nn.Module,
        kind: Callable[[], Hashable | None],
        trial: Callable[[], T],
        place: str = "",
    ) -> T:
        """The module's result; what `trial` raises is nobody's.

        Args:
            kind: of the model, of which the module is that part which is called `place`.
        """
        if module not in self._own:
            whole = kind()
            key = None if whole is None else (whole, place)
            found = self._kinds.get(key) if key is not None else None
            self._own[module] = found or trial()
            if key is not None and self._own[module]:
                self._kinds[key] = self._own[module]
        return self._own[module]
