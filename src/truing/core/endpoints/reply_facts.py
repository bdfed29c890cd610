"""What a server's reply says beside its answer: errors, how long to wait, tokens used."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import cast

import httpx

UNSUPPORTED = ("unsupported", "unsupported_parameter")  # codes of errors that name a setting


def retry_after(headers: httpx.Headers) -> float:
    """Seconds to wait as the server states them, in any of the usual forms; 0 when not."""
    exact, text = headers.get("retry-after-ms", ""), headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(exact) / 1000)
    with contextlib.suppress(ValueError):
        return max(0.0, float(text))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


def json_object(raw: bytes) -> dict[str, object] | None:
    """The JSON object that a reply is, or None."""
    try:
        data: object = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, object]", data) if isinstance(data, dict) else None


def message_of(data: Mapping[str, object] | None) -> str:
    """What an error object says, in the shapes that servers use."""
    error = (data or {}).get("error")
    if isinstance(error, dict):
        return str(cast("dict[str, object]", error).get("message") or error)
    return str(error or (data or {}).get("message") or (data or {}).get("detail") or "")


def unsupported(data: Mapping[str, object] | None) -> str:
    """The setting that an error object names as not supported, or ""."""
    error = (data or {}).get("error")
    facts = cast("dict[str, object]", error) if isinstance(error, dict) else {}
    return str(facts.get("param") or "") if facts.get("code") in UNSUPPORTED else ""


def kind_of(headers: httpx.Headers) -> str:
    """The content type that a reply says."""
    return headers.get("content-type", "no content type").partition(";")[0]


def usage_of(data: Mapping[str, object], asked: int, answered: int) -> tuple[int, int]:
    """Tokens of prompt and answer as the server counts them, else as they were guessed."""
    found = data.get("usage")
    usage = cast("dict[str, object]", found) if isinstance(found, dict) else {}
    total, prompt = usage.get("total_tokens"), usage.get("prompt_tokens")
    if not isinstance(total, int) or total <= 0:
        return asked, answered
    asked = min(prompt if isinstance(prompt, int) and prompt >= 0 else asked, total)
    return asked, total - asked
