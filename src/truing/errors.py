"""Errors that a user can act on: what is wrong, where, what was seen, what to do about it."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from truing import other_names
from truing.core import private

# More of their letters than this in common, or two names are not meant for each other: "rows" and
# "prose" have two thirds. Of a slip, see `_slip`, less will do.
CLOSE, SLIP = 0.7, 0.6
MANY = 5000  # names of a folder that are compared; each takes some microseconds
ENDING = re.compile(r"(\.[A-Za-z]+)?(\.gz)?$")  # of a file's name; "v1.0" has none


class TruingError(Exception):
    """Base of every error raised on purpose.

    Args:
        message: what is wrong, one sentence without the full stop.
        where: file, row, step or setting that it concerns.
        seen: the offending value.
        fix: what the user can do.
    """

    exit_code = 1

    def __init__(
        self, message: str, *, where: str = "", seen: object = None, fix: str = ""
    ) -> None:
        self.message, self.where, self.seen, self.fix = message, where, seen, fix
        super().__init__(message)

    def __str__(self) -> str:
        text = private.shown(self.message)
        if self.where:
            text = f"{private.shown(self.where)}: {text}"
        if self.seen is not None:
            text += f" (seen: {shorten(self.seen)})"
        if self.fix:
            text += f". {self.fix}"
        return text

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments would be lost when an error crosses a process boundary.
        return (_rebuild, (type(self), self.message, self.where, self.seen, self.fix))


class InputError(TruingError, ValueError):
    """The user's input is at fault; nothing was written, or everything kept."""

    exit_code = 2


class Damaged(InputError):
    """What the store or a saved model holds is not what was put there."""


class Unread(InputError):
    """What cannot be read now, for reasons that lie in the machine and not in the file."""


class OtherVersion(InputError):
    """What another version of truing wrote: whole, and not readable by this one."""


class Stopped(TruingError):
    """The run stopped before its end and can be resumed with the same command."""

    exit_code = 3


class Diverged(Stopped):
    """What is trained has a loss, a gradient or an advantage that is not finite."""


class MissingExtra(InputError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, *, where: str = "") -> None:
        super().__init__(
            f"the package {package!r} is needed here and is not installed",
            where=where,
            fix=f"Install it with: pip install 'truing[{extra}]'",
        )
        self.package, self.extra = package, extra

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_missing, (self.package, self.extra, self.where))


def _rebuild(
    cls: type[TruingError], message: str, where: str, seen: object, fix: str
) -> TruingError:
    return cls(message, where=where, seen=seen, fix=fix)


def _rebuild_missing(package: str, extra: str, where: str) -> MissingExtra:
    return MissingExtra(package, extra, where=where)


