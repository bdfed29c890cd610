"""`@online`: finished answers become per-token weights; the rest of reinforcement learning is here.

An online method never sees models, text or sampling. It is one pure function from a rollout (groups
of answers to a prompt, with their rewards) to an `Update`: tensors that stay fixed while a rollout
is learnt from, such as advantages, and a loss put together from the components of this module. The
engine samples, rewards, measures, skips groups that cannot teach anything, and resumes.

A rollout is a `Measurements` of U groups with K answers of T tokens:

    r["logp"]       log-probability of each token under the policy that drew it, [U, K, T]
    r["ref_logp"]   the same under the frozen reference, where it is needed
    r["values"]     the critic's, where there is one
    r["reward"]     of each answer, [U, K]; r["reward/NAME"] are its terms before weighing
    r["finished"]   1.0 where an answer ended by itself, [U, K]
    r["own"]        1.0 where the policy drew it; 0.0 for an opponent's or a given answer
    r["token_reward"]  where rewards fall inside of answers: what an environment gave for each of
                    several turns, at the turn's last token, and what a reward gave at positions of
                    the text (`core.placed`), [U, K, T]; part of the reward. T counts the policy's
                    tokens alone, one turn after the other.
    r["old_entropy"]  in nats, of the distribution that each token was drawn from, where it is
                    needed, [U, K, T]
    r["greedy"]     of the policy's greedy answer, where that is the opponent: none of the K; [U]

All of these are of the logits over the `temperature` that answers are drawn at (see `tempered`).
The loss gets, besides the update's tensors, `logp` with gradients, `old_logp` and the same
columns. The ratio of the two is exactly 1, with the gradient of logp, as long as a rollout is used
for one update only.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace

from torch import Tensor

from truing.components import told
from truing.core.bounds import Bounds
from truing.core.objective import WITHIN, Function, Loss, Measurements, State
from truing.core.online_training import CRITICS, OnlineTraining
from truing.core.rl.advantages import OLD_ENTROPY, Estimator, at_end, kl_tokens
from truing.core.rl.online_entry import entry_of
from truing.core.trainer import user_loss
from truing.core.trainer.objective_entry import registered
from truing.core.trainer.preflight import check_online
from truing.errors import InputError

F = typing.TypeVar("F", bound=Function)
Level = typing.Literal["token", "sequence"]
Aggregation = typing.Literal["grpo", "bnpo", "luspo"]
TOP_KL = "ref_top_kl"
GREEDY = "greedy"  # the opponent of whose answer the reward alone is kept
OPPONENTS = ("", "reference", "mixture", GREEDY)
# Settings of how answers are asked for and rewarded; a pool has its own.
REWARDED = ("rewards", "weights", "missing_end", "environment", "turns")


@dataclass(frozen=True)
class Update:
    """What a rollout teaches.

    Args:
        tensors: fixed while the rollout is learnt from, by name: [U, K, T], [U, K] or [U].
        loss: maps measurements, with these tensors among them, to a `Loss`; it may close over
            settings, never over the rollout, since it is called on some of the groups at a time.
        active_U: groups whose gradient is not 0 whatever the model says; None when all may have
            one. Others are not computed, yet count in every denominator, so that leaving them out
            changes nothing.
        metrics: values of this rollout to be averaged and recorded.
        state: what the next rollout's call is given.
        head_only: learn with the value head alone, the model held fixed.
    """

    tensors: Mapping[str, Tensor]
    loss: Callable[[Measurements], Loss]
    active_U: Tensor | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    state: State | None = None
    head_only: bool = False


def weighed(
    advantage: Tensor, loss: Callable[[Measurements], Loss], *, beta: float = 0.0, **facts: Tensor
) -> Update:
    """An update by advantages, [U, K] or [U, K, T]; groups where all are 0 are not computed.

    With `beta`, the strength of a term that is there without any advantage, none is left out.
    """
    active_U = advantage.flatten(1).abs().amax(1) > 0 if not beta else None
    return Update({"advantage": advantage}, loss, active_U, facts)


# The loss components: tensors of one value a token, and how they are averaged


def placed(r: Measurements, score_UK: Tensor) -> Tensor:
    """Scores at the tokens where they fall, [U, K, T]: sums over T are `score_UK`.

    What an environment gave for a turn falls on the turn's last token, what a reward gave at a
    position on the token there, all else on the answer's last.
    """
    if "token_reward" not in r:
        return at_end(score_UK, r.mask_UKT)
    inside_UKT = r["token_reward"] * r.mask_UKT
    return inside_UKT + at_end(score_UK - inside_UKT.sum(-1), r.mask_UKT)


def log_ratio(m: Measurements, level: Level = "token") -> Tensor:
    """log pi_new / pi_old of each token, [U, K, T].

    "sequence" gives each token the mean over its answer, whose gradient reaches all its tokens
    (GSPO, arXiv 2507.18071).
    """
    made_UKT = (m["logp"] - m["old_logp"]) * m.mask_UKT
    if level == "token":
        return made_UKT
    mean_UK = made_UKT.sum(-1) / m.length_UK.clamp(min=1)
    return mean_UK[..., None] * m.mask_UKT


def advantages(m: Measurements) -> Tensor:
    """Advantages of each token, [U, K, T]; an answer's is every token's."""
    found = m["advantage"]
    return found[..., None] * m.mask_UKT if found.dim() == 2 else found * m.mask_UKT


def clipped(
    m: Measurements,
    low: float = 0.2,
    high: float = 0.2,
    *,
    level: Level = "token",
    bound: float = 0.0,
) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A) of each token, [U, K, T].

    PPO's surrogate, arXiv 1707.06347. With `bound` the ratio is held below it in the first term
    too, so that negative advantages cannot grow without limit (two-sided clipping).
    """
    advantage_UKT = advantages(m)
    ratio_UKT = log_ratio(m, level).exp()
    held_UKT = ratio_UKT.clamp(1 - low, 1 + high)
    free_UKT = ratio_UKT.clamp(max=bound) if bound else ratio_UKT
    return -(free_UKT * advantage_UKT).minimum(held_UKT * advantage_UKT)


