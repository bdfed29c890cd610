"""Training language models on their own answers: who draws, who rewards, and what comes out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from truing.context import current
from truing.core import distributed, recompute
from truing.core import lora as adapters
from truing.core.agents import Speaker
from truing.core.alongside import Alongside
from truing.core.collect import Asked, Collector, Draw, Pool
from truing.core.critic import Critic
from truing.core.drawing import Completion, continued
from truing.core.engine import train
from truing.core.episodes import World
from truing.core.frozen_trunk import attach
from truing.core.loaded import Loaded
from truing.core.memory import Beside
from truing.core.online import GREEDY, Online
from truing.core.online_prompts import prompts_of, tasks_of
from truing.core.online_reward import Reward
from truing.core.online_task import OnlineTask
from truing.core.online_training import OnlineTraining
from truing.core.opening import same_tokens
from truing.core.past import Past
from truing.core.pools import check_pool, pool_of
from truing.core.preflight import check_played, online_training
from truing.core.ptx import check_text, text_beside
from truing.core.rewards import Rewards, licences_at, telling
from truing.core.rollout import Make, maker
from truing.core.sampling import SamplingSettings
from truing.core.sight import refuse
from truing.core.start import Start, begin
from truing.core.together import joint
from truing.core.train_text import trained_model
from truing.datasets import licence_of
from truing.errors import InputError, unknown
from truing.models import Model, named
from truing.principles import Principles
from truing.tables import Table, content_hash

if TYPE_CHECKING:
    from pathlib import Path


def _split(spec: Online, values: Mapping[str, object]) -> tuple[dict[str, object], OnlineTraining]:
    """All settings by name, and the engine's; a method's default goes before the engine's."""
    shared = set(spec.engine)
    own = {n: p.default for n, p in spec.settings.items()}
    for name in values:
        if name not in shared and name not in own:
            raise unknown("setting", name, [*own, *shared], where=spec.name)
    chosen = own | dict(values)
    training = online_training(spec, chosen)
    # What the method is told includes the engine's settings that it asks for.
    told = {n: getattr(training, n) if n in shared else chosen[n] for n in own}
    if training.environment is not None and "new_tokens" in told:
        told["new_tokens"] = training.new_tokens * training.turns  # its longest answer
    return told, training


class Players:
    """Who draws answers: the policy as it is now, the frozen reference, their mixture."""

    def __init__(self, policy: Loaded, lora: adapters.Lora | None, other: Loaded | None) -> None:
        self.own, self.lora, self.other = policy, lora, other

    def policy(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingSettings,
        first: Sequence[int],
        past: Past | None = None,
    ) -> list[list[Completion]]:
        """The policy's answers."""
        return continued(self.own, prompts, sampling, first=first, past=past)

    def reference(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingSettings,
        first: Sequence[int],
        past: Past | None = None,
    ) -> list[list[Completion]]:
        """The reference's answers."""
        if self.other is not None:
            return continued(self.other, prompts, sampling, first=first, past=past)
        with cast(adapters.Lora, self.lora).off():
            return continued(self.own, prompts, sampling, first=first, past=past)

    def mixture(self, mix: float) -> Draw:
        """Answers of the geometric mixture that gives the reference the share `mix`."""
        off = self.lora.off if self.other is None and self.lora else contextlib.nullcontext
        module = self.other.module if self.other is not None else self.own.module

        def draw(
            prompts: Sequence[Sequence[int]],
            sampling: SamplingSettings,
            first: Sequence[int],
            past: Past | None = None,
        ) -> list[list[Completion]]:
            hook = Alongside(module, off, mix, sampling.max_tokens)
            return continued(self.own, prompts, sampling, first=first, logits=hook, past=past)

        return draw


def _draws(spec: Online, players: Players, told: Mapping[str, object]) -> list[Draw]:
    if spec.opponent == "mixture":
        mix = cast(float, told["mix"])
        if not 0 <= mix <= 1:
            raise InputError("setting 'mix' is a share", where=spec.name, seen=mix)
        return [players.policy, players.mixture(mix)]
    if spec.opponent == GREEDY:
        return [players.policy, players.policy]
    return [players.policy, *([players.reference] if spec.opponent else [])]


