"""What errors tell a user to give for an input, on the command line and in a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from truing.errors import InputError
from truing.method import methods

if TYPE_CHECKING:
    from truing.plan import Checked, Plan, Step
    from truing.signature import Input

# What names a noun where no step makes it.
NAMED = {
    "Model": "a folder, a name of `truing models` or of the Hugging Face hub, or "
    "http://host:port/v1#NAME",
    "Table": "a file of rows (.jsonl, .csv, .parquet) or a name of `truing data`",
    "Principles": "a principles file (.yaml, .json)",
    "Report": "the folder of a report, such as the --out of `truing evaluate`",
}


def sources(noun: str) -> str:
    """What names that noun; of several, as in "Model|Table", what names one of them."""
    return ", or ".join(NAMED[n] for n in noun.split("|"))


def makers(plan: Plan, noun: str, but: Step) -> list[str]:
    """Names in a plan that stand for that noun: its models, its data sets and other steps."""
    nouns = noun.split("|")
    named = [*(plan.models if "Model" in nouns else ()), *(plan.data if "Table" in nouns else ())]
    for name, step in plan.steps.items():
        try:
            made = methods[step.method].returns
        except InputError:  # of a method that is not there, which is a mistake of its own
            continue
        if step is not but and made in nouns:
            named.append(name)
    return named


def missing(plan: Plan, step: Step, wanted: Input, method: str) -> InputError:
    """The error for an input that a step is not given, with the names that fit it."""
    fits = " or ".join(makers(plan, wanted.noun, step))
    return InputError(
        f"input {wanted.name!r} ({wanted.noun}) of {method} is missing",
        where=step.at(),
        fix=f"Add {wanted.name}: {fits or sources(wanted.noun)}",
    )


def unnamed(plan: Plan, step: Step, wanted: Input, given: object) -> InputError:
    """The error for what is given for an input and is no name, such as a number or a list."""
    fits = " or ".join(makers(plan, wanted.noun, step))
    return InputError(
        f"input {wanted.name!r} takes the name of a step or a source",
        where=step.at(wanted.name),
        seen=given,
        fix=f"Give {fits or sources(wanted.noun)}",
    )


def misfit(plan: Plan, step: Step, sort: str, name: str, noun: str, given: Checked) -> InputError:
    """The error for an input or setting that takes another noun than the step given for it makes.

    Args:
        sort: "input" or "setting", and its `name`.
        given: the step that is named there.
    """
    fits = " or ".join(makers(plan, noun, step))
    return InputError(
        f"{sort} {name!r} takes a {noun}, and step {given.name!r} ({given.method.id}) makes a "
        f"{given.method.returns}",
        where=step.at(name),
        fix=f"Give {fits or sources(noun)}",
    )
