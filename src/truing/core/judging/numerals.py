r"""Numbers as answers write them, read exactly: 1,200.50, 1/2, \frac{1}{2}, 1 1/2, 1e-3.

What verifiers of numeric answers share. A number is a `Fraction`, so that 0.5 and 1/2 are equal and
1/3 is no rounded decimal. What is part of another expression, as in 10^3, 2\pi, 2x or \sqrt{2}, is
none; nor is a date such as 1/2/2024 a fraction.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 200  # characters: digits without end, as of a model that repeats itself, are no answer
_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_BRACED = r"\{(?:[^{}]|\{[^{}]*\})*\}"
_POWER = rf"\^(?!\s*\{{?\s*\\circ)\s*(?:{_BRACED}|[-+]?[0-9]+)"
_ROOT = rf"\\sqrt\s*(?:\[[^\]]*\]\s*)?(?:{_BRACED}|[0-9])"
_FRACTION = rf"\\[dtc]?frac\s*{_BRACED}\s*{_BRACED}"
_NUMBER = re.compile(
    # After a word or a number it is a hyphen or a difference, and no sign.
    r"(?P<sign>(?:(?<![\w)\]}])[-+\u2212](?:\\?\$|[\u20ac\u00a3])?)?)"
    r"(?:(?:(?P<whole>(?<![0-9.,/])[0-9]{1,3})\s*)?\\[dtc]?frac\s*"
    r"(?:\{\s*(?P<a>-?[0-9]+)\s*\}\s*\{\s*(?P<b>-?[0-9]+)\s*\}|(?P<a1>[0-9])\s*(?P<b1>[0-9]))"
    r"|(?:(?P<mixed>(?<![0-9.,/])[0-9]{1,3})\s+)?"
    rf"(?<![0-9/])(?P<c>{_WHOLE})\s?/\s?(?P<d>[0-9]+)(?!\s?/|\.?[0-9])"
    rf"|(?P<plain>(?:{_WHOLE}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?))"
    # A letter right behind is a factor, but for units of one letter: d, g, h, l, m, s.
    rf"(?P<more>\s*(?:{_POWER}|{_ROOT}|{_FRACTION}|\\pi\b|\u03c0)|\s?/\s?[0-9]+"
    r"|[abcefi-kn-rt-z](?![A-Za-z]))?"
    rf"|(?P<other>{_POWER}|{_ROOT}|{_FRACTION})"
)
_UNIT_POWER = re.compile(r"(?:(?<=[A-Za-z]{2})|(?<=\bm)|(?<=[A-Za-z]\}))\s?\^\s?(?:[23]|\{[23]\})")
# Where an answer is marked as such, it is looked for there: GSM8K's "####", LaTeX's box.
_MARK = re.compile(r"####\s*([^\n]+)|\\f?boxed\s*\{")
_WORDS = r"[^\d\\=^_{}()\[\]+*<>]*"
_BEFORE = re.compile(rf"(?:{_WORDS}(?::|\bis))?[\s\u20ac\u00a3]*")
_UNIT = re.compile(rf"{_WORDS}(?:\^\s?\{{?[23]\}}?)?{_WORDS}")
_SEVERAL = re.compile(r"\b(?:and|or)\b")
_TYPESETTING = (
    (re.compile(r"(?<=[0-9])(?:\\[,;:! ]|\{,\})(?=[0-9]{3})"), ","),
    (re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree"), "\u00b0"),
    (re.compile(r"\\(?=[%$])|\\left|\\right|\\displaystyle|\$"), ""),
    (re.compile(r"\\[,;:! ]|~"), " "),
)


@dataclass(frozen=True)
class Number:
    """A number in a text.

    Args:
        value: None for what looks like one and is none, such as 10^3, 2x or 1/0.
        start: place of its first character.
        end: place behind its last one.
    """

    value: Fraction | None
    start: int
    end: int


def _value(found: re.Match[str]) -> Fraction | None:
    if found["more"] or found["other"] or len(found[0]) > LONGEST:
        return None
    if found["plain"]:
        if len(found["plain"].lower().partition("e")[2].lstrip("+-")) > 2:  # beyond 10^99
            return None
        value = Fraction(found["plain"].replace(",", ""))
    else:
        top, bottom = found["a"] or found["a1"] or found["c"], found["b"] or found["b1"]
        below, whole = int(bottom or found["d"]), found["whole"] or found["mixed"]
        if not below:
            return None
        value = Fraction(int(top.replace(",", "")), below)
        if whole and not 0 < value < 1:  # a product, or a number that stands before by chance
            return None
        value += int(whole or 0)
    return -value if found["sign"].startswith(("-", "\u2212")) else value


def numbers(text: str) -> list[Number]:
    """All numbers of a text, in order; the power of a unit, as in cm^2, is none of them."""
    text = _UNIT_POWER.sub(lambda m: " " * len(m[0]), text)
    return [Number(_value(m), m.start(), m.end()) for m in _NUMBER.finditer(text)]


def exact_number(text: str) -> Fraction | None:
    """The number that a text is, with nothing beside it; else None."""
    found = numbers(text)
    whole = len(found) == 1 and (found[0].start, found[0].end) == (0, len(text))
    return found[0].value if whole else None


def only_number(text: str) -> Fraction | None:
    r"""The number that a text is, with nothing but a unit and what it is called; else None.

    So are $18, 18 dollars, x = 18, 50\% and 3 cm^2; not 2x, 3 or 4, (1, 2) and 5 + \sqrt{2}.
    """
    text = _plain(text).strip().rstrip(".,;").strip()
    before, _, text = text.rpartition("=")  # of a sum, or of a name
    found = next(iter(numbers(text)), None)
    if found is None or re.search(r"[,;](?![0-9]{3})", before) or _SEVERAL.search(before):
        return None
    head, tail = text[: found.start], text[found.end :]
    fits = _BEFORE.fullmatch(head) and _UNIT.fullmatch(tail) and not _SEVERAL.search(tail)
    return found.value if fits else None


def marked(text: str) -> str | None:
    """What the last mark of an answer holds, a box or what follows "####"; None without a mark.

    A box that is not closed, as where an answer was cut, holds nothing.
    """
    found: str | None = None
    for mark in _MARK.finditer(text):
        if mark[1] is None:
            found = _boxed(text, mark.end())
        else:
            inner = marked(mark[1])
            found = mark[1] if inner is None else inner
    return found


def final_number(text: str) -> Fraction | None:
    """The number that the last marked part is, else the last of the whole text; None for none."""
    part = marked(text)
    if part is not None:
        return only_number(part)
    found = numbers(_plain(text))
    return found[-1].value if found else None


def _boxed(text: str, start: int) -> str:
    """What stands from `start` to the brace that closes it; "" where none does."""
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if not depth:
            return text[start:i]
    return ""


def _plain(text: str) -> str:
    """A text without what LaTeX only sets it by."""
    for pattern, plain in _TYPESETTING:
        text = pattern.sub(plain, text)
    return text
