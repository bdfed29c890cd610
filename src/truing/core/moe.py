"""A mixture of experts as a layer for any model: modules of any sort behind a gate of any sort.

    y_n = sum_e w_ne E_e(x_n) + sum_s S_s(x_n),     S the shared experts, which every item has

x_n are N items (tokens, patches, images, users), f_n a vector of each that the gate reads, and
z = scores(f) [N, E], p = softmax(z). What a gate does not keep has weight 0, and the rest has

    softmax        of the k largest p, p over their sum; k = E is the dense mixture
    noisy          the same of z + e softplus(V f), e standard normal, while training
    switch         p itself, of the largest one
    sigmoid        of the k largest s = sigmoid(z), s over their sum
    cosine         as softmax, with z_e = f . w_e / (|f| |w_e| t) and a temperature t that is learnt
    gaussian       as softmax, with z_e = - |f - mu_e|^2 / 2
    laplace        as softmax, with z_e = - |f - mu_e|
    mlp            as softmax, with z of a network of two layers
    top_p          p itself, of the fewest of the largest that make up `top_p`
    expert_choice  p itself, of the ceil(N k / E) items that each expert likes best
    smear          no w: one expert for each item, of the parameters sum_e p_ne theta_e
    soft           k slots of each expert, x'_s = sum_n D_ns x_n, y_n = sum_s C_ns E(x'_s), D and C
                   the softmax of z [N, E k] over the items and over the slots
    hash           1 / k, of the k largest of a random projection of f that stays as it is; where
                   f is the one-hot code of a key, such as a word's or a user's, a table of keys
    random         1 / k, of k drawn anew in every pass
    uniform        1 / E, of all

Under a capacity an expert has room for ceil(capacity * choices / E) of the items, for one at least;
earlier ones go first, and the weights of an item's other choices stay. Gates, losses, bias and room
are those of `core.passes.routers` where it has them. Leave padding out of x: it would be counted.

What an item gets depends on itself alone, but for `expert_choice` and `soft`, which look at all
items of a call, and for a capacity, which looks at those before it and at how many there are. Over
the tokens of one text these three are not causal: what was trained so could not be sampled token by
token. Let whole texts, or images, be the items there. `smear` is as causal as the f it is given.

Sources: the list, arXiv 2503.07137; noisy, 1701.06538; switch, 2101.03961; sigmoid, 2412.19437;
cosine, 2204.09179; top_p, 2403.07652; expert choice, 2202.09368; SMEAR, 2306.03745; Soft-MoE,
2308.00951; hash, 2106.04426; shared, 2401.06066. Differences: each item of smear has its own merge
(the paper's are sequences); p of top_p is not divided by its sum, or one expert alone would have 1.

Shapes: N items, D width of f, E experts, S slots of soft, else E, M items of a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from truing.core.bounds import check_bounds
from truing.core.passes import routers
from truing.errors import InputError, unknown

WHERE = "core.moe.Layer"
Gate = Literal[
    "softmax",
    "noisy",
    "switch",
    "sigmoid",
    "cosine",
    "gaussian",
    "laplace",
    "mlp",
    "top_p",
    "expert_choice",
    "smear",
    "soft",
    "hash",
    "random",
    "uniform",
]
RENORMALISED = ("softmax", "noisy", "sigmoid", "cosine", "gaussian", "laplace", "mlp")
FIXED = ("hash", "random", "uniform")  # nothing of them is trained
K = {"switch": 1, "soft": 1, "hash": 1, "random": 1}  # where k is not given; else 2
LOSSES = dict.fromkeys(("balance", "importance", "z"), "[0, inf)")
BOUNDS = {"capacity": "[0, inf]", "top_p": "(0, 1]", "bias_step": "[0, inf)", **LOSSES}


@dataclass(frozen=True)
class Mixed:
    """What the gate decided in one pass.

    Args:
        logits_NS: scores before noise and bias.
        p_NE: probability of each expert; of a gate that is not trained its weights.
        chosen_NE: True for the choices.
        kept_NE: True for those that found room.
        weight_NE: what outputs were weighed by; 0 where not kept.
    """

    logits_NS: Tensor
    p_NE: Tensor
    chosen_NE: Tensor
    kept_NE: Tensor
    weight_NE: Tensor


class _Centres(nn.Module):
    """How near features are to a vector of each expert: z of cosine, gaussian and laplace."""

    def __init__(self, gate: Gate, dim: int, experts: int) -> None:
        super().__init__()
        self.gate, self.centre_ED = gate, nn.Parameter(torch.randn(experts, dim))
        self.log_t = nn.Parameter(torch.tensor(math.log(0.07))) if gate == "cosine" else None

    def forward(self, f_ND: Tensor) -> Tensor:
        if self.log_t is not None:
            of, to = (nn.functional.normalize(v, dim=-1) for v in (f_ND, self.centre_ED))
            return of @ to.T / self.log_t.exp().clamp(min=0.01)
        # By products of matrices it is faster, and far from exact for what is near.
        far_NE = torch.cdist(f_ND, self.centre_ED, compute_mode="donot_use_mm_for_euclid_dist")
        return -far_NE if self.gate == "laplace" else -far_NE.square() / 2


def scores_of(gate: Gate, dim: int, outputs: int) -> nn.Module:
    """The module that gives z of a gate, [N, D] -> [N, S]."""
    if gate in ("cosine", "gaussian", "laplace"):
        return _Centres(gate, dim, outputs)
    linear = nn.Linear(dim, outputs, bias=False)
    if gate == "mlp":
        return nn.Sequential(nn.Linear(dim, dim), nn.GELU(), linear)
    return linear.requires_grad_(gate not in FIXED)


def gated(
    gate: Gate, z_NE: Tensor, k: int = 1, top_p: float = 1.0, bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weights [N, E] before any capacity, and True for the choices [N, E]; of all but "soft".

    z_NE has its noise already; bias_E has a say in the choice alone, as in `core.passes.routers`.
    """
    (items, experts), p_NE = z_NE.shape, routers.shares(z_NE)
    none_NE = torch.zeros_like(p_NE, dtype=torch.bool)
    if gate == "smear":
        chosen_NE = ~none_NE
    elif gate == "expert_choice":
        best_CE = p_NE.topk(math.ceil(items * k / experts), 0).indices
        chosen_NE = none_NE.scatter(0, best_CE, True)
    elif gate == "top_p":
        largest_NE, at_NE = p_NE.sort(-1, descending=True)
        # Those of which what is before does not suffice.
        chosen_NE = none_NE.scatter(1, at_NE, largest_NE.cumsum(-1) - largest_NE < top_p)
    else:
        index_Nk = z_NE.topk(k, -1).indices
        weight_Nk = torch.full_like(index_Nk, 1 / k, dtype=p_NE.dtype)
        if gate not in FIXED:
            kind = gate if gate in ("switch", "sigmoid") else "softmax"
            weight_Nk, index_Nk = routers.top_k_gate(z_NE, k, bias_E, kind)
        weight_NE = torch.zeros_like(p_NE).scatter(1, index_Nk, weight_Nk)
        return weight_NE, routers.counted(index_Nk, experts) > 0
    return p_NE * chosen_NE, chosen_NE


