"""Principles stated in a prompt: what context distillation and its comparisons start from."""

from __future__ import annotations

from typing import Literal, cast

from truing.errors import InputError
from truing.principles import Principle, Principles
from truing.tables import Message


def told(principles: Principles, n: int = 0) -> list[Principle]:
    """The `n` principles of highest priority, all for 0; the file's order decides among equals."""
    ranked = sorted(principles, key=lambda p: -p.priority)
    return ranked[:n] if n else ranked


def as_rules(principles: Principles, n: int = 0) -> str:
    """What a system message says of the `n` principles of highest priority, all for 0."""
    return "Follow these rules in every answer.\n" + Principles(told(principles, n)).as_text()


def with_principles(
    prompt: object, principles: Principles, place: Literal["user", "system"], n: int = 0
) -> list[Message]:
    """The prompt as messages that also state principles, in the last user turn or ahead of it.

    Args:
        prompt: a text or messages.
        principles: the rules.
        place: after the user's words, or in the system message.
        n: state only so many, those of highest priority; 0 for all.

    Raises InputError for messages without one of the user's, where it is there that they belong.
    """
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [dict(m) for m in cast(list[Message], given)]
    if place == "user":
        last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        if last < 0:
            raise InputError(
                "a prompt without a message of the user's has no place for principles",
                seen=prompt,
                fix="Leave it out, or state them in the system message (place: system)",
            )
        messages[last]["content"] += "\n\n" + " ".join(p.text for p in told(principles, n))
        return messages
    rules = as_rules(principles, n)
    if messages and messages[0]["role"] == "system":
        return [
            {"role": "system", "content": f"{messages[0]['content']}\n\n{rules}"},
            *messages[1:],
        ]
    return [{"role": "system", "content": rules}, *messages]
