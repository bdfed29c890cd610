"""What the inputs of a plan name, opened; and whether its models can do what is asked of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from truing.errors import InputError
from truing.models import Model
from truing.plan import Checked, Source
from truing.principles import Principles
from truing.reports import Report
from truing.store import Noun
from truing.tables import Table


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
            path = Path(text)
            return Principles.load(path) if path.is_dir() else Principles.read(path)
        if kind == "Report":
            return Report.load(text)
        if kind == "Model":
            return Model.open(text)
    raise InputError(f"cannot read a {noun}", seen=text)


def open_sources(checked: Sequence[Checked]) -> dict[Source, Noun]:
    """Everything that is not made by a step. Tables first: data is checked before models."""
    wanted = [
        (one.method.inputs[name].noun, source, one)
        for one in checked
        for name, roles in one.sources.items()
        for source in roles.values()
        if not source.is_step
    ]
    opened: dict[Source, Noun] = {}
    for noun, source, one in sorted(wanted, key=lambda w: w[0] == "Model"):
        if source not in opened:
            try:
                opened[source] = open_noun(noun, source.text)
            except InputError as error:
                if not error.where or "row" not in error.where:
                    error.where = f"{one.step.at()}: {error.where}".rstrip(": ")
                raise
    return opened


def check_abilities(checked: Sequence[Checked], opened: Mapping[Source, Noun]) -> None:
    """Raise before anything runs when a model cannot do what a method needs of it."""
    can: dict[str, frozenset[str]] = {}
    for one in checked:
        own = [
            (name, can.get(s.text) if s.is_step else getattr(opened[s], "can", None))
            for name, roles in one.sources.items()
            for s in roles.values()
            if "Model" in one.method.inputs[name].noun
        ]
        able = [abilities for _, abilities in own if abilities is not None]
        first = able[0] if able else None
        lacks = sorted(set(one.method.needs) - first) if first is not None else []
        if lacks:
            raise InputError(
                f"{one.method.id} needs a model that can {' and '.join(lacks)}",
                where=one.step.at(own[0][0]),
                seen=f"this one can {', '.join(sorted(first or ()))}",
                fix="Give a local model",
            )
        if first is not None and one.method.returns == "Model":
            can[one.name] = first
