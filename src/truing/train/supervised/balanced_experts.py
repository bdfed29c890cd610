"""Fine-tune a mixture of experts while its routers are kept balanced.

    loss = nll + balance L_bal + importance L_imp + z L_z

    L_bal = E sum_i f_i m_i        L_imp = CV(m)^2        L_z = mean (log sum_i exp z_i)^2

with f_i the share of the tokens whose first expert is i, m_i the mean of their probability of i
before the choice of k (see `core.routers`); all means are over tokens that carry loss, then over
layers. L_bal is 1 at uniform routing and E at collapse; it is no strict lower bound, since f and m
can disagree. f and m are those of the whole step, never of a micro-batch: one more forward pass
without gradients takes them. `noise` is added to the logits before experts are chosen.

Rows are examples; train all weights (`rank=0`), since adapters are on linear layers and the experts
of stock transformers are none. Sources: arXiv 2101.03961 and 2202.08906; the design space, arXiv
2503.07137. Differences: noisy top-k (arXiv 1701.06538) learns its noise's size, here it is given,
so that the model stays one that stock transformers opens; no expert has a capacity, no token is
dropped; prompts are routed without being counted.

Shapes: U rows, K = 1 branch, T answer tokens; N, M and E as in `core.routers`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from truing.core.logprob import states
from truing.core.objective import Loss, Measurements, objective
from truing.core.routers import balance_value, first_share, importance_value, watched, z_value
from truing.core.training import Hook, Tuned, hook
from truing.core.tree import BUDGET, Packed, pack
from truing.errors import InputError
from truing.train.supervised.sft import nll


@hook("routers")
class Routers(Hook):
    """Takes the routers' measurements.

    Args:
        noise: standard deviation of what is added to the routers' logits while training.
    """

    measures = ("router_balance", "router_importance", "router_z")

    def __init__(self, *, noise: float = 0.0) -> None:
        if noise < 0:
            raise InputError("noise must not be negative", seen=noise)
        self.noise = noise
        self._first: list[Tensor] = []  # f [E] of each layer, for the running step
        self._mean: list[Tensor] = []  # m [E]
        self._seen: list[Tensor] = []

    def settings(self) -> dict[str, object]:
        """Its settings by name."""
        return {"noise": self.noise}

    def before_step(self, task: Tuned, rows: Sequence[int], step: int) -> None:
        """Count where the tokens of the whole step go."""
        device = next(task.module.parameters()).device
        found: list[list[Tensor]] = []
        with torch.no_grad():
            for packed in pack([task.units[r].tree() for r in rows], BUDGET):
                here = packed.to(device)
                with watched(task.module) as seen:
                    states(task.module, here)
                found.append([z_NE.float()[here.source_M] for z_NE in seen])
        logits = [torch.cat(parts) for parts in zip(*found, strict=True)]
        self._first = [first_share(z_ME) for z_ME in logits]
        self._mean = [torch.softmax(z_ME, -1).mean(0) for z_ME in logits]

    @contextlib.contextmanager
    def forward(self, task: Tuned) -> Generator[None]:
        """Listen to the routers, and add noise to them."""
        with watched(task.module, self.noise) as self._seen:
            yield

    def measured(self, packed: Packed) -> dict[str, Tensor]:
        """Values of the pass, the mean over layers of each loss token, [U, K, T]."""
        logits = [z_NE.float()[packed.source_M] for z_NE in self._seen]
        p = [torch.softmax(z_ME, -1) for z_ME in logits]
        # A pass outside a step has its own tokens for the whole.
        first = self._first or [first_share(z_ME) for z_ME in logits]
        mean = self._mean or [p_ME.detach().mean(0) for p_ME in p]
        values = {
            "router_balance": map(balance_value, p, first),
            "router_importance": map(importance_value, p, mean),
            "router_z": map(z_value, logits),
        }
        return {n: packed.spread(torch.stack(list(v)).mean(0)) for n, v in values.items()}


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
