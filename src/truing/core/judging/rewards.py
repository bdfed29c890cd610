"""What decoding methods steer by: registered functions, principles, a reward model; named, weighed.

    h(x, y) = sum_j w_j r_j(x, y)

A term r_j is a reward or check that is referred to as `{use: name, ...settings}`; "principles" is
the priority-weighted mean satisfaction of their checks, in [0, 1]; "reward_model" is what a model
says. A model with a score head gives that; a language model its implicit reward, the log-ratio to
its base without any changes (Direct Preference Optimization, arXiv 2305.18290, without its factor
beta):

    r(x, y) = log pi(y | x) - log pi_base(y | x)

Of one that was tuned twice, as by sft and then dpo, that holds both; what the second has learnt is
the reward {use: implicit_reward, model: ..., reference: ...}, whose reference is the first.
Weights are 1 unless given. Terms come on their own scales: a reward model's is not [0, 1]. A reward
may name several values, `term/value`, each with a weight of its own or the term's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import cast

from truing.changes import Decoder
from truing.core.judging.scores import check_named, check_reward, named_scores, weight_of
from truing.core.passes.cross_encoder import label_scores
from truing.core.passes.scoring import (
    answer_logps,
    check_answers,
    check_logits,
    check_reviews,
    has_head,
    head_scores,
    sigmoid,
)
from truing.errors import InputError, unknown
from truing.method import check_component, resolve
from truing.models import Model, held_by, hold
from truing.models import held as at_hand
from truing.principles import Principles
from truing.references import referred
from truing.remedies import SERVED_REWARD
from truing.specify.satisfaction import measured, satisfaction
from truing.tables import Row

PRINCIPLES, MODEL = "principles", "reward_model"
Refs = Mapping[str, dict[str, object]]


def _classifies(reward: Model) -> bool:
    """True for an architecture whose only output is a label."""
    return not reward.is_served and "generate" not in reward.can


def check_reward_model(reward: Model, where: str) -> None:
    """Raise InputError for a model that cannot reward."""
    if reward.is_served:
        raise InputError(
            "a served model shows no probabilities to reward by",
            where=f"{where} input {MODEL!r}",
            fix=SERVED_REWARD,
        )
    if not (_classifies(reward) or has_head(reward) or reward.weight_changes):
        raise InputError(
            "a language model rewards by what was changed in it, and nothing was",
            where=f"{where} input {MODEL!r}",
            seen=reward.name,
            fix="Give one with an adapter or merged weights, or one with a scalar head",
        )
    check_answers(reward, f"{where} input {MODEL!r}")


def held_model(key: str, where: str) -> Model:
    """The model that a reward's setting names; an InputError where it is none."""
    found = at_hand(key)
    if not isinstance(found, Model):
        raise InputError(
            "is not a model",
            where=where,
            seen=key,
            fix="Give the name of a model, or in Python the key that truing.models.hold returns",
        )
    return found


def score_model(reward: Model, rows: Sequence[Row], sort: str = "answers") -> list[float]:
    """What a reward model says of answers: one finite number a row.

    Args:
        reward: a model with a score head, a classifier of one label, or a tuned language model,
            which rewards by its log-ratio to its base without any changes; see the module's
            docstring for one that was tuned twice.
        rows: with "prompt", "completion" and optionally "finished".
        sort: what their answers are: "answers", or "reviews" of some.
    Raises:
        InputError: the model cannot reward such, or a score is not a finite number.
    """
    if sort == "reviews":
        check_reviews(reward, reward.name)  # of a language model, too
    if has_head(reward):
        scores = head_scores(reward, rows, sort)
    elif _classifies(reward):
        scores = label_scores(reward.load_module(), rows)
    else:
        scores = implicit_rewards(reward, reward.with_changes(()), rows)
    for i, (value, row) in enumerate(zip(scores, rows, strict=True), 1):
        if not math.isfinite(value):
            raise InputError(
                "the reward model's score is not a finite number",
                where=f"{reward.name} row {i}",
                seen=row["completion"],
            )
    return scores


def probabilities(reward: Model, rows: Sequence[Row], where: str) -> list[float]:
    """The sigmoid of each row's score; see `score_model`.

    Raises:
        InputError: as there; or a head of values, whose scores are no logits.
    """
    check_logits(reward, where)
    return [sigmoid(s) for s in score_model(reward, rows)]


def implicit_rewards(tuned: Model, base: Model, rows: Sequence[Row]) -> list[float]:
    """log pi(y | x) - log pi_base(y | x) of each row."""
    a, b = (answer_logps(m.load_module(), rows) for m in (tuned, base))
    return [x - y for x, y in zip(a, b, strict=True)]


