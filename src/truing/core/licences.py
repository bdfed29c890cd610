"""Licences by strictness, so that a model or table carries the strictest of what it came from."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Falling strictness; the first group with a fragment in the text decides. What nobody stated may
# forbid anything: it stands above all but the known prohibitions, which it must not hide.
_GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("non-commercial", ("-nc", "non-commercial", "noncommercial", "research-only", "research-use")),
    ("no derivatives", ("-nd",)),
    ("restricted use", ("gemma", "llama-", "llama2", "llama3", "openrail", "rail", "terms-of-use")),
    ("unknown", ("unknown", "no-licence", "states-no", "not-stated", "other", "free-for-research",
                 "free-research", "no-explicit")),
    ("share alike", ("-sa", "gpl", "sharing", "odbl", "mpl")),
    ("attribution", ("cc-by", "odc-by")),
    ("permissive", ("mit", "apache", "bsd", "isc", "permissive")),
    ("free", ("cc0", "public-domain", "unlicense", "pddl")),
)  # fmt: skip
_ORDER = [name for name, _ in _GROUPS]


def sort_of(licence: str) -> str:
    """The group of a licence text: "non-commercial", "permissive", ..., "unknown"."""
    text = re.sub(r"[\s_]+", "-", licence.strip().lower())
    for name, fragments in _GROUPS:
        if any(f in text for f in fragments):
            return name
    return "unknown"


def strictest(licences: Iterable[str]) -> str:
    """The licence that allows least; the earlier one among equals, "unknown" for none."""
    given = [text or "unknown" for text in licences] or ["unknown"]
    return min(given, key=lambda text: _ORDER.index(sort_of(text)))


def allows_commercial(licence: str) -> bool:
    """False for non-commercial licences and where none is known."""
    return sort_of(licence) not in ("non-commercial", "unknown")
