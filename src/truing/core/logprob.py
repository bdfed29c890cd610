"""Per-token measurements of a causal language model on packed trees, without full logits.

The backbone runs once over the flat list of tokens; the head runs on the M positions that predict a
loss token only, a chunk of rows at a time, and no logits outlive their chunk. With z the logits of
one row, p = softmax(z) and t its target:

    logp    = z_t - log sum_v exp z_v        d logp / dz_v    = [v = t] - p_v
    entropy = -sum_v p_v log p_v             d entropy / dz_v = -p_v (log p_v + entropy)
    sum_p2  = sum_v p_v^2                    d sum_p2 / dz_v  = 2 p_v (p_v - sum_p2)

Each is one number per row, so its gradient with respect to the row's hidden state, (dz) W, is
formed in the forward pass while the chunk's logits are at hand, and the backward pass only scales
it. A head that is trained itself needs the rows' upstream gradients first: its logits are made
again in the backward pass.

Shapes: N tokens, M loss tokens, C rows of a chunk, D hidden size, V vocabulary; U, K, T as in
`tree`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from truing.core.batch.layout import Layout
from truing.core.modelfiles.reach import check_ids, text_config, too_long, vocab_of
from truing.core.passes.attention import KNOWN, tree_attention
from truing.core.passes.fused import fused
from truing.core.passes.headed import check_words
from truing.core.passes.products import logits, times, times_t
from truing.core.passes.tried import Tried, kind_of
from truing.core.tree import Packed, group_tree, pack
from truing.errors import InputError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK, CHUNK_GPU = 2**23, 2**25  # logits of a chunk: 32 and 128 MiB in float32
_exact: Tried[bool] = Tried()


@dataclass(frozen=True)
class Rows:
    """What a statistic is given: a chunk of C rows.

    `extras` holds the caller's tensors for these rows, by name, each [C, ...].
    """

    logp_CV: Tensor
    target_C: Tensor
    extras: Mapping[str, Tensor]


Extras = Mapping[str, "Tensor | Callable[[slice], Tensor]"]
Statistic = Callable[[Rows, bool], tuple[Tensor, Tensor | None]]
STATISTICS: dict[str, Statistic] = {}


def statistic(function: Statistic) -> Statistic:
    """Register a measurement under its function's name.

    It maps rows to (value_C, gradient with respect to the logits [C, V] or None when not asked).
    """
    STATISTICS[function.__name__] = function
    return function


@statistic
def logp(rows: Rows, grad: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probability of the target."""
    value_C = rows.logp_CV.gather(1, rows.target_C[:, None])[:, 0]
    if not grad:
        return value_C, None
    slope_CV = rows.logp_CV.exp().neg_()
    row_C = torch.arange(len(value_C), device=slope_CV.device)
    slope_CV[row_C, rows.target_C] += 1.0
    return value_C, slope_CV


@statistic
def entropy(rows: Rows, grad: bool) -> tuple[Tensor, Tensor | None]:
    """Entropy of the next-token distribution, in nats."""
    p_CV = rows.logp_CV.exp()
    value_C = -(p_CV * rows.logp_CV).sum(1)
    return value_C, p_CV.mul_(rows.logp_CV + value_C[:, None]).neg_() if grad else None


@statistic
def sum_p2(rows: Rows, grad: bool) -> tuple[Tensor, Tensor | None]:
    """Sum over the vocabulary of squared probabilities."""
    p_CV = rows.logp_CV.exp()
    value_C = (p_CV * p_CV).sum(1)
    return value_C, 2.0 * p_CV * (p_CV - value_C[:, None]) if grad else None


@statistic
def kl_vocab(rows: Rows, grad: bool) -> tuple[Tensor, Tensor | None]:
    """KL(model || other) over the vocabulary; extras: "other_logp" [C, V]."""
    p_CV = rows.logp_CV.exp()
    ratio_CV = rows.logp_CV - rows.extras["other_logp"]
    value_C = (p_CV * ratio_CV).sum(1)
    return value_C, p_CV.mul_(ratio_CV - value_C[:, None]) if grad else None


