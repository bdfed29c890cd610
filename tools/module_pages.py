"""docs/modules.md: every module beside the methods, with the first line of its docstring."""

from __future__ import annotations

import ast
from pathlib import Path

from pagetext import NOTE, escape, table

FOLDERS = {
    "truing": "Nouns, verbs, pipelines, the store and the command line.",
    "truing/core": "What methods stand on.",
    "truing/report": "The HTML report of a run.",
}


def _first(path: Path) -> str:
    """The first sentence of a module's docstring, which may take more than one line."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(doc.split("\n\n", 1)[0].split()).partition(". ")[0].rstrip(".") + "."


def modules_page(root: Path) -> str:
    """The page, from the docstrings under `root`/src."""
    parts = [
        NOTE + "# Modules\n",
        "What is where, besides [the methods](methods/README.md), each of which is a file in the "
        "folder of its verb.\nHow the parts work together: [architecture](architecture.md).\n",
    ]
    for folder, about in FOLDERS.items():
        paths = sorted(p for p in (root / "src" / folder).glob("*.py") if p.name[0] != "_")
        rows = [[f"[`{p.stem}`](../src/{folder}/{p.name})", escape(_first(p))] for p in paths]
        parts += [f"## {folder.replace('/', '.')}\n", about + "\n", table(("module", "is"), rows)]
    return "\n".join(parts)
