"""Routers of a mixture of experts: what they decide, what balances them, and who has room.

With z [E] a router's logits for one token, the experts of the k largest p_i are kept, by weights

    softmax     p_i / sum of the kept p_j,   p = softmax(z): the gate of Mixtral
    switch      p_i itself, of the one expert that is kept (k = 1): divided by itself it would be
                1 whatever the router says, which would get no gradient from the task
    sigmoid     s_i / sum of the kept s_j,   s = sigmoid(z), p = s / sum s

Over the tokens of a whole step, with f_i = the share of them whose first expert is i, m_i = the
mean of p_i:

    balance     E sum_i f_i p_i              mean over tokens: E sum_i f_i m_i      (Switch)
    importance  E sum_i m_i (2 p_i - m_i) - 1                  E sum_i m_i^2 - 1 = CV(m)^2
    z           (log sum_i exp z_i)^2

f and m are held constant, so that each is a sum over tokens: its mean and its gradient are those of
the whole step, however that is split. balance is 1 at uniform routing and E when one expert takes
all.

    bias        the k experts with the largest p_i + b_i are chosen (of a sigmoid gate, s_i + b_i);
                their weights are as without it
    capacity    of the n tokens of a row, C = ceil(factor n k / E) may choose an expert; the choices
                of later ones have weight 0, and the weights of a token's other choices stay

Rows have their capacity each, and earlier tokens go first: so what a token gets depends on nothing
that comes after it, nor on what is computed beside its row. A prompt and its answers are one row. A
bias lies beside the model's weights as a further tensor for each router (`....gate.bias` [E]), and
so does a gate other than softmax (`....gate.kind`, its number); both act wherever the model is
loaded.

Sources: noisy top-k and importance, arXiv 1701.06538; Switch, arXiv 2101.03961; groups with their
own capacity, arXiv 2006.16668; z, arXiv 2202.08906; bias, arXiv 2408.15664; sigmoid gates,
arXiv 2412.19437.

Shapes: N tokens, M of them that predict a loss token, E experts, k kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch
from torch import Tensor, nn

from truing.core.passes import recompute
from truing.core.trunk import backbone_of
from truing.errors import InputError

if TYPE_CHECKING:
    from truing.models import Model

KIND = "MixtralTopKRouter"
BIAS = "selection_bias"  # of a router, beside its weight
GATE = "truing_gate"  # the same of its gate
NAME = "model.layers.{}.block_sparse_moe.gate.bias"  # of the first in a file
GATE_NAME = "model.layers.{}.block_sparse_moe.gate.kind"
Gate = Literal["softmax", "switch", "sigmoid"]
GATES = get_args(Gate)  # a file has their numbers


@dataclass(frozen=True)
class Routed:
    """What one router decided in one pass.

    Args:
        logits_NE: before noise and bias.
        index_Nk: experts of each token, the likeliest first.
        kept_Nk: True where the expert had room.
        gate: of the router.
    """

    logits_NE: Tensor
    index_Nk: Tensor
    kept_Nk: Tensor
    gate: Gate = "softmax"

    @property
    def p_NE(self) -> Tensor:
        """p of each token, in float32."""
        return shares(self.logits_NE.float(), self.gate)

    def of(self, tokens: Tensor) -> Routed:
        """What it decided for these tokens."""
        return Routed(
            self.logits_NE[tokens], self.index_Nk[tokens], self.kept_Nk[tokens], self.gate
        )


def found_in(module: nn.Module) -> list[nn.Module]:
    """The routers of a module, first layer first; [] where there is none."""
    return [m for m in module.modules() if type(m).__name__ == KIND]


def routers(module: nn.Module, where: str = "") -> list[nn.Module]:
    """The routers of a module, first layer first; an InputError when there is none."""
    found = found_in(module)
    if not found:
        raise InputError(
            "the model is no mixture of experts that can be read",
            where=where,
            seen=type(module).__name__,
            fix="Make one with merge/mixture_of_experts, or open a Mixtral",
        )
    return found


def softened(logits_NE: Tensor, gate: Gate = "softmax") -> Tensor:
    """Numbers whose softmax over the experts is p, [N, E]."""
    # log s: the sum of the s themselves would be 0 where all are tiny.
    return nn.functional.logsigmoid(logits_NE) if gate == "sigmoid" else logits_NE


def shares(logits_NE: Tensor, gate: Gate = "softmax") -> Tensor:
    """p of each token, [N, E], in the logits' type."""
    return torch.softmax(softened(logits_NE, gate), -1)


