"""Whether training could begin: settings and rows, before any model is fetched or step has run."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, cast

from truing.core.batch.row_kinds import as_kind, is_taken, takes_texts
from truing.core.bounds import check_bounds
from truing.errors import InputError, nearest
from truing.kinds import KINDS
from truing.readings import READINGS, last_answer
from truing.renaming import advice
from truing.tables import Table

if TYPE_CHECKING:
    from truing.core.held_out import Watch
    from truing.core.objective import Objective
    from truing.core.online import Online
    from truing.core.online_training import OnlineTraining

Settings = Mapping[str, object]
Tables = Mapping[str, Table]
READ = {given for given, _ in READINGS}  # kinds whose rows read as those of another
BRANCHES = {"pair": 2, "group": 3}  # of a row of that kind; of all others one


def check_objective(spec: Objective, settings: Settings, tables: Tables) -> None:
    """Raise an InputError for settings and rows that training would refuse; see `Method.check`."""
    from truing.core.held_out import INPUT
    from truing.core.logprob import STATISTICS
    from truing.core.trainer.mix import MEASURED, check_terms, mixed
    from truing.core.trainer.user_loss import check_needs
    from truing.core.training import HOOKS, Hook, TextTraining

    mix = cast("Settings | None", settings.get("mix"))
    watch = watch_of(settings)
    watch.check(spec.name)
    settings = {n: v for n, v in settings.items() if n not in ("mix", *vars(watch))}
    check_bounds(settings, spec.within, spec.name)
    engine = {f.name: settings[f.name] for f in fields(TextTraining) if f.name in settings}
    training = TextTraining(**engine)  # type: ignore[arg-type]
    training.check(spec.name)
    if spec.heads and training.batch < (count := objectives_of(spec, settings)):
        raise InputError(
            "setting 'batch' must be at least that of 'objectives': a step has a row of each",
            where=spec.name,
            seen={"batch": training.batch, "objectives": count},
        )
    if spec.hook:
        HOOKS[spec.hook](
            **{n: v for n, v in settings.items() if n not in engine and n not in spec.settings}
        )
    more = HOOKS.get(spec.hook, Hook).measures
    check_needs(spec.name, spec.needs, {*MEASURED, *STATISTICS, *more})
    check_loss(spec, settings)
    spec = mixed(spec, mix)
    if "mismatched" in spec.needs and settings.get("batch") == 1:
        text = "setting 'batch' must be at least 2: answers are compared with those of other rows"
        raise InputError(text, where=spec.name, seen=1)
    check_terms(spec, check_term)
    needed = [n for n, default in {**spec.columns, **spec.texts}.items() if default is None]
    for name in [n for n in ("data", INPUT) if n in tables]:
        where = spec.name if name == "data" else f"{spec.name} {name}"
        check_rows(tables[name], spec.rows, where, needed, texts=takes_texts(spec))
        check_heads(spec, settings, tables[name], where, every=name == "data")


def check_given(settings: Settings, given: Collection[str], at: Callable[[str], str]) -> None:
    """Raise an InputError for a setting that means nothing without an input that is not given.

    Args:
        settings: all of a method's.
        given: names of the inputs that are, whether they are at hand or a step makes them.
        at: where a setting stands.
    """
    from truing.core.held_out import INPUT, Watch

    if "environment" in settings:
        check_partner(settings["environment"], "partner" in given, at("partner"))
    watched = {f.name for f in fields(Watch)} <= set(settings)
    if watched and INPUT not in given:
        watch_of(settings).check_unused(at)


def check_partner(environment: object, given: bool, where: str) -> None:
    """Raise an InputError for a partner that is given where there is nothing to act in."""
    if given and environment is None:
        raise InputError(
            "input 'partner' counts for nothing: there is no environment",
            where=where,
            fix="Give an environment that it acts in, such as {use: conversation}, or leave it out",
        )


def watch_of(settings: Settings) -> Watch:
    """When held-out rows are measured, among all of a method's settings."""
    from truing.core.held_out import Watch

    return Watch(**{f.name: settings[f.name] for f in fields(Watch) if f.name in settings})  # type: ignore[arg-type]


def check_heads(
    spec: Objective, settings: Settings, table: Table, where: str, *, every: bool = True
) -> None:
    """Raise an InputError for rows that name an output head too many, or not `every` one."""
    if not spec.heads or isinstance(table, Promised):
        return
    default, count = spec.columns[spec.heads], objectives_of(spec, settings)
    named = {row.get(spec.heads, default) for row in table}
    if named != set(range(count)) and (every or not named <= set(range(count))):
        raise InputError(
            f"setting 'objectives' asks for {count} heads, one for each number from 0 in the "
            f"column {spec.heads!r}, and the rows name others",
            where=where,
            seen=sorted(map(str, named))[:8],
            fix="Name each row's objective, or set objectives to how many there are",
        )


def check_left(spec: Objective, settings: Settings, heads: Sequence[int]) -> None:
    """Raise an InputError where every row of an output head was left out, as too long, say.

    Args:
        heads: number of each row's that is left.
    """
    gone = sorted(set(range(objectives_of(spec, settings))) - set(heads))
    if gone:
        raise InputError(
            f"no row of objective {gone[0]} is left to train its head on",
            where=spec.name,
            seen=dict(sorted(Counter(heads).items())),
            fix="Give it rows that can be used; how many were left out, and why, is told above",
        )


