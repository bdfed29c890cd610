"""Training language models on their own answers: who draws, who rewards, and what comes out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, cast

from truing.context import current
from truing.core.batch.same_tokenizer import same_tokens
from truing.core.engine import checkpoints_of, train
from truing.core.held_out import INPUT as HELD
from truing.core.held_out import Watch, watching
from truing.core.judging.rewards import Rewards, licences_at, telling
from truing.core.modelfiles.loaded import Loaded
from truing.core.online import GREEDY, Online
from truing.core.online_training import OnlineTraining
from truing.core.passes import recompute
from truing.core.passes.frozen_trunk import attach
from truing.core.passes.memory import Beside
from truing.core.passes.precision import unrounded
from truing.core.passes.scoring import warn_of_head
from truing.core.play.agents import Speaker
from truing.core.play.episodes import World
from truing.core.rl.answers import Asked
from truing.core.rl.collect import Collector, Pool
from truing.core.rl.critic import Critic
from truing.core.rl.gold import check_gold
from truing.core.rl.held_out_online import HeldOutPrompts
from truing.core.rl.online_mix import Added, Mix, check_mix, read_added
from truing.core.rl.online_prompts import Source
from truing.core.rl.online_prompts import check as check_prompts
from truing.core.rl.online_reward import Reward
from truing.core.rl.online_task import OnlineTask
from truing.core.rl.players import Players, draws_of
from truing.core.rl.pools import check_pool, pool_of
from truing.core.rollout import Make, maker
from truing.core.together import joint
from truing.core.trainer import distributed
from truing.core.trainer.checkpoint import KEEP, Checkpoints
from truing.core.trainer.frozen_view import refuse
from truing.core.trainer.held_out_rows import told_apart
from truing.core.trainer.preflight import check_partner, check_played, online_training
from truing.core.trainer.start import Start, begin
from truing.core.trainer.train_text import trained_model
from truing.datasets import licence_of
from truing.errors import InputError, unknown
from truing.models import Model, named
from truing.principles import Principles
from truing.tables import Table, content_hash

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Given:
    """What a run is given beside its model and its rows.

    Args:
        reference: frozen; None takes the model as it is before training.
        reward_model: makes the reward "reward_model".
        principles: their checks make the reward "principles".
        critic: brings trunk and head of the values; None puts them on the policy's own trunk.
        partner: who acts in an environment's other roles, such as a simulated user.
        mix_data: rows of the losses in `mix`; None takes the run's own.
        held_out: rows like the run's own that are not trained on, but answered meanwhile.
    """

    reference: Model | None = None
    reward_model: Model | None = None
    principles: Principles | None = None
    critic: Model | None = None
    partner: Model | None = None
    mix_data: Table | None = None
    held_out: Table | None = None

    @property
    def keys(self) -> list[str]:
        """Of all that updates depend on."""
        held = (self.reference, self.reward_model, self.principles, self.critic, self.partner)
        return [m.key for m in (*held, self.mix_data) if m is not None]


@dataclass(frozen=True)
class Run:
    """A run whose model is in memory.

    Args:
        told: settings of the method by name, the engine's that it asks for among them.
        added: losses that are learnt beside.
    """

    spec: Online
    told: Mapping[str, object]
    settings: OnlineTraining
    given: Given
    start: Start
    added: Added | None

    @property
    def needs_other(self) -> bool:
        """Whether a frozen model of its own is compared with, or answers."""
        spec, start = self.spec, self.start
        needed = spec.compares(self.told) or self.settings.watch or spec.opposed
        return bool(needed) and (start.reference is not None or not self.settings.rank)

    @property
    def beside(self) -> Beside:
        """What will be loaded beside the model."""
        asked = self.added is not None and self.added.asks_frozen(self.start)
        return Beside(
            trunks=int(self.given.critic is not None and self.spec.values),
            frozen=int(self.needs_other or asked),
        )


def _split(
    spec: Online, values: Mapping[str, object], held_out: Table | None
) -> tuple[dict[str, object], OnlineTraining, Watch]:
    """All settings by name, the engine's, and those of held-out rows.

    A method's default goes before the engine's.
    """
    shared, watched = set(spec.engine), {f.name for f in fields(Watch)}
    own = {n: p.default for n, p in spec.settings.items()}
    for name in values:
        if name not in shared | watched and name not in own:
            raise unknown("setting", name, [*own, *shared, *watched], where=spec.name)
    watch = watching(held_out, spec.name, **{n: v for n, v in values.items() if n in watched})
    chosen = own | {n: v for n, v in values.items() if n not in watched}
    online_training(spec, chosen)  # it refuses; what results depend on is made here
    training = OnlineTraining.of(spec.engine, chosen)
    # What the method is told includes the engine's settings that it asks for.
    told = {n: getattr(training, n) if n in shared else chosen[n] for n in own}
    if training.environment is not None and "max_tokens" in told:
        told["max_tokens"] = training.max_tokens * training.turns  # its longest answer
    return told, training, watch


def _readers(spec: Online, given: Given, model: Model) -> dict[str, Model]:
    """Who reads prompt and answer beside the policy, in tokens that are the same."""
    found = {"critic": given.critic} if given.critic is not None and spec.values else {}
    judge = given.reward_model
    # One that follows principles reads reviews, which it cuts itself; of other tokens than the
    # policy's no number is known before there is an answer.
    if judge is not None and not (spec.follows or spec.pools or judge.is_served):
        with contextlib.suppress(InputError):
            same_tokens({"model": model, "reward_model": judge})
            found["reward model"] = judge
    return found


def _critic(run: Run) -> Critic | None:
    """The critic, where the method has one: on the policy's trunk, or a model of its own."""
    given, loaded = run.given.critic, run.start.loaded
    if not run.spec.values:
        return None
    if given is None:
        return Critic.of(loaded)
    same_tokens({"model": loaded.model, "critic": given}, where=run.spec.name)
    refuse(given, loaded.model, "critic", run.spec.name)
    own = unrounded(given, run.start.dtype, loaded.device, fresh=True)
    if recompute.is_on(loaded.module):
        recompute.switch_on(own.module)
    lora = attach(own.module, run.settings, current().stream("critic") % 2**31)
    try:
        return Critic.of(own, own=True, lora=lora)
    except InputError as error:
        error.where = f"{run.spec.name} input 'critic' {error.where}".rstrip()
        raise


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


