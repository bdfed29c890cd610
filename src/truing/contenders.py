"""Who is compared: methods and groups as they are named, and what rows at hand allow of them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from truing.errors import InputError
from truing.method import Method
from truing.method import methods as registry
from truing.signature import read_value
from truing.steps import Typed
from truing.tables import Table

NO_REWARDS = "needs rewards"


@dataclass(frozen=True)
class Contender:
    """One line of the table: a method, perhaps with settings that differ from its defaults.

    `grouped` ones are meant by the name of their group, and are left out where they need more.
    """

    label: str
    method: str
    settings: Mapping[str, object]
    grouped: bool = False


def parts(text: str, mark: str) -> list[str]:
    """What stands between the marks that lie outside of brackets and quotes."""
    found, depth = [""], 0
    for token in re.findall(r'"(?:\\.|[^"\\])*"|.', text, re.S):
        depth += (token in "([{") - (token in ")]}")
        if token == mark and depth <= 0:
            found.append("")
        else:
            found[-1] += token
    return found


def settings_of(given: Sequence[str], where: str) -> dict[str, Typed]:
    """Settings by name from "beta=0.3" and the like, as they were typed."""
    settings: dict[str, Typed] = {}
    for one in given:
        key, found, written = one.partition("=")
        if not found:
            raise InputError("settings are written setting=value", where=where, seen=one)
        settings[key] = Typed(written, f"{where} {key}")
    return settings


def _bare(written: Typed) -> Typed:
    """Without the quotes that hold its commas and marks together."""
    value = read_value(written.text)
    return written._replace(text=value) if isinstance(value, str) else written


def contender(text: str, verb: str, shared: Mapping[str, object] | None = None) -> Contender:
    """ "dpo", "train/dpo" or "dpo@beta=0.3@lr=1e-4"; its own settings come before shared ones."""
    name, *given = parts(text.strip(), "@")
    own = {n: _bare(value) for n, value in settings_of(given, "--methods").items()}
    method = registry[name if "/" in name else f"{verb}/{name}"]
    if method.returns != "Model":
        raise InputError(
            "only methods that return a model can be compared",
            where="--methods",
            seen=method.id,
            fix="Such are those of `truing list --verb train`",
        )
    label = re.sub(r"[^\w.-]+", "_", text.strip().replace("/", "-"))
    settings = {n: _read(method, n, value) for n, value in {**(shared or {}), **own}.items()}
    return Contender(label, method.id, settings)


def _read(method: Method, name: str, value: object) -> object:
    """A setting as its method takes what was typed; of one that it does not have, the text."""
    if not isinstance(value, Typed):
        return value
    known = method.settings.get(name)
    return known.parse(value.text, where=value.at) if known else value.text


def members(text: str, verb: str) -> list[str]:
    """Names of all methods of a group, such as "preference"; none where it is no group's name."""
    name = text.strip()
    group = [m.name for m in registry.values() if m.verb == verb and m.group == name]
    return group if f"{verb}/{name}" not in registry else []


def contenders_of(
    methods: Sequence[str], verb: str, shared: Mapping[str, object] | None = None
) -> list[Contender]:
    """What is named: each by itself, and all of each group; an InputError for one named twice."""
    found: list[Contender] = []
    for text in methods:
        group = [contender(name, verb, shared) for name in members(text, verb)]
        found += [replace(one, grouped=True) for one in group] or [contender(text, verb, shared)]
    labels = [c.label for c in found]
    if len(set(labels)) < len(labels):
        fix = "Leave one out, or give it settings of its own: dpo,dpo@beta=0.3"
        raise InputError("a method is named twice", where="--methods", seen=labels, fix=fix)
    return found


def missing_inputs(method: Method) -> list[str]:
    """Inputs that a comparison on pairs cannot give."""
    given = ("model", "data")
    return [n for n, i in method.inputs.items() if not i.optional and n not in given]


def lack(one: Contender, pairs: Table) -> str:
    """What a method needs and a comparison on these pairs does not give; "" where it is all there.

    Raises:
        InputError: its settings are at fault, whatever the rows.
    """
    method = registry[one.method]
    if missing := missing_inputs(method):
        return f"needs {', '.join(missing)}"
    try:
        settings = method.validate(one.settings, where=one.label)
    except InputError as error:
        # A group's members have the settings that are shared, which some of them lack; others need
        # one that nobody gave.
        if one.grouped and error.message.startswith("unknown setting"):
            return error.message
        if one.grouped and error.message.endswith("is missing"):
            return error.message
        raise
    if {"rewards", "environment"} <= set(settings) and not (
        settings["rewards"] or settings["environment"]
    ):
        return NO_REWARDS
    method.check(settings, {}, where=one.label)
    try:
        method.check(settings, {"data": pairs}, where=one.label)
    except InputError as error:
        return error.message
    return ""


def reasons(left: Mapping[str, str]) -> list[str]:
    """Lines that say which methods were left out and why: those with one reason together."""
    return [
        f"{', '.join(name for name, other in left.items() if other == why)}: {why}"
        for why in dict.fromkeys(left.values())
    ]


def _remedy(found: Sequence[Contender], whys: Iterable[str]) -> str:
    """What to do where no method is left: settings can be given here, further inputs cannot."""
    fix = "Name others"
    if any(why.endswith((" is missing", NO_REWARDS)) for why in whys):
        fix += ", or give the settings that are missing by --set"
    if any(missing_inputs(registry[c.method]) for c in found):
        fix += "; in a recipe a step is given any input"
    return fix


def taken(found: Sequence[Contender], pairs: Table) -> tuple[list[Contender], dict[str, str]]:
    """The contenders, and of those that are left out why."""
    left = {c.label: why for c in found if c.grouped and (why := lack(c, pairs))}
    for line in reasons(left):
        print(f"left out: {line}", file=sys.stderr)
    kept = [c for c in found if c.label not in left]
    if not kept:
        raise InputError(
            f"none of these methods can be compared on {pairs.source}",
            where="--methods",
            seen=left,
            fix=_remedy(found, left.values()),
        )
    return kept, left


def budget_of(text: str) -> int:
    """Rows in "64pairs", "64 rows" or "64"."""
    found = re.fullmatch(r"\s*(\d+)\s*(pairs|rows|)\s*", text)
    if not found or not int(found[1]):
        raise InputError(
            "a budget is a number of rows", where="--budget", seen=text, fix="Such as 64pairs"
        )
    return int(found[1])
