"""Several objectives in one training step: what the setting `mix` of every objective does.

    L = w_0 L_0 + sum_i w_i L_i        L_i: mean of objective i over its own weights in the step

L_0 is the method's own loss; w_0 is 1, or what `mix` says of the method's own name. All terms are
of the same rows in the same forward pass: the union of what they need is measured, the reference
once, and it is the method's. So `dpo` with `{sft: a}` is RPO (arXiv 2404.19733), and MPO (arXiv
2411.10442) is `dpo` with `{dpo: 0.8, bco_pair: 0.2, sft: 1}`.

An added objective sees of a row what it would see were it trained alone on these rows: the row
itself, where both objectives take the same kind, else what is made of it there, too:

    pair       example: the chosen answer     negative: the rejected one
               unpaired: both, as good and as bad     group: both, of scores 1 and 0
    unpaired   example: good answers alone    negative: bad ones alone
    group      example: the best answer       pair: the best against the worst

Which rows are left out, what is cut and which tokens carry loss is decided for the method itself:
of a pair of dialogues `sft` learns the chosen turns after the parting, as the method does. An
objective of unit "batch" makes all terms be computed on the whole step at once, and each that keeps
a state keeps its own. Refused is what would change the other terms or the model's form: hooks,
teachers and heads of an added objective, and measurements that depend on its settings.

Shapes: U units, K branches, T loss tokens, as in `objective`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import torch
from torch import Tensor

from truing import catalogue
from truing.core.batch.row_kinds import CONVERSIONS
from truing.core.objective import Loss, Measurements, Objective, State, objective_of
from truing.core.training import HOOKS, Hook
from truing.errors import InputError, unknown
from truing.method import methods

Settings = Mapping[str, object]
V = TypeVar("V")
# What is measured in the same way whatever the settings of an objective.
MEASURED = {"logp", "ref_logp", "entropy", "sum_p2", "ref_kl_vocab", "mismatched", "scores"}
WIDTH = {"pair": 2, "prompt": 0}  # branches of a row of that kind; of all others but groups one
EXAMPLE = "Such as {sft: 0.5} or {ipo: {weight: 0.2, beta: 0.05}}"


# Rows of the method's kind as another objective sees them


def _singles(m: Measurements) -> Measurements:
    """Pairs as 2 U single answers: chosen ones are good, rejected ones bad."""
    label_U = m.mask_UKT.new_tensor([1.0, 0.0]).repeat(len(m.mask_UKT))
    columns = {n: c.repeat_interleave(2, 0) for n, c in m.columns.items()}
    tensors = {n: t.flatten(0, 1)[:, None] for n, t in m.tensors.items()}
    return Measurements(m.mask_UKT.flatten(0, 1)[:, None], tensors, {**columns, "label": label_U})


def _ranked(m: Measurements) -> Measurements:
    """Pairs as groups of two, of scores 1 and 0."""
    score_UK = m.mask_UKT.new_tensor([1.0, 0.0]).expand(len(m.mask_UKT), 2)
    return replace(m, columns={**m.columns, "scores": score_UK})


def _extremes(m: Measurements, count: int) -> Measurements:
    """The best answer of each group and, where `count` is 2, the worst; the first of equal ones."""
    there_UK, score_UK = m.there_UK > 0, m.columns["scores"]
    best_U = score_UK.masked_fill(~there_UK, -torch.inf).argmax(1)
    worst_U = score_UK.masked_fill(~there_UK, torch.inf).argmin(1)
    at_UK1 = torch.stack([best_U, worst_U], 1)[:, :count, None]

    def taken(value_UKT: Tensor) -> Tensor:
        return value_UKT.gather(1, at_UK1.expand(-1, -1, value_UKT.shape[-1]))

    columns = {n: c for n, c in m.columns.items() if c.dim() == 1}
    return Measurements(taken(m.mask_UKT), {n: taken(t) for n, t in m.tensors.items()}, columns)


# By the kinds of the method's rows and of the added objective's, as in `row_kinds.CONVERSIONS`.
VIEWS: dict[tuple[str, str], Callable[[Measurements], Measurements]] = {
    ("pair", "example"): lambda m: m.branches(0),
    ("pair", "negative"): lambda m: m.branches(1),
    ("pair", "unpaired"): _singles,
    ("pair", "group"): _ranked,
    ("unpaired", "example"): lambda m: m,
    ("unpaired", "negative"): lambda m: m,
    ("group", "example"): lambda m: _extremes(m, 1),
    ("group", "pair"): lambda m: _extremes(m, 2),
}
COUNTED = {("unpaired", "example"): True, ("unpaired", "negative"): False}  # good rows, or bad ones
MADE = {("pair", "unpaired"): ("label",), ("pair", "group"): ("scores",)}  # columns of the view
READ = {"unpaired": ("label",), "group": ("scores",)}  # columns that a view of such rows reads


def _counting(loss: Loss, there_U: Tensor) -> Loss:
    """The loss of the rows that are there: the others weigh nothing and are not recorded."""
    weight = torch.ones_like(loss.per_unit) if loss.weight is None else loss.weight
    wide = there_U.reshape(-1, *[1] * (weight.dim() - 1))
    return replace(
        loss,
        weight=weight * wide,
        metrics={n: v[there_U] for n, v in loss.metrics.items()},
        others=tuple(_counting(o, there_U) for o in loss.others),
    )


# The mixture


@dataclass(frozen=True)
class Term:
    """One added objective: its weight and its own settings."""

    spec: Objective
    weight: float
    settings: Settings


@dataclass(frozen=True, kw_only=True)
class Mixture(Objective):
    """An objective with others added to it, declared as one.

    Args:
        host: the method's own objective, whose name, rows, hook, teachers and heads are kept.
        weight: of it.
        added: the other terms.
    """

    host: Objective
    weight: float
    added: tuple[Term, ...]

    @property
    def keeps_state(self) -> bool:
        """True when a term does."""
        return self.host.keeps_state or any(t.spec.keeps_state for t in self.added)

    @property
    def answers_end(self) -> bool:
        """True when a term learns given answers."""
        return any(s.answers_end for s in (self.host, *(t.spec for t in self.added)))

    def asked(self, settings: Settings) -> tuple[str, ...]:
        """The measurements that any term takes."""
        names = [*self.host.asked(settings)]
        for term in self.added:
            names += term.spec.asked(term.settings)
        return tuple(dict.fromkeys(names))

    def notes(self) -> str:
        """The sum in words, with what of a row each term sees."""
        parts = [f"{self.weight:g} {self.name}"]
        for term in self.added:
            kinds = (self.rows, term.spec.rows)
            seen = f" ({CONVERSIONS[kinds][0]})" if kinds in VIEWS else ""
            parts.append(f"{term.weight:g} {term.spec.name}{seen}")
        return " + ".join(parts)

    def __call__(self, m: Measurements, settings: Settings, state: State | None = None) -> Loss:
        """The weighted sum of all terms."""
        total = self.weight * self._one(self.host, m, settings, state)
        for term in self.added:
            loss = self._one(term.spec, m, term.settings, state)
            named = {f"{term.spec.name}/{n}": v for n, v in loss.metrics.items()}
            total = total + term.weight * replace(loss, metrics=named)
        return total

    def _one(
        self, spec: Objective, m: Measurements, settings: Settings, state: State | None
    ) -> Loss:
        """A term's loss of what it sees, with the state that it kept itself."""
        place = f"{spec.name}/"
        own = {n.removeprefix(place): t for n, t in (state or {}).items() if n.startswith(place)}
        loss = spec(self._seen(spec, m), settings, own or None)
        kinds = (self.rows, spec.rows)
        if kinds in COUNTED:
            loss = _counting(loss, (m.columns["label"] != 0) == COUNTED[kinds])
        if loss.state is None:
            return loss
        return replace(loss, state={f"{place}{n}": t for n, t in loss.state.items()})

    def _seen(self, spec: Objective, m: Measurements) -> Measurements:
        """The branches, measurements and columns that `spec` would have by itself."""
        at = self._places(spec, m.mask_UKT.shape[1])
        m = m if len(at) == m.mask_UKT.shape[1] else m.branches(*at)
        if spec.rows != self.rows:
            m = VIEWS[self.rows, spec.rows](m)
        return Measurements(
            m.mask_UKT,
            {n: m.tensors[n] for n in spec.needs if n in m.tensors},
            {n: m.columns[n] for n in spec.columns if n in m.columns},
        )

    def _places(self, spec: Objective, width: int) -> list[int]:
        """Numbers of a row's `width` branches that are the term's.

        In this order: the kind's own, further texts, what a hook adds, another row's answer.
        """
        if self.rows == "group":
            return list(range(width))
        first = WIDTH.get(self.rows, 1)
        texts = {n: first + i for i, n in enumerate(self.texts)}
        last = [width - 1] if "mismatched" in self.needs else []
        made = [*range(first), *(at for n, at in texts.items() if n in spec.texts)]
        if spec is self.host:
            made += range(first + len(texts), width - len(last))
        return made + (last if "mismatched" in spec.needs else [])