def on_policy(m: Measurements, most: float) -> tuple[Tensor, dict[str, Tensor]]:
    """1.0 for answers that are not masked as off-policy, [U, K, 1], and what to record of them.

    Masked are those of negative advantage that lost more than `most` nats a token since they were
    drawn: they are not pushed down further. 0 masks none.
    """
    if not most:
        return m.there_UK[..., None], {}
    gap_UK = -log_ratio(m).detach().sum(-1) / m.length_UK.clamp(min=1)
    masked_UK = (gap_UK > most) & (advantages(m).sum(-1) < 0)
    return (~masked_UK).float()[..., None], {"masked": masked_UK.float()}


def clip_fraction(m: Measurements, low: float, high: float, level: Level = "token") -> Tensor:
    """Share of each answer's tokens whose gradient `low` and `high` stop, [U, K]."""
    ratio_UKT, a_UKT = log_ratio(m, level).exp(), advantages(m)
    out_UKT = ((ratio_UKT > 1 + high) & (a_UKT > 0)) | ((ratio_UKT < 1 - low) & (a_UKT < 0))
    return (out_UKT * m.mask_UKT).sum(-1).detach() / m.length_UK.clamp(min=1)


def kl_loss(m: Measurements, kind: Estimator = "k3") -> Tensor:
    """KL to the reference at each token, [U, K, T], differentiated; the ratio of "k3_ratio" too."""
    made_UKT = kl_tokens(m["logp"], m["ref_logp"], kind) * m.mask_UKT
    return made_UKT * log_ratio(m).exp() if kind == "k3_ratio" else made_UKT


def value_loss(m: Measurements, clip: float = 0.2) -> Tensor:
    """max((V - ret)^2, (clip(V, V_old - clip, V_old + clip) - ret)^2) / 2 of each token, [U, K, T].

    With `clip` 0 the plain half squared error.
    """
    value_UKT, return_UKT = m["values"], m["returns"]
    plain_UKT = (value_UKT - return_UKT) ** 2
    if not clip:
        return 0.5 * plain_UKT * m.mask_UKT
    old_UKT = m["old_values"]
    near_UKT = old_UKT + (value_UKT - old_UKT).clamp(-clip, clip)
    return 0.5 * plain_UKT.maximum((near_UKT - return_UKT) ** 2) * m.mask_UKT


