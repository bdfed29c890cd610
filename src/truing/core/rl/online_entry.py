"""The function that an online method is called by: its inputs and settings, with what they mean.

A method declares a pure function of rollouts (`core.online`). What a user calls takes models and a
table, the function's settings, and those of the engine that mean something to it.
"""

from __future__ import annotations

import inspect
import typing
from dataclasses import fields

from truing.core.held_out import INPUT as HELD
from truing.core.held_out import Watch
from truing.core.objective import Function, Mix
from truing.core.online_training import OnlineTraining
from truing.core.rl.online_mix import INPUT, MIX, ROWS
from truing.core.trainer.objective_entry import finished
from truing.models import Model
from truing.principles import Principles
from truing.signature import argument_docs, class_docs
from truing.tables import Table

if typing.TYPE_CHECKING:
    from truing.core.online import Online

GLOSSARY = {
    "beta": "strength of the pull towards the reference.",
    "aggregate": "how tokens are averaged: grpo, the mean over answers of their means; bnpo, the"
    " mean over all tokens of the update; luspo, the mean over answers of their sums.",
    "clip_ratio": "how far from 1 the ratio of new to old probability counts.",
    "clip_low": "how far below 1 the ratio of new to old probability counts.",
    "clip_high": "how far above 1 the ratio of new to old probability counts.",
    "entropy_share": "share of the rollout's tokens, those drawn with the highest entropy, that are"
    " trained on; 1 for all. TRL calls it `top_entropy_quantile`. The others keep the pull"
    " towards the reference.",
}

# What `Watch` says of losses, of rewards; and what the rows are.
WATCHED = {
    "eval_every": "updates between two measurements of the held-out reward; 0 makes five in a run."
    " It is also measured before the first update and after the last.",
    "keep_best": "make the result the model after the update with the highest held-out reward, not"
    " that after the last.",
    "patience": "end the training after so many measurements in a row without a held-out reward"
    " higher than all before; 0 does not.",
    HELD: "prompts, or tasks of the environment, that are not trained on: the model's answers to"
    " them are rewarded meanwhile.",
}


def entry_of(spec: Online) -> Function:
    """The function that trains: inputs, its settings, the engine's with its defaults."""

    def train(
        model: Model,
        data: Table,
        reference: Model | None = None,
        reward_model: Model | None = None,
        principles: Principles | None = None,
        critic: Model | None = None,
        partner: Model | None = None,
        mix_data: Table | None = None,
        held_out: Table | None = None,
        **settings: object,
    ) -> Model:
        from truing.core.rl.train_online import Given, train_online

        given = Given(reference, reward_model, principles, critic, partner, mix_data, held_out)
        return train_online(spec, model, data, given, settings)

    kind = inspect.Parameter.KEYWORD_ONLY
    hints = typing.get_type_hints(spec.update, include_extras=True)
    shared = typing.get_type_hints(OnlineTraining) | typing.get_type_hints(Watch)
    names = [*spec.engine, *(f.name for f in fields(Watch))]
    own = {n: p.replace(annotation=hints.get(n, str)) for n, p in spec.settings.items()}
    engine = {
        f.name: inspect.Parameter(f.name, kind, default=f.default, annotation=shared[f.name])
        for f in (*fields(OnlineTraining), *fields(Watch))
        if f.name in names and f.name not in own  # a method's default goes before
    }
    engine["mix"] = inspect.Parameter("mix", kind, default=None, annotation=Mix | None)
    unused = {"reward_model", "principles", "partner"} if spec.pools else set[str]()
    if "ref_logp" not in spec.needs and not spec.opposed:
        unused.add("reference")
    if not spec.values:
        unused.add("critic")
    nouns = list(inspect.signature(train, eval_str=True).parameters.values())[:-1]
    nouns = [n for n in nouns if n.name not in unused]
    docs = class_docs(OnlineTraining)
    docs = {n: d for n, d in docs.items() if n in engine or n in own}
    docs |= {n: d for n, d in GLOSSARY.items() if n in own}
    docs |= argument_docs(inspect.getdoc(spec.update) or "") | {"mix": MIX, INPUT: ROWS, **WATCHED}
    return finished(train, spec.update, spec.name, [*nouns, *own.values(), *engine.values()], docs)