def objectives_of(spec: Objective, settings: Settings) -> int:
    """How many output heads are asked for."""
    return cast(int, settings.get("objectives", spec.settings["objectives"].default))


def check_term(spec: Objective, settings: Settings) -> None:
    """Raise an InputError for settings that the objective itself would refuse."""
    check_bounds(settings, spec.within, spec.name)
    check_loss(spec, settings)


def check_online(spec: Online, settings: Settings, tables: Tables) -> None:
    """Raise an InputError for settings and rows that training would refuse; see `Method.check`."""
    from truing.core.held_out import INPUT as HELD
    from truing.core.rl.online_mix import INPUT, check_mix
    from truing.core.rl.pools import check_pool, pool_of

    watch_of(settings).check(spec.name)
    training = online_training(spec, settings)
    given = spec.joins(settings)
    check_played(spec, training, given)
    # An environment's tasks may be rows of any kind.
    asked = [n for n in ("data", HELD) if n in tables and training.environment is None]
    for name in asked:
        table, where = tables[name], spec.name if name == "data" else f"{spec.name} {name}"
        needed = [given] if given and not _answered(table) else []
        check_rows(table, spec.rows, where, needed)
        pool = pool_of(spec, settings)
        if pool is not None:
            check_pool(pool, table, where)
    # Without rows at hand they may come from a step that has not run yet.
    check_mix(spec.name, settings, tables.get(INPUT), given=INPUT in tables)


def _answered(table: Table) -> bool:
    """Whether all rows are dialogues whose last answers are taken for completions."""
    return not isinstance(table, Promised) and all("completion" in last_answer(r) for r in table)


def online_training(spec: Online, settings: Settings) -> OnlineTraining:
    """The engine's settings among all of a method's, checked; an InputError names the wrong one."""
    from truing.core.online_training import OnlineTraining

    check_bounds(settings, spec.within, spec.name)
    training = OnlineTraining.of(spec.engine, settings)
    training.check(spec.name)
    if training.answers < spec.least:
        raise InputError(
            f"setting 'answers' must be at least {spec.least}: an answer is compared with the "
            "others of its group",
            where=spec.name,
            seen=training.answers,
        )
    if training.refill and not spec.refills:
        raise InputError(
            "setting 'refill': groups of equal rewards teach here too, and it would replace them",
            where=spec.name,
            seen=training.refill,
            fix="Set it to 0",
        )
    check_update(spec, settings, training.answers)
    return training


def check_played(spec: Online, training: OnlineTraining, given: str) -> None:
    """Raise an InputError for an answer of the column `given` that joins those of an episode."""
    if training.environment is not None and given:
        raise InputError(
            "setting 'environment': an answer that rows bring along was given in no episode",
            where=spec.name,
            seen=given,
            fix="Leave it out, or use a method that draws all its answers",
        )


def check_loss(spec: Objective, settings: Settings) -> None:
    """Raise what a loss itself says of its settings, by calling it on nothing but ones."""
    import torch

    from truing.components import told
    from truing.core.objective import Loss, Measurements
    from truing.core.trainer import user_loss

    own = {n: settings.get(n, p.default) for n, p in spec.settings.items()}
    branches = BRANCHES.get(spec.rows, 1) + len(spec.texts) + ("mismatched" in spec.needs)
    mask_UKT = torch.ones(2, branches, 2)
    columns = {n: torch.full((2,), 1.0 if d is None else d) for n, d in spec.columns.items()}
    with torch.enable_grad():
        value_UKT = -mask_UKT.clone().requires_grad_()
        fixed = {"ref_logp": -mask_UKT}
        m = Measurements(mask_UKT, {n: fixed.get(n, value_UKT) for n in spec.needs}, columns)
        made: list[Loss] = []
        with told(spec.loss, "its function", spec.name):
            _ask(lambda values: made.append(spec.plain(m, values)), own, spec.settings, spec.name)
    for loss in made[-1:]:  # none where it says something of made-up numbers
        user_loss.check_made(spec.name, loss, len(mask_UKT))


