"""Pages from the code, and tutorials that run: what `make docs` does.

python tools/docs.py            compare the committed pages with the code, run all tutorials
python tools/docs.py --check    compare only
python tools/docs.py --write    write the pages
python tools/docs.py NAME ...   run these tutorials only, such as first-run
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pages
import tutorials

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ("docs/methods",)  # folders in which every file is generated


def existing(root: Path) -> set[str]:
    """Files in the folders that hold nothing but generated pages."""
    found = (p for folder in GENERATED for p in (root / folder).rglob("*") if p.is_file())
    return {str(p.relative_to(root)) for p in found}


def stale(root: Path, made: dict[str, str]) -> list[str]:
    """Pages that differ from the code: changed, missing, or of a method that is gone."""
    changed = [
        name
        for name, text in made.items()
        if not (root / name).is_file() or (root / name).read_text(encoding="utf-8") != text
    ]
    return sorted([*changed, *(existing(root) - set(made))])


def write(root: Path, made: dict[str, str]) -> list[str]:
    """Write what differs, delete what is left over; the names."""
    names = stale(root, made)
    for name in names:
        path = root / name
        if name in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(made[name], encoding="utf-8")
        else:
            path.unlink()
    return names


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Pages from the code, and tutorials that run.")
    parser.add_argument("--check", action="store_true", help="compare the pages only")
    parser.add_argument("--write", action="store_true", help="write the pages")
    parser.add_argument("names", nargs="*", help="tutorials to run instead")
    args = parser.parse_args(argv)
    began = time.monotonic()
    if not args.names:
        made = pages.generate(ROOT)
        names = write(ROOT, made) if args.write else stale(ROOT, made)
        for name in names:
            print(f"{'written' if args.write else 'out of date'}: {name}")
        if names and not args.write:
            print("The pages differ from the code. Run: python tools/docs.py --write")
            return 1
        print(f"{len(made)} pages agree with the code ({time.monotonic() - began:.0f} s)")
    if args.check or args.write:
        return 0
    return tutorials.run_all(ROOT / "docs" / "tutorials", args.names)


if __name__ == "__main__":
    sys.exit(main())
