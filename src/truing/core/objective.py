"""`@objective`: a pure loss on measured tensors becomes a training method.

An objective never sees models, devices or text. It declares what must be measured and gets it as a
`Measurements`; it returns a `Loss`, a value and a weight for each unit, and the engine divides by
the weight of the whole step, so that micro-batches cannot change the result.

Shapes: U units (rows), K branches of a unit (chosen = 0, rejected = 1; or the answers of a group),
T tokens of a branch that carry loss, padded on the right and masked.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from truing.components import told
from truing.core.bounds import Bounds
from truing.core.trainer import own_samples as own_samples
from truing.core.trainer import user_loss
from truing.core.trainer.objective_entry import MIX as MIX
from truing.core.trainer.objective_entry import Function as Function
from truing.core.trainer.objective_entry import Mix as Mix
from truing.core.trainer.objective_entry import entry_of, registered
from truing.core.trainer.preflight import check_objective
from truing.core.training import HOOKS
from truing.errors import InputError

State = dict[str, Tensor]
F = typing.TypeVar("F", bound=Function)
UNITS = ("token", "pair", "group", "batch")
# Least and largest value of settings that mean the same in whichever method has them.
WITHIN: Bounds = {
    "entropy_share": "(0, 1]",
    **dict.fromkeys(
        (
            "beta",
            "label_smoothing",
            "clip_ratio",
            "clip_low",
            "clip_high",
            "clip_value",
            "clip_log",
            "bound",
            "opsm",
            "vf",
            "ptx",
            "critic_rollouts",
            "imitation",
            "sft_weight",
        ),
        (0.0, None),
    ),
}


@dataclass(frozen=True)
class Measurements:
    """What was measured on U units of K branches (answers) of T tokens each; the rest is padding.

    Args:
        mask_UKT: 1.0 where a branch has a token that carries loss, 0.0 at padding.
        tensors: measured values by name, each [U, K, T] in float32, 0 at padding.
        columns: numbers of the rows by column name, [U] or [U, K].
    """

    mask_UKT: Tensor
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        """The measurement or row column of that name."""
        found = self.tensors.get(name, self.columns.get(name))
        if found is None:
            known = [*self.tensors, *self.columns]
            raise InputError(
                f"{name!r} was not measured", seen=known, fix="Declare it in `needs` or `columns`"
            )
        return found

    def __contains__(self, name: str) -> bool:
        return name in self.tensors or name in self.columns

    @property
    def logp_UKT(self) -> Tensor:
        """Log-probability of each token under the model that is trained."""
        return self["logp"]

    @property
    def ref_logp_UKT(self) -> Tensor:
        """Log-probability of each token under the frozen reference."""
        return self["ref_logp"]

    @property
    def length_UK(self) -> Tensor:
        """Number of loss tokens of each branch, 0 for one that does not exist."""
        return self.mask_UKT.sum(-1)

    @property
    def there_UK(self) -> Tensor:
        """1.0 for branches that exist; groups may differ in size."""
        return (self.length_UK > 0).float()

    def seq(self, name: str = "logp") -> Tensor:
        """Sum over the tokens of each branch, [U, K]: lp(y|x) for "logp"."""
        return (self[name] * self.mask_UKT).sum(-1)

    def mean(self, name: str = "logp") -> Tensor:
        """Mean over the tokens of each branch, [U, K]."""
        return self.seq(name) / self.length_UK.clamp(min=1)

    def last(self, name: str) -> Tensor:
        """Value at the last token of each branch, [U, K]; 0 for one that does not exist."""
        at_UK1 = (self.length_UK - 1).clamp(min=0).long()[..., None]
        return self[name].gather(-1, at_UK1)[..., 0] * self.there_UK

    def ratio(self) -> Tensor:
        """Log-ratio r = lp(y|x) - lp_ref(y|x) of each branch, [U, K]."""
        return self.seq("logp") - self.seq("ref_logp")

    def having(self, **tensors: Tensor) -> Measurements:
        """The same measurements with some replaced or added."""
        return replace(self, tensors={**self.tensors, **tensors})

    def to(self, device: torch.device | str) -> Measurements:
        """The same measurements on another device."""
        return Measurements(
            self.mask_UKT.to(device),
            {n: t.to(device) for n, t in self.tensors.items()},
            {n: c.to(device) for n, c in self.columns.items()},
        )

    def branches(self, *which: int) -> Measurements:
        """Only the branches of these numbers, in this order."""
        at = list(which)
        return Measurements(
            self.mask_UKT[:, at],
            {n: t[:, at] for n, t in self.tensors.items()},
            {n: c[:, at] if c.dim() > 1 else c for n, c in self.columns.items()},
        )


@dataclass(frozen=True)
class Loss:
    """Value and weight of each unit: the step's loss is sum(per_unit * weight) / sum(weight).

    Losses add and take factors, each term keeping its own weights: `dpo + 0.5 * nll` is the mean
    over pairs plus half the mean over tokens. A weight may depend on masks and row columns, never
    on what the model computes: the engine asks for it before the forward pass.

    Args:
        per_unit: [U] for pairs and groups, [U, K] or [U, K, T] for branches and tokens.
        weight: of the same shape; None weighs every entry 1.
        metrics: per-unit values to be averaged and recorded.
        state: what the next step's call is given; for objectives of unit "batch" only.
    """

    per_unit: Tensor
    weight: Tensor | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    state: State | None = None
    scale: float = 1.0
    others: tuple[Loss, ...] = ()

    def terms(self) -> Iterator[tuple[float, Tensor, Tensor]]:
        """(factor, values, weights) of each term of the sum."""
        weight = torch.ones_like(self.per_unit) if self.weight is None else self.weight
        yield self.scale, self.per_unit, weight.detach()
        for other in self.others:
            yield from other.terms()

    def total(self) -> Tensor:
        """The loss as one number, were these units the whole step."""
        parts = [c * (v * w).sum() / w.sum().clamp(min=1e-12) for c, v, w in self.terms()]
        return torch.stack(parts).sum()

    def sums(self) -> dict[str, tuple[Tensor, float]]:
        """Of each metric the sum over its units, and how many they are."""
        return {n: (v.detach().sum(), float(v.numel())) for n, v in self.metrics.items()}

    def __mul__(self, factor: float) -> Loss:
        others = tuple(o * factor for o in self.others)
        return replace(self, scale=self.scale * factor, others=others)

    __rmul__ = __mul__

    def __add__(self, other: Loss) -> Loss:
        state = {**(self.state or {}), **(other.state or {})} or None
        metrics = {**other.metrics, **self.metrics}
        return replace(self, metrics=metrics, state=state, others=(*self.others, other))


def reward_metrics(reward_w_U: Tensor, reward_l_U: Tensor) -> dict[str, Tensor]:
    """What to watch of a preference objective: accuracy, margin, both rewards; all detached."""
    w, l = reward_w_U.detach(), reward_l_U.detach()  # noqa: E741
    return {
        "accuracy": (w > l).float(),
        "margin": w - l,
        "reward_chosen": w,
        "reward_rejected": l,
    }


@dataclass(frozen=True)
class Objective:
    """What an objective declares.

    Args:
        name: of the method.
        loss: the pure function.
        unit: what one value of the loss needs to see: "token", "pair", "group" or "batch".
        needs: measurements, by name.
        rows: kind of the table.
        columns: numeric row columns; a default makes one optional, None makes it required.
        texts: further text columns that become branches after the kind's own, each with the column
            that stands in for a missing one, or None when it is required.
        hook: name of an engine hook that changes inputs, reference or sampling.
        teachers: roles of frozen teachers, each an input of the method, and how their
            distributions are kept: "full" or "top" (see `core.trainer.teacher`).
        heads: column with the number of the output head that a row is measured under; the settings
            `objectives` and `head_rank` say how many there are and of what rank.
        only: measurements that cost nothing where a setting, by its name, is 0: they are not taken.
        bounds: least and largest value of settings of its own, None where none is largest.
    """

    name: str
    loss: Function
    unit: str
    needs: tuple[str, ...]
    rows: str
    columns: Mapping[str, float | None]
    texts: Mapping[str, str | None] = field(default_factory=dict)
    hook: str = ""
    teachers: Mapping[str, str] = field(default_factory=dict)
    heads: str = ""
    only: Mapping[str, str] = field(default_factory=dict)
    bounds: Bounds = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, inspect.Parameter]:
        """Keyword-only parameters of the loss."""
        found = inspect.signature(self.loss).parameters.items()
        return {n: p for n, p in found if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def within(self) -> Bounds:
        """Least and largest value of settings that are numbers; None where none is largest."""
        return {n: WITHIN[n] for n in self.settings if n in WITHIN} | dict(self.bounds)

    @property
    def keeps_state(self) -> bool:
        """True when the loss takes the state of the step before."""
        return "state" in inspect.signature(self.loss).parameters

    @property
    def with_reference(self) -> bool:
        """True when something is measured under a reference."""
        return any(n == "ref_logp" or n.endswith("kl_vocab") for n in self.needs)

    @property
    def takes_reference(self) -> bool:
        """True when a reference can be given: not where it starts as the model and moves."""
        return self.with_reference and not (self.hook and HOOKS[self.hook].moves_reference)

    @property
    def compares_vocabulary(self) -> bool:
        """True when whole distributions are compared with the reference's."""
        return any(n.endswith("kl_vocab") for n in self.needs)

    @property
    def answers_end(self) -> bool:
        """True when given answers are learnt, so that one at least must come to its end."""
        return self.rows not in ("prompt", "steps") and "scores" not in self.needs

    def asked(self, settings: Mapping[str, object]) -> tuple[str, ...]:
        """The measurements that are taken under `settings`."""
        return tuple(n for n in self.needs if settings.get(self.only.get(n, ""), 1) != 0)

    def __call__(
        self, m: Measurements, settings: Mapping[str, object], state: State | None = None
    ) -> Loss:
        """The loss under `settings`."""
        with told(self.loss, "its function", self.name):
            return self.plain(m, settings, state)

    def plain(
        self, m: Measurements, settings: Mapping[str, object], state: State | None = None
    ) -> Loss:
        """The same, with what its function raises as it is."""
        found = self.loss(m, state, **settings) if self.keeps_state else self.loss(m, **settings)
        return user_loss.returned(found, Loss, self.name, user_loss.RETURN)


