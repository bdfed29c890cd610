"""JSON files that come from elsewhere: one clear error for whatever is not an object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from truing.errors import InputError
from truing.faults import AGAIN


def read(path: Path) -> dict[str, object]:
    """The object in a file that is there.

    Raises:
        InputError: it is not UTF-8, not JSON, or no object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the encoding, too
        raise InputError(f"not valid JSON: {error}", where=str(path), fix=AGAIN) from None
    if not isinstance(data, dict):
        raise InputError("must hold a JSON object", where=str(path), seen=data, fix=AGAIN)
    return cast("dict[str, object]", data)