def shorten(value: object, limit: int = 120) -> str:
    """`repr` of a value without secrets in it, cut to `limit` characters."""
    text = repr(private.shown_value(value))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `name`, or None when none is close: a wrong hint is worse than none.

    Of equally like ones, those of the same letters, then those that begin alike, then those of like
    length come first.
    """
    names = {other_names.plain(c): c for c in candidates}
    asked = other_names.plain(name)
    if (meant := other_names.here(name, names)) is not None:
        return meant
    match = difflib.SequenceMatcher(None, b=asked)
    best, rank = None, (0.0, False, False, 0)
    for candidate in sorted(names):
        match.set_seq1(candidate)
        found = (
            match.ratio(),
            sorted(candidate) == sorted(asked),
            candidate[:1] == asked[:1],
            -abs(len(candidate) - len(asked)),
        )
        enough = SLIP if _slip(candidate, asked) else CLOSE
        if found[0] > enough and found > rank:
            best, rank = candidate, found
    return names[best] if best is not None else None


def _slip(one: str, other: str) -> bool:
    """Whether two names differ by letters swapped, one that is wrong, or an end left out."""
    if one.startswith(other) or other.startswith(one) or sorted(one) == sorted(other):
        return True
    return len(one) == len(other) and sum(a != b for a, b in zip(one, other, strict=True)) == 1


def no_file(
    what: str, path: str | Path, suffixes: tuple[str, ...] = (), *, folders: bool = False
) -> InputError:
    """The error for a file or folder that is not there, offering what lies there and is like it.

    Args:
        what: as in "principles file".
        suffixes: of the files that could be meant; all of them without any.
        folders: only folders could be.
    """
    path = Path(path)
    if path.is_dir() and not folders:
        names = _names(path, suffixes)
        fix = _listed(path, names) if names else f"Name a file: {', '.join(suffixes)}"
        return InputError(f"this is a folder, and no {what}", where=str(path), fix=fix)
    if path.is_file() and folders:
        fix = "Give the folder in which config.json lies beside the weights"
        if path.suffix == ".gguf":
            fix = "GGUF is not opened: convert it first, as transformers does with gguf_file=NAME"
        return InputError(f"this is a file, and no {what}", where=str(path), fix=fix)
    return InputError(
        f"no such {what}", where=str(path), fix=beside(path, suffixes, folders=folders)
    )


def beside(
    path: Path,
    suffixes: tuple[str, ...] = (),
    *,
    folders: bool = False,
    start: str | Path = "",
) -> str:
    """What to write in place of a path that is not there: see `no_file`.

    Args:
        start: the folder that the path is seen from, such as a recipe's; "" for the current one.
    """
    folder = path.parent
    if not (start / folder).is_dir():
        seen = "" if path.is_absolute() else f", seen from {_whole(Path(start))!r}"
        return f"There is no folder {str(folder)!r}{seen}"
    names = [n for n in _names(start / folder, suffixes, folders) if n != path.name]
    # Stems are compared: that both end in .yaml makes no two names alike.
    stem = path.name if folders else _stem(path.name)
    known = {n if folders else _stem(n): n for n in names}
    known |= {_stem(n): n for n in names if n.endswith(path.suffix) and not folders}
    close = nearest(stem, known)
    if close is not None:
        return f"Did you mean {str(folder / known[close])!r}?"
    if names and suffixes:
        return _listed(folder, names)
    return "" if path.is_absolute() else f"It is looked for in {_whole(start / folder)!r}"


def stems(
    folder: str | Path = ".", suffixes: tuple[str, ...] = (), *, folders: bool = False
) -> dict[str, str]:
    """The files in a folder by their names without endings; or the folders in it."""
    return {n if folders else _stem(n): n for n in _names(folder, suffixes, folders)}


def _names(folder: str | Path, suffixes: tuple[str, ...], folders: bool = False) -> list[str]:
    """Names in a folder, of files with these endings or of folders: of the first MANY in it."""
    found: list[str] = []
    # A folder may be one whose names must not be read.
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in itertools.islice(entries, MANY):
            meant = entry.is_dir() if folders else entry.name.endswith(suffixes or ("",))
            if meant and entry.name[0] != ".":
                found.append(entry.name)
    return sorted(found)


def _stem(name: str) -> str:
    return ENDING.sub("", name)


def _listed(folder: Path, names: list[str]) -> str:
    more = ", ..." if len(names) > 10 else ""
    return f"In {str(folder)!r} there are: {', '.join(names[:10])}{more}"


def _whole(path: Path) -> str:
    """A path from the root; as it stands where the current directory has been deleted."""
    with contextlib.suppress(OSError):
        return str(Path.cwd() / path)
    return str(path)


def yaml_fix(said: str) -> str:
    """What to do about the commonest mistakes in YAML, by what its reader says; else ""."""
    if "\\t" in said:
        return "Indent with spaces, not with tabs"
    if "mapping values are not allowed here" in said:
        return "Put quotes around a text that holds ': ', and begin lines of one mapping alike"
    if "character '`'" in said or "character '@'" in said or "character '%'" in said:
        return "Put quotes around the text"
    if "expected ',' or ']'" in said or "expected ',' or '}'" in said:
        return "Close the bracket, and put quotes around texts that hold brackets or ': '"
    return ""


def unknown(
    what: str,
    name: str,
    candidates: Iterable[str],
    *,
    where: str = "",
    limit: int = 20,
    near: Mapping[str, str] | None = None,
) -> InputError:
    """The error for a name that does not exist, offering the nearest one that does.

    Args:
        near: what else may be meant, by name, and what to write for it: see `stems`.
    """
    known = sorted(candidates)
    written = {**(near or {}), **{n: n for n in known}}
    asked = other_names.plain(name)
    note = other_names.NOTES.get(asked, "") if what == "setting" else ""
    # By its letters alone, the name of another tool's setting would lead to a wrong one.
    told = note or (what == "setting" and asked in other_names.ALSO)
    elsewhere = other_names.here(name, {other_names.plain(n): n for n in written})
    close = elsewhere if told else nearest(name, written)
    if close is not None:
        fix = f"Did you mean {written[close]!r}?" + (f" {note}" if note else "")
    elif note:
        fix = note
    elif known:
        fix = "Known: " + ", ".join(known[:limit]) + (", ..." if len(known) > limit else "")
    else:
        fix = "There is none to choose from"
    return InputError(f"unknown {what} {name!r}", where=where, fix=fix)