def lasting(spec: Objective, own: Settings, total: int) -> tuple[Objective, dict[str, object]]:
    """The objective and its settings, the number of updates filled in where it is asked for."""

    def filled(settings: Settings) -> dict[str, object]:
        return {n: total if n == "total_steps" and v == 0 else v for n, v in settings.items()}

    if isinstance(spec, Mixture):
        spec = replace(
            spec, added=tuple(replace(t, settings=filled(t.settings)) for t in spec.added)
        )
    return spec, filled(own)


def _union(kept: Mapping[str, V | None], more: Mapping[str, V | None]) -> dict[str, V | None]:
    """Columns of both; one becomes required where they differ in what stands for a missing one."""
    made = dict(kept)
    for name, default in more.items():
        made[name] = default if made.get(name, default) == default else None
    return made


def _joined(host: Objective, weight: float, added: tuple[Term, ...]) -> Mixture:
    needs, columns, texts = list(host.needs), dict(host.columns), dict(host.texts)
    for term in added:
        kinds = (host.rows, term.spec.rows)
        made = MADE.get(kinds, ())
        columns = _union(columns, {n: d for n, d in term.spec.columns.items() if n not in made})
        columns = _union(columns, dict.fromkeys(READ.get(host.rows, ()) if kinds in VIEWS else ()))
        texts = _union(texts, term.spec.texts)
        needs += term.spec.needs
    batch = "batch" in {host.unit, *(t.spec.unit for t in added)}
    declared = replace(
        host,
        unit="batch" if batch else host.unit,
        needs=tuple(dict.fromkeys(needs)),
        columns=columns,
        texts=texts,
    )
    return Mixture(**vars(declared), host=host, weight=weight, added=added)


