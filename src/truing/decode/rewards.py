"""Rewards that a program can compute, for decoding: concepts that must appear in the answer.

A reward takes rows with "prompt" and "completion" and returns one float each. Checks of principles
(`specify.checks`) serve as rewards too.
"""

from __future__ import annotations

import re

from truing.errors import InputError
from truing.method import component
from truing.tables import Row, user_text

_ENDINGS = ("", "s", "es", "ed", "ing", "d")
_PART = re.compile(r"[^\W_]+")


def inflections(word: str) -> set[str]:
    """A word and its plural, past and -ing forms, roughly: dog -> dogs; stop -> stopped."""
    word = word.lower()
    stems = {word}
    if word.endswith("e"):
        stems.add(word[:-1])
    if len(word) > 2 and word[-1] not in "aeiouwxy" and word[-2] in "aeiou":
        stems.add(word + word[-1])
    made = {stem + ending for stem in stems for ending in _ENDINGS}
    if len(word) > 2 and word.endswith("y") and word[-2] not in "aeiou":
        made |= {word[:-1] + ending for ending in ("ies", "ied")}
    return made - (stems - {word})


def listed_words(prompt: str) -> list[str]:
    """What a prompt lists after its last colon: "Use these words: dog, ball, park." -> three."""
    _, colon, tail = prompt.rpartition(":")
    parts = re.split(r",|\band\b", tail) if colon else []
    return [w for w in (p.strip(" .!?\n\"'") for p in parts) if w]


def coverage(text: str, words: list[str]) -> float:
    """Share of `words`, or phrases, that the text holds in some inflection of their end.

    Both are cut at all that is no letter or digit: a text of T-shirts holds "t-shirt".
    """
    line = f" {' '.join(_PART.findall(text.lower()))} "
    found = 0
    for word in words:
        parts = _PART.findall(word)
        forms = inflections(parts[-1]) if parts else ()
        start = "".join(f"{p.lower()} " for p in parts[:-1])
        found += any(f" {start}{form} " in line for form in forms)
    return found / len(words)


@component("reward")
def keyword_coverage(rows: list[Row], *, words: list[str] | None = None) -> list[float]:
    """Share of the required words in the answer, inflections allowed; as in DeAL, 2402.06147.

    Args:
        words: None takes those that each prompt lists after its last colon, parted by commas.
    """
    values: list[float] = []
    for i, row in enumerate(rows, 1):
        wanted = words or listed_words(user_text(row.get("prompt")))
        if not wanted:
            raise InputError(
                "no required words",
                where=f"reward keyword_coverage row {i}",
                seen=user_text(row.get("prompt")),
                fix="Give words=[...], or prompts that end in a list: 'Use these words: dog, ball'",
            )
        values.append(coverage(str(row.get("completion", "")), wanted))
    return values