class _Head(torch.autograd.Function):
    """The head and the statistics of its rows; one [M] tensor for each statistic."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        rows_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_M: Tensor,
        names: tuple[str, ...],
        extras: Extras,
        grad: bool,
    ) -> tuple[Tensor, ...]:
        """Values in float32, and what the backward pass needs."""
        trained = grad and (
            weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad)
        )
        values = [rows_MD.new_empty(len(rows_MD), dtype=torch.float32) for _ in names]
        slopes = [torch.empty_like(rows_MD) for _ in names if grad and not trained]
        for part in _chunks(rows_MD, len(weight_VD)):
            rows = _rows(rows_MD, weight_VD, bias_V, target_M, extras, part)
            for i, name in enumerate(names):
                value_C, slope_CV = STATISTICS[name](rows, bool(slopes))
                values[i][part] = value_C
                if slope_CV is not None and slopes:
                    slopes[i][part] = times(slope_CV.to(weight_VD.dtype), weight_VD)
        ctx.names, ctx.extras, ctx.trained = names, extras, trained  # type: ignore[attr-defined]
        if trained:
            kept = (rows_MD, weight_VD, bias_V, target_M)
            ctx.save_for_backward(*cast("tuple[Tensor, ...]", kept))
        else:
            ctx.save_for_backward(*slopes)
        return tuple(values)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *up: Tensor) -> tuple[object, ...]:  # type: ignore[override]
        """Gradients of the rows, and of the head where it is trained."""
        saved = cast("tuple[Tensor, ...]", ctx.saved_tensors)  # type: ignore[attr-defined]
        none = (None,) * 5
        if not ctx.trained:  # type: ignore[attr-defined]
            total = sum(s * u[:, None].to(s.dtype) for s, u in zip(saved, up))
            return total, None, *none
        rows_MD, weight_VD, bias_V, target_M = saved
        d_rows_MD = torch.empty_like(rows_MD)
        d_weight_VD: Tensor | None = None
        d_bias_V = None if bias_V is None else torch.zeros_like(bias_V)
        for part in _chunks(rows_MD, len(weight_VD)):
            rows = _rows(rows_MD, weight_VD, bias_V, target_M, ctx.extras, part)  # type: ignore[attr-defined]
            total_CV: Tensor | None = None
            for name, u in zip(ctx.names, up):  # type: ignore[attr-defined]
                slope_CV = cast(Tensor, STATISTICS[name](rows, True)[1]).mul_(u[part, None])
                total_CV = slope_CV if total_CV is None else total_CV.add_(slope_CV)
            total_CV = cast(Tensor, total_CV).to(weight_VD.dtype)
            d_rows_MD[part] = times(total_CV, weight_VD)
            d_weight_VD = _plus(total_CV.T, rows_MD[part], d_weight_VD)
            if d_bias_V is not None:
                d_bias_V += total_CV.sum(0)
        if d_weight_VD is None:  # no row at all
            d_weight_VD = torch.zeros_like(weight_VD)
        return d_rows_MD, d_weight_VD.to(weight_VD.dtype), d_bias_V, *none[1:]


def _plus(up_VC: Tensor, rows_CD: Tensor, sum_VD: Tensor | None) -> Tensor:
    """sum + up rows, [V, D]: added up in float32 whatever the factors are of, and in place.

    A new sum for each chunk would be as large as the head, and memory that is fresh each time.
    """
    if sum_VD is None:
        return times_t(up_VC, rows_CD.T).float()
    if up_VC.dtype == sum_VD.dtype:
        return sum_VD.addmm_(up_VC, rows_CD)
    return sum_VD.add_(times_t(up_VC, rows_CD.T))


def chunk_of(like: Tensor) -> int:
    """Logits of a chunk on a tensor's device."""
    return CHUNK_GPU if like.is_cuda else CHUNK