def _critic(
    spec: Online, settings: OnlineTraining, loaded: Loaded, given: Model | None, dtype: str
) -> Critic | None:
    """The critic, where the method has one: on the policy's trunk, or a model of its own."""
    if "values" not in spec.needs:
        return None
    if given is None:
        return Critic.of(loaded)
    same_tokens({"model": loaded.model, "critic": given}, where=spec.name)
    refuse(given, loaded.model, "critic", spec.name)
    own = given.load_module(dtype, loaded.device, fresh=True)
    if recompute.is_on(loaded.module):
        recompute.switch_on(own.module)
    lora = attach(own.module, settings, current().stream("critic") % 2**31)
    return Critic.of(own, own=True, lora=lora)


def _reward(
    spec: Online,
    told: Mapping[str, object],
    settings: OnlineTraining,
    principles: Principles | None,
    reward_model: Model | None,
) -> Reward:
    """What answers are rewarded by, checked."""
    terms, judges = settings.rewards or {}, (principles, reward_model)
    if spec.follows:
        terms = terms | telling(spec.follows, told, reward_model, principles, spec.name)
        # Told to the reward model, the principles are no reward of their own.
        judges = (None if reward_model is not None else principles, None)
    rewards = Rewards(terms, settings.weights or {}, *judges, spec.name)
    made = Reward(rewards, settings.missing_end, played=settings.environment is not None)
    made.check()
    return made


def _make(settings: OnlineTraining) -> Make | None:
    """What makes environments, checked; None where answers are of one turn."""
    if settings.environment is None:
        return None
    return maker(settings.environment)


def _world(
    spec: Online, settings: OnlineTraining, start: Start, make: Make | None, partner: Model | None
) -> World | None:
    """Where episodes take place, with who acts in its other roles."""
    if make is None:
        return None
    seed = current().stream("partner") % 2**31
    agent = Speaker(partner, settings.sampling(seed)) if partner is not None else None
    return World(make, agent, settings.turns, start.limit, spec.name)


def _joined(
    spec: Online,
    told: Mapping[str, object],
    settings: OnlineTraining,
    data: Table,
    ptx_data: Table | None,
    pool: Pool | None,
) -> str:
    """Column of an answer that joins each group, or ""; rows of a pool and of text are checked."""
    if pool is not None:
        check_pool(pool, data, spec.name)
    if ptx_data is not None:
        check_text(ptx_data, told, spec.name)
        return ""
    given = spec.joins(told)
    check_played(spec, settings, given)
    return given


def _warn(spec: Online, told: Mapping[str, object], rollouts: int) -> None:
    """Say where the policy may not learn at all."""
    if spec.values and cast(int, told.get("critic_rollouts", 0)) >= rollouts:
        print(
            f"{spec.name}: warning: all {rollouts} rollouts may go to the critic alone; raise "
            "epochs or steps, or lower critic_rollouts",
            file=sys.stderr,
        )


def _needs_other(
    spec: Online, told: Mapping[str, object], settings: OnlineTraining, start: Start
) -> bool:
    needed = spec.compares(told) or settings.watch or spec.opposed
    return bool(needed) and (start.reference is not None or not settings.rank)


def _other(
    spec: Online, told: Mapping[str, object], settings: OnlineTraining, start: Start
) -> Loaded | None:
    """The frozen reference, where one is needed that is not the model with its adapter off."""
    if not _needs_other(spec, told, settings, start):
        return None
    found = start.frozen()
    return replace(found, model=found.model.with_changes(found.model.weight_changes))