class Layer(nn.Module):
    """Experts behind a gate; see the module's docstring.

    Args:
        gate: of the list there.
        experts: modules that take items [n, ...] and give [n, ...], all in one shape; those of
            smear are of one architecture. `nn.Identity()` is one that copies.
        dim: D.
        k: choices of an item; of expert_choice their mean, of soft the slots of an expert. 0 takes
            1 for switch, soft, hash and random, else 2.
        capacity: how many items an expert takes, over its even share; 0 or infinity for any.
        top_p: of that gate.
        shared: experts that every item has, with weight 1.
        losses: weights of "balance", "importance" and "z".
        bias_step: what the bias of an expert's choice moves by; 0 for no bias.
        scores: gives z instead, [N, D] -> [N, E] ([N, E k] for soft).
    Raises:
        InputError: a k or experts that the gate cannot have; what counts for nothing with it.
    """

    def __init__(
        self,
        gate: Gate,
        experts: Sequence[nn.Module],
        dim: int,
        *,
        k: int = 0,
        capacity: float = 0.0,
        top_p: float = 0.8,
        shared: Sequence[nn.Module] = (),
        losses: Mapping[str, float] | None = None,
        bias_step: float = 0.0,
        scores: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.gate: Gate = gate
        self.experts, self.shared = nn.ModuleList(experts), nn.ModuleList(shared)
        self.dim, self.k, self.top_p = dim, k, top_p
        self.capacity, self.bias_step, self.losses = capacity, bias_step, dict(losses or {})
        self._check(given=scores is not None)
        self.k = len(experts) if gate == "uniform" else k or K.get(gate, 2)
        outputs = len(experts) * (self.k if gate == "soft" else 1)
        self.scores = scores_of(gate, dim, outputs) if scores is None else scores
        self.noise = nn.Linear(dim, len(experts), bias=False) if gate == "noisy" else None
        self.bias_E: Tensor | None
        self.register_buffer("bias_E", torch.zeros(len(experts)) if bias_step else None)

    def _check(self, *, given: bool) -> None:
        gate, experts, k = self.gate, len(self.experts), self.k
        for what, names, known in (("gate", [gate], get_args(Gate)), ("loss", self.losses, LOSSES)):
            for name in names:
                if name not in known:
                    raise unknown(what, name, known, where=WHERE)
        check_bounds({**vars(self), **self.losses}, BOUNDS, WHERE)
        idle = {
            "k": k and gate in ("top_p", "smear", "uniform"),
            "capacity": self.capacity and gate in ("expert_choice", "smear", "soft", "uniform"),
            "bias_step": self.bias_step and gate not in (*RENORMALISED, "switch"),
            "losses": self.losses and gate in FIXED,
            "scores": given and gate in FIXED,
        }
        if name := next((n for n, idly in idle.items() if idly), ""):
            said = f"setting {name!r} counts for nothing with this gate"
            raise InputError(said, where=WHERE, seen=gate, fix="Leave it out")
        most = {"switch": 1, "soft": max(k, 1)}.get(gate, experts)
        if experts < 2 or (k and not (2 if gate in RENORMALISED else 1) <= k <= most):
            raise InputError(
                "needs two experts, and k up to their number: from 2 where weights are divided by "
                "their sum (one alone is 1 always, and no router learns so), 1 for a switch",
                where=WHERE,
                seen={"gate": gate, "experts": experts, "k": k},
            )
        made = [{n: p.shape for n, p in e.named_parameters()} for e in self.experts]
        if gate == "smear" and any(one != made[0] for one in made):
            raise InputError("smear merges experts, whose parameters must be alike", where=WHERE)

    def forward(self, x: Tensor, features_ND: Tensor | None = None) -> tuple[Tensor, Mixed]:
        """The outputs [N, ...] and what the gate decided.

        Args:
            x: items [N, ...], one at least.
            features_ND: what the gate reads of each; None for the items themselves, flattened.
        Raises:
            InputError: no item, or features of another shape.
        """
        f_ND = x[:, None].flatten(1) if features_ND is None else features_ND
        if not len(x) or f_ND.shape != (len(x), self.dim):
            raise InputError(
                "needs an item, and for the gate a vector of width `dim` of each",
                where=WHERE,
                seen=tuple(f_ND.shape),
                fix=f"Give features_ND [{len(x)}, {self.dim}]",
            )
        z_NS = cast(Tensor, self.scores(f_ND)).float()
        out, mixed = self._slots(x, z_NS) if self.gate == "soft" else self._sent(x, f_ND, z_NS)
        for expert in self.shared:
            out = out + expert(x)
        return out, mixed

    def loss(self, *passes: Mixed) -> Tensor:
        """The weighted losses over the items of all these passes, which are those of one step."""
        p_ME = torch.cat([m.p_NE for m in passes])
        values_M = {
            "balance": routers.balance_value(p_ME, routers.first_share(p_ME)),
            "importance": routers.importance_value(p_ME, p_ME.detach().mean(0)),
            "z": routers.z_value(torch.cat([m.logits_NS for m in passes])),
        }
        each = [weight * values_M[name].mean() for name, weight in self.losses.items()]
        return torch.stack(each).sum() if each else p_ME.new_zeros(())

    def move_bias(self, *passes: Mixed) -> None:
        """Move the bias by the loads of one step's passes; without `bias_step` nothing is done."""
        if self.bias_E is not None:
            load_E = torch.cat([m.chosen_NE for m in passes]).float().sum(0)
            self.bias_E.copy_(routers.moved(self.bias_E, load_E, self.bias_step))

    def _sent(self, x: Tensor, f_ND: Tensor, z_NE: Tensor) -> tuple[Tensor, Mixed]:
        loud_NE = z_NE = torch.rand_like(z_NE) if self.gate == "random" else z_NE
        if self.noise is not None and self.training:
            size_NE = nn.functional.softplus(self.noise(f_ND).float())
            loud_NE = z_NE + torch.randn_like(z_NE) * size_NE
        weight_NE, chosen_NE = gated(self.gate, loud_NE, self.k, self.top_p, self.bias_E)
        kept_NE = chosen_NE
        if self.capacity:
            share_R = chosen_NE.sum()[None].double() * (self.capacity / z_NE.shape[1])
            one_N = torch.zeros(len(z_NE), dtype=torch.long, device=z_NE.device)
            kept_NE = chosen_NE & routers.has_room(chosen_NE.long(), one_N, share_R.clamp(min=1))
        kind = "sigmoid" if self.gate == "sigmoid" else "softmax"
        p_NE = weight_NE if self.gate in FIXED else routers.shares(z_NE, kind)
        mixed = Mixed(z_NE, p_NE, chosen_NE, kept_NE, weight_NE * kept_NE)
        return (self._merged if self.gate == "smear" else self._summed)(x, mixed), mixed

    def _summed(self, x: Tensor, mixed: Mixed) -> Tensor:
        out: Tensor | None = None
        for e, expert in enumerate(self.experts):
            at_n = mixed.kept_NE[:, e].nonzero()[:, 0]
            if len(at_n):  # each expert computes its own items alone
                y = cast(Tensor, expert(x[at_n]))
                out = y.new_zeros(len(x), *y.shape[1:]) if out is None else out
                weight_n = mixed.weight_NE[at_n, e].to(y.dtype)
                out = out.index_add(0, at_n, weight_n.view(-1, *[1] * (y.dim() - 1)) * y)
        return cast(Tensor, out)  # an item has a choice, and an expert room for one

    def _merged(self, x: Tensor, mixed: Mixed) -> Tensor:
        base, held = self.experts[0], [dict(e.named_parameters()) for e in self.experts]
        each = {n: torch.stack([one[n] for one in held]) for n in held[0]}
        theta = {n: torch.tensordot(mixed.p_NE.to(t.dtype), t, 1) for n, t in each.items()}

        def one(theta: dict[str, Tensor], item: Tensor) -> Tensor:
            return cast(Tensor, torch.func.functional_call(base, theta, (item[None],)))[0]

        return cast(Tensor, torch.func.vmap(one, randomness="different")(theta, x))

    def _slots(self, x: Tensor, z_NS: Tensor) -> tuple[Tensor, Mixed]:
        to_NS, back_NS = z_NS.softmax(0), z_NS.softmax(1)
        parts = torch.tensordot(to_NS.T.to(x.dtype), x, 1).split(self.k)
        made = torch.cat([e(part) for e, part in zip(self.experts, parts, strict=True)])
        p_NE = back_NS.unflatten(1, (-1, self.k)).sum(-1)
        out = torch.tensordot(back_NS.to(made.dtype), made, 1)
        return out, Mixed(z_NS, p_NE, p_NE >= 0, p_NE >= 0, p_NE)
