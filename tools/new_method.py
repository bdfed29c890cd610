"""Write the skeleton of a new method and the golden test that fails until it is filled.

    make new-method select my_filter
    make new-method train/preference my_loss

The skeleton runs as it is and is listed at once; replace its mathematics, its docstring and the
expected values of its test. Nothing else has to be edited.
"""

from __future__ import annotations

import keyword
import re
import sys
from pathlib import Path

from truing import catalogue
from truing.catalogue import VERBS
from truing.errors import InputError, unknown

ROOT = Path(__file__).resolve().parents[1]
SKELETONS = Path(__file__).parent / "skeletons"
USAGE = "make new-method VERB NAME, such as: make new-method train/preference my_loss"


def groups() -> list[str]:
    """Sub-folders of train/ for which there is a skeleton."""
    return sorted(p.stem.removeprefix("train_") for p in SKELETONS.glob("train_*.py"))


def check(place: str, name: str) -> tuple[str, str]:
    """(verb, group), or an InputError that names the mistake."""
    verb, _, group = place.strip("/").partition("/")
    if verb not in VERBS:
        raise unknown("verb", verb, VERBS, where=USAGE)
    if verb == "serve":
        raise InputError(
            "a server has no skeleton: it ends the graph and is written around one protocol",
            where=USAGE,
            fix="Start from a file in src/truing/serve",
        )
    if verb == "train" and group not in groups():
        raise InputError(
            "a training method lies in a sub-folder, and not every one has a skeleton",
            where=USAGE,
            seen=place,
            fix="Write one of: " + ", ".join(f"train/{g}" for g in groups()),
        )
    if group and verb != "train":
        raise InputError(f"{verb} has no sub-folders", where=USAGE, seen=place, fix=f"Write {verb}")
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise InputError(
            "a method's name is snake_case: small letters, digits, single underscores",
            where=USAGE,
            seen=name,
        )
    if f"{verb}/{name}" in catalogue.methods():
        raise InputError("this method exists", where=USAGE, seen=f"{verb}/{name}")
    return verb, group


def fill(text: str, name: str) -> str:
    """A skeleton under the method's own name."""
    words = name.replace("_", " ")
    text = text.replace("My method", words[0].upper() + words[1:])
    return text.replace("my_method", name).replace("my-method", name.replace("_", "-"))


def write(root: Path, place: str, name: str) -> list[Path]:
    """Write method and golden test; the paths. Nothing is written when one of them exists."""
    verb, group = check(place, name)
    kind = f"{verb}_{group}" if group else verb
    paths = {
        root / "src" / "truing" / verb / group / f"{name}.py": SKELETONS / f"{kind}.py",
        root / "tests" / "golden" / f"test_{name}.py": SKELETONS / "golden" / f"{kind}.py",
    }
    for path in paths:
        if path.exists():
            raise InputError("the file exists", where=str(path), fix="Choose another name")
    for path, skeleton in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(fill(skeleton.read_text(encoding="utf-8"), name), encoding="utf-8")
    return list(paths)


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    words = sys.argv[1:] if argv is None else argv
    try:
        if len(words) != 2:
            raise InputError("give a verb and a name", where=USAGE, seen=" ".join(words))
        made = write(root, *words)
    except InputError as error:
        print(f"new-method: {error}", file=sys.stderr)
        return error.exit_code
    verb = words[0].partition("/")[0]
    print("\n".join(f"written: {p.relative_to(root)}" for p in made))
    print(f"listed:  truing show {verb}/{words[1]}")
    print(f"test:    .venv/bin/python -m pytest {made[1].relative_to(root)} tests/contract")
    print("page:    .venv/bin/python tools/docs.py --write")
    return 0


if __name__ == "__main__":
    sys.exit(main())