def _chunks(rows_MD: Tensor, vocab: int) -> list[slice]:
    rows, size = len(rows_MD), max(1, chunk_of(rows_MD) // vocab)
    return [slice(a, min(a + size, rows)) for a in range(0, rows, size)]


def _rows(
    rows_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_M: Tensor,
    extras: Extras,
    part: slice,
) -> Rows:
    logits_CV = logits(rows_MD[part], weight_VD, bias_V)
    logp_CV = torch.log_softmax(logits_CV, dim=-1, dtype=torch.float32)
    here = {n: e(part) if callable(e) else e[part] for n, e in extras.items()}
    return Rows(logp_CV, target_M[part], here)


class Played(Protocol):
    """What a module carries whose lower blocks are not computed: see `core.passes.frozen_trunk`."""

    def played(self, packed: Packed) -> AbstractContextManager[None]:
        """The module as it is to be computed for this micro-batch inside the block."""
        ...


def states(module: nn.Module, packed: Packed) -> Tensor:
    """Last hidden states [N, D] of all tokens, after the final norm."""
    check(module)
    if wrong := too_long(module, packed.longest):
        raise InputError(wrong, fix="Shorten or leave out such rows, or score them in pieces")
    check_ids([packed.largest], vocab_of(module))
    layout = Layout(packed.segments)
    trunk = cast("Played | None", vars(module).get("truing_trunk"))
    below = trunk.played(packed) if trunk is not None else contextlib.nullcontext()
    with below, tree_attention(module), fused(module, layout.longest):
        return _backbone(module, packed, layout)


def measure(
    module: nn.Module,
    packed: Packed,
    needs: Sequence[str] = ("logp",),
    *,
    grad: bool = True,
    extras: Extras | None = None,
    heads: Mapping[str, nn.Module] | None = None,
    change: Callable[[Tensor], Tensor] | None = None,
    temperature: float = 1.0,
    given_UK: Tensor | None = None,
) -> dict[str, Tensor]:
    """Measure the loss tokens of a micro-batch.

    Args:
        module: a stock transformers causal language model.
        packed: trees from `tree.pack`, on the module's device.
        needs: names of registered statistics: "logp", "entropy", "sum_p2", "kl_vocab",
            and those of methods.
        grad: False computes without a graph.
        extras: for statistics that compare: tensors [M, ...] in the order of the loss tokens, or
            functions from a slice of them to a tensor.
        heads: further heads by name, each from float32 states [M, D] of the tokens that predict the
            loss tokens to one number [M, 1], such as a critic's values.
        change: of those states before the vocabulary's head sees them, such as another head's.
        temperature: divides the logits, so that all statistics are of what is drawn at it.
        given_UK: true for answers that nobody drew: their "logp" is at temperature 1 all the same.

    Returns each need and head as [U, K, T] in float32, 0 at padding, and "mask" [U, K, T]. Raises
    InputError for architectures that trees do not compute exactly, and for rows longer than the
    context.
    """
    for name in needs:
        if name not in STATISTICS:
            raise unknown("measurement", name, STATISTICS)
    check_words(module)
    with torch.set_grad_enabled(grad):
        rows_MD = states(module, packed)[packed.source_M]
        rows_MD = rows_MD if change is None else change(rows_MD)
        head, graph = _head(module), grad and torch.is_grad_enabled()
        bias_V = head.bias
        logit_MD = rows_MD
        if temperature != 1:
            logit_MD = rows_MD / temperature
            bias_V = None if bias_V is None else bias_V / temperature
        values = _statistics(
            logit_MD, head.weight, bias_V, packed.target_M, tuple(needs), extras or {}, graph
        )
        said = {n: cast(Tensor, h(rows_MD.float()))[:, 0] for n, h in (heads or {}).items()}
    made = {name: packed.spread(v) for name, v in [*zip(needs, values), *said.items()]}
    if given_UK is not None and temperature != 1 and "logp" in made:
        with torch.set_grad_enabled(grad):
            plain_UKT = _plain_logp(head, rows_MD, packed, given_UK, graph)
            made["logp"] = torch.where(given_UK[..., None], plain_UKT, made["logp"])
    return {"mask": packed.mask_UKT, **made}


def _statistics(
    rows_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_M: Tensor,
    names: tuple[str, ...],
    extras: Extras,
    grad: bool,
) -> tuple[Tensor, ...]:
    """One [M] tensor for each statistic, by `_Head`."""
    made = _Head.apply(rows_MD, weight_VD, bias_V, target_M, names, extras, grad)
    return cast("tuple[Tensor, ...]", made)


def _plain_logp(
    head: nn.Linear, rows_MD: Tensor, packed: Packed, given_UK: Tensor, grad: bool
) -> Tensor:
    """log p [U, K, T] at temperature 1 of these answers' tokens, 0 elsewhere.

    A token that such an answer shares with one that was drawn has both values.
    """
    index = packed.index_UKT[given_UK].unique()
    index_m = index[index < len(rows_MD)]  # less what stands at padding
    target_m = packed.target_M[index_m]
    (value_m,) = _statistics(
        rows_MD[index_m], head.weight, head.bias, target_m, ("logp",), {}, grad
    )
    return packed.spread(value_m.new_zeros(len(rows_MD)).index_copy(0, index_m, value_m))


def _head(module: nn.Module) -> nn.Linear:
    return cast(nn.Linear, cast("PreTrainedModel", module).get_output_embeddings())


def _backbone(module: nn.Module, packed: Packed, layout: Layout) -> Tensor:
    found = cast("PreTrainedModel", module).base_model(
        input_ids=packed.ids_N[None],
        position_ids=packed.positions_N[None],
        use_cache=False,
        tree=layout,
    )
    return cast(Tensor, found.last_hidden_state)[0]


def check(module: nn.Module) -> None:
    """Raise InputError unless trees give this module's own values; looked at once (see `tried`).

    A tree of ten tokens is computed both ways: logits that the architecture scales or caps, layers
    that look at neighbours by other means than attention, and the like show here.
    """
    name = type(module).__name__
    if any(getattr(m, "gradient_checkpointing", False) for m in module.modules()):
        raise InputError(
            "gradient checkpointing computes layers again without their trees",
            seen=name,
            fix="Switch it off for this module",
        )
    _exact(module, partial(kind_of, module), partial(_try, module, name))


def _try(module: nn.Module, name: str) -> bool:
    head = getattr(module, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Linear) or not hasattr(module, "base_model"):
        fix = "Give one whose class ends in ForCausalLM"
        raise InputError("not a causal language model of transformers", seen=name, fix=fix)
    if not getattr(module, "_supports_attention_backend", False):
        said = "the architecture does not take other attention functions"
        raise InputError(said, seen=name, fix=KNOWN)
    _compare(module, name)
    return True


def small_tree(module: nn.Module) -> tuple[list[int], Packed]:
    """Ten tokens to try a module on: four that branch into the next three and the last three."""
    vocab = cast(int, text_config(module).vocab_size)
    ids = [(7 * i * i + 3 * i + 5) % vocab for i in range(10)]
    packed = pack([group_tree(ids[:4], [ids[4:7], ids[7:]])])[0]
    return ids, packed.to(next(module.parameters()).device)


def _compare(module: nn.Module, name: str) -> None:
    device = next(module.parameters()).device
    ids, packed = small_tree(module)
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            with tree_attention(module):
                rows_MD = _backbone(module, packed, Layout(packed.segments))[packed.source_M]
            head = _head(module)
            tree_MV = torch.nn.functional.linear(rows_MD, head.weight, head.bias).float()
            alone = [
                module(torch.tensor([ids[:4] + b], device=device), use_cache=False).logits
                for b in (ids[4:7], ids[7:])
            ]
            plain_MV = torch.cat([a[0, 3:-1].float() for a in alone])
    finally:
        module.train(training)
    scale = float(plain_MV.abs().max())
    loose = 1e-3 if plain_MV.dtype == head.weight.dtype else 5e-2
    if float((tree_MV - plain_MV).abs().max()) > loose * max(scale, 1e-3):
        raise InputError(
            "packed trees do not give this architecture's own values",
            seen=name,
            fix=KNOWN,
        )
