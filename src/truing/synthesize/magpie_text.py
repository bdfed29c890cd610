"""Magpie's text rules: which instructions are kept, without leaked answers or labels.

Some models write an answer, a label ("**Question:**") or an enumerator into the user turn they are
completing. `sanitise` cuts these away by a fixed list of rules of which exactly one fires
(arXiv 2406.08464, rule numbers as in the method's released code).
"""

from __future__ import annotations

import re

_LABELS = (
    "Task|Prompt|Original Prompt|Question|The Problem|Problem|Scenario|Situation|The situation"
    "|Context|Challenge|Query|Request|Instructions|Instruction|Descriptions|Description"
)
_ENUMERATOR = re.compile(r"^(?:\d+\.|\w+\))\s*")
_LABEL = re.compile(
    rf"^(?:(?:{_LABELS}):|\*\*(?:{_LABELS})\*\*|## (?:{_LABELS}):"
    r"|Question \d+[:.]|Part \d+:|Q\d+[.:])\s*",
    re.IGNORECASE,
)
_ANSWER = re.compile(
    r"(?:Answers?|The answer is|(?:The )?Correct answer|Answer is|Explanation|Here are some"
    r"|Solution(?: Approach)?):"
)
_STEP = re.compile(r"#{1,3} Step 1")


def strip_prefix(text: str) -> str:
    """The text without one leading enumerator and then one leading label."""
    text = _ENUMERATOR.sub("", text.strip(), count=1)
    return _LABEL.sub("", text, count=1).strip()


def _before_question(text: str, mark: str) -> str:
    return text.split("?", 1)[0].replace(mark, "").strip() + "?"


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0]


def _cut(text: str) -> tuple[str, str]:
    """(text, rule) of the rules after the starred question."""
    if text.startswith('"'):
        if "?" in text:
            return _before_question(text, '"'), "2.1"
        return _first_line(text).replace('"', "").replace("*", ""), "2.2"
    if re.match(r"<b\b[^>]*>|<strong\b[^>]*>", text):
        return text.replace("*", ""), "3"
    marker = _ANSWER.search(text)
    if marker:
        return text[: marker.start()], "4"
    step = _STEP.search(text)
    if step:
        return text[: step.start()], "5"
    if _first_line(text).rstrip().endswith(":"):
        if "#" in text:
            return text.split("#", 1)[0], "6.1"
        if "?" in text:
            return text.split("?", 1)[0] + "?", "6.2"
        return _first_line(text).replace("*", ""), "6.3"
    if "?" in text:
        return text.split("?", 1)[0] + "?", "99.1"
    return _first_line(text).replace("*", ""), "99.2"


def sanitise(text: str) -> tuple[str, str]:
    """(cleaned instruction, id of the one rule that fired)."""
    text = strip_prefix(text)
    if text.startswith("*") and "?" in text:
        return strip_prefix(_before_question(text, "*")), "1"
    text, rule = _cut(strip_prefix(text))
    return strip_prefix(text), rule


def early_stop(text: str) -> str:
    """The first line: many models begin to answer after it."""
    return text.strip().split("\n", 1)[0].strip()


def cut_role(text: str) -> str:
    """The text before the next role header, "assistant" or "Assistant", that it ran into."""
    return re.split(r"[Aa]ssistant", text, maxsplit=1)[0].strip()


def clean(text: str, *, one_line: bool, rules: bool) -> str:
    """An instruction from a raw continuation of the pre-query; "" when nothing is left."""
    text = cut_role(text)
    if one_line:
        text = early_stop(text)
    return sanitise(text)[0] if rules and text else text.strip()


def keep(text: str, finished: bool, min_words: int) -> bool:
    """True for an instruction that is complete, long enough, not empty, not the head of a list."""
    return finished and len(text.split()) >= max(min_words, 1) and not text.endswith(":")
