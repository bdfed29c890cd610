"""The identity of code: what a method computes, without comments, docstrings and layout.

A step's key holds the syntax trees of the method's module and of every module of the same package
that it imports, directly or not, so that an edited method runs again and a reworded one does not.
Of a script or recipe whose functions a step uses, it is the whole file and what it imports that is
neither installed nor Python's own.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import truing
from truing.core.identity.edited import check_loaded
from truing.core.identity.parsed import Code, bare, imports_of, memory
from truing.declared import Declared, everything
from truing.tables import content_hash

PLAN = "recipe"  # the function of a recipe that makes its plan
Follows = Callable[[str, frozenset[str]], frozenset[str]]
# Modules that refuse, name, show and tell, and say what the machine has: no result depends on them,
# but most of truing lies behind.
OUTSIDE = (
    "truing.core.trainer.preflight.",
    "truing.doctor.",
    "truing.keys.",
    "truing.pipeline.",
    "truing.report.",
    "truing.watchers.",
)
INSTALLED = {"site-packages", "dist-packages"}  # folders of what pip installs


def _source(module: str) -> Path | None:
    """The file of a module; only packages above it are imported, never the module itself."""
    if _is_name(module):
        return None
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    origin = found.origin if found is not None else None
    return Path(origin) if origin and origin.endswith(".py") else None


_plain: set[str] = set()  # modules that are no packages and not loaded


def _is_name(module: str) -> bool:
    """True for a name inside of a module, which is not imported to know; false for a module."""
    above = module.rpartition(".")[0]
    if (loaded := sys.modules.get(above)) is not None:
        return not hasattr(loaded, "__path__")
    if above and above not in _plain:
        path = _source(above)
        if path is None or path.name == "__init__.py":
            return False
        _plain.add(above)
    return bool(above)


_read_at: tuple[int, tuple[Declared, ...]] | None = None  # what was there when `read_own` last read


class _File(NamedTuple):
    """A module's file as it was read: what loaded the module by then, and when it was changed."""

    loaded: object
    code: Code | None
    text: str = ""
    changed: float = math.inf


_known: dict[str, _File] = {}


def _read(module: str) -> Code | None:
    """(hash of the bare syntax tree, modules that it imports); None where there is no source.

    Read once, and again after the module was: an edit in between is not what runs.
    """
    loaded = getattr(sys.modules.get(module), "__spec__", None)
    known = _known.get(module)
    if known is None or known.loaded is not loaded:
        known = _known[module] = _parsed(module, loaded)
    return known.code


def forget_unloaded() -> None:
    """Let go of modules that were not loaded when they were read: another may have their name."""
    global _read_at
    _read_at = None
    _plain.clear()
    for module in [m for m, file in _known.items() if file.loaded is None]:
        del _known[module]


def read_own() -> None:
    """Read all that functions of the user's own import, as long as it is what is loaded.

    A plan is checked at once and may run for hours, in which such a file is edited. Each of its
    steps asks, so that nothing is done where nothing was declared or imported since.
    """
    global _read_at
    own = [one for one in everything() if one.text is not None]
    if own and (now := (len(sys.modules), tuple(own))) != _read_at:
        code_key([], own)
        _read_at = now


def _parsed(module: str, loaded: object) -> _File:
    path = _source(module)
    if path is None:
        return _File(loaded, None)
    stat = path.stat()
    changed = max(stat.st_mtime, stat.st_ctime)  # what copies a file may keep its older time
    text, (bare, imported) = memory().code(path, module)
    imported |= _behind(module, imported)
    names = {m for m in _own(module, imported) if _is_name(m)}
    if loaded is not None and changed > truing.began and _top(module) != "truing":
        check_loaded(module, path)
    return _File(loaded, (bare, imported - names), text, changed)


def _behind(module: str, imported: frozenset[str]) -> set[str]:
    """Modules behind the names of truing's own that another package uses: `truing.generate`."""
    if _top(module) == "truing":
        return set()
    names = {m.removeprefix("truing.") for m in imported if m.startswith("truing.")}
    return {where for name, where in truing.WHERE.items() if name in names}


@functools.cache
def made_by(module: str) -> str:
    """Hash of a module's code and of the libraries that its numbers depend on, for caches.

    A name that no module has would be the same hash for ever, whatever the code.
    """
    if _read(module) is None:
        raise LookupError(f"no such module: {module}")
    libraries = [metadata.version(p) for p in ("torch", "transformers")]
    return content_hash([code_key([module]), libraries])


def code_key(modules: Iterable[str], own: Iterable[Declared] = ()) -> str:
    """Hash of modules and of all that they import from their own package or from truing.

    Args:
        own: functions of a user's own, of which the files count as they were when they were loaded.
    """
    found = _walked(modules, _computing)
    files = {one.entry.path: one for one in own}
    if not files:
        return content_hash(found)
    codes: list[str] = []
    wanted: set[str] = set()
    for one in files.values():
        code, imported = _of_file(one.text or "", one.entry.path, _module(one))
        codes.append(code)
        wanted |= _computing(_module(one), imported | _behind(_module(one), imported), _followed)
    walked = _walked(wanted, functools.partial(_computing, follows=_followed))
    return content_hash([found | walked, sorted(codes)])


