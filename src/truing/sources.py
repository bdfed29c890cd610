"""What the inputs of a plan name, opened; and whether its models can do what is asked of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from truing.core.endpoints.limits import SAID
from truing.core.files import expanded
from truing.core.modelfiles import choices
from truing.errors import InputError
from truing.method import Makes, Method
from truing.models import Folder, Model, Served
from truing.plan import Checked, Plan, may_be_model
from truing.principles import Principles
from truing.remedies import SERVED_REWARD
from truing.reports import Report
from truing.store import Noun
from truing.tables import KINDS, Table


def open_noun(noun: str, text: str) -> Noun:
    """The noun that a text names: a file, a folder, or a registered name.

    Args:
        noun: "Model", "Table", ...; several as "Model|Table".
        text: what the user wrote.
    """
    for kind in noun.split("|"):
        if kind == "Table":
            return Table.read(text)
        if kind == "Principles":
            from truing.specify.principles_file import check_all

            path = expanded(text)
            found = Principles.load(path) if path.is_dir() else Principles.read(path)
            check_all(found, where=text)
            return found
        if kind == "Report":
            return Report.load(text)
        if kind == "Model":
            return Model.open(text)
    raise InputError(f"cannot read a {noun}", seen=text)


READS = "specify/principles_file"
Nouns = Mapping[str, Noun | Mapping[str, Noun]]
Opened = dict[tuple[str, str], Noun]  # by noun and text: one text may name two things


def open_sources(
    checked: Sequence[Checked], at_hand: Opened | None = None, *, fetch: bool = True
) -> Opened:
    """Everything that is not made by a step. Tables first: data is checked before models.

    Args:
        at_hand: what is opened already, and is not read again.
        fetch: open also models that may have to be fetched.
    Raises:
        InputError: something cannot be read, or is not what the step that it is given to takes.
    """
    wanted = [
        (noun, source.text, source.at or one.step.at())
        for one in checked
        for _, noun, source in one.given()
        if not source.is_step
    ]
    opened: Opened = dict(at_hand or {})

    def take(noun: str, text: str, at: str) -> None:
        if (noun, text) not in opened:
            try:
                opened[noun, text] = open_noun(noun, text)
            except InputError as error:
                if not error.where or "row" not in error.where:
                    error.where = f"{at}: {error.where}".rstrip(": ")
                raise

    for noun, text, at in wanted:
        if noun != "Model":
            take(noun, text, at)
    for one in checked:
        if one.method.id == READS:  # its file, which it reads itself
            take("Principles", str(one.settings["path"]), one.step.at())
    check_tables(checked, opened)
    # Of one model under two addresses the limits count, whichever stands first.
    for noun, text, at in sorted(wanted, key=lambda w: SAID.search(w[1]) is not None):
        if fetch or noun != "Model" or not may_be_model(choices.named(text)[0]):
            take(noun, text, at)
    return opened


def check(plan: Plan) -> list[Checked]:
    """Steps of a plan, checked as far as can be done before a model is fetched; nothing is run.

    Raises:
        InputError: a mistake in plan, data or settings.
    """
    checked = plan.check()
    check_abilities(checked)
    open_sources(checked, fetch=False)
    return checked


def check_tables(checked: Sequence[Checked], opened: Opened) -> None:
    """Raise before anything runs when a step is given rows that it cannot take.

    What select makes of a table has the kind and the columns of that table; of what other steps
    make, the kind is known where their method says it.
    """
    from truing.core.trainer.preflight import Promised

    made: dict[str, Table] = {}
    for one in checked:
        tables: dict[str, Table] = {}
        for name, roles in one.sources.items():
            noun = one.method.inputs[name].noun
            found = {
                role: made.get(s.text) if s.is_step else opened.get((noun, s.text))
                for role, s in roles.items()
            }
            if isinstance(next(iter(found.values()), None), Table):  # of several, the first decides
                known = {f"{name} {r}".strip(): t for r, t in found.items()}
                tables |= {n: t for n, t in known.items() if isinstance(t, Table)}
        one.method.check(one.settings, tables, where=one.step.at(), at=one.step.at, planned=True)
        rows = kind_made(one.method, {**one.sources, **one.settings})
        kept = [tables.get(f"{rows} {role}".strip()) for role in one.sources.get(rows, ())]
        if kept and kept[0] is not None:
            made[one.name] = _together(kept[0], kept)
        elif rows in KINDS:
            made[one.name] = Promised(rows, f"step {one.name}")


def _together(first: Table, tables: Sequence[Table | None]) -> Table:
    """The rows of several tables; the first, where some are not known yet or of another kind."""
    from truing.core.trainer.preflight import Promised

    known = [t for t in tables if t is not None and not isinstance(t, Promised)]
    alike = len(known) == len(tables) > 1 and {t.kind for t in known} == {first.kind}
    return Table.joined(known) if alike else first


def kind_made(method: Method, given: Mapping[str, object]) -> str:
    """Kind of the rows that a method makes, or the input whose rows it keeps; "" when not known.

    Args:
        given: its settings, and what its inputs are given, by name.
    """
    facts = cast("Mapping[str, Makes]", method.facts)
    makes = facts.get("makes") or ("data" if method.verb == "select" else "")
    if isinstance(makes, str):
        return makes
    fits = (k for k, under in makes.items() if all(given.get(n) == v for n, v in under.items()))
    return next(fits, "")


def with_defaults(method: Method, nouns: Nouns) -> Nouns:
    """The inputs, and the data sets that stand in for those that are not given."""
    missing = [i for i in method.inputs.values() if i.default and nouns.get(i.name) is None]
    return {**nouns, **{i.name: open_noun(i.noun, i.default) for i in missing}}


# What a model must be able to do in a role of its own; in all others, what its method needs.
ROLES: dict[str, tuple[str, ...]] = {
    "judge": ("generate",),
    "partner": ("generate",),  # who acts, served or not: its words are all that is asked
    "reward": ("weights",),
    "reward_model": ("weights",),
    "critic": ("weights",),
    "process_model": ("weights",),
}


def nowhere(text: str) -> bool:
    """True for a model's name that neither a folder nor anything that is fetched can have."""
    name = choices.named(text)[0]
    return not may_be_model(name) and not expanded(name).is_dir()