def by_answer(value_UKT: Tensor, m: Measurements, weight_UK: Tensor | None = None) -> Loss:
    """Mean over answers of the mean over their tokens (GRPO's aggregation)."""
    per_UK = (value_UKT * m.mask_UKT).sum(-1) / m.length_UK.clamp(min=1)
    return Loss(per_UK, m.there_UK if weight_UK is None else weight_UK * m.there_UK)


def by_token(value_UKT: Tensor, m: Measurements, weight_UK: Tensor | None = None) -> Loss:
    """Mean over all tokens of the step (DAPO's aggregation)."""
    weight_UKT = m.mask_UKT if weight_UK is None else m.mask_UKT * weight_UK[..., None]
    return Loss(value_UKT * m.mask_UKT, weight_UKT)


def by_length(
    value_UKT: Tensor, m: Measurements, longest: float, weight_UK: Tensor | None = None
) -> Loss:
    """Sum over tokens divided by a constant, mean over answers (Dr. GRPO's aggregation)."""
    made_UK = (value_UKT * m.mask_UKT).sum(-1) / longest
    return Loss(made_UK, m.there_UK if weight_UK is None else weight_UK * m.there_UK)


def aggregated(
    value_UKT: Tensor, m: Measurements, kind: Aggregation, weight_UK: Tensor | None = None
) -> Loss:
    """By its name in TRL: "grpo", "bnpo" (`by_token`) or "luspo" (sums of answers)."""
    if kind == "luspo":
        return by_length(value_UKT, m, 1.0, weight_UK)
    return (by_token if kind == "bnpo" else by_answer)(value_UKT, m, weight_UK)


def watched(loss: Loss, **metrics: Tensor) -> Loss:
    """The loss with further values to record."""
    return replace(loss, metrics={**loss.metrics, **metrics})


# Declaration