@dataclass(frozen=True)
class Rewards:
    """The terms of h and their weights.

    Args:
        refs: rewards and checks by the name of their term.
        weights: by the name of the term; 1 where none is given.
        principles: those whose checks make the term "principles".
        reward_model: the model that makes the term "reward_model".
        where: what errors name.
    """

    refs: Refs
    weights: Mapping[str, float]
    principles: Principles | None = None
    reward_model: Model | None = None
    where: str = ""

    @property
    def names(self) -> list[str]:
        """Names of the terms."""
        held = [(PRINCIPLES, self.principles), (MODEL, self.reward_model)]
        return [*self.refs, *(n for n, artefact in held if artefact is not None)]

    def check(self) -> None:
        """Raise InputError for anything that would go wrong later."""
        for name, ref in self.refs.items():
            if name in (PRINCIPLES, MODEL):
                raise InputError(
                    "the name of this term is taken",
                    where=self.where,
                    seen=name,
                    fix="Give that reward another name",
                )
            check_reward(ref, where=f"{self.where} reward {name!r}")
        if self.principles is not None:
            rules = measured(self.principles, where=self.where)
            for rule in rules:
                check_component("check", rule.check or {}, where=f"{self.where} {rule.id}")
        if self.reward_model is not None:
            check_reward_model(self.reward_model, self.where)
        for name, weight in self.weights.items():
            if name not in self.names and name.partition("/")[0] not in self.names:
                raise unknown("term", name, self.names, where=f"{self.where} setting 'weights'")
            if not math.isfinite(weight):
                raise InputError(
                    "a weight must be finite", where=f"{self.where} weight {name!r}", seen=weight
                )

    def terms(self, rows: Sequence[Row], *, whole: bool = True) -> dict[str, list[float]]:
        """Every term's score of every row; of one that names several values, each: `term/value`.

        Args:
            rows: dicts with "prompt", "completion" and "finished".
            whole: False for the beginnings of answers, which cannot be off topic yet.
        """
        items = list(rows)
        made: dict[str, list[float]] = {}
        for name, ref in self.refs.items():
            made |= named_scores(name, ref, items, where=f"{self.where} reward {name!r}")
        if self.principles is not None:
            near = None if whole else [1.0] * len(items)
            kept = satisfaction(self.principles, items, relevance=near, where=self.where)
            made[PRINCIPLES] = [k.value(self.principles) for k in kept]
        if self.reward_model is not None:
            made[MODEL] = score_model(self.reward_model, items)
        if items:
            check_named(self.weights, made, self.where)
        return made

    def __call__(self, rows: Sequence[Row], *, whole: bool = True) -> list[float]:
        """h of every row; zeros where there is no term."""
        if not rows:
            return []
        found = self.terms(rows, whole=whole)
        parts = [[weight_of(n, self.weights) * v for v in values] for n, values in found.items()]
        return [math.fsum(p[i] for p in parts) for i in range(len(rows))]


def telling(
    use: str,
    told: Mapping[str, object],
    reward_model: Model | None,
    principles: Principles | None,
    where: str,
) -> dict[str, dict[str, object]]:
    """The one term of a reward model that is told principles, as a reference to a component.

    Args:
        use: the component, with settings `model` and `principles` and any of `told`.
    Returns:
        {} where there is no reward model.
    """
    if reward_model is None:
        return {}
    if principles is None:
        raise InputError(
            "the reward model follows principles, and none are given",
            where=f"{where} input {PRINCIPLES!r}",
            fix="Give principles, the ones to reward by",
        )
    check_reviews(reward_model, f"{where} input {MODEL!r}")
    keys = {"model": hold(reward_model), "principles": hold(principles)}
    function, _ = resolve("reward", {"use": use, **keys}, where=where)
    takes = {n: v for n, v in told.items() if n in signature(function).parameters}
    return {use: {"use": use, **keys, **takes}}


def rewards_of(
    held: Mapping[str, object], refs: Refs | None, weights: Mapping[str, float] | None, where: str
) -> Rewards:
    """The rewards of a decoder from its settings and from what its change holds."""
    return Rewards(
        refs or {},
        weights or {},
        cast("Principles | None", held.get(PRINCIPLES)),
        cast("Model | None", held.get(MODEL)),
        where,
    )


def rewarded(
    model: Model,
    use: str,
    settings: Mapping[str, object],
    *,
    rewards: Refs | None,
    weights: Mapping[str, float] | None,
    principles: Principles | None,
    reward_model: Model | None,
) -> Model:
    """`model` with a decoder that steers by these rewards; all of them are checked.

    Returns a model that holds principles and reward model by key, and carries the licences of that
    and of models that rewards name, such as a judge.
    """
    held = {PRINCIPLES: principles, MODEL: reward_model}
    rewards = cast("Refs", referred(rewards or {}))
    rewards_of(held, rewards, weights, f"decode/{use}").check()
    holds = {n: hold(a) for n, a in held.items() if a is not None}
    chosen = dict(settings) | {"rewards": dict(rewards), "weights": dict(weights or {})}
    change = Decoder(use, chosen, holds)
    made = model.adding(change).with_licences(licences_at(held_by(change)))
    return made.called(f"{model.name}+{use}")


def licences_at(keys: Iterable[str]) -> list[str]:
    """Licences of the models among held artefacts, such as a judge that rewards name."""
    artefacts = [at_hand(key) for key in keys]
    return [a.licence for a in artefacts if isinstance(a, Model)]