def known_abilities(text: str) -> frozenset[str] | None:
    """What the model of that name can do, as far as it is known without fetching anything."""
    if text.startswith(("http://", "https://")):
        return Served(text, "").can
    base = Folder(expanded(choices.named(text)[0]))
    return base.can if (base.path / "config.json").is_file() else None


def need_abilities(
    method: Method, name: str, role: str, able: frozenset[str] | None, *, where: str
) -> None:
    """Raise where the model given as an input of a method cannot do what it must in that role.

    Args:
        method: that it is given to.
        name: of the input.
        role: within an input that takes several, else "".
        able: what it can; None where that is not known yet.
        where: what the error names.
    """
    needs = ROLES.get(role) or ROLES.get(name, method.needs)
    lacks = sorted(set(needs) - able) if able is not None else []
    if lacks:
        called = f"{name} {role}".strip().replace("_", " ")
        raise InputError(
            f"{method.id} needs a {called} that can {' and '.join(lacks)}",
            where=where,
            seen=f"this one can {', '.join(sorted(able or ()))}",
            fix=SERVED_REWARD
            if "reward_model" in (role, name)
            else "Give a local causal language model",
        )


def check_abilities(checked: Sequence[Checked], opened: Opened | None = None) -> None:
    """Raise before anything runs when a model cannot do what a step needs of it in its role.

    Args:
        checked: the steps in order.
        opened: models; None tells what can be told before they are fetched.
    """
    made: dict[str, frozenset[str] | None] = {}
    for one in checked:
        own: list[frozenset[str] | None] = []
        inputs = [
            (name, role, one.method.inputs[name].noun, source)
            for name, roles in one.sources.items()
            for role, source in roles.items()
        ]
        inputs += [
            (n.setting, "", n.noun, s) for n, s in one.named.items() if n.setting in one.references
        ]
        for name, role, noun, source in inputs:
            if "Model" not in noun.split("|"):
                continue
            if source.is_step:
                able = made.get(source.text)
            elif opened is None:
                able = known_abilities(source.text)
            else:
                found = opened[noun, source.text]
                able = found.can if isinstance(found, Model) else None
            need_abilities(one.method, name, role, able, where=one.step.at(name))
            own.append(able)
        if own and one.method.returns == "Model":
            made[one.name] = own[0]