def top_k_gate(
    logits_NE: Tensor, k: int, bias_E: Tensor | None = None, gate: Gate = "softmax"
) -> tuple[Tensor, Tensor]:
    """Weights [N, k] of the k likeliest experts and their numbers.

    The weights sum to 1 but for a switch, whose one weight is the expert's probability. A bias has
    a say in which are chosen, none in their weights.
    """
    logits_NE = logits_NE.float()
    p_NE = shares(logits_NE, gate)
    if bias_E is None:
        index_Nk = p_NE.topk(k, -1).indices
    else:
        liked_NE = logits_NE.sigmoid() if gate == "sigmoid" else p_NE
        index_Nk = (liked_NE + bias_E).topk(k, -1).indices
    kept_Nk = p_NE.gather(-1, index_Nk)
    if gate == "sigmoid":
        kept_Nk = torch.softmax(softened(logits_NE, gate).gather(-1, index_Nk), -1)
    elif gate == "softmax":
        kept_Nk = kept_Nk / kept_Nk.sum(-1, keepdim=True)
    return kept_Nk, index_Nk


def with_room(index_Nk: Tensor, row_N: Tensor, experts: int, factor: float) -> Tensor:
    """True for the choices that their experts have room for, [N, k].

    Args:
        index_Nk: experts of each token.
        row_N: number of each token's row, 0, 1, ..., the tokens of a row one after another.
        experts: E.
        factor: of the capacity; see the module's docstring.
    """
    share_R = torch.bincount(row_N).double() * (factor * index_Nk.shape[1] / experts)
    return has_room(counted(index_Nk, experts), row_N, share_R).gather(1, index_Nk)


def has_room(chosen_NE: Tensor, row_N: Tensor, share_R: Tensor) -> Tensor:
    """True where an expert has room left for a token, [N, E].

    Args:
        chosen_NE: 1 for the experts that each token chose, an integer.
        row_N: see `with_room`.
        share_R: choices of each row that an expert takes, in fractions: they are rounded up.
    """
    before_NE = chosen_NE.cumsum(0) - chosen_NE
    size_R = torch.bincount(row_N)
    first_N = (size_R.cumsum(0) - size_R)[row_N]
    earlier_NE = before_NE - before_NE[first_N]
    return earlier_NE < torch.ceil(share_R - 1e-9)[row_N, None]


def counted(index_Nk: Tensor, experts: int) -> Tensor:
    """1 for the experts that each token chose, [N, E]."""
    return nn.functional.one_hot(index_Nk, experts).sum(1)


