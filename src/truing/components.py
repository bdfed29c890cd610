"""Components: registered functions that settings refer to as `{use: name, **settings}`."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeGuard, TypeVar, cast

from truing import catalogue
from truing.context import current
from truing.declared import declared
from truing.errors import InputError, TruingError, unknown
from truing.own_checks import check_of
from truing.references import Function, Ref, bare, check_rows, reference, refuse_bare

if TYPE_CHECKING:
    from truing.method import Method

Row = dict[str, object]
V = TypeVar("V")
LARGEST = sys.float_info.max


class _Array(Protocol):
    def tolist(self) -> object: ...
    def item(self) -> object: ...


def check_component(kind: str, ref: Ref, *, where: str = "") -> None:
    """Raise an InputError unless `ref` names a registered component with valid settings."""
    resolve(kind, ref, where=where)


def resolve(kind: str, ref: Ref, *, where: str = "") -> tuple[Function, dict[str, object]]:
    """The component's function and its validated settings.

    Args:
        ref: `{use: name, **settings}`, a bare name, or outside of stored steps a function.
    """
    from truing.method import Method

    ref = reference(ref)
    name = ref.get("use")
    if not isinstance(name, str):
        raise InputError(
            f"a {kind} is written {{use: name, ...settings}}",
            where=where,
            seen=dict(ref),
            fix="`truing list --components` has the names",
        )
    given = bare(kind, name, where=where)
    if given is not None:
        if current().stored:
            refuse_bare([name], where=where)
        return given, {}
    known = catalogue.components(kind)
    entry = known.get(name.replace("-", "_"))
    if entry is None:
        raise catalogue.no_component(kind, name, known, where=where)
    function = Method(entry)
    if declared(entry) is not None:
        check_rows(function.function, kind, name, settings=True, where=where)
    at = f"{where} {kind} {name}".strip()
    return function.function, settings_of(function, ref, where=at)


def asked(kind: str, ref: Ref, *, where: str = "") -> tuple[Function, dict[str, object]]:
    """`resolve`, and the component's own check of its settings passed (`truing.own_checks`)."""
    function, settings = resolve(kind, ref, where=where)
    if (check := check_of(function)) is not None:
        with told(check, "its check", where):
            check(settings)
    return function, settings


def settings_of(
    function: Method, ref: Mapping[str, object], *, where: str = ""
) -> dict[str, object]:
    """The settings that a reference gives a component, as their declared types.

    Raises:
        InputError: one is unknown, wrong or missing.
    """
    allowed = function.settings
    checked: dict[str, object] = {}
    for key, value in ref.items():
        if key == "use":
            continue
        if key not in allowed:
            raise unknown("setting", key, allowed, where=where)
        checked[key] = allowed[key].validate(value, where=where)
    for key, setting in allowed.items():
        if setting.required and key not in checked:
            fix = f"Write {{use: {ref['use']}, {key}: ...}}"
            raise InputError(f"setting {key!r} is missing", where=where, fix=fix)
    return checked


def get_component(kind: str, ref: Ref, *, where: str = "") -> Callable[..., object]:
    """The component that `ref` names, its settings bound: call it with the remaining arguments.

    Args:
        kind: such as "reward" or "check".
        ref: `{use: name, **settings}`, a bare name, or outside of stored steps a function.
        where: what errors name.
    Raises:
        InputError: no such component, or a setting of it that is unknown, wrong or missing.
    """
    function, settings = resolve(kind, ref, where=where)
    return functools.partial(function, **settings)


def one_a_row(
    kind: str, ref: Ref, rows: Sequence[Row], *, where: str = "", name: str = ""
) -> list[object]:
    """What a check, reward or scorer makes of `rows`: as many, or an InputError.

    Args:
        name: how errors call it; "" takes the component's own name.
    Raises:
        InputError: too many or too few; or a function of the user's own raises, named with its row.
    """
    ref = reference(ref)
    name = name or str(ref.get("use"))
    function = get_component(kind, ref, where=where)
    try:
        # What a function of the user's own writes into its rows is no other function's to see.
        values = function(list(rows) if is_own(function) else own_copy(list(rows)))
    except Exception as error:
        if not of_the_user(function, error):
            raise
        raise _raised(error, f"{kind} {name!r}", function, rows, where) from error
    if isinstance(values, tuple):
        values = list(cast("tuple[object, ...]", values))
    elif not isinstance(values, list) and hasattr(values, "tolist"):  # an array, a tensor
        values = cast("_Array", values).tolist()
    if not isinstance(values, list) or len(cast("list[object]", values)) != len(rows):
        got = len(values) if isinstance(values, Sequence) else type(values).__name__
        raise InputError(
            f"{kind} {name!r} must return one score a row",
            where=where,
            seen=f"{got} for {len(rows)} rows",
        )
    return cast("list[object]", values)


