"""The identity of code: what a method computes, without comments, docstrings and layout.

A step's key holds the syntax trees of the method's module and of every module of the same package
that it imports, directly or not, so that an edited method runs again and a reworded one does not.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from truing.tables import content_hash


def _source(module: str) -> Path | None:
    """The file of a module; only packages above it are imported, never the module itself."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    origin = found.origin if found is not None else None
    return Path(origin) if origin and origin.endswith(".py") else None


class _Bare(ast.NodeTransformer):
    """Drops docstrings and what only type checkers read."""

    def _without_docstring(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        assert isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        body = node.body
        first = body[0] if body else None
        if (
            isinstance(first, ast.Expr)
            and isinstance(first.value, ast.Constant)
            and isinstance(first.value.value, str)
        ):
            body[0:1] = [] if isinstance(node, ast.Module) or len(body) > 1 else [ast.Pass()]
        return node

    visit_Module = visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _without_docstring

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        checked = node.test.id if isinstance(node.test, ast.Name) else ""
        return node.orelse if checked == "TYPE_CHECKING" else node


def _imports(tree: ast.AST, module: str, package: str, *, is_package: bool = False) -> set[str]:
    """Modules of `package` that a syntax tree imports, at whatever depth."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts, up = module.split("."), node.level - is_package
                parts = parts[:-up] if up else parts
                base = ".".join([*parts, *([base] if base else [])])
            # `from package import module` names a module in its second half.
            found |= {base, *(f"{base}.{a.name}" for a in node.names)}
    return {m for m in found if m.split(".")[0] == package}


@functools.cache
def _read(module: str, package: str) -> tuple[str, frozenset[str]] | None:
    """(hash of the bare syntax tree, modules that it imports); None where there is no source."""
    path = _source(module)
    if path is None:
        return None
    tree = _Bare().visit(ast.parse(path.read_text(encoding="utf-8"), str(path)))
    return content_hash(ast.dump(tree)), frozenset(
        _imports(tree, module, package, is_package=path.name == "__init__.py")
    )


@functools.cache
def made_by(module: str) -> str:
    """Hash of a module's code and of the libraries that its numbers depend on, for caches."""
    libraries = [metadata.version(p) for p in ("torch", "transformers")]
    return content_hash([code_key([module]), libraries])


def code_key(modules: Iterable[str]) -> str:
    """Hash of the modules and of all that they import from their own package or from truing."""
    seen: dict[str, str] = {}
    wanted = sorted(set(modules))
    while wanted:
        module = wanted.pop()
        if module in seen:
            continue
        top = module.split(".")[0]
        here = [_read(module, package) for package in {top, "truing"}]
        for facts in here:
            if facts is not None:
                seen[module] = facts[0]
                wanted += sorted(facts[1] - set(seen))
        seen.setdefault(module, "")
    return content_hash({m: h for m, h in seen.items() if h})