class _Rows:
    """Which row each token of the running pass belongs to: a row begins at position 0."""

    def __init__(self) -> None:
        self.now: Tensor | None = None

    def note(self, _: nn.Module, __: object, named: dict[str, object]) -> None:
        """Read the positions that the backbone is called with."""
        self.now = cast("Tensor | None", named.get("position_ids"))

    def of(self, tokens: Tensor) -> Tensor:
        """Row of each of these tokens, [N]; one row where no positions were given."""
        if self.now is None:
            return torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
        at_T = self.now.flatten()
        return (at_T.repeat(len(tokens) // len(at_T)) == 0).long().cumsum(0) - 1


@contextlib.contextmanager
def decided(
    module: nn.Module, *, noise: float = 0.0, capacity: float = 0.0
) -> Generator[list[Routed]]:
    """What each router decides in the passes inside the block, in the order of the layers.

    Args:
        noise: standard deviation of what is added to the logits before experts are chosen.
        capacity: factor of the experts' capacity; 0 for none.
    """
    seen: list[Routed] = []
    rows = _Rows()

    def read(router: nn.Module, _: object, out: object) -> object:
        logits_NE, weight_Nk, index_Nk = cast("tuple[Tensor, Tensor, Tensor]", out)
        if noise:
            loud_NE = logits_NE + noise * torch.randn_like(logits_NE)
            k, bias_E = index_Nk.shape[1], bias_of(router)
            weight_Nk, index_Nk = top_k_gate(loud_NE, k, bias_E, gate_of(router))
        kept_Nk = torch.ones_like(index_Nk, dtype=torch.bool)
        if capacity:
            row_N = rows.of(logits_NE)
            kept_Nk = with_room(index_Nk, row_N, logits_NE.shape[1], capacity)
        if not recompute.under_way():  # a block computed again has told this before
            seen.append(Routed(logits_NE, index_Nk, kept_Nk, gate_of(router)))
        return (logits_NE, weight_Nk * kept_Nk, index_Nk) if noise or capacity else None

    backbone = backbone_of(module)
    handles = [r.register_forward_hook(read) for r in routers(module)]
    handles.append(backbone.register_forward_pre_hook(rows.note, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# The bias and the gate


def bias_of(router: nn.Module) -> Tensor | None:
    """The bias of a router's choice, [E]; None where it has none."""
    return cast("Tensor | None", getattr(router, BIAS, None))


def gate_of(router: nn.Module) -> Gate:
    """The gate of a router; of one as transformers has it softmax."""
    return cast(Gate, getattr(router, GATE, "softmax"))


def set_bias(router: nn.Module, bias_E: Tensor) -> None:
    """Let a router choose by this bias from now on."""
    held = bias_of(router)
    if held is not None:
        held.copy_(bias_E)
        return
    weight = cast(Tensor, router.weight)
    # Not persistent: stock transformers knows of no such tensor.
    own_E = bias_E.detach().clone().to(weight.device, torch.float32)
    _choose_here(router)
    router.register_buffer(BIAS, own_E, persistent=False)


def set_gate(router: nn.Module, gate: Gate) -> None:
    """Let a router weigh experts by this gate from now on."""
    _choose_here(router)
    setattr(router, GATE, gate)


def _choose_here(router: nn.Module) -> None:
    """Let a router choose as `top_k_gate` does, in place of its own way."""
    if bias_of(router) is not None or hasattr(router, GATE):
        return  # it does

    def choose(router: nn.Module, _: object, out: object) -> object:
        logits_NE, _, index_Nk = cast("tuple[Tensor, Tensor, Tensor]", out)
        k, bias_E = index_Nk.shape[1], bias_of(router)
        return (logits_NE, *top_k_gate(logits_NE, k, bias_E, gate_of(router)))

    router.register_forward_hook(choose)


def take_choices(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Set the gates and biases that lie among further tensors of a model, where there are any."""
    for i, router in enumerate(found_in(module)):
        if (number := tensors.get(GATE_NAME.format(i))) is not None:
            set_gate(router, GATES[int(number)])
        if (bias_E := tensors.get(NAME.format(i))) is not None:
            set_bias(router, bias_E)


def with_choices(model: Model, module: nn.Module, folder: Path) -> Model:
    """`model` with the gates and biases of `module`, in `folder`; itself where it has them."""
    made: dict[str, Tensor] = {}
    for i, router in enumerate(found_in(module)):
        if (bias_E := bias_of(router)) is not None:
            made[NAME.format(i)] = bias_E.detach().cpu()
        if (gate := gate_of(router)) != "softmax":
            made[GATE_NAME.format(i)] = torch.tensor([GATES.index(gate)])
    held = model.folded().extra if made else {}
    new = {n: t for n, t in made.items() if n not in held or not torch.equal(held[n].to(t), t)}
    return _added(model, new, folder) if new else model


def _added(model: Model, tensors: Mapping[str, Tensor], folder: Path) -> Model:
    from truing.changes import Weights
    from truing.core.files import new_folder
    from truing.core.weights import write

    if not folder.is_dir():
        with new_folder(folder) as partial:
            write(partial, tensors.items())
    return model.adding(Weights(folder))


def with_biases(model: Model, biases: Mapping[int, Tensor], folder: Path) -> Model:
    """`model` whose routers, by the number of their layer, choose by these biases [E]."""
    return _added(model, {NAME.format(i): bias_E for i, bias_E in biases.items()}, folder)


def with_gate(model: Model, gate: Gate, layers: int, folder: Path) -> Model:
    """`model` whose routers have this gate, which a change in `folder` says; itself for softmax."""
    made = {GATE_NAME.format(i): torch.tensor([GATES.index(gate)]) for i in range(layers)}
    return model if gate == "softmax" else _added(model, made, folder)


def moved(bias_E: Tensor, load_E: Tensor, step: float) -> Tensor:
    """The bias after a step: up for experts with less than the mean load, down for the others."""
    return bias_E + step * torch.sign(load_E.mean() - load_E)


# What balances


def first_share(logits_ME: Tensor) -> Tensor:
    """f: share of the tokens whose likeliest expert is each, [E]."""
    return nn.functional.one_hot(logits_ME.argmax(-1), logits_ME.shape[1]).float().mean(0)


def balance_value(p_ME: Tensor, f_E: Tensor) -> Tensor:
    """E sum_i f_i p_i of each token, [M]."""
    return len(f_E) * (p_ME * f_E).sum(-1)


def importance_value(p_ME: Tensor, m_E: Tensor) -> Tensor:
    """E sum_i m_i (2 p_i - m_i) - 1 of each token, [M]: its mean is CV(m)^2, with its gradient."""
    return len(m_E) * (m_E * (2 * p_ME - m_E)).sum(-1) - 1


def z_value(logits_ME: Tensor) -> Tensor:
    """Squared log-sum-exp of each token's logits, [M]."""
    return logits_ME.logsumexp(-1).square()


def mutual_information(counts: Sequence[Sequence[float]]) -> float:
    """I(expert; domain) in nats of a table of counts [domains][experts]."""
    joint = torch.tensor(counts, dtype=torch.float64)
    joint = joint / joint.sum()
    apart = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
    there = joint > 0
    return float((joint[there] * (joint[there] / apart[there]).log()).sum())
