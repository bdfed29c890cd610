"""Halves of characters (surrogates), which JSON can say and files, tokenizers and UTF-8 cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

T = TypeVar("T")
UNFINISHED = "\ufffd"  # how a character looks whose last bytes are missing


def mended(value: T) -> T:
    """`value` with halves of characters joined, or U+FFFD where the other half is missing.

    JSON can say "\\ud83d" alone and a model's reply can be cut there; tokenizers, Parquet and
    files take no such text.
    """
    return cast(T, _mend(value)) if _broken(value) else value


def _broken(value: object) -> bool:
    """Whether a text in `value` holds half a character."""
    if isinstance(value, str):
        if value.isascii():
            return False
        try:
            value.encode()
        except UnicodeEncodeError:
            return True
        return False
    if isinstance(value, dict):
        items = cast(dict[object, object], value)
        return any(map(_broken, items)) or any(map(_broken, items.values()))
    return isinstance(value, (list, tuple)) and any(map(_broken, cast(Sequence[object], value)))


def _mend(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_mend(k): _mend(v) for k, v in cast(dict[object, object], value).items()}
    if isinstance(value, (list, tuple)):
        return [_mend(v) for v in cast(Sequence[object], value)]
    return value
