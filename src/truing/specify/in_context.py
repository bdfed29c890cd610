"""Principles stated in a prompt: what context distillation and its comparisons start from."""

from __future__ import annotations

from typing import Literal, cast

from truing.principles import Principles
from truing.tables import Message


def with_principles(
    prompt: object, principles: Principles, place: Literal["user", "system"]
) -> list[Message]:
    """The prompt as messages that also state the principles, in the last user turn or ahead."""
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [dict(m) for m in cast(list[Message], given)]
    if place == "user":
        ranked = sorted(principles, key=lambda p: -p.priority)
        last = max(i for i, m in enumerate(messages) if m["role"] == "user")
        messages[last]["content"] += "\n\n" + " ".join(p.text for p in ranked)
        return messages
    rules = "Follow these rules in every answer.\n" + principles.as_text()
    if messages[0]["role"] == "system":
        return [
            {"role": "system", "content": f"{messages[0]['content']}\n\n{rules}"},
            *messages[1:],
        ]
    return [{"role": "system", "content": rules}, *messages]
