"""What a file of Python computes and what it imports; no file is parsed twice.

A step's key is made of some 160 files: parsing them takes seconds, reading them hundredths. So what
was found of a text is remembered in the user's cache, by the text.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import sys
from pathlib import Path
from typing import cast

from truing.core.files import home, write_text
from truing.errors import InputError
from truing.tables import content_hash

PYTHON = list(sys.version_info[:2])  # whose trees are dumped in their own ways
MOST = 4096  # texts that are remembered; beyond it those of this process alone
Code = tuple[str, frozenset[str]]


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


def bare(tree: ast.Module) -> ast.Module:
    """A syntax tree without docstrings and what only type checkers read; changed in place."""
    return cast(ast.Module, _Bare().visit(tree))


def imports_of(tree: ast.AST, module: str, is_package: bool) -> set[str]:
    """Modules that a syntax tree imports, at whatever depth; of truing also names that it uses.

    truing's own names, as in `truing.generate`, it imports itself when they are asked for.
    """
    found: set[str] = set()
    called: set[str] = set()  # what truing is called there
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
            called |= {a.asname or "truing" for a in node.names if a.name == "truing"}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts, up = module.split("."), node.level - is_package
                parts = parts[:-up] if up else parts
                base = ".".join([*parts, *([base] if base else [])])
            # `from package import module` names a module in its second half.
            found |= {base, *(f"{base}.{a.name}" for a in node.names)}
    used = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and called)
    return found | {
        f"truing.{n.attr}" for n in used if isinstance(n.value, ast.Name) and n.value.id in called
    }


class _Memory:
    """What was found of texts, by their hashes: read once, written when more was found."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.used, self.new = path, dict[str, list[str]](), False
        self.found: dict[str, list[str]] = {}
        # Whatever is wrong with the file, what it held is found again.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            told = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
            self.found = {name: words for name, words in told.items() if _whole(words)}

    def code(self, path: Path, module: str) -> tuple[str, Code]:
        """Hash of a module's text, and (hash of its bare syntax tree, modules that it imports).

        Raises:
            InputError: it is not Python.
        """
        text, is_package = path.read_bytes(), path.name == "__init__.py"
        name = content_hash([text.decode("utf-8", "surrogateescape"), module, is_package])
        if not (words := self.found.get(name)):
            tree = bare(_tree(text, path))
            words = [content_hash(ast.dump(tree)), *sorted(imports_of(tree, module, is_package))]
            self.found[name], self.new = words, True
        self.used[name] = words
        return name, (words[0], frozenset(words[1:]))

    def save(self) -> None:
        """Write what is new; a cache that cannot be written costs time only."""
        if not self.new or self.path is None:
            return
        self.new = False
        kept = self.found if len(self.found) <= MOST else self.used
        with contextlib.suppress(OSError):
            write_text(self.path, json.dumps(kept))


def _tree(text: bytes, path: Path) -> ast.Module:
    try:
        return ast.parse(text, str(path))
    except SyntaxError as error:
        where = f"{path} line {error.lineno}"
        raise InputError(f"is not Python: {error.msg}", where=where, fix="Mend the file") from error


def _whole(words: object) -> bool:
    """True for what `_Memory.code` writes: a hash and names."""
    return isinstance(words, list) and all(isinstance(w, str) for w in cast("list[object]", words))


@functools.cache
def _memory(path: Path | None) -> _Memory:
    return _Memory(path)


@functools.cache
def _name() -> str:
    """Of the file: another Python, or another way to look at a text, finds something else."""
    return f"code-{content_hash([PYTHON, Path(__file__).read_text(encoding='utf-8')], 4)}.json"


def memory() -> _Memory:
    """Of the user's cache as it is set now; of this process alone where there is none."""
    try:
        return _memory(home() / _name())
    except InputError:
        return _memory(None)
