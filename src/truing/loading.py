"""The module of a registered function, imported when it is first needed."""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
import types
from collections.abc import Generator

from truing.declared import declared
from truing.entry import Entry
from truing.errors import InputError, MissingExtra
from truing.references import Function

in_command = False  # whether this process is a command's own: nothing else is in its memory


def is_loaded(entry: Entry) -> bool:
    """True where asking the function itself costs nothing more."""
    return entry.module in sys.modules or declared(entry) is not None


def module_of(entry: Entry) -> types.ModuleType:
    """The module, imported; an InputError names the package that it lacks."""
    if (own := declared(entry)) is not None:
        return _of_function(own.function, entry.module)
    try:
        with _uncollected():
            return importlib.import_module(entry.module)
    except ModuleNotFoundError as error:
        name = (error.name or "?").partition(".")[0]
        if name == "truing":
            raise
        raise missing(name, entry.id, entry.package) from error


def missing(package: str, what: str, owner: str) -> InputError:
    """The error for a package that is not there and that `what` needs, which is of `owner`."""
    from truing.doctor import extra_of

    extra = extra_of(package)
    if extra:
        return MissingExtra(package, extra, where=what)
    return InputError(
        f"the package {package!r} is needed here and is not installed",
        where=f"{what} of {owner}",
        fix=f"Install it with: pip install {package}",
    )


def _of_function(function: Function, name: str) -> types.ModuleType:
    """The module of a function whose file was run, not imported."""
    held = function.__globals__
    found = sys.modules.get(name)
    if found is None or found.__dict__ is not held:
        found = types.ModuleType(name)
        found.__dict__.update(held)
    return found


@contextlib.contextmanager
def _uncollected() -> Generator[None]:
    """No garbage collection: one fifth of what PyTorch and transformers take to be imported.

    What a command has imported stays to its end: no later collection has to look through it. That
    is said once, with PyTorch, when there is no model yet which might have to go again.
    """
    on, first = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if in_command and first and "torch" in sys.modules:
            gc.freeze()
        if on:
            gc.enable()
