"""What a method's inputs hold: kinds of rows, the columns that are read, and who a model is.

The code tells most of it; what nothing tells of an input by its name alone is in `USUAL` here. Used
by a method's own `--help`, by `truing show` and by the pages of methods.
"""

from __future__ import annotations

import inspect
from math import inf
from typing import TYPE_CHECKING, cast

from truing.method import Kinds, Method
from truing.signature import argument_docs
from truing.tables import KINDS

if TYPE_CHECKING:
    from truing.core.objective import Objective
    from truing.core.online import Online
    from truing.signature import Input

# What an input is by its name, where its method says nothing of its own.
MODEL = {
    "attack": "what is damaged",
    "decode": "what writes the answers",
    "evaluate": "what is measured",
    "select": "what scores the rows",
    "serve": "what is served",
    "specify": "what answers are sampled from",
    "steer": "what is steered",
    "synthesize": "what writes the rows",
    "train": "what is trained",
}
USUAL = {
    "reference": "frozen, what is compared with; without one, the model as it was at the start",
    "principles": "rules, with their texts, priorities and checks",
    "reward_model": "scores whole answers, as a reward beside those that are named",
    "process_model": "scores the steps of answers",
    "outcome_model": "scores whole answers",
    "partner": "acts in the environment's other roles, such as a simulated user",
    "teacher": "what is learnt from",
    "judge": "reads answers and gives verdicts",
    "critic": "brings the trunk and head of the values; without one they are the policy's own",
    "guard": "tells harmful answers from others",
    "data": "rows",
    "teacher_reference": "what the teacher was before it was aligned",
    "reward_models": "a reward model for each objective",
    "process_models": "a scorer of steps for each objective",
    "outcome_models": "a scorer of whole answers for each objective",
    "outcome_process_model": "scores whole answers and steps",
    "reward": "scores the steps of answers",
    "baseline": "what is compared with",
    "weak": "the supervisor",
    "student": "what learnt from the supervisor's labels",
    "ceiling": "the same student, taught by true labels",
    "others": "further models by name",
    "before": "of the model as it was",
    "after": "of the model as it has become",
    "ability_before": "of evaluate/ability, as it was",
    "ability_after": "of evaluate/ability, as it has become",
    "refusals": "of evaluate/refusal_rate, by the name of a run",
    "abilities": "of evaluate/ability, by the name of a run",
    "preferences": "of evaluate/implicit_preference, by the name of a run",
    "win_rates": "of evaluate/win_rate, by the name of a run",
    "divergences": "of evaluate/divergence, by the name of a run",
}


def _spec(method: Method) -> Objective | Online | None:
    """What a training method declares; None for one that is a function of its inputs.

    Only the former are met by the engine's modules, and so by PyTorch.
    """
    if method.entry.kind == "objective":
        from truing.core.objective import objective_of

        return objective_of(method.declared)
    if method.entry.kind == "online":
        from truing.core.online import online_of

        return online_of(method.declared)
    return None


def _shared(kind: str) -> dict[str, str]:
    """Inputs that all methods of a sort have, and what they hold."""
    if kind == "objective":
        from truing.core import held_out

        return {held_out.INPUT: held_out.ABOUT}
    if kind == "online":
        from truing.core import held_out
        from truing.core.rl import online_entry, online_mix

        watched = online_entry.WATCHED[held_out.INPUT]
        return {online_mix.INPUT: online_mix.ROWS, held_out.INPUT: watched}
    return {}


def kinds_of(method: Method) -> Kinds:
    """Kinds of rows that its tables may be of, by input."""
    spec = _spec(method)
    if spec is not None:
        return {"data": (spec.rows,)}
    facts = cast("dict[str, Kinds]", getattr(method.declared, "__truing__", {}))
    return facts.get("rows", {})


def _either(names: list[str]) -> str:
    *first, last = (f"`{n}`" for n in names)
    return f"{', '.join(first)} or {last}" if first else last


def _converted(spec: Objective | Online) -> str:
    """The kinds that its rows are made from, or that it reads as well."""
    from truing.core.batch.row_kinds import is_taken, takes_texts
    from truing.core.objective import Objective

    texts = isinstance(spec, Objective) and takes_texts(spec)
    others = [one for one in KINDS if one != spec.rows and is_taken(one, spec.rows, texts)]
    return f", made from {_either(others)} too" if others else ""


def _columns(spec: Objective | Online) -> list[str]:
    """Columns that it reads besides those of its kind, with what stands for a missing one."""
    from truing.core.online import Online

    own = {column for choice in KINDS[spec.rows] for column in choice}
    if isinstance(spec, Online):
        if not spec.given or spec.given in own:
            return []
        when = ", where `ptx` is above 0" if "ptx" in spec.settings else ""
        return [f"`{spec.given}` (text{when})"]
    numbers = [
        f"`{name}` (number{_missing(default)})"
        for name, default in spec.columns.items()
        if name not in own
    ]
    texts = [
        f"`{name}` (text{'' if other is None else f'; `{other}` where missing'})"
        for name, other in spec.texts.items()
    ]
    return numbers + texts


def _missing(default: float | None) -> str:
    """What stands for a number that a row does not give."""
    if default is None:
        return ""
    return f"; {default:g} where missing" if default > -inf else "; none where missing"


def holds(method: Method, given: Input) -> str:
    """What an input holds; column and kind names stand in back-quotes."""
    spec, kinds = _spec(method), kinds_of(method).get(given.name, ())
    shared = _shared(method.entry.kind)
    if given.name in shared:
        return shared[given.name].removesuffix(".")
    said: list[str] = []
    if kinds:
        said.append(f"rows of kind {_either(list(kinds))}{_converted(spec) if spec else ''}")
        columns = _columns(spec) if spec else []
        said += [f"columns besides: {', '.join(columns)}"] if columns else []
    docs = argument_docs(method.doc) | argument_docs(inspect.getdoc(method.declared) or "")
    said += [docs[given.name]] if given.name in docs else []
    usual = MODEL.get(method.verb, "") if given.name == "model" else USUAL.get(given.name, "")
    if not given.optional:
        usual = usual.partition("; without one")[0]
    said = said or ([usual] if usual else [])
    said += [f"without one, the data set `{given.default}`"] if given.default else []
    return "; ".join(text.removesuffix(".") for text in said)


def noun_of(given: Input) -> str:
    """The noun that an input takes, in words."""
    return given.noun.replace("|", " or ") + (", several by role" if given.many else "")