def text_key(modules: Iterable[str]) -> str:
    """Hash of the very texts of modules and of all that they import that a user may edit.

    "" where the text of one of them is not at hand.
    """
    texts = {m: _known[m].text for m in _walked(modules, _edited)}
    return content_hash(texts) if set(modules) <= set(texts) else ""


def settled(modules: Iterable[str]) -> bool:
    """True where no file that `text_key` walks was changed since this process began.

    Then what it has loaded is what lies on the disk.
    """
    return all(_known[m].changed < truing.began for m in _walked(modules, _edited))


def _edited(module: str, imported: frozenset[str]) -> frozenset[str]:
    """Of truing's own modules what `_own` says; a user's may import others of the user's."""
    return (_own if _top(module) == "truing" else _followed)(module, imported)


def _computing(
    module: str, imported: frozenset[str], follows: Follows | None = None
) -> frozenset[str]:
    """What `follows` says, by default `_own`, less what no result depends on."""
    found = (follows or _own)(module, imported)
    return frozenset(m for m in found if not f"{m}.".startswith(OUTSIDE))


@functools.lru_cache(maxsize=4096)
def _own(module: str, imported: frozenset[str]) -> frozenset[str]:
    """What a module imports of its own package or of truing."""
    tops = (_top(module), "truing")
    return frozenset(m for m in imported if _top(m) in tops)


def _walked(modules: Iterable[str], follows: Follows) -> dict[str, str]:
    """Hashes of modules and of all that they import, as far as `follows(module, imported)`."""
    seen: dict[str, str] = {}
    wanted = set(modules)
    while wanted:
        module = wanted.pop()
        seen[module], imported = _read(module) or ("", frozenset[str]())
        wanted |= {m for m in follows(module, imported) if m not in seen}
    memory().save()
    return {m: h for m, h in seen.items() if h}


def _top(module: str) -> str:
    return module.partition(".")[0]


def _followed(module: str, imported: frozenset[str]) -> frozenset[str]:
    """What a user's module imports of its own package, of truing, and of the user's."""
    return frozenset(m for m in imported if _is_users(_top(m), _top(module)))


def _is_users(top: str, own: str) -> bool:
    if top in (own, "truing"):
        return True
    if top in sys.stdlib_module_names:
        return False
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):
        return False
    if spec is None:
        return False
    place = spec.origin or next(iter(spec.submodule_search_locations or ()), "")
    return bool(place) and not INSTALLED & set(Path(place).parts)


def _module(own: Declared) -> str:
    """The name by which a function's file imports others; `python -m` runs it under another."""
    name = own.entry.module
    spec = getattr(sys.modules.get(name), "__spec__", None)
    if name != "__main__" or spec is None or spec.origin is None:
        return name
    return spec.name if Path(spec.origin).absolute() == Path(own.entry.path) else name


@functools.lru_cache(maxsize=256)
def _of_file(text: str, path: str, module: str) -> Code:
    """(hash of the bare syntax tree of a function's file, modules that the file imports)."""
    tree = bare(_without_plan(ast.parse(text, path)))
    found = imports_of(tree, module, path.endswith("__init__.py"))
    return content_hash(ast.dump(tree)), frozenset(found)


def _without_plan(tree: ast.Module) -> ast.Module:
    """A recipe's file without the function that makes its plan, whose steps have their own keys.

    It stays where the file's other functions may depend on it: where it is called, or may change
    what they read, as far as its text tells.
    """
    plans = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == PLAN]
    rest = [n for n in tree.body if n not in plans]
    if len(plans) != 1:
        return tree
    outside = [n for part in rest for n in ast.walk(part)]
    mentioned = {n.id for n in outside if isinstance(n, ast.Name)}
    if PLAN in mentioned or _changes(plans[0], rest):
        return tree
    return ast.Module(rest, tree.type_ignores)


def _changes(plan: ast.FunctionDef, rest: Sequence[ast.stmt]) -> bool:
    """True for a function that may change what the rest of its file reads.

    It assigns to more than its own names, mentions what may be changed, or calls the file's own.
    """
    inner = list(ast.walk(plan))
    places = [n for n in inner if isinstance(n, (ast.Attribute, ast.Subscript))]
    if any(isinstance(n, ast.Global) for n in inner):
        return True
    if any(not isinstance(n.ctx, ast.Load) for n in places):
        return True
    names = {n.id for n in inner if isinstance(n, ast.Name)}
    called = {n.func.id for n in inner if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    own = {n.name for n in rest if isinstance(n, ast.FunctionDef)} | {"setattr"}
    return bool(names & _changeable(rest) or called & own)


def _changeable(body: Iterable[ast.stmt]) -> set[str]:
    """Names that a file binds to what may be changed: modules of the user's, all but constants.

    Of functions it is known what they are, and whether they are called.
    """
    found: set[str] = set()
    for node in body:
        if isinstance(node, ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Constant):
            continue
        elif not isinstance(node, ast.FunctionDef):
            inner = list(ast.walk(node))
            found |= {
                n.id for n in inner if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            }
            found |= {
                (a.asname or _top(a.name))
                for n in inner
                if isinstance(n, (ast.Import, ast.ImportFrom))
                for a in n.names
                if not _settled(n.module or "" if isinstance(n, ast.ImportFrom) else a.name)
            }
    return found


def _settled(module: str) -> bool:
    """True for Python's own modules and for truing, which a plan is made with."""
    return _top(module) in sys.stdlib_module_names | {"truing"}