def _task(
    spec: Online,
    told: Mapping[str, object],
    settings: OnlineTraining,
    start: Start,
    prompts: Sequence[Asked],
    by: Reward | Pool,
    critic: Model | None,
    folder: Path,
    world: World | None,
) -> OnlineTask:
    """The task with its players, its critic and whoever collects its rollouts."""
    loaded, context = start.loaded, current()
    other = _other(spec, told, settings, start)
    lora = attach(loaded.module, settings, context.stream("adapter") % 2**31)
    policy = replace(loaded, model=start.model.with_changes(start.model.weight_changes))
    draws = _draws(spec, Players(policy, lora, other), told)
    reward, pool = (by, None) if isinstance(by, Reward) else (None, by)
    collector = Collector(
        prompts, draws, reward, pool, loaded.tokenizer, folder, context, world, start.limit,
        greedy=spec.opponent == GREEDY,
    )  # fmt: skip
    return OnlineTask(
        spec, told, settings, collector, loaded.module, lora=lora,
        other=other.module if other is not None else None,
        critic=_critic(spec, settings, loaded, critic, start.dtype),
        compare=spec.compares(told) or settings.watch, budget=start.budget,
    )  # fmt: skip


@joint
def train_online(
    spec: Online,
    model: Model,
    data: Table,
    reference: Model | None,
    reward_model: Model | None,
    principles: Principles | None,
    critic: Model | None,
    partner: Model | None,
    values: Mapping[str, object],
    ptx_data: Table | None = None,
) -> Model:
    """Train `model` on its own answers to the prompts of `data`.

    Args:
        spec: the method.
        model: weight changes are folded in; run-time changes are carried on to the result, and do
            not act while answers are drawn.
        data: rows of the method's kind, or tasks of the environment; all their columns reach the
            rewards.
        reference: frozen; None takes the model as it is before training.
        reward_model: makes the reward "reward_model".
        principles: their checks make the reward "principles".
        critic: brings trunk and head of the values; None puts them on the policy's own trunk.
        partner: who acts in an environment's other roles, such as a simulated user.
        values: the method's and the engine's settings by name.
        ptx_data: text that is learnt beside, in place of the column that joins each group.
    Returns:
        the model with an adapter, or with new weights when `rank` is 0; and with its value head as
        extra tensors where the method has one.
    Raises:
        InputError: wrong rows, settings, template or rewards.
        Stopped: a loss or an advantage that is not finite.
    """
    told, settings = _split(spec, values)
    context = current()
    others = (reference, reward_model, principles, critic, partner, ptx_data)
    held = [m.key for m in others if m is not None]
    key = content_hash(
        [spec.name, told, vars(settings), model.weights_key, data.key, context.seed, held], 8
    )
    pool = pool_of(spec, told)
    given = _joined(spec, told, settings, data, ptx_data, pool)
    by = pool or _reward(spec, told, settings, principles, reward_model)
    make = _make(settings)
    start = begin(model, settings, spec.name, key=key, reference=reference)
    world = _world(spec, settings, start, make, partner)
    beside = Beside(
        trunks=int(critic is not None and "values" in spec.needs),
        frozen=int(_needs_other(spec, told, settings, start)),
    )
    text = text_beside(ptx_data, told, settings, start)
    if world is not None:
        prompts = tasks_of(settings, start, data, world, beside, text)
    else:
        prompts = prompts_of(spec, given, settings, start, data, pool, beside, text)
    if distributed.leads():
        _warn(spec, told, settings.rollouts(len(prompts)))
    home = distributed.agree(context.folder)
    journals = home / f"rollouts-{key}"
    task = _task(spec, told, settings, start, prompts, by, critic, journals, world)
    task.ptx = text
    train(task, settings, key=key, peak=settings.peak)
    folder = home / f"{spec.name}-{key}"
    made = trained_model(model, task.module, task.lora, folder, data, spec.name)
    licences = [m.licence for m in (reward_model, partner) if m is not None and m.licence]
    judges = licences_at(named([settings.rewards or {}, told]))
    read = licence_of([ptx_data]) if ptx_data is not None else ""
    made = made.with_licences([*licences, *judges, *([read] if read else [])])
    if task.critic is None:
        return made
    return task.critic.saved(made, critic, data, home / f"{spec.name}-critic-{key}")
