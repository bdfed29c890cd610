"""A decoder block of the Llama family as one autograd function: values and gradients by hand.

On a CPU a stock block spends a third of its time outside matrix products: thirty passes over memory
that is fresh each time. This one computes the same

    y  = norm(x)                        x2 = x + attention(rope(y Wq), rope(y Wk), y Wv) Wo
    y2 = norm(x2)                       out = x2 + (silu(y2 Wg) * (y2 Wu)) Wd

keeping x, the rotated q and k, v, the attention's output, x2 and the two halves of the gated
product, and makes the cheap rest (norms, silu) again in the backward pass. With `again` it keeps x
alone and makes all of it again, by the same operations and so with the same bits. Each W is a plain
weight, trained or frozen, or a frozen one with an adapter (`lora`): dX = G W', and only what is
trained has a gradient. With r = (mean(x^2) + eps)^-1/2 and t = dy * w:

    norm:  dx = r t - x r^3 mean(t * x)            rope:  dx = dy cos - rotate(dy sin)

`fused` puts it into stock modules. Shapes: N tokens, D hidden, F features of the gated product,
Q all ranks of stacked adapters; G, R, H as in `attention`, S head size, E = H S.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from truing.core.batch.layout import Layout
from truing.core.modelfiles.lora import Adapter, adapter_of
from truing.core.passes import attention
from truing.core.passes.products import times, times_t, times_t_plus

NORMS = ("input_layernorm", "post_attention_layernorm")
PRODUCTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass(frozen=True)
class Product:
    """One linear layer as the block uses it: W' and what of it is trained."""

    weight_OI: Tensor
    bias_O: Tensor | None
    adapter: Adapter | None

    @classmethod
    def of(cls, linear: nn.Linear) -> Product:
        """The layer as it is now, with its adapter unless that is off."""
        adapter = adapter_of(linear)
        weight = linear.weight if adapter is None else adapter.merged()
        return cls(weight, linear.bias, adapter)

    def tensors(self) -> list[Tensor]:
        """What its gradients may belong to, in the order in which `_Gradients` is asked."""
        low = [] if self.adapter is None else [self.adapter.a_RI, self.adapter.b_OR]
        return [self.weight_OI, *([] if self.bias_O is None else [self.bias_O]), *low]


@dataclass(frozen=True)
class Plan:
    """All that one block needs besides its input."""

    products: tuple[Product, ...]
    norms: tuple[Tensor, Tensor]
    eps: tuple[float, float]
    groups: int
    size: int
    scale: float
    layout: Layout
    again: bool = False  # what is inside is computed again in the backward pass

    def tensors(self) -> list[Tensor]:
        """Everything that may be trained."""
        return [*self.norms, *(t for p in self.products for t in p.tensors())]


def _norm(x_ND: Tensor, weight_D: Tensor, rate_N1: Tensor) -> Tensor:
    return (x_ND * rate_N1).mul_(weight_D)


def _rate(x_ND: Tensor, eps: float) -> Tensor:
    """(mean(x^2) + eps)^-1/2 of each row, [N, 1]."""
    norm_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True)
    return norm_N1.square_().div_(x_ND.shape[-1]).add_(eps).rsqrt_()


def _norm_back(
    up_ND: Tensor, x_ND: Tensor, weight_D: Tensor, rate_N1: Tensor, plus_ND: Tensor
) -> Tensor:
    """Gradient of the norm's input, added to `plus`."""
    t_ND = up_ND * weight_D
    drop_N1 = (t_ND * x_ND).sum(-1, keepdim=True).mul_(rate_N1.pow(3)).div_(x_ND.shape[-1])
    return torch.addcmul(plus_ND, t_ND, rate_N1).addcmul_(x_ND, drop_N1, value=-1.0)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, sign: float = 1.0) -> Tensor:
    """Rotary embedding of the last dimension into `out`; the inverse rotation for sign -1."""
    half = x.shape[-1] // 2
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return out


