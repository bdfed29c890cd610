"""References to components, `{use: name, **settings}`, and functions that stand for one.

Whoever calls a method in Python may give a function where a reference is wanted:

    methods["grpo"](model, prompts, rewards={"short": lambda rows: [...]})

It gets a name of this process alone, under which every place that follows references finds it as
long as any reference with that name is held: by the call, or by what it returned, such as a model
that decodes by it. A function that `@component` registered is referred to by its own name. Nothing
tells the next version of any other function from this one, so a stored step takes none, and no
model is saved with one.
"""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

from truing.errors import InputError

Function = Callable[..., object]
Ref = Mapping[str, object] | str | Function
OF_ROWS = ("check", "reward")  # kinds whose functions take rows and nothing else
WITH_MODEL = ("scorer", "embedder")  # kinds whose functions may take a model beside the rows
APART = ("prompts", "completions")  # what functions of rewards elsewhere take
REGISTER = (
    'Put @component("reward") on it (or "check", "environment", ...) at the top level of the '
    "script or recipe file, or of a module that it imports, and write {use: NAME, ...settings}"
)


class _Name(str):
    """The name of a function that was given as it is; it holds the function."""

    function: Function

    def __deepcopy__(self, memo: object) -> _Name:
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)  # elsewhere it is no more than a name


_bare: weakref.WeakValueDictionary[str, _Name] = weakref.WeakValueDictionary()
_times: Counter[str] = Counter()  # how many had one name: none is given to a second function


def referred(value: object) -> object:
    """`value` with a reference in place of every function, at whatever depth.

    Models and principles that stand as settings in a reference are held, under their keys.
    """
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value)
        if "use" in items:
            return {k: referred(_held(v)) for k, v in items.items()}
        return {k: referred(v) for k, v in items.items()}
    if isinstance(value, (list, tuple)):
        return [referred(v) for v in cast("Sequence[object]", value)]
    return {"use": _name(value)} if callable(value) else value


def _held(value: object) -> object:
    """The key of a model or of principles, which `truing.models.held` gives back; else `value`."""
    if isinstance(value, (list, tuple)):
        return [_held(v) for v in cast("Sequence[object]", value)]
    if value is None or isinstance(value, (str, bool, int, float, Mapping)):
        return value
    from truing.models import Model, hold
    from truing.principles import Principles

    return hold(value) if isinstance(value, (Model, Principles)) else value


def reference(ref: Ref) -> Mapping[str, object]:
    """A reference in full, however it is given."""
    return {"use": ref} if isinstance(ref, str) else cast("Mapping[str, object]", referred(ref))


def _name(function: Function) -> str:
    """The registered name of a function, or one that is made up for it: `short()`."""
    own = str(getattr(function, "__name__", type(function).__name__))
    facts = cast("Mapping[str, object]", getattr(function, "__truing__", {}))
    # Inside another function it may differ from call to call: no name says which it is.
    if "component" in facts and "<locals>" not in getattr(function, "__qualname__", ""):
        return str(facts.get("name") or own)
    same = next((name for name in _bare.values() if name.function is function), None)
    if same is not None:
        return same
    _times[own] += 1
    name = _Name(f"{own}() {_times[own]}" if _times[own] > 1 else f"{own}()")
    name.function = function
    _bare[str(name)] = name
    return name


def bare(kind: str, name: str, *, where: str = "") -> Function | None:
    """The function that was given as it is and has this name; None where there is none.

    Raises:
        InputError: it cannot be called as components of this kind are.
    """
    given = _bare.get(name)
    function = given.function if given is not None else None
    if function is not None:
        check_rows(function, kind, name, where=where)
    return _taking(function) if function is not None and kind in WITH_MODEL else function


def is_bare(name: str) -> bool:
    """True for the name that a function given as it is has."""
    return name in _bare


def any_bare() -> bool:
    """True while any function that was given as it is has a name."""
    return bool(_bare)


def refuse_bare(names: Iterable[str], *, what: str = "a stored step", where: str = "") -> None:
    """Raise an InputError when one of these names is that of a function given as it is."""
    for name in names:
        if name in _bare:
            raise InputError(
                f"a function that is given as it is cannot be part of {what}: nothing would tell "
                "its next version from this one",
                where=where,
                seen=name,
                fix=REGISTER,
            )


def _parameters(function: Function) -> Mapping[str, inspect.Parameter] | None:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # of some built-in functions nothing is known
        return None


def _taking(function: Function) -> Function:
    """A function without the keywords that it does not take, such as the model to score with."""
    known = _parameters(function) or {}
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        return function
    return lambda rows, **more: function(rows, **{n: v for n, v in more.items() if n in known})


def check_rows(
    function: Function, kind: str, name: str, *, settings: bool = False, where: str = ""
) -> None:
    """Raise an InputError for a reward or check that does not take rows alone.

    Functions of other libraries take prompts and completions apart. Called with rows they might
    even return numbers, which would mean nothing.

    Args:
        settings: keyword-only parameters are filled in by a reference.
    """
    known = _parameters(function)
    if kind not in OF_ROWS or known is None:
        return
    filled = inspect.Parameter.KEYWORD_ONLY if settings else None
    if _takes_one([p for p in known.values() if p.kind is not filled]):
        return
    apart = [n for n in APART if n in known]
    if apart:
        given = ", ".join(f"{n}=[r[{n[:-1]!r}] for r in rows]" for n in apart)
        own = str(getattr(function, "__name__", ""))
        fix = f"Wrap it: lambda rows: {own if own.isidentifier() else 'mine'}({given})"
    else:
        fix = f"Write def {kind}(rows): return [... for row in rows]"
    raise InputError(
        f"a {kind} takes one argument, the rows, each with 'prompt' and 'completion'",
        where=where,
        seen=f"{name} takes {', '.join(known) or 'nothing'}",
        fix=fix,
    )


def _takes_one(parameters: Sequence[inspect.Parameter]) -> bool:
    """True for one argument by position, which is not one of those that others take apart."""
    if not parameters or any(p.name in APART for p in parameters):
        return False
    first, *rest = parameters
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if first.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
        return False
    return all(p.default is not p.empty or p.kind in many for p in rest)
