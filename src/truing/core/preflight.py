"""Whether training could begin: settings and rows, before any model is fetched or step has run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, cast

from truing.core.row_kinds import CONVERSIONS
from truing.errors import InputError, nearest
from truing.tables import KINDS, Table

if TYPE_CHECKING:
    from truing.core.objective import Objective
    from truing.core.online import Online
    from truing.core.online_training import OnlineTraining

Settings = Mapping[str, object]
Tables = Mapping[str, Table]
BRANCHES = {"pair": 2, "group": 3}  # of a row of that kind; of all others one


def check_objective(spec: Objective, settings: Settings, tables: Tables) -> None:
    """Raise an InputError for settings and rows that training would refuse; see `Method.check`."""
    from truing.core.mix import check_terms, mixed
    from truing.core.training import HOOKS, TextTraining

    mix = cast("Settings | None", settings.get("mix"))
    settings = {n: v for n, v in settings.items() if n != "mix"}
    check_bounds(settings, spec.within, spec.name)
    engine = {f.name: settings[f.name] for f in fields(TextTraining) if f.name in settings}
    TextTraining(**engine).check(spec.name)  # type: ignore[arg-type]
    if spec.hook:
        HOOKS[spec.hook](
            **{n: v for n, v in settings.items() if n not in engine and n not in spec.settings}
        )
    check_loss(spec, settings)
    spec = mixed(spec, mix)
    check_terms(spec, check_term)
    if "data" in tables:
        needed = [n for n, default in {**spec.columns, **spec.texts}.items() if default is None]
        check_rows(tables["data"], spec.rows, spec.name, needed)


def check_term(spec: Objective, settings: Settings) -> None:
    """Raise an InputError for settings that the objective itself would refuse."""
    check_bounds(settings, spec.within, spec.name)
    check_loss(spec, settings)


def check_online(spec: Online, settings: Settings, tables: Tables) -> None:
    """Raise an InputError for settings and rows that training would refuse; see `Method.check`."""
    training = online_training(spec, settings)
    given = spec.joins(settings)
    # An environment's tasks may be rows of any kind.
    if "data" in tables and training.environment is None:
        check_rows(tables["data"], spec.rows, spec.name, [given] if given else [])


def online_training(spec: Online, settings: Settings) -> OnlineTraining:
    """The engine's settings among all of a method's, checked; an InputError names the wrong one."""
    from truing.core.online_training import OnlineTraining

    check_bounds(settings, spec.within, spec.name)
    engine = {n: v for n, v in settings.items() if n in spec.engine}
    training = OnlineTraining(**engine)  # type: ignore[arg-type]
    training.check(spec.name)
    spec.check(settings)
    given = spec.joins(settings)
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
        )
    if training.environment is not None and given:
        raise InputError(
            "setting 'environment': an answer that rows bring along was given in no episode",
            where=spec.name,
            seen=given,
        )
    return training


def check_bounds(
    settings: Settings, bounds: Mapping[str, tuple[float, float | None]], where: str = ""
) -> None:
    """Raise an InputError for a number outside of its least and largest value."""
    for name, (low, high) in bounds.items():
        value = settings.get(name)
        if not isinstance(value, (int, float)):
            continue
        if value < low or (high is not None and value > high):
            wanted = f"from {low:g} to {high:g}" if high is not None else f"at least {low:g}"
            raise InputError(f"setting {name!r} must be {wanted}", where=where, seen=value)


def check_loss(spec: Objective, settings: Settings) -> None:
    """Raise what a loss itself says of its settings, by calling it on nothing but ones.

    Only losses of units that are computed one by one. Whatever else such a call says is of the
    ones, and means nothing.
    """
    import torch

    from truing.core.objective import Measurements

    if spec.unit == "batch":
        return
    own = {n: settings.get(n, p.default) for n, p in spec.settings.items()}
    mask_UKT = torch.ones(2, BRANCHES.get(spec.rows, 1) + len(spec.texts), 2)
    columns = {n: torch.full((2,), 1.0 if d is None else d) for n, d in spec.columns.items()}
    try:
        spec(Measurements(mask_UKT, dict.fromkeys(spec.needs, -mask_UKT), columns), own)
    except (RuntimeError, LookupError, ValueError) as error:
        if isinstance(error, InputError) and error.message.startswith("setting "):
            raise


def check_rows(table: Table, kind: str, where: str, columns: Iterable[str] = ()) -> None:
    """Raise an InputError unless the rows are of `kind`, or of one that is converted to it.

    Args:
        columns: further ones that each row must have.
    """
    if (table.kind, kind) in CONVERSIONS or (table.kind, kind) == ("dialogue_pair", "pair"):
        return  # a conversion makes what is missing
    check_kinds(table, (kind,), where)
    for name in columns:
        if name not in table.columns:
            close = nearest(name, [c for c in table.columns if c not in ("id", "lineage")])
            raise InputError(
                f"needs the column {name!r} in {table.source}",
                where=where,
                seen=[c for c in table.columns if c not in ("id", "lineage")],
                fix=f"Did you mean {name!r} by {close!r}?" if close else "",
            )


def check_kinds(table: Table, kinds: Sequence[str], where: str) -> None:
    """Raise an InputError unless `Table.expect` takes the rows as one of `kinds`."""
    try:
        table.expect(*kinds, where=where)
    except InputError as error:
        meant = (_meant(table, kind) for kind in kinds)
        error.fix = next(filter(None, meant), error.fix)
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
