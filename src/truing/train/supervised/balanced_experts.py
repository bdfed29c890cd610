"""Fine-tune a mixture of experts while its routers are kept balanced.

    loss = nll + balance L_bal + importance L_imp + z L_z

    L_bal = E sum_i f_i m_i        L_imp = CV(m)^2        L_z = mean (log sum_i exp z_i)^2

with f_i the share of the tokens whose first expert is i, m_i the mean of their probability of i
before the choice of k (see `core.passes.routers`); all means are over tokens that carry loss, then
over layers. The gate is the model's own: softmax, switch or sigmoid, of which probabilities are
sigmoid(z) over their sum. A Mixtral can have these three; the others of the field's list are in
`core.moe`, with the same losses, for a layer of one's own. L_bal is 1 at uniform routing and E at
collapse; it is no strict lower bound, since f and m can disagree. Both are those of the whole step,
never of a micro-batch: one more forward pass without gradients takes them. `noise` is added to the
logits before experts are chosen.

Balancing by bias alone, without a loss: `balance=0 z=0 bias_step=0.001`. A number b_i of each
expert takes part in the choice of k and in nothing else, and moves after every step by

    b_i <- b_i + bias_step sign(mean load - load_i),   load_i: tokens of the step that chose i

It stays with the model as a further tensor and acts wherever that is used here; a plain folder for
stock transformers cannot hold it, and exporting says so.

`capacity` (1.25 is usual) bounds how many tokens of a row an expert takes; what it drops is counted
as `router_dropped`, the share of all choices, prompts included. It shapes training alone: nothing
is dropped afterwards, and here no time is saved by it. `router_max_load` is the largest share of
the tokens' choices that an expert had before the step, mean over layers; `evaluate/router_report`
measures a model's routing as a whole. With `layers` the routers of blocks that are not trained are
counted, too, as constants of the losses, and their biases stay as they are.

Rows are examples; train all weights (`rank=0`): adapters are on linear layers, which neither the
routers nor the experts of stock transformers are, so that with them the losses change what routers
read and never the routers. Sources: arXiv 2101.03961 and 2202.08906; bias, arXiv 2408.15664;
the design space, arXiv 2503.07137. Differences: noisy top-k (arXiv 1701.06538) learns its noise's
size, here it is given, so that the model stays one that stock transformers opens; each row has its
capacity, a batch has none; prompts are routed without being counted, except by the capacity.

Shapes: U rows, K = 1 branch, T answer tokens; N, M and E as in `core.passes.routers`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from truing.core.logprob import states
from truing.core.objective import Loss, Measurements, objective
from truing.core.passes.frozen_trunk import PLACE, FrozenTrunk
from truing.core.passes.routers import (
    Routed,
    balance_value,
    bias_of,
    counted,
    decided,
    first_share,
    found_in,
    importance_value,
    moved,
    routers,
    set_bias,
    z_value,
)
from truing.core.trainer import distributed
from truing.core.training import Hook, State, Tuned, hook
from truing.core.tree import BUDGET, Packed, pack
from truing.errors import InputError
from truing.train.supervised.sft import nll


def _read(module: nn.Module, packed: Packed) -> dict[str, Tensor]:
    return {"states": states(module, packed)}


def frozen_routers(module: nn.Module) -> int:
    """How many routers, the first ones, are in blocks that are not trained."""
    trunk = cast("FrozenTrunk | None", vars(module).get(PLACE))
    below = [] if trunk is None else list(trunk.blocks)[: trunk.depth]
    return sum(len(found_in(block)) for block in below)


@hook("routers")
class Routers(Hook):
    """Takes the routers' measurements, and moves their biases.

    Args:
        noise: standard deviation of what is added to the routers' logits while training.
        bias_step: what an expert's bias moves by after each step; 0 leaves biases as they are.
        capacity: how many tokens of a row an expert takes, over its even share; 0 for any.
    """

    quiet: ClassVar[Mapping[str, object]] = {"noise": 0.0, "capacity": 0.0}
    measures = ("router_balance", "router_importance", "router_z")

    def __init__(
        self, *, noise: float = 0.0, bias_step: float = 0.0, capacity: float = 0.0
    ) -> None:
        self.noise, self.bias_step, self.capacity = noise, bias_step, capacity
        for name, value in (("noise", noise), ("bias_step", bias_step), ("capacity", capacity)):
            if not 0 <= value < math.inf:
                raise InputError(f"setting {name!r} must not be negative", seen=value)
        self._first: list[Tensor] = []  # f [E] of each layer, for the running step
        self._mean: list[Tensor] = []  # m [E]
        self._load: list[Tensor] = []  # tokens that chose each expert [E]
        self._seen: list[Routed] = []

    def settings(self) -> dict[str, object]:
        """Its settings by name."""
        return {"noise": self.noise, "bias_step": self.bias_step, "capacity": self.capacity}

    def before_step(self, task: Tuned, rows: Sequence[int], step: int) -> None:
        """Count where the tokens of the whole step go."""
        device = next(task.module.parameters()).device
        found: list[list[Routed]] = []
        with torch.no_grad():
            for packed in pack([task.units[r].tree() for r in rows], BUDGET):
                here = packed.to(device)
                with decided(task.module, capacity=self.capacity) as seen:
                    distributed.forward_of(task.module, partial(_read, task.module, here))
                found.append([routed.of(here.source_M) for routed in seen])
        layers = list(zip(*found, strict=True))
        p = [torch.cat([r.p_NE for r in parts]) for parts in layers]
        chosen = [torch.cat([r.index_Nk for r in parts]) for parts in layers]
        self._first = [first_share(p_ME) for p_ME in p]
        self._mean = [p_ME.mean(0) for p_ME in p]
        both = zip(p, chosen, strict=True)
        self._load = [counted(i_Mk, p_ME.shape[1]).sum(0).float() for p_ME, i_Mk in both]

    before_measuring = before_step  # losses of balance are of whole steps there, too

    @contextlib.contextmanager
    def forward(self, task: Tuned) -> Generator[None]:
        """Listen to the routers, add noise to them, and drop what finds no room."""
        with decided(task.module, noise=self.noise, capacity=self.capacity) as self._seen:
            yield

    def measured(self, packed: Packed) -> dict[str, Tensor]:
        """Values of the pass, the mean over layers of each loss token, [U, K, T]."""
        seen = [r.of(packed.source_M) for r in self._seen]
        logits, p = [r.logits_NE.float() for r in seen], [r.p_NE for r in seen]
        # A pass outside a step has its own tokens for the whole.
        first = self._first or [first_share(p_ME) for p_ME in p]
        mean = self._mean or [p_ME.detach().mean(0) for p_ME in p]
        values = {
            "router_balance": map(balance_value, p, first),
            "router_importance": map(importance_value, p, mean),
            "router_z": map(z_value, logits),
        }
        return {n: packed.spread(torch.stack(list(v)).mean(0)) for n, v in values.items()}

    def facts(self) -> dict[str, tuple[Tensor, float]]:
        """The largest load before the step, and where there is a capacity what it dropped."""
        made: dict[str, tuple[Tensor, float]] = {}
        if self._load:
            largest = torch.stack([load_E.max() / load_E.sum() for load_E in self._load])
            made["router_max_load"] = (largest.mean(), 1.0)
        if self.capacity and self._seen:
            kept = torch.stack([r.kept_Nk for r in self._seen])
            made["router_dropped"] = ((~kept).sum().float(), float(kept.numel()))
        return made

    def after_step(self, task: Tuned, step: int) -> None:
        """Move the biases by the loads of the step."""
        if self.bias_step:
            every, below = routers(task.module), frozen_routers(task.module)
            for router, load_E in zip(every[below:], self._load[below:], strict=True):
                before_E = bias_of(router)
                before_E = torch.zeros_like(load_E) if before_E is None else before_E
                set_bias(router, moved(before_E, load_E, self.bias_step))

    def state(self, task: Tuned) -> State:
        """The biases by the number of their layer."""
        biases = [bias_of(router) for router in routers(task.module)]
        return {str(i): bias_E.clone() for i, bias_E in enumerate(biases) if bias_E is not None}

    def load_state(self, task: Tuned, state: State) -> None:
        """Take biases back."""
        for name, bias_E in state.items():
            set_bias(routers(task.module)[int(name)], bias_E)


@objective(
    paper="moe-survey",
    unit="token",
    needs=("logp", "router_balance", "router_importance", "router_z"),
    rows="example",
    hook="routers",
)
def balanced_experts(
    m: Measurements, *, balance: float = 1e-2, importance: float = 0.0, z: float = 1e-3
) -> Loss:
    """Fine-tune a mixture of experts while its routers are kept balanced.

    Args:
        balance: weight of the Switch load-balancing loss.
        importance: weight of the squared coefficient of variation of the gates' sums.
        z: weight of the squared log-sum-exp of the routers' logits.
    """
    weights = {"router_balance": balance, "router_importance": importance, "router_z": z}
    if min(weights.values()) < 0:
        raise InputError("the weights of the losses must not be negative", seen=weights)
    loss = nll(m)
    for name, weight in weights.items():
        seen = {name: m.mean(name)[:, 0].detach()}
        loss = loss + weight * Loss(m[name][:, 0], m.mask_UKT[:, 0], seen)
    return loss