def of_the_user(function: Callable[..., object], error: Exception) -> bool:
    """True for a mistake in a function that is none of truing's own, and no fault of the system."""
    if isinstance(error, (TruingError, OSError, MemoryError)):
        return False
    return not is_own(function) and "out of memory" not in str(error).lower()


@contextlib.contextmanager
def told(function: Callable[..., object], what: str, where: str) -> Generator[None]:
    """What a user's own function raises inside the block is an InputError with its place.

    Args:
        what: raised it, as errors say.
        where: what errors name.
    """
    try:
        yield
    except Exception as error:
        if not of_the_user(function, error):
            raise
        said = f"{what} raised {type(error).__name__}: {error}"
        raise InputError(said, where=where, fix=see(error, function)) from error


def is_own(function: Callable[..., object]) -> bool:
    """True for truing's own functions."""
    module = str(getattr(getattr(function, "func", function), "__module__", ""))
    return module.startswith("truing.") and module != "truing.references"


def own_copy(value: V) -> V:
    """`value` with copies of the lists and dicts in it; what else it holds stays what it is."""
    if type(value) is dict:
        items = cast("dict[object, object]", value)
        return cast(V, {k: own_copy(v) for k, v in items.items()})
    if type(value) is list:
        return cast(V, [own_copy(v) for v in cast("list[object]", value)])
    return value


def _raised(
    error: Exception, what: str, function: Callable[..., object], rows: Sequence[Row], where: str
) -> InputError:
    """What a user's function raised, with its place and the first row that alone makes it raise."""
    at = 0
    for i, row in enumerate(rows, 1):
        try:
            function([own_copy(row)])
        except Exception as again:
            at = i if type(again) is type(error) else 0
            break
    return InputError(
        f"{what} raised {type(error).__name__}: {error}",
        where=f"{where} row {at}".strip() if at else where,
        seen=rows[at - 1].get("completion") if at else None,
        fix=see(error, function),
    )


def see(error: Exception, function: Callable[..., object]) -> str:
    """Where a user's function raised: the last line of its own file that led there."""
    frames = traceback.extract_tb(error.__traceback__)
    plain = getattr(function, "func", function)
    code = getattr(plain, "__code__", None)
    module = sys.modules.get(str(getattr(plain, "__module__", "")))
    file = code.co_filename if code is not None else getattr(module, "__file__", None)
    last = [*frames, *(f for f in frames if f.filename == file)][-1]
    return f"See {last.filename} line {last.lineno}"


def number_of(value: object) -> float:
    """A number of Python's, numpy's or torch's; NaN for what is none that a float holds."""
    if getattr(value, "ndim", None) == 0:
        value = cast("_Array", value).item()
    return float(value) if _holds(value) else math.nan


def _holds(value: object) -> TypeGuard[float]:
    """True for numbers that a float holds: whole ones may be larger than any."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) <= LARGEST)


def finite(value: object, *, what: str, where: str) -> float:
    """The value as a finite number, or an InputError."""
    number = number_of(value)
    if not math.isfinite(number):
        raise InputError(
            f"{what} returned a score that is not a finite number", where=where, seen=value
        )
    return number


def score(kind: str, ref: Ref, rows: Sequence[Row], *, where: str = "") -> list[float]:
    """Scores of `rows` under a check, reward or scorer: same length, finite, or an InputError."""
    ref = reference(ref)
    name = str(ref.get("use"))
    return [
        finite(value, what=f"{kind} {name!r}", where=f"{where} row {i}".strip())
        for i, value in enumerate(one_a_row(kind, ref, rows, where=where), 1)
    ]