@dataclass(frozen=True)
class Online:
    """What an online method declares.

    Args:
        name: of the method.
        update: the pure function.
        rows: kind of the table.
        needs: "ref_logp", "values" (a critic, see `core.rl.critic`), "entropy" (of whole
            distributions, with gradients), "old_entropy" (the same before the first update, where a
            setting `entropy_share` is not 1), "ref_top_kl" (the divergence from the reference over
            its `top_k` likeliest tokens, before the first update; with gradients where a setting
            `ptx` is not 0).
        least: answers of a group that it cannot do without.
        opponent: who draws a further answer for each of the policy's: "reference", or the
            "mixture" of policy and reference whose logits the setting `mixture_coef` weighs.
            "greedy" is the policy's answer of likeliest tokens, one a group, whose reward is all
            that is kept of it. "" nobody.
        given: text column that joins each group as an answer which nobody drew; where the method
            has a setting `ptx`, only if that is not 0.
        pools: how rows of several sorts are asked and rewarded; name of a component of kind "pool".
            No other reward can be given then.
        follows: reward component of a reward model that is told the principles, made of the two
            inputs of these names and of the method's settings; "" where they reward by themselves.
        tempered: log-probabilities, the reference's too, are of the distribution that answers are
            drawn from: logits divided by `temperature`. False is for losses of pairs, which may
            come from anywhere and speak of the model at temperature 1.
        bounds: least and largest value of settings of its own, None where none is largest.
    """

    name: str
    update: Function
    rows: str = "prompt"
    needs: tuple[str, ...] = ()
    least: int = 1
    opponent: str = ""
    given: str = ""
    pools: str = ""
    follows: str = ""
    tempered: bool = True
    bounds: Bounds = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, inspect.Parameter]:
        """Keyword-only parameters of the function."""
        found = inspect.signature(self.update).parameters.items()
        return {n: p for n, p in found if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def within(self) -> Bounds:
        """Least and largest value of settings that are numbers; None where none is largest."""
        return {n: WITHIN[n] for n in self.settings if n in WITHIN} | dict(self.bounds)

    @property
    def engine(self) -> list[str]:
        """Settings of the engine that mean something here."""
        unused = {*(REWARDED if self.pools else ()), *(() if self.values else CRITICS)}
        return [f.name for f in fields(OnlineTraining) if f.name not in unused]

    @property
    def values(self) -> bool:
        """True when there is a critic."""
        return "values" in self.needs

    @property
    def keeps_state(self) -> bool:
        """True when the function takes the state of the rollout before."""
        return "state" in inspect.signature(self.update).parameters

    @property
    def opposed(self) -> bool:
        """True when an opponent's answers, for which a reference is needed, stand in the groups."""
        return self.opponent not in ("", GREEDY)

    @property
    def refills(self) -> bool:
        """True when equal rewards teach nothing, so that other groups may take the place."""
        compared = self.least > 1 or self.opponent == GREEDY
        return compared and not (self.given or self.opposed)

    def compares(self, values: Mapping[str, object]) -> bool:
        """True when the reference must be measured: not where its strength `beta` is 0."""
        # Losses of pairs and those with an opponent read what it says at any strength.
        held = values.get("beta", 1.0) != 0 or self.opposed or not self.tempered
        return "ref_logp" in self.needs and (held or self.anchored(values))

    def anchored(self, values: Mapping[str, object]) -> bool:
        """True when the divergence over the reference's likeliest tokens is differentiated."""
        return TOP_KL in self.needs and values.get("ptx", 0.0) != 0

    def sifts(self, values: Mapping[str, object]) -> bool:
        """True when answers are trained on by the entropy that their tokens were drawn with."""
        return OLD_ENTROPY in self.needs and values.get("entropy_share", 1.0) != 1

    def joins(self, values: Mapping[str, object]) -> str:
        """Column of the answer that joins each group, or ""."""
        return self.given if values.get("ptx", 1.0) != 0 else ""

    def __call__(
        self, r: Measurements, values: Mapping[str, object], state: State | None = None
    ) -> Update:
        """The update under settings; those that it does not take are left out."""
        with told(self.update, "its function", self.name):
            found = self.plain(r, values, state)
        return replace(found, loss=functools.partial(self._told, found.loss))

    def plain(
        self, r: Measurements, values: Mapping[str, object], state: State | None = None
    ) -> Update:
        """The same, with what its functions raise as it is."""
        own = {n: v for n, v in values.items() if n in self.settings}
        found = self.update(r, state, **own) if self.keeps_state else self.update(r, **own)
        return user_loss.returned(found, Update, self.name, user_loss.UPDATE)

    def _told(self, loss: Callable[[Measurements], Loss], m: Measurements) -> Loss:
        with told(loss, "the loss of its update", self.name):
            return user_loss.returned(loss(m), Loss, self.name, user_loss.RETURN)


def online(
    *,
    paper: str = "",
    rows: str = "prompt",
    needs: tuple[str, ...] = (),
    least: int = 1,
    opponent: str = "",
    given: str = "",
    pools: str = "",
    follows: str = "",
    tempered: bool = True,
    within: Bounds | None = None,
    field: str = "text",
    name: str = "",
    group: str = "",
) -> Callable[[F], F]:
    """Register a pure function `(rollout, *, settings) -> Update` as the method `train/<name>`.

    A setting of the engine (`OnlineTraining`) that the function takes too has the function's
    default. Args (all literals, since the catalogue is read without importing): see `Online`;
    paper, field, name and group as for `truing.method.method`.
    """
    if opponent not in OPPONENTS:
        raise InputError("unknown opponent", seen=opponent, fix=f"Known: {OPPONENTS[1:]}")

    def decorate(function: F) -> F:
        spec = Online(
            name or function.__name__,
            function,
            rows,
            needs,
            least,
            opponent,
            given,
            pools,
            follows,
            tempered,
            within or {},
        )
        user_loss.check_declared(spec.name, function, rows)
        checked = functools.partial(check_online, spec)
        called = {"paper": paper, "field": field, "name": name, "group": group}
        more = {"rows": rows, "follows": follows, "pools": pools}
        return registered(function, "online", spec, entry_of(spec), checked, called, more)

    return decorate


def online_of(function: object) -> Online:
    """The declaration of a decorated function."""
    found = getattr(function, "__online__", None)
    if not isinstance(found, Online):
        raise InputError("is not an online method", seen=function)
    return found
