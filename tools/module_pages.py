"""docs/modules.md: every module that is no method's, with the first sentence of its docstring."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

from pagetext import NOTE, escape, table

FOLDERS = {
    "truing": "Nouns, verbs, pipelines, the store and the command line.",
    "truing/core": "What methods stand on: what their authors import. The rest is in folders.",
    "truing/report": "The HTML report of a run.",
    "truing/watchers": "What is told of a run as it goes: trackers of experiments.",
}
BESIDE = (
    "In the folders of verbs, what methods there share: the server, rewards and rules, helpers."
)
ENTRIES = {"method", "objective", "online"}


def _first(path: Path) -> str:
    """The first sentence of a module's docstring, which may take more than one line."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(doc.split("\n\n", 1)[0].split()).partition(". ")[0].rstrip(".") + "."


def _is_method(path: Path) -> bool:
    """Whether a file registers a method, and so is listed with the methods."""
    functions = [
        n for n in ast.parse(path.read_text("utf-8")).body if isinstance(n, ast.FunctionDef)
    ]
    marks = [m.func if isinstance(m, ast.Call) else m for f in functions for m in f.decorator_list]
    return any(isinstance(m, ast.Name) and m.id in ENTRIES for m in marks)


def _folders(top: Path) -> dict[str, str]:
    """The folders whose modules have a table each, with a line on each: those of `core` too."""
    inner = sorted(p for p in (top / "core").iterdir() if (p / "__init__.py").is_file())
    named = {f"truing/core/{p.name}": _first(p / "__init__.py") for p in inner}
    shown = FOLDERS | named
    return {f: shown[f] for f in sorted(shown)}


def _rows(root: Path, paths: Iterable[Path], shown: Path) -> list[list[str]]:
    """A line of the table for each file, named as from the folder `shown`."""
    return [
        [
            f"[`{p.relative_to(shown).with_suffix('').as_posix()}`](../{p.relative_to(root)})",
            escape(_first(p)),
        ]
        for p in sorted(paths)
        if not p.name.startswith("_")
    ]


def modules_page(root: Path) -> str:
    """The page, from the docstrings under `root`/src."""
    parts = [
        NOTE + "# Modules\n",
        "What is where, besides [the methods](methods/README.md), each of which is a file in the "
        "folder of its verb.\nHow the parts work together: [architecture](architecture.md).\n",
    ]
    top = root / "src" / "truing"
    folders = _folders(top)
    for folder, about in folders.items():
        here = root / "src" / folder
        rows = _rows(root, here.glob("*.py"), here)
        parts += [f"## {folder.replace('/', '.')}\n", about + "\n", table(("module", "is"), rows)]
    listed = {top / Path(f).relative_to("truing") for f in folders}
    rest = [p for p in top.rglob("*.py") if p.parent not in listed and not _is_method(p)]
    parts += [
        "## Beside the methods\n",
        BESIDE + "\n",
        table(("module", "is"), _rows(root, rest, top)),
    ]
    return "\n".join(parts)
