"""Routers of a mixture of experts: what they decide, what balances them, and who has room.

With z [E] a router's logits for one token, p = softmax(z), and over the tokens of a whole step
f_i = the share of them whose first expert is i, m_i = the mean of p_i:

    balance     E sum_i f_i p_i              mean over tokens: E sum_i f_i m_i      (Switch)
    importance  E sum_i m_i (2 p_i - m_i) - 1                  E sum_i m_i^2 - 1 = CV(m)^2
    z           (log sum_i exp z_i)^2

f and m are held constant, so that each is a sum over tokens: its mean and its gradient are those of
the whole step, however that is split. balance is 1 at uniform routing and E when one expert takes
all.

    bias        the k experts with the largest p_i + b_i are chosen; their weights are of p alone
    capacity    of the n tokens of a row, C = ceil(factor n k / E) may choose an expert; the choices
                of later ones have weight 0, and the weights of a token's other choices stay

Rows have their capacity each, and earlier tokens go first: so what a token gets depends on nothing
that comes after it, nor on what is computed beside its row. A prompt and its answers are one row. A
bias lies beside the model's weights as a further tensor for each router (`....gate.bias` [E]) and
acts wherever the model is loaded.

Sources: noisy top-k and importance, arXiv 1701.06538; Switch, arXiv 2101.03961; groups with their
own capacity, arXiv 2006.16668; z, arXiv 2202.08906; bias, arXiv 2408.15664.

Shapes: N tokens, M of them that predict a loss token, E experts, k kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from truing.core import recompute
from truing.core.trunk import backbone_of
from truing.errors import InputError

if TYPE_CHECKING:
    from truing.models import Model

KIND = "MixtralTopKRouter"
BIAS = "selection_bias"  # of a router, beside its weight
NAME = "model.layers.{}.block_sparse_moe.gate.bias"  # of the same in a file


@dataclass(frozen=True)
class Routed:
    """What one router decided in one pass.

    Args:
        logits_NE: before noise and bias.
        index_Nk: experts of each token, the likeliest first.
        kept_Nk: True where the expert had room.
    """

    logits_NE: Tensor
    index_Nk: Tensor
    kept_Nk: Tensor

    def of(self, tokens: Tensor) -> Routed:
        """What it decided for these tokens."""
        return Routed(self.logits_NE[tokens], self.index_Nk[tokens], self.kept_Nk[tokens])


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


def top_k_gate(logits_NE: Tensor, k: int, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights [N, k] of the k likeliest experts, which sum to 1, and their numbers.

    A bias has a say in which are chosen, none in their weights.
    """
    p_NE = torch.softmax(logits_NE, -1, dtype=torch.float32)
    index_Nk = (p_NE if bias_E is None else p_NE + bias_E).topk(k, -1).indices
    kept_Nk = p_NE.gather(-1, index_Nk)
    return kept_Nk / kept_Nk.sum(-1, keepdim=True), index_Nk


def with_room(index_Nk: Tensor, row_N: Tensor, experts: int, factor: float) -> Tensor:
    """True for the choices that their experts have room for, [N, k].

    Args:
        index_Nk: experts of each token.
        row_N: number of each token's row, 0, 1, ..., the tokens of a row one after another.
        experts: E.
        factor: of the capacity; see the module's docstring.
    """
    chosen_NE = counted(index_Nk, experts)
    before_NE = chosen_NE.cumsum(0) - chosen_NE
    size_R = torch.bincount(row_N)
    first_N = (size_R.cumsum(0) - size_R)[row_N]
    earlier_Nk = (before_NE - before_NE[first_N]).gather(1, index_Nk)
    share_R = size_R.double() * (factor * index_Nk.shape[1] / experts)
    return earlier_Nk < torch.ceil(share_R - 1e-9)[row_N, None]


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
    module: nn.Module, *, noise: float = 0.0, capacity: float = 0.0, where: str = ""
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
            weight_Nk, index_Nk = top_k_gate(loud_NE, index_Nk.shape[1], bias_of(router))
        kept_Nk = torch.ones_like(index_Nk, dtype=torch.bool)
        if capacity:
            row_N = rows.of(logits_NE)
            kept_Nk = with_room(index_Nk, row_N, logits_NE.shape[1], capacity)
        if not recompute.under_way():  # a block computed again has told this before
            seen.append(Routed(logits_NE, index_Nk, kept_Nk))
        return (logits_NE, weight_Nk * kept_Nk, index_Nk) if noise or capacity else None

    backbone = backbone_of(module)
    handles = [r.register_forward_hook(read) for r in routers(module, where)]
    handles.append(backbone.register_forward_pre_hook(rows.note, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# The bias


def bias_of(router: nn.Module) -> Tensor | None:
    """The bias of a router's choice, [E]; None where it has none."""
    return cast("Tensor | None", getattr(router, BIAS, None))


def set_bias(router: nn.Module, bias_E: Tensor) -> None:
    """Let a router choose by this bias from now on."""
    held = bias_of(router)
    if held is not None:
        held.copy_(bias_E)
        return

    def choose(router: nn.Module, _: object, out: object) -> object:
        logits_NE, _, index_Nk = cast("tuple[Tensor, Tensor, Tensor]", out)
        return (logits_NE, *top_k_gate(logits_NE, index_Nk.shape[1], bias_of(router)))

    weight = cast(Tensor, router.weight)
    # Not persistent: stock transformers knows of no such tensor.
    own_E = bias_E.detach().clone().to(weight.device, torch.float32)
    router.register_buffer(BIAS, own_E, persistent=False)
    router.register_forward_hook(choose)


def take_biases(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Set the biases that lie among further tensors of a model, where there are any."""
    for i, router in enumerate(found_in(module)):
        if (bias_E := tensors.get(NAME.format(i))) is not None:
            set_bias(router, bias_E)


def with_biases(model: Model, module: nn.Module, folder: Path) -> Model:
    """`model` with the biases of `module`, stored in `folder`; itself where there is none."""
    from truing.changes import Weights
    from truing.core.files import new_folder
    from truing.core.weights import write

    biases = [bias_of(router) for router in found_in(module)]
    made = {NAME.format(i): b.detach().cpu() for i, b in enumerate(biases) if b is not None}
    if not made:
        return model
    if not folder.is_dir():
        with new_folder(folder) as partial:
            write(partial, made.items())
    return model.adding(Weights(folder))


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