# What can be added to what


def refusal(host: Objective, spec: Objective) -> str:
    """Why `spec` cannot be added to `host`; "" where it can."""
    kinds = (host.rows, spec.rows)
    other = sorted(set(spec.needs) - MEASURED)
    hook = HOOKS.get(host.hook, Hook)
    # Other branches of a group, or loss at other tokens of steps, are not what a term would see.
    anew = hook.units is not Hook.units and host.rows in ("group", "steps")
    if hook.rows is not Hook.rows or anew:
        return f"{host.name} writes its rows anew, and nothing else is trained on these"
    if spec.teachers:
        return "it learns from teachers of its own"
    if spec.hook:
        return f"it changes more than the loss (hook {spec.hook!r})"
    if spec.heads:
        return "it trains output heads of its own"
    if "scores" in spec.needs and "scores" not in host.needs:
        return f"it trains a score head, and {host.name} has none"
    if other:
        return f"what it measures ({', '.join(other)}) is its own"
    if host.rows != spec.rows and kinds not in VIEWS:
        return f"it trains on rows of kind {spec.rows!r}, {host.name} on {host.rows!r}"
    if spec.texts and (host.rows != spec.rows or host.rows == "group"):
        return f"its further texts ({', '.join(spec.texts)}) stand beside other rows"
    if "mismatched" in spec.needs and host.rows != spec.rows:
        return "it needs answers to other prompts, which these rows do not bring"
    if spec.unit == "batch" and kinds in COUNTED:
        return "it compares all rows of a step, and must not see all of these"
    if spec.compares_vocabulary and hook.moves_reference:
        return f"it compares whole distributions, and the reference of {host.name} moves"
    return ""


