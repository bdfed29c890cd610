"""One step of a plan: as it is written, and as it is known to be right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from truing.errors import InputError
from truing.method import Method
from truing.naming import Named


@dataclass(frozen=True)
class Source:
    """Where one noun comes from: another step, or something to be opened; `at`, who says so."""

    text: str
    is_step: bool = False
    at: str = field(default="", compare=False)


class Typed(NamedTuple):
    """A value of the command line: the text that was typed, and how errors call it."""

    text: str
    at: str


@dataclass
class Step:
    """One step as written.

    Args:
        name: unique in its plan.
        method: `verb/name`, or a bare name that is unique.
        given: inputs and settings by name.
        seed: None takes the plan's.
        where: file and line, for errors.
        typed: what the command line gave; relative paths in it are meant from the current
            directory.
    """

    name: str
    method: str
    given: dict[str, object] = field(default_factory=dict)
    seed: int | None = None
    where: str = ""
    lines: Mapping[str, str] = field(default_factory=dict)
    typed: dict[str, Typed] = field(default_factory=dict)

    def at(self, name: str = "") -> str:
        """How errors call the step, or one of its lines."""
        typed = self.typed.get(name)
        where = typed.at if typed else self.lines.get(name, self.where)
        return f"{where} step {self.name}".strip()


@dataclass(frozen=True)
class Checked:
    """A step whose method, settings and edges are known to be right."""

    step: Step
    method: Method
    sources: Mapping[str, Mapping[str, Source]]  # input -> role ("" for a single one) -> source
    settings: Mapping[str, object]
    seed: int
    named: Mapping[Named, Source] = field(default_factory=dict)  # inside settings: see `naming`
    references: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # given as inputs

    @property
    def name(self) -> str:
        """Name of the step."""
        return self.step.name

    def edges(self) -> list[str]:
        """Steps that this one needs."""
        return [source.text for _, _, source in self.given() if source.is_step]

    def inputs(self) -> dict[str, list[Source]]:
        """Where each of its inputs comes from; of one that is a reference, what that names."""
        named = {
            name: [s for one, s in self.named.items() if one.setting == name]
            for name in self.references
        }
        return {n: list(roles.values()) for n, roles in self.sources.items()} | named

    def given(self) -> list[tuple[str, str, Source]]:
        """(input or setting, noun that it takes, where that comes from) of all nouns."""
        inputs = self.method.inputs
        found = [
            (n, inputs[n].noun, s) for n, roles in self.sources.items() for s in roles.values()
        ]
        return found + [(one.setting, one.noun, s) for one, s in self.named.items()]


def seed_of(value: object, where: str) -> int | None:
    """A seed as written, None where none is; an InputError for what is no whole number."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        fix = "Give one such as 1, or leave it out"
        raise InputError("the seed must be a whole number", where=where, seen=value, fix=fix)
    return value
