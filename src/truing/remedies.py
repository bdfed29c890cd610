"""What errors tell a user to give for an input: on the command line, in a plan and in Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from truing.errors import InputError, beside, stems, unknown
from truing.method import methods

if TYPE_CHECKING:
    from truing.plan import Plan
    from truing.signature import Input
    from truing.steps import Checked, Step

# What names a noun where no step makes it.
NAMED = {
    "Model": "a folder, a name of `truing models` or of the Hugging Face hub, or "
    "http://host:port/v1#NAME",
    "Table": "a file of rows (.jsonl, .csv, .parquet) or a name of `truing data`",
    "Principles": "a principles file (.yaml, .json)",
    "Report": "the folder of a report, such as the --out of `truing evaluate`",
}
# What is one in Python.
OBJECTS = {
    "Model": "a truing.Model, a folder that save_pretrained writes",
    "Table": "a truing.Table, a list of dicts, one split of a datasets.Dataset",
    "Principles": "truing.Principles",
    "Report": "a truing.Report",
}
# What rewards answers where a served model cannot.
SERVED_REWARD = (
    "Give a local model, let a reward model's server say it, rewards: {good: {use: "
    "served_reward, url: 'http://host/classify#name'}}, or a judge: {use: judged, "
    "model: 'http://host/v1#name'}"
)
SEVERAL = "; select/mixture makes one table of several"
RULES = (".yaml", ".yml", ".json")


def sources(noun: str) -> str:
    """What names that noun; of several, as in "Model|Table", what names one of them."""
    return ", or ".join(NAMED[n] for n in noun.split("|"))


def objects(noun: str) -> str:
    """What to give for that noun in Python."""
    return "; or: ".join(f"Give {OBJECTS[n]}, or {NAMED[n]}" for n in noun.split("|"))


def option(wanted: Input) -> str:
    """What to give for an input on the command line."""
    name = f"--{wanted.name.replace('_', '-')}"
    if wanted.many:
        return f"Give {name} NAME=SOURCE, once for each; a source is {sources(wanted.noun)}"
    return f"Give {name} {sources(wanted.noun)}"


def makers(plan: Plan, noun: str, but: Step) -> list[str]:
    """Names in a plan that may be given to a step for that noun: models, data sets, other steps.

    None of those that wait for the step itself.
    """
    nouns, waiting = noun.split("|"), _waiting(plan, but.name)
    named = [*(plan.models if "Model" in nouns else ()), *(plan.data if "Table" in nouns else ())]
    for name, step in plan.steps.items():
        try:
            made = methods[step.method].returns
        except InputError:  # of a method that is not there, which is a mistake of its own
            continue
        if name not in waiting and made in nouns:
            named.append(name)
    return named


def _fitting(plan: Plan, noun: str, but: Step) -> str:
    """The names of `makers`, or what else names that noun."""
    return " or ".join(makers(plan, noun, but)) or sources(noun)


def _waiting(plan: Plan, name: str) -> set[str]:
    """A step and all those that wait for it: that their texts name one of them is enough."""
    named = {other: set(_texts(step.given)) for other, step in plan.steps.items()}
    found, more = set[str](), {name}
    while more:
        found |= more
        more = {other for other, texts in named.items() if texts & more} - found
    return found


def _texts(value: object) -> Iterator[str]:
    """The texts in a value, however deep."""
    if isinstance(value, (str, Path)):
        yield str(value)
    elif isinstance(value, Mapping):
        yield from _texts(list(cast("Mapping[object, object]", value).values()))
    elif isinstance(value, Sequence):
        for one in cast("Sequence[object]", value):
            yield from _texts(one)


def missing(plan: Plan, step: Step, wanted: Input, method: str) -> InputError:
    """The error for an input that a step is not given, with the names that fit it."""
    several = "{NAME: SOURCE, ...}; a source is " if wanted.many else ""
    return InputError(
        f"input {wanted.name!r} ({wanted.noun}) of {method} is missing",
        where=step.at(),
        fix=f"Add {wanted.name}: {several}{_fitting(plan, wanted.noun, step)}",
    )


def unnamed(plan: Plan, step: Step, wanted: Input, given: object) -> InputError:
    """The error for what is given for an input and is no name, such as a number or a list."""
    fix = f"Give {_fitting(plan, wanted.noun, step)}"
    if isinstance(given, Mapping) and "Model" in wanted.noun.split("|"):
        fix = (
            "Write it below models: with a name, or with plan.model(NAME, {...}), and give that "
            "name here. A key goes into the environment variable TRUING_API_KEY"
        )
    elif isinstance(given, Mapping) and wanted.noun == "Table":
        fix = (
            "Write it below data: with a name, or with plan.table(NAME, {...}), and give that name "
            "here"
        )
    elif isinstance(given, (bool, int, float)):
        fix += "; a name that reads as a number, or as true or false, stands in quotes"
    if isinstance(given, (Mapping, Sequence)) and "Table" in wanted.noun.split("|"):
        fix += SEVERAL
    return InputError(
        f"input {wanted.name!r} takes the name of a step or a source",
        where=step.at(wanted.name),
        seen=given,
        fix=fix,
    )


def unfound(
    plan: Plan, step: Step, wanted: Input, text: str, *, sort: str, typed: bool
) -> InputError:
    """The error for a text that names nothing, with what is like it: a name, or a file beside.

    Args:
        sort: "input" or "setting".
        typed: on the command line: a path is seen from the current directory, not the recipe's.
    """
    from truing import datasets, renaming, tablefiles
    from truing.core.modelfiles import fetch

    nouns = wanted.noun.split("|")
    known, ends = set(makers(plan, wanted.noun, step)), tuple[str, ...]()
    if "Table" in nouns:
        known, ends = known | set(datasets.sets()), tablefiles.SUFFIXES
    if "Model" in nouns:
        known |= set(fetch.names())
    if "Principles" in nouns:
        ends += RULES
    start, path = Path() if typed else plan.folder, Path(text.partition("?")[0])
    near = stems(start, ends, folders=not ends)
    fixes = [unknown("name", text, known, near=near).fix]
    if path.suffix or "/" in text:
        fixes.insert(0, beside(path, ends, folders=not ends, start=start))
    close = next((f for f in fixes if f.startswith("Did you mean")), fixes[0] or fixes[-1])
    return InputError(
        f"{sort} {wanted.name!r}: no step, file or {wanted.noun.lower()} called {text!r}",
        where=step.at(wanted.name),
        fix=(tablefiles.hub_fix(renaming.split(text)[0]) if "Table" in nouns else "") or close,
    )


def circular(plan: Plan, left: Mapping[str, Checked]) -> InputError:
    """The error for steps that wait for each other, by the first of them; others wait for these.

    Args:
        left: steps by name, each of which waits for another one of them.
    """
    path = [next(iter(left))]
    while path[-1] not in path[:-1]:
        path.append(next(e for e in left[path[-1]].edges() if e in left))
    circle = set(path[path.index(path[-1]) :])
    first, *others = [n for n in left if n in circle]
    return InputError(
        "steps wait for each other in a circle" if others else "a step waits for itself",
        where=plan.steps[first].at(),
        seen=[first, *others],
        fix="Give one of them an input that none of the others makes"
        if others
        else "Give it an input that another step makes, or that is there",
    )


def misfit(plan: Plan, step: Step, sort: str, name: str, noun: str, given: Checked) -> InputError:
    """The error for an input or setting that takes another noun than the step given for it makes.

    Args:
        sort: "input" or "setting", and its `name`.
        given: the step that is named there.
    """
    return InputError(
        f"{sort} {name!r} takes a {noun}, and step {given.name!r} ({given.method.id}) makes a "
        f"{given.method.returns}",
        where=step.at(name),
        fix=f"Give {_fitting(plan, noun, step)}",
    )