def _world(run: Run, make: Make | None) -> World | None:
    """Where episodes take place, with who acts in its other roles."""
    if make is None:
        return None
    settings, partner = run.settings, run.given.partner
    seed = current().stream("partner") % 2**31
    agent = Speaker(partner, settings.sampling(seed)) if partner is not None else None
    return World(make, agent, settings.turns, run.start.limit, run.spec.name)


def _joined(
    spec: Online,
    told: Mapping[str, object],
    settings: OnlineTraining,
    data: Table,
    pool: Pool | None,
) -> str:
    """Column of an answer that joins each group, or ""; rows of a pool are checked."""
    if pool is not None:
        check_pool(pool, data, spec.name)
    given = spec.joins(told)
    check_played(spec, settings, given)
    return given


def _warn(run: Run, rollouts: int) -> None:
    """Say where the policy may not learn at all, and where a reference says nothing."""
    spec, told = run.spec, run.told
    if run.given.reference is not None and not (
        spec.compares(told) or run.settings.watch or spec.opposed
    ):
        print(
            f"{spec.name}: warning: the reference counts for nothing, since beta is 0; raise beta, "
            "or set watch to record how far the model moves from it",
            file=sys.stderr,
        )
    if spec.values and cast(int, told.get("critic_rollouts", 0)) >= rollouts:
        print(
            f"{spec.name}: warning: all {rollouts} rollouts may go to the critic alone; raise "
            "epochs or steps, or lower critic_rollouts",
            file=sys.stderr,
        )


def _other(run: Run) -> Loaded | None:
    """The frozen reference, where one is needed that is not the model with its adapter off."""
    if not run.needs_other:
        return None
    found = run.start.frozen()
    return replace(found, model=found.model.with_changes(found.model.weight_changes))


def _needed(saved: Checkpoints, updates: int) -> int:
    """Number of the rollout that the older of the last checkpoints goes on with."""
    steps = saved.steps()[-KEEP:]
    return steps[0] // updates if len(steps) == KEEP else 0