class _Gradients:
    """Collects the gradients of trained tensors, and none of the others."""

    def __init__(self, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> None:
        self.wanted = {id(t): w for t, w in zip(tensors, wanted)}
        self.found: dict[int, Tensor] = {}
        self.order = [id(t) for t in tensors]

    def wants(self, *tensors: Tensor | None) -> bool:
        return any(t is not None and self.wanted.get(id(t), False) for t in tensors)

    def give(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        if self.wants(tensor):
            self.found[id(tensor)] = make()

    def all(self) -> tuple[Tensor | None, ...]:
        return tuple(self.found.get(i) for i in self.order)

    def products(self, products: Sequence[Product], x_NI: Tensor, ups: Sequence[Tensor]) -> None:
        """Gradients of layers that share an input; adapters in as few narrow products as can be."""
        low = [p.adapter for p in products if p.adapter is not None]
        if low:
            stacked_QI = torch.cat([a.a_RI for a in low])
            x_NQ = times_t(x_NI, stacked_QI)
            up_NQ = torch.cat(
                [times(up, p.adapter.b_OR) for p, up in zip(products, ups) if p.adapter], dim=1
            )
            d_a_QI = times(up_NQ.t(), x_NI)
            at = 0
            for p, up in zip(products, ups):
                if p.adapter is not None:
                    a, part = p.adapter, slice(at, at + p.adapter.a_RI.shape[0])
                    self.found[id(a.a_RI)] = d_a_QI[part].mul_(a.scale)
                    d_b_RO = times_t(x_NQ[:, part].t(), up.t())
                    self.found[id(a.b_OR)] = d_b_RO.mul_(a.scale).t()
                    at = part.stop
        for p, up in zip(products, ups):
            self.give(p.weight_OI, lambda up=up: times(up.t(), x_NI))
            if p.bias_O is not None:
                self.give(p.bias_O, lambda up=up: up.sum(0))


def _inside(plan: Plan, x_ND: Tensor, cos_NS: Tensor, sin_NS: Tensor) -> tuple[Tensor, ...]:
    """What the backward pass reads of a block besides its input: ten tensors, in its order."""
    q, k, v, o, gate, up = plan.products[:6]
    tokens, groups, size = len(x_ND), plan.groups, plan.size
    rate_N1 = _rate(x_ND, plan.eps[0])
    y_ND = _norm(x_ND, plan.norms[0], rate_N1)
    q_GNRS = times_t(y_ND, q.weight_OI, q.bias_O).view(tokens, groups, -1, size)
    q_GNRS = q_GNRS.transpose(0, 1)
    k_GNS = times_t(y_ND, k.weight_OI, k.bias_O).view(tokens, groups, size).transpose(0, 1)
    v_GNS = times_t(y_ND, v.weight_OI, v.bias_O).view(tokens, groups, size).transpose(0, 1)
    cos, sin = cos_NS[:, None] * plan.scale, sin_NS[:, None] * plan.scale
    q_GNRS = _rotate(q_GNRS, cos, sin, q_GNRS.new_empty(q_GNRS.shape))
    k_GNS = _rotate(k_GNS, cos_NS, sin_NS, k_GNS.new_empty(k_GNS.shape))
    out_GNRS, lse_GNR = attention.forward(q_GNRS, k_GNS, v_GNS, plan.layout)
    out_NE = out_GNRS.transpose(0, 1).reshape(tokens, -1)
    x2_ND = times_t_plus(out_NE, o.weight_OI, o.bias_O, x_ND)
    rate2_N1 = _rate(x2_ND, plan.eps[1])
    y_ND = _norm(x2_ND, plan.norms[1], rate2_N1)
    gate_NF = times_t(y_ND, gate.weight_OI, gate.bias_O)
    up_NF = times_t(y_ND, up.weight_OI, up.bias_O)
    return rate_N1, q_GNRS, k_GNS, v_GNS, out_GNRS, lse_GNR, x2_ND, rate2_N1, gate_NF, up_NF


class _Block(torch.autograd.Function):
    """The block; see the module's docstring for the equations."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx,
        x_ND: Tensor,
        cos_NS: Tensor,
        sin_NS: Tensor,
        plan: Plan,
        keep: bool,
        *tensors: Tensor,
    ) -> Tensor:
        """The block's output [N, D]."""
        inside = _inside(plan, x_ND, cos_NS, sin_NS)
        x2_ND, gate_NF, up_NF = inside[6], inside[8], inside[9]
        keeps_inside = keep and not plan.again
        h_NF = torch.nn.functional.silu(gate_NF, inplace=not keeps_inside).mul_(up_NF)
        if keep:
            more = inside if keeps_inside else ()
            ctx.save_for_backward(x_ND, cos_NS, sin_NS, *more, *tensors)
            ctx.plan = plan  # type: ignore[attr-defined]
        down = plan.products[6]
        return times_t_plus(h_NF, down.weight_OI, down.bias_O, x2_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, up_ND: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of the input and of all that is trained."""
        saved = cast("tuple[Tensor, ...]", ctx.saved_tensors)  # type: ignore[attr-defined]
        x_ND, cos_NS, sin_NS = saved[:3]
        plan = cast(Plan, ctx.plan)  # type: ignore[attr-defined]
        inside = _inside(plan, x_ND, cos_NS, sin_NS) if plan.again else saved[3:13]
        rate_N1, q_GNRS, k_GNS, v_GNS, out_GNRS, lse_GNR, x2_ND, rate2_N1, gate_NF, up_NF = inside
        asked = cast("tuple[bool, ...]", ctx.needs_input_grad)  # type: ignore[attr-defined]
        got = _Gradients(plan.tensors(), asked[5:])
        up_ND = up_ND.contiguous()
        d_x2_ND = _mlp_back(plan, got, up_ND, x2_ND, rate2_N1, gate_NF, up_NF)

        q, k, v, o = plan.products[:4]
        tokens = len(x_ND)
        out_NE = out_GNRS.transpose(0, 1).reshape(tokens, -1)
        got.products([o], out_NE, [d_x2_ND])
        d_out_NE = times(d_x2_ND, o.weight_OI)
        d_out_GNRS = d_out_NE.view(tokens, plan.groups, -1, plan.size).transpose(0, 1)
        dq_GNRS, dk_GNS, dv_GNS = attention.backward(
            d_out_GNRS, q_GNRS, k_GNS, v_GNS, out_GNRS, lse_GNR, plan.layout
        )
        cos, sin = cos_NS[:, None] * plan.scale, sin_NS[:, None] * plan.scale
        dq_NGRS = q_GNRS.new_empty(tokens, plan.groups, q_GNRS.shape[2], plan.size)
        _rotate(dq_GNRS, cos, sin, dq_NGRS.transpose(0, 1), -1.0)
        dk_NGS = q_GNRS.new_empty(tokens, plan.groups, plan.size)
        _rotate(dk_GNS, cos_NS, sin_NS, dk_NGS.transpose(0, 1), -1.0)
        dq_NE, dk_NE = dq_NGRS.view(tokens, -1), dk_NGS.view(tokens, -1)
        dv_NE = dv_GNS.transpose(0, 1).reshape(tokens, -1)
        if got.wants(*(t for p in (q, k, v) for t in p.tensors())):
            y_ND = _norm(x_ND, plan.norms[0], rate_N1)
            got.products([q, k, v], y_ND, [dq_NE, dk_NE, dv_NE])
        if not asked[0] and not got.wants(plan.norms[0]):
            return (None,) * 5 + got.all()
        d_y_ND = times(dq_NE, q.weight_OI)
        d_y_ND = times(dk_NE, k.weight_OI, d_y_ND)
        d_y_ND = times(dv_NE, v.weight_OI, d_y_ND)
        got.give(plan.norms[0], lambda: (d_y_ND * x_ND).mul_(rate_N1).sum(0))
        d_x_ND = _norm_back(d_y_ND, x_ND, plan.norms[0], rate_N1, d_x2_ND)
        return d_x_ND, None, None, None, None, *got.all()


def _mlp_back(
    plan: Plan,
    got: _Gradients,
    up_ND: Tensor,
    x_ND: Tensor,
    rate_N1: Tensor,
    gate_NF: Tensor,
    up_NF: Tensor,
) -> Tensor:
    """Gradient of x2 through the gated product and past it."""
    gate, up, down = plan.products[4:]
    d_h_NF = times(up_ND, down.weight_OI)
    act_NF = torch.nn.functional.silu(gate_NF)
    if got.wants(*down.tensors()):
        got.products([down], act_NF * up_NF, [up_ND])
    d_up_NF = act_NF.mul_(d_h_NF)
    # In place: memory that is fresh each time costs more than the sums.
    d_gate_NF = torch.ops.aten.silu_backward.grad_input(
        d_h_NF.mul_(up_NF), gate_NF, grad_input=d_h_NF
    )
    if got.wants(*gate.tensors(), *up.tensors()):
        got.products([gate, up], _norm(x_ND, plan.norms[1], rate_N1), [d_gate_NF, d_up_NF])
    d_y_ND = times(d_up_NF, up.weight_OI, times(d_gate_NF, gate.weight_OI))
    got.give(plan.norms[1], lambda: (d_y_ND * x_ND).mul_(rate_N1).sum(0))
    return _norm_back(d_y_ND, x_ND, plan.norms[1], rate_N1, up_ND)


def plan_of(block: nn.Module, layout: Layout, again: bool = False) -> Plan:
    """The parts of a stock block as they are now."""
    attn = block.get_submodule("self_attn")
    first, second = (block.get_submodule(n) for n in NORMS)
    products = tuple(Product.of(cast(nn.Linear, block.get_submodule(n))) for n in PRODUCTS)
    size = cast(int, attn.head_dim)
    return Plan(
        products,
        (cast(Tensor, first.weight), cast(Tensor, second.weight)),
        (cast(float, first.variance_epsilon), cast(float, second.variance_epsilon)),
        products[1].weight_OI.shape[0] // size,
        size,
        cast(float, attn.scaling),
        layout,
        again,
    )


def run(
    block: nn.Module,
    layout: Layout,
    x_1ND: Tensor,
    tables: tuple[Tensor, Tensor],
    again: bool = False,
) -> Tensor:
    """What a stock block gives for `x_1ND`, with cosines and sines [1, N, S] of the positions.

    Args:
        again: keep `x_1ND` alone for the backward pass, and compute the rest again there.
    """
    plan = plan_of(block, layout, again)
    tensors = plan.tensors()
    keep = torch.is_grad_enabled() and (
        x_1ND.requires_grad or any(t.requires_grad for t in tensors)
    )
    cos, sin = tables[0][0], tables[1][0]
    return cast(Tensor, _Block.apply(x_1ND[0], cos, sin, plan, keep, *tensors))[None]