def joins(host: Objective) -> list[str]:
    """Names of the objectives that can be added to `host`."""
    found: list[str] = []
    for entry in catalogue.methods().values():
        if entry.kind != "objective" or entry.verb != "train" or entry.name == host.name:
            continue
        with contextlib.suppress(InputError):  # a plug-in whose packages are missing
            if not refusal(host, objective_of(methods[entry.id].declared)):
                found.append(entry.name)
    return sorted(found)


@contextlib.contextmanager
def _of(host: Objective, name: str) -> Generator[None]:
    """Errors of one entry of `mix` say so."""
    try:
        yield
    except InputError as error:
        raise InputError(
            f"setting 'mix': {name}: {error.message}",
            where=host.name,
            seen=error.seen,
            fix=error.fix,
        ) from None


def _written(given: object) -> tuple[float, dict[str, object]]:
    """Weight and settings of an entry: a number, or a mapping with both."""
    settings: dict[str, object] = {}
    if isinstance(given, Mapping):
        settings = dict(cast("Mapping[str, object]", given))
        given = settings.pop("weight", 1.0)
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not math.isfinite(given):
        raise InputError("a weight must be a finite number", seen=given, fix=EXAMPLE)
    return float(given), settings


def _term(host: Objective, name: str, given: object) -> Term:
    entry = catalogue.training(name)
    weight, settings = _written(given)
    method = methods[entry.id]
    is_loss = entry.kind == "objective"
    why = refusal(host, objective_of(method.declared)) if is_loss else "it is no loss on given rows"
    if why:
        fix = "Can be added: " + (", ".join(joins(host)) or "none")
        raise InputError(f"cannot be added to {host.name}: {why}", fix=fix)
    spec = objective_of(method.declared)
    for n in settings:
        if n not in spec.settings and n in method.settings:
            raise InputError(f"{n!r} holds for the whole step", fix="Give it beside 'mix'")
        if n not in spec.settings:
            raise unknown("setting", n, [*spec.settings, "weight"])
    own = {n: p.default for n, p in spec.settings.items()}
    own |= {n: method.settings[n].validate(v) for n, v in settings.items()}
    return Term(spec, weight, own)


def mixed(host: Objective, mix: Mapping[str, object] | None) -> Objective:
    """`host` with the objectives of `mix` added; itself where that is None.

    Args:
        host: a method's own objective.
        mix: by the names of others, a weight or {weight: ..., ...settings of its own}; by the
            method's own name its weight.
    Raises:
        InputError: an objective that does not exist or cannot be added, a weight that is not
            finite, no weight but 0, or settings that the objective would refuse.
    """
    if mix is None:
        return host
    weight, terms = 1.0, dict[str, Term]()
    for name, given in mix.items():
        with _of(host, name):
            if name.removeprefix("train/").replace("-", "_") == host.name:
                weight, settings = _written(given)
                if settings:
                    raise InputError("its own settings stand beside 'mix'", seen=settings)
                continue
            term = _term(host, name, given)
            if term.spec.name in terms:
                raise InputError("is given twice")
            terms[term.spec.name] = term
    if not any(term.weight for term in terms.values()):
        raise InputError(
            "setting 'mix' adds nothing: no other objective has a weight but 0",
            where=host.name,
            seen=dict(mix),
            fix=EXAMPLE,
        )
    return _joined(host, weight, tuple(terms.values()))


def check_terms(spec: Objective, check: Callable[[Objective, Settings], None]) -> None:
    """Let `check` look at each added objective and its settings, as at a method's own."""
    for term in spec.added if isinstance(spec, Mixture) else ():
        with _of(spec, term.spec.name):
            check(term.spec, term.settings)
