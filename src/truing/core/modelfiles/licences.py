"""Licences by strictness, so that a model or table carries the strictest of what it came from."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Falling strictness; the first group with a word in the text decides. What nobody stated may
# forbid anything: it stands above all but the known prohibitions, which it must not hide.
_GROUPS: tuple[tuple[str, str], ...] = (
    ("non-commercial", r"nc|non-?commercial|research-(only|use)"),
    ("no derivatives", r"nd|no-?deriv\w*"),
    (
        "restricted use",
        r"gemma|llama-?[\d.]*-(community-)?licen\w+|llama-?[\d.]*$|"
        r"\w*rail(-m)?|terms-of-use",
    ),
    (
        "unknown",
        r"unknown|no-(explicit-)?licen[cs]e|states-no|none|not-stated|other|"
        r"free-(for-)?research",
    ),
    ("share alike", r"sa|[al]?gpl|sharing|odbl|mpl"),
    ("attribution", r"cc-by|odc-by"),
    ("permissive", r"mit|apache|bsd|isc|permissive"),
    ("free", r"cc0|public-domain|unlicense|pddl"),
)
_ORDER = [name for name, _ in _GROUPS]


def _hyphened(licence: str) -> str:
    return re.sub(r"[\s_]+", "-", licence.strip().lower())


def sort_of(licence: str) -> str:
    """The group of a licence text: "non-commercial", "permissive", ..., "unknown"."""
    text = _hyphened(licence)
    for name, words in _GROUPS:
        if re.search(rf"(?<![a-z0-9])({words})(?![a-z])", text):
            return name
    return "unknown"


def strictest(licences: Iterable[str]) -> str:
    """The licence that allows least; the earlier one among equals, "unknown" for none."""
    given = [text or "unknown" for text in licences] or ["unknown"]
    return min(given, key=lambda text: _ORDER.index(sort_of(text)))


def allows_commercial(licence: str) -> bool:
    """False for non-commercial licences and where none is known."""
    return sort_of(licence) not in ("non-commercial", "unknown")


def forbids_commercial(licence: str) -> bool:
    """True for licences that say so: non-commercial ones, and those for research alone."""
    research = r"free-(for-)?research|research-(use|purposes?|only)"
    found = re.search(rf"(?<![a-z0-9])({research})(?![a-z])", _hyphened(licence))
    return sort_of(licence) == "non-commercial" or found is not None


def short(licence: str) -> str:
    """The licence's name without its remarks; the group is put before it where they carried it."""
    head = re.split(r" \(|[;,]|\.(?:\s|$)", licence.strip(), maxsplit=1)[0][:60].strip()
    return head if sort_of(head) == sort_of(licence) else f"{sort_of(licence)}: {head}"
