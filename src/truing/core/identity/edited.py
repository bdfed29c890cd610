"""Whether the code that is loaded is still that of its file.

Code objects are compared by what they do: comments, docstrings and places in the file may change.
"""

from __future__ import annotations

import ast
import dis
import inspect
import sys
import types
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import cast

from truing.errors import InputError


def check_loaded(module: str, path: Path) -> None:
    """Raise an InputError for a module whose functions were edited since it was loaded.

    Under the key of the new text, what the old code makes would be found by the new one. Methods of
    classes are compared, too, and defaults that are written out; not what a module works out as it
    is loaded, such as its constants.
    """
    if type(getattr(sys.modules[module], "__loader__", None)) is not SourceFileLoader:
        return  # others, such as pytest's, change code as they load it
    tree = ast.parse(path.read_bytes(), str(path))
    codes: dict[str, list[object]] = {}
    for code in _inner(compile(tree, str(path), "exec", dont_inherit=True)):
        codes.setdefault(code.co_qualname, []).append(_steps(code))
    heads: dict[str, list[ast.arguments]] = {}
    for name, arguments in _functions(tree):
        heads.setdefault(name, []).append(arguments)
    for name in heads:
        held: object = sys.modules[module]
        for part in name.split("."):
            held = inspect.getattr_static(held, part, None)
        for part in ("__func__", "fget", "func"):  # of a class method or a property
            held = getattr(held, part, held)
        held = inspect.unwrap(held) if callable(held) else held
        if not isinstance(held, types.FunctionType) or held.__module__ != module:
            continue
        # One of several of a name, and the inner function of a decorator, may be what it is.
        found = held.__code__.co_qualname
        same = found not in codes or _steps(held.__code__) in codes[found]
        if not same or not any(_defaults_are(held, h) for h in heads.get(found, heads[name])):
            raise InputError(
                f"the function {name!r} was edited since its module was loaded",
                where=str(path),
                fix=f"Load it again, importlib.reload({module}), or start Python anew",
            )


def _inner(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of all functions and classes inside of a module's."""
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield inner
            yield from _inner(inner)


def _functions(tree: ast.AST, above: str = "") -> Iterator[tuple[str, ast.arguments]]:
    """(qualified name, arguments) of the functions of a module and of its classes."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield above + node.name, node.args
        else:
            inside = f"{above}{node.name}." if isinstance(node, ast.ClassDef) else above
            yield from _functions(node, inside)


def _defaults_are(held: types.FunctionType, written: ast.arguments) -> bool:
    """True where a function's defaults are those of the text, as far as it writes them out."""
    places, named = held.__defaults__ or (), held.__kwdefaults__ or {}
    pairs = zip(written.kwonlyargs, written.kw_defaults, strict=True)
    texts = {a.arg: node for a, node in pairs if node is not None}
    return (
        len(places) == len(written.defaults)
        and named.keys() == texts.keys()
        and all(map(_may_be, places, written.defaults))
        and all(_may_be(value, texts[n]) for n, value in named.items())
    )


def _may_be(value: object, written: ast.expr) -> bool:
    try:
        told = ast.literal_eval(written)
        hash(told)  # what may have been changed since says nothing
    except (ValueError, TypeError):
        return True
    return _typed(value) == _typed(told)


def _steps(code: types.CodeType) -> tuple[object, ...]:
    """What code does, wherever it stands in its file and whatever its docstring says."""
    flags = code.co_flags & ~0x4000000  # which tells of a docstring, from Python 3.13 on
    head = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_varnames)
    steps = (
        (s.opname, _typed(s.argval) if s.opcode in dis.hasconst else s.argrepr or s.arg)
        for s in dis.get_instructions(code)
    )
    return (flags, *head, code.co_exceptiontable, *steps)


def _typed(value: object) -> object:
    """A constant that equals no other's: not 1 that of 1.0."""
    if isinstance(value, types.CodeType):
        return _steps(value)
    if isinstance(value, (tuple, frozenset)):
        many = cast("tuple[object] | frozenset[object]", value)
        return type(many)(map(_typed, many))
    return repr(value)
