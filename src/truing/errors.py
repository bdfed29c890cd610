"""Errors that a user can act on: what is wrong, where, what was seen, what to do about it."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable
from pathlib import Path

# More of their letters than this in common, or two names are not meant for each other: "pairs" and
# "prose" have it exactly.
CLOSE = 0.6


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
        text = f"{self.where}: {self.message}" if self.where else self.message
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
    """`repr` of a value, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `name`, or None when none is close: a wrong hint is worse than none.

    Of equally like ones, those of the same letters, then those that begin alike, then those of like
    length come first.
    """
    names = {c.lower().replace("-", "_"): c for c in candidates}
    asked = name.lower().replace("-", "_")
    match = difflib.SequenceMatcher(None, b=asked)
    best, rank = None, (CLOSE, False, False, 0)
    for candidate in sorted(names):
        match.set_seq1(candidate)
        found = (
            match.ratio(),
            sorted(candidate) == sorted(asked),
            candidate[:1] == asked[:1],
            -abs(len(candidate) - len(asked)),
        )
        if found[0] > CLOSE and found > rank:
            best, rank = candidate, found
    return names[best] if best is not None else None


def no_file(what: str, path: str | Path, suffixes: tuple[str, ...] = ()) -> InputError:
    """The error for a file or folder that is not there, offering what lies there and is like it.

    Args:
        what: as in "principles file".
        suffixes: of the files that could be meant; all of them without any.
    """
    path = Path(path)
    return InputError(f"no such {what}", where=str(path), fix=beside(path, suffixes))


def beside(path: Path, suffixes: tuple[str, ...] = ()) -> str:
    """What to write in place of a path that is not there: see `no_file`."""
    folder = path.parent
    if not folder.is_dir():
        seen = "" if path.is_absolute() else f", seen from {str(Path.cwd())!r}"
        return f"There is no folder {str(folder)!r}{seen}"
    names: list[str] = []
    with contextlib.suppress(OSError):  # a folder whose names may not be read
        names = sorted(p.name for p in folder.iterdir() if p.name[0] != "." and p.name != path.name)
    names = [n for n in names if n.endswith(suffixes)] if suffixes else names
    # Stems are compared: that both end in .yaml makes no two names alike.
    stems = {n.partition(".")[0]: n for n in names}
    stems |= {n.partition(".")[0]: n for n in names if n.endswith(path.suffix)}
    close = nearest(path.name.partition(".")[0], stems)
    if close is not None:
        return f"Did you mean {str(folder / stems[close])!r}?"
    if names and suffixes:
        return f"In {str(folder)!r} there are: {', '.join(names[:10])}" + ", ..." * (
            len(names) > 10
        )
    return "" if path.is_absolute() else f"It is looked for in {str(Path.cwd() / folder)!r}"


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
    what: str, name: str, candidates: Iterable[str], *, where: str = "", limit: int = 20
) -> InputError:
    """The error for a name that does not exist, offering the nearest one that does."""
    known = sorted(candidates)
    close = nearest(name, known)
    if close is not None:
        fix = f"Did you mean {close!r}?"
    elif known:
        fix = "Known: " + ", ".join(known[:limit]) + (", ..." if len(known) > limit else "")
    else:
        fix = "There is none to choose from"
    return InputError(f"unknown {what} {name!r}", where=where, fix=fix)
