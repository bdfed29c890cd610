"""What the wheel needs, as it declares it: every package, theirs too, is there in a right version.

Run by an interpreter that has the wheel and, on its path, the packages of development. Links those
that the wheel needs, and no others, into the folder given: a run from there tells what is missing.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def needed(name: str) -> dict[str, metadata.Distribution]:
    """The package and all that it needs without extras, by name."""
    found: dict[str, metadata.Distribution] = {}
    wanted, wrong = [(Requirement(name), "the wheel")], []
    while wanted:
        requirement, of = wanted.pop()
        try:
            dist = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{of} needs {requirement}, which is not there")
            continue
        if not requirement.specifier.contains(dist.version, prereleases=True):
            wrong.append(f"{of} needs {requirement}, and {dist.version} is there")
        extras = ["", *requirement.extras]
        key = f"{dist.name}[{','.join(sorted(requirement.extras))}]"
        if key in found:
            continue
        found[key] = dist
        for text in dist.requires or ():
            more = Requirement(text)
            if more.marker is None or any(more.marker.evaluate({"extra": e}) for e in extras):
                wanted.append((more, dist.name))
    if wrong:
        sys.exit("\n".join(wrong))
    return found


def link(dists: list[metadata.Distribution], folder: Path) -> None:
    """Whatever these packages have put beside each other, as links in `folder`."""
    folder.mkdir()
    for dist in dists:
        tops = {f.parts[0] for f in dist.files or () if f.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            place = Path(str(dist.locate_file(top)))
            if place.exists() and not (folder / top).exists():
                (folder / top).symlink_to(place)


if __name__ == "__main__":
    all_of_it = needed("truing")
    others = [d for d in all_of_it.values() if d.name != "truing"]
    link(others, Path(sys.argv[1]))
    print(f"{len({d.name for d in others})} packages needed, all there in right versions")
