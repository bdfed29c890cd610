"""Stdout as it may be: read to its end, cut by `head`, closed, or on a disk that is full."""

from __future__ import annotations

import os
import re
import select
import sys
import unicodedata
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from truing.errors import InputError

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but line breaks and tabs


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


def check() -> None:
    """Raise an InputError when stdout is closed; what stderr would say is then dropped if it is.

    What stdout cannot say is escaped, as it is on stderr.

    Python has no stream at all in place of a closed one, and `print` would take the other.
    """
    if sys.stderr is None:  # pyright: ignore[reportUnnecessaryComparison]
        sys.stderr = _nowhere()
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison]
        sys.stdout = _nowhere()
        raise InputError(
            "stdout is closed", where="truing", fix="Redirect it to a file or to /dev/null"
        )
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal that knows no such character
        sys.stdout.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """A text of a model's or of data as a terminal may have it: what would command it is spelt."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def width(text: str) -> int:
    """Columns of a terminal that a text takes: wide characters take two, accents none."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def drop() -> None:
    """Let what is left to be written to stdout vanish: Python would tell it as an error at its end.

    Nothing happens where stdout is no file, as in a notebook.
    """
    try:
        out = sys.stdout.fileno()
    except (OSError, ValueError):
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, out)
    os.close(nowhere)


def nobody_reads() -> bool:
    """True when the other end is gone, as in `truing list | head -1`; the rest is dropped."""
    try:
        out = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    poll = select.poll()
    poll.register(out, select.POLLOUT)
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if gone:
        drop()
    return gone


def fails() -> bool:
    """True when what was printed cannot be written there; the rest is dropped."""
    try:
        sys.stdout.flush()
    except OSError:
        drop()
        return True
    return False