def _task(
    run: Run, prompts: Sequence[Asked], by: Reward | Pool, folder: Path, world: World | None
) -> OnlineTask:
    """The task with its players, its critic and whoever collects its rollouts."""
    spec, told, settings, start = run.spec, run.told, run.settings, run.start
    loaded, context, added = start.loaded, current(), run.added
    other = _other(run)
    if added is not None:  # before there are adapters the module itself is the model as it was
        added.begin(start, settings.total(len(prompts)))
    lora = attach(loaded.module, settings, context.stream("adapter") % 2**31)
    if added is not None:
        added.adapt(lora)
    policy = replace(loaded, model=start.model.with_changes(start.model.weight_changes))
    critic = _critic(run)
    trunk = critic.trunk if critic is not None else None
    draws = draws_of(spec, Players(policy, lora, other, trunk), told)
    reward, pool = (by, None) if isinstance(by, Reward) else (None, by)
    collector = Collector(
        prompts,
        draws,
        reward,
        pool,
        loaded.tokenizer,
        folder,
        context,
        world,
        start.limit,
        greedy=spec.opponent == GREEDY,
        needed=partial(_needed, checkpoints_of(start.run), settings.updates),
    )
    return OnlineTask(
        spec,
        told,
        settings,
        collector,
        loaded.module,
        lora=lora,
        other=other.module if other is not None else None,
        critic=critic,
        compare=spec.compares(told) or settings.watch,
        budget=start.budget,
        added=added,
    )


def _result(run: Run, task: OnlineTask, model: Model, data: Table, folder: Path) -> Model:
    """The trained model with its licences, and its critic."""
    given, name = run.given, run.spec.name
    made = trained_model(model, task.module, task.lora, folder, data, name)
    licences = [m.licence for m in (given.reward_model, given.partner) if m is not None]
    licences += licences_at(named([run.settings.rewards or {}, run.told]))
    licences += [licence_of([given.mix_data])] if given.mix_data is not None else []
    made = made.with_licences([one for one in licences if one])
    if task.critic is None:
        return made
    return task.critic.saved(
        made, given.critic, data, folder.with_name(f"{name}-critic-{run.start.run}")
    )


@joint
def train_online(
    spec: Online, model: Model, data: Table, given: Given, values: Mapping[str, object]
) -> Model:
    """Train `model` on its own answers to the prompts of `data`.

    Args:
        spec: the method.
        model: weight changes are folded in; run-time changes are carried on to the result, and do
            not act while answers are drawn.
        data: rows of the method's kind, or tasks of the environment; all their columns reach the
            rewards, an own completion as `given`.
        values: the method's and the engine's settings by name, and `mix`; those of held-out rows.
    Returns:
        the model with an adapter, or with new weights when `rank` is 0; and with its value head as
        extra tensors where the method has one.
    Raises:
        InputError: wrong rows, settings, template or rewards.
        Stopped: a loss or an advantage that is not finite.
    """
    mix = cast("Mix | None", values.get("mix"))
    own = {n: v for n, v in values.items() if n != "mix"}
    told, settings, watch = _split(spec, own, given.held_out)
    beside, own_rows = (given.mix_data, False) if given.mix_data is not None else (data, True)
    check_mix(spec.name, {**vars(settings), "mix": mix}, beside, given=not own_rows)
    whole: list[object] = [spec.name, told, vars(settings), mix, model.weights_key, data.key]
    key = content_hash([*whole, current().seed, given.keys], 8)
    if given.held_out is not None:
        key = content_hash([key, given.held_out.key, vars(watch)], 8)
    pool = pool_of(spec, told)
    joined = _joined(spec, told, settings, data, pool)
    by = pool or _reward(spec, told, settings, given.principles, given.reward_model)
    for table in (data, given.held_out):
        if table is not None and settings.rewards:
            check_gold(settings.rewards, table, spec.name)
    check_partner(settings.environment, given.partner is not None, spec.name)
    make = _make(settings)
    readers = _readers(spec, given, model)
    start = begin(model, settings, spec.name, key=key, reference=given.reference, readers=readers)
    added = read_added(mix, beside, not own_rows, settings, start)
    run = Run(spec, told, settings, given, start, added)
    world = _world(run, make)
    source = Source(spec, joined, settings, start, pool, world)
    drawn = settings.answers * (2 if spec.opposed else 1)
    prompts, aside = source.read(data, spec.name, drawn), None
    if given.held_out is not None:
        with told_apart():
            aside = source.read(given.held_out, f"{spec.name} {HELD}", 1)
    check_prompts(start, prompts, aside, run.beside, added)
    if distributed.leads():
        _warn(run, settings.rollouts(len(prompts.asked)))
    warn_of_head(start.loaded, spec.name)
    home = distributed.agree(current().folder)
    task = _task(run, prompts.asked, by, home / f"rollouts-{key}", world)
    held = HeldOutPrompts.of(task, aside.asked, watch) if aside is not None else None
    train(task, settings, key=key, peak=settings.peak, held=held)
    return _result(run, task, model, data, home / f"{spec.name}-{key}")