def check_update(spec: Online, settings: Settings, answers: int) -> None:
    """Raise what an online method says of its settings, by calling it on a made-up rollout."""
    import torch

    from truing.components import told
    from truing.core.objective import Loss, Measurements
    from truing.core.trainer import user_loss

    if spec.pools:
        return  # what its rows' sorts are called is the pool's to know
    own = {n: settings.get(n, p.default) for n, p in spec.settings.items()}
    mask_UKT = torch.ones(2, 2 * answers if spec.opposed else answers, 2)
    ones_UK = mask_UKT[..., 0]
    reward_UK = ones_UK.cumsum(1)  # so that no group is flat
    columns = {"reward": reward_UK, "reward/made_up": reward_UK, "greedy": ones_UK[:, 0]}
    columns |= dict.fromkeys(("finished", "own"), ones_UK) | {"empty": 0 * ones_UK}
    tensors = dict.fromkeys(("logp", "old_entropy", *spec.needs), -mask_UKT)
    rollout = Measurements(mask_UKT, tensors, columns)
    losses: list[Loss] = []

    def update(values: Settings) -> None:
        made = spec.plain(rollout, values)
        value_UKT = -mask_UKT.clone().requires_grad_()
        moving = {n for n in spec.needs if n != "ref_logp"} | {"logp", "entropy"}
        found = {**tensors, **dict.fromkeys(moving, value_UKT)}
        found |= {**made.tensors, "old_logp": -mask_UKT}
        found |= {"old_values": -mask_UKT} if spec.values else {}
        loss = made.loss(Measurements(mask_UKT, found, columns))
        losses.append(user_loss.returned(loss, Loss, spec.name, user_loss.RETURN))

    with torch.enable_grad(), told(spec.update, "its function", spec.name):
        _ask(update, own, spec.settings, spec.name)
    for loss in losses[-1:]:  # none where it says something of made-up numbers
        user_loss.check_made(spec.name, loss, len(mask_UKT))


def _ask(
    call: Callable[[Settings], object],
    settings: Settings,
    declared: Mapping[str, inspect.Parameter],
    where: str,
) -> None:
    """Let through what made-up numbers show of the settings; what else is said means nothing."""
    from truing.core.trainer.user_loss import NoLoss

    try:
        call(settings)
    except ZeroDivisionError:
        name = divisor(call, settings, {n: p.default for n, p in declared.items()})
        if name:
            text = f"setting {name!r} must not be 0: the loss divides by it"
            raise InputError(text, where=where, seen=settings[name]) from None
    except (RuntimeError, LookupError, ValueError, AssertionError) as error:
        named = isinstance(error, InputError) and error.message.startswith("setting ")
        if named or isinstance(error, NoLoss):
            raise


def divisor(
    call: Callable[[Settings], object], settings: Settings, defaults: Mapping[str, object]
) -> str:
    """The setting of value 0 that `call` divides by, found by trying; "" where it is none of them.

    Each is set to its default, or to 1 where that is 0, too. Where several are at fault, so that
    no single one helps, those tried stay as they were set until the division does not fail.
    """

    def divides(values: Settings) -> bool:
        try:
            call(values)
        except ZeroDivisionError:
            return True
        except (RuntimeError, LookupError, ValueError, AssertionError):
            pass  # it got beyond the division
        return False

    zeros = [n for n, v in settings.items() if v == 0 and not isinstance(v, bool)]
    usual = {n: d for n, d in defaults.items() if isinstance(d, (int, float)) and d}
    for together in (False, True):
        tried = settings
        for name in zeros:
            tried = {**(tried if together else settings), name: usual.get(name, 1.0)}
            if not divides(tried):
                return name
    return ""


class Promised(Table):
    """A table that a step will make: the kind of its rows is known, further columns are not."""

    def __init__(self, kind: str, where: str) -> None:
        row = {name: types[0]() for name, types in KINDS[kind][0].items()}
        super().__init__(kind, [row], where=where)

    def _read_as(self, kind: str) -> Table:
        return Promised(kind, self.source)


def check_rows(
    table: Table, kind: str, where: str, columns: Iterable[str] = (), *, texts: bool = False
) -> None:
    """Raise an InputError unless the rows are of `kind`, or of one that is converted to it.

    Args:
        columns: further ones that each row must have.
        texts: take whole texts as examples.
    """
    if is_taken(table.kind, kind, texts):
        if table.kind in READ and not isinstance(table, Promised):
            as_kind(table, kind, where, texts=texts)  # says which row does not read so
        return  # a conversion makes what is missing
    check_kinds(table, (kind,), where)
    for name in () if isinstance(table, Promised) else columns:
        if name not in table.columns:
            close = nearest(name, [c for c in table.columns if c not in ("id", "lineage")])
            raise InputError(
                f"needs the column {name!r} in {table.source}",
                where=where,
                seen=[c for c in table.columns if c not in ("id", "lineage")],
                fix=f"Did you mean {name!r} by {close!r}?" if close else "Add it to each row",
            )


def check_kinds(table: Table, kinds: Sequence[str], where: str) -> None:
    """Raise an InputError unless `Table.expect` takes the rows as one of `kinds`."""
    try:
        table.expect(*kinds, where=where)
    except InputError as error:
        meant = (_meant(table, kind) for kind in kinds if not isinstance(table, Promised))
        if found := next(filter(None, meant), ""):
            error.fix = f"{found} {advice(table.rows, kinds)}"
        raise


def _meant(table: Table, kind: str) -> str:
    """What a misspelt column was meant to be; "" where none is like one that is missing."""
    have = set(table.columns) - {"id", "lineage"}
    for needed in sorted(KINDS[kind], key=lambda n: len(set(n) - have)):
        spare = sorted(have - set(needed))
        found = [(name, nearest(name, spare)) for name in needed if name not in have]
        if found and all(close for _, close in found):
            return "; ".join(f"Did you mean {name!r} by {close!r}?" for name, close in found)
    return ""
