"""JSON as every reader takes it: what is printed for machines, manifests, metrics, reports.

JSON has no NaN and no infinity, though Python writes them. Here they are null: nothing is known.
Half a character, which UTF-8 cannot say, is U+FFFD, as it is in tables.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from truing.surrogates import mended

if TYPE_CHECKING:
    from truing.context import Json


def plain(value: object) -> Json:
    """`value` as JSON has it, such as a setting; what is no plain data by its text."""
    if isinstance(value, dict):
        items = cast("dict[object, object]", value)
        return {str(k): plain(v) for k, v in items.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in cast("list[object]", value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def finite(value: object) -> object:
    """`value` as plain data in which every number that is not finite is None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return {str(k): finite(v) for k, v in items}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in cast("Sequence[object]", value)]
    return value


def dumps(
    value: object,
    *,
    indent: int | None = None,
    ascii: bool = False,
    default: Callable[[object], object] | None = None,
) -> str:
    """`value` as JSON text.

    Args:
        value: plain data.
        indent: of nested lines; None for one line.
        ascii: escape all other characters, for terminals that may not know them.
        default: what to write for what is no plain data, such as a path; else it is a TypeError.
    """
    whole = default and (lambda other: mended(default(other)))
    return json.dumps(
        mended(finite(value)), indent=indent, ensure_ascii=ascii, allow_nan=False, default=whole
    )


def read_lines(text: str) -> list[object]:
    """The objects of a text with one JSON object a line.

    Lines end at "\\n" alone. JSON escapes it in texts, but not the other characters at which
    `str.splitlines` cuts, such as U+2028.
    """
    return [json.loads(line) for line in text.split("\n") if line]


def loads_or_text(written: str) -> object:
    """What was written as a value: JSON where it can be read so, else the text itself."""
    try:
        return json.loads(written)
    except (ValueError, RecursionError):
        return written
