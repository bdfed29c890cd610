"""What a server's reply says: errors, how long to wait, tokens used; its message as text.

A model in memory writes its calls of tools as text. Those of a served one come apart from its
words, and are put behind them in the form that Qwen's and Hermes' templates have:

    <tool_call>
    {"name": "add", "arguments": {"a": 1, "b": 2}}
    </tool_call>

Our own server sends beside its calls the text that they were read from, which then is the answer to
the letter.
"""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, cast

from truing import jsontext

if TYPE_CHECKING:
    import httpx

UNSUPPORTED = ("unsupported", "unsupported_parameter")  # codes of errors that name a setting
WRITTEN = "written"  # in a message of our server: the answer as the model wrote it
CALLS = "calls of tools are text"  # a part of the key of replies that may hold some
Wrong = Callable[[str, object], Exception]


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


def answer_of(message: Mapping[str, object], wrong: Wrong) -> str:
    """The text of an answer; "" where the model said nothing.

    Args:
        message: of a chat completion. "content" may be null, and left out beside calls of tools.
        wrong: makes the error for what is none, of what is wrong and what was seen.
    """
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise wrong("the calls of tools in its message are no list", calls)
    if "content" not in message and not calls:
        raise wrong("its reply has no message with content", message)
    if calls and isinstance(written := message.get(WRITTEN), str):
        return written
    content, refusal = _joined(message.get("content")), message.get("refusal")
    if not isinstance(content, str | None):
        raise wrong("the content of its message is not text", content)
    said = content or (refusal if isinstance(refusal, str) else "")
    texts = [_written(call, wrong) for call in cast("list[object]", calls)]
    return "\n".join([*([said] if said else []), *texts])


def _joined(content: object) -> object:
    """The text of a content in parts, of which those of other types, such as thoughts, are none."""
    parts = cast("list[object]", content) if isinstance(content, list) else [None]
    if not all(isinstance(part, Mapping) for part in parts):
        return content
    facts = cast("list[Mapping[str, object]]", parts)
    texts = [part.get("text") for part in facts if part.get("type") == "text"]
    told = [text for text in texts if isinstance(text, str)]
    return "".join(told) if len(told) == len(texts) else content


def _written(call: object, wrong: Wrong) -> str:
    """A call as text; its arguments, which come as JSON text, as what they say."""
    given = (
        cast("Mapping[str, object]", call).get("function") if isinstance(call, Mapping) else None
    )
    facts = cast("Mapping[str, object]", given) if isinstance(given, Mapping) else {}
    name, told = facts.get("name"), facts.get("arguments")
    if not isinstance(name, str):
        raise wrong("a call of a tool without the tool's name", call)
    made = {
        "name": name,
        "arguments": jsontext.loads_or_text(told) if isinstance(told, str) else told,
    }
    return f"<tool_call>\n{json.dumps(made, ensure_ascii=False)}\n</tool_call>"


def warn_of_filtered(place: str, filtered: Sequence[bool]) -> None:
    """Warn of answers that the server's own filter cut short or left out."""
    if n := sum(filtered):
        said = f"{n} of {len(filtered)} answers were filtered by the server (content_filter)"
        fix = "what is left of them counts as the answer"
        warnings.warn(f"{place}: {said}; {fix}", stacklevel=3)
