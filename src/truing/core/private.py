"""Secrets that pass through: they are used, and never recorded or shown.

Settings that are secrets are known by their names. A name and a password in an address
(`http://name:password@host/v1#model`) are kept in this process's memory alone, by the address
without them, which is what models, manifests and the store have. Errors show what a user wrote, a
key in the wrong place among it, without either (`shown`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import cast
from urllib.parse import unquote, urlsplit

SECRETS = frozenset({"token", "password", "secret", "api_key"})
HIDDEN = "***"
# The same in whatever a user wrote, such as "key: sk-..." or "?token=...": errors show it.
_NAMES = (
    "(?:(?:api|access|auth|secret|security|hf)[_-]?)?(?:key|token)"
    "|secret|password|passwd|authorization|credential|sig|signature"
)
_NAMED = re.compile(_NAMES, re.I)
_SAID = re.compile(
    rf"""(?<!\w)((?:{_NAMES})['"]?\s*[:=]\s*)"""
    r"""('[^']*'|"[^"]*"|(?:Bearer\s+)?[^\s,;&)}\]'"#]+)""",
    re.I,
)
_LOGIN = re.compile(r"(https?://)[^\s/?#]*@")
_logins: dict[str, tuple[str, str]] = {}


def hide(name: str, value: object) -> object:
    """A setting's value as it may be recorded: what is a secret by its name is not there.

    Nor is a name and password in an address, however deep it lies in a setting.
    """
    if name in SECRETS and value:
        return HIDDEN
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value)
        return {key: hide(str(key), inner) for key, inner in items.items()}
    if isinstance(value, (list, tuple)):
        return [hide("", inner) for inner in cast("Sequence[object]", value)]
    return without_login(value) if isinstance(value, str) else value


def hidden(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings as they may be recorded."""
    return {name: hide(name, value) for name, value in settings.items()}


def without_login(text: str) -> str:
    """An address without the name and password in it; any other text as it is."""
    if not text.startswith(("http://", "https://")):
        return text
    scheme, _, rest = text.partition("://")
    ends = [at for at in map(rest.find, "/?#") if at >= 0]
    host = rest[: min(ends, default=len(rest))]
    return f"{scheme}://{host.rpartition('@')[2]}{rest[len(host) :]}"


def is_secret(name: str) -> bool:
    """Whether what a user calls so is a secret."""
    return _NAMED.fullmatch(name) is not None


def shown(text: str) -> str:
    """A text of a user's as an error may show it: without keys and the logins of addresses."""
    return _SAID.sub(rf"\g<1>{HIDDEN}", _LOGIN.sub(r"\1", text))


def shown_value(value: object) -> object:
    """A value of a user's as an error may show it, of its own type; see `shown`."""
    if isinstance(value, str):
        text = shown(value)
        return value if text == value else text  # of its own type, which may show itself otherwise
    if isinstance(value, dict):
        named = cast("dict[object, object]", value)
        return {
            name: HIDDEN if inner and is_secret(str(name)) else shown_value(inner)
            for name, inner in named.items()
        }
    if type(value) in (list, tuple):
        items = [shown_value(inner) for inner in cast("Sequence[object]", value)]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def keep_login(url: str) -> str:
    """The address without its name and password, which `login` gives back for it."""
    bare = without_login(url)
    if bare != url:
        parts = urlsplit(url)
        _logins[bare] = unquote(parts.username or ""), unquote(parts.password or "")
    return bare


def login(url: str) -> tuple[str, str] | None:
    """Name and password for an address, where one was given with it in this process."""
    return _logins.get(url)