def objective(
    *,
    unit: str,
    rows: str,
    needs: tuple[str, ...] = ("logp",),
    paper: str = "",
    field: str = "text",
    columns: Mapping[str, float | None] | None = None,
    texts: Mapping[str, str | None] | None = None,
    hook: str = "",
    teachers: Mapping[str, str] | None = None,
    heads: str = "",
    only: Mapping[str, str] | None = None,
    within: Bounds | None = None,
    name: str = "",
    group: str = "",
) -> Callable[[F], F]:
    """Register a pure loss `(measurements, *, settings) -> Loss` as the method `train/<name>`.

    It stays callable as it is.

    Args (all literals, since the catalogue is read without importing):
        unit: what one value of the loss needs to see: "token", "pair", "group" or "batch"; the last
            is called once a step with all its units.
        rows: kind of the table that it trains on: "example", "pair", "unpaired", "group".
        needs: "logp", "ref_logp", "entropy", "sum_p2", "mismatched", ...
        paper: slug of the paper, which is also that of its claim.
        field: of the models it trains.
        columns: numeric row columns that it reads, with the value that stands for a missing one.
        texts: text columns that become further branches, with the column that stands in.
        hook: an engine hook, whose settings become the method's.
        teachers: roles of frozen teachers and how much of each is kept, "full" or "top".
        heads: numeric column that says which of several output heads a row belongs to.
        only: measurements that are taken only where the setting of this name is not 0.
        within: least and largest value of settings of its own; None where none is largest.
        name: when the registered name differs from the function's.
        group: when it differs from the sub-folder.
    """
    if unit not in UNITS:
        raise InputError("unknown unit", seen=unit, fix="Known: " + ", ".join(UNITS))

    def decorate(function: F) -> F:
        spec = Objective(
            name or function.__name__,
            function,
            unit,
            needs,
            rows,
            columns or {},
            texts or {},
            hook,
            teachers or {},
            heads,
            only or {},
            within or {},
        )
        if spec.keeps_state and unit != "batch":
            raise InputError("only objectives of unit 'batch' keep state", where=spec.name)
        user_loss.check_declared(spec.name, function, rows)
        return registered(
            function,
            "objective",
            spec,
            entry_of(spec),
            functools.partial(check_objective, spec),
            {"paper": paper, "field": field, "name": name, "group": group},
            {"needs": needs, "unit": unit, "rows": rows},
        )

    return decorate


def objective_of(function: object) -> Objective:
    """The declaration of a decorated function."""
    found = getattr(function, "__objective__", None)
    if not isinstance(found, Objective):
        raise InputError("is not a training objective", seen=function)
    return found
