"""Executable checks of principles: what a rule means, as a function of prompt and answer.

A check takes rows with "prompt" and "completion" and returns satisfaction in [0, 1]: 1.0 means the
rule is kept, below 0.5 that it is broken. Where "how badly" has a natural measure (words over the
limit), a broken rule scores in proportion below 0.5, so that the worse of two bad answers is known.
"""

from __future__ import annotations

import re

from truing.errors import InputError
from truing.method import component
from truing.specify import texts
from truing.specify.texts import (
    SCRIPTS,
    STOP_WORDS,
    language_of,
    repeats_a_sentence,
    repetition,
    sentences,
    text_of,
    words,
)
from truing.tables import Row, user_text

BROKEN = 0.49  # the best score that a broken rule can have
_LIST_LINE = re.compile(
    r"^\s*(?:[-*+\u2022\u2023\u25aa\u25cf]|\(?\d{1,3}[.):]|\(?[a-zA-Z][.)])\s+\S", re.M
)
_INLINE_LIST = re.compile(r"(?:^|\s)\(?1[.)]\s+\S.*?\s\(?2[.)]\s+\S", re.S)
_MARKDOWN = re.compile(
    r"^\s{0,3}#{1,6}\s|\*\*\S|__\S.*?\S__|^```|`[^`\n]+`|^\s*\|.+\|\s*$|\[[^\]\n]+\]\([^)\n]+\)|^\s*>\s",
    re.M,
)
_FIRST_PERSON = re.compile(r"\b(?:I|I['\u2019](?:m|ve|d|ll)|[Mm]e|[Mm]y|[Mm]ine|[Mm]yself)\b")
# "I" as a numeral: "World War I", "Type I".
_NUMERAL = re.compile(r"\b(?:War|Type|Part|Phase|Class|Chapter|Act|Volume|Stage|Level|Grade) I\b")
_QUOTED = re.compile(r"\"[^\"]*\"|\u201c[^\u201d]*\u201d")
_SENTENCE_END = re.compile(r"[.!?\u2026\u3002\uff01\uff1f][\"'\u201d\u2019)\]*]*\s*$")
_PREAMBLE = re.compile(
    r"^\W*(?:(?:sure|certainly|of course|absolutely|great question|good question)\b|happy to help"
    r"|i(?:'d|\u2019d| would)? (?:be |am )?(?:happy|glad) to|here(?:'s|\u2019s| is| are)\b"
    r"|thank you for|that(?:'s|\u2019s| is) a (?:great|good))",
    re.I,
)
_REFUSAL = re.compile(
    r"\b(?:i(?:'m|\u2019m| am) sorry|i (?:can(?:no|')t|cannot|am unable|am not able)|as an ai)\b",
    re.I,
)


def _kept(values: list[bool]) -> list[float]:
    return [1.0 if value else 0.0 for value in values]


def _not_negative(value: int, name: str, setting: str = "n") -> int:
    if value < 0:
        raise InputError(
            f"setting {setting!r} must be 0 or more", where=f"check {name}", seen=value
        )
    return value


def _share(value: float, name: str, setting: str = "share") -> float:
    if not 0 <= value <= 1:
        raise InputError(
            f"setting {setting!r} must lie in [0, 1]", where=f"check {name}", seen=value
        )
    return value


def _at_most(value: float, limit: float) -> float:
    return 1.0 if value <= limit else BROKEN * limit / value


@component("check")
def max_words(rows: list[Row], *, n: int) -> list[float]:
    """The answer has at most `n` words."""
    limit = _not_negative(n, "max_words")
    return [_at_most(len(words(text_of(r))), limit) for r in rows]


@component("check")
def min_words(rows: list[Row], *, n: int) -> list[float]:
    """The answer has at least `n` words."""
    least = _not_negative(n, "min_words")
    counts = [len(words(text_of(r))) for r in rows]
    return [1.0 if c >= least else BROKEN * c / least for c in counts]


@component("check")
def max_sentences(rows: list[Row], *, n: int) -> list[float]:
    """The answer has at most `n` sentences."""
    limit = _not_negative(n, "max_sentences")
    return [_at_most(len(sentences(text_of(r))), limit) for r in rows]


@component("check")
def no_lists(rows: list[Row], *, allow: int = 0) -> list[float]:
    """The answer holds no bulleted or numbered list: at most `allow` lines that look like items."""
    _not_negative(allow, "no_lists", "allow")
    values: list[float] = []
    for row in rows:
        text = text_of(row)
        items = len(_LIST_LINE.findall(text))
        if items <= allow and _INLINE_LIST.search(text):
            items = max(2, allow + 1)
        values.append(1.0 if items <= allow else BROKEN / (items - allow))
    return values


@component("check")
def no_markdown(rows: list[Row]) -> list[float]:
    """The answer is plain text: no headings, bold, code marks, tables or links."""
    return _kept([not _MARKDOWN.search(text_of(r)) for r in rows])


@component("check")
def one_paragraph(rows: list[Row]) -> list[float]:
    """The answer is a single paragraph."""
    counts = [sum(1 for line in text_of(r).splitlines() if line.strip()) for r in rows]
    return [_at_most(c, 1) for c in counts]


@component("check")
def ends_with_sentence(rows: list[Row]) -> list[float]:
    """The answer ends where a sentence ends; one cut at the length limit is not held to it."""
    return _kept(
        [r.get("finished") is False or bool(_SENTENCE_END.search(text_of(r))) for r in rows]
    )


@component("check")
def no_exclamation(rows: list[Row]) -> list[float]:
    """The answer holds no exclamation mark."""
    return [_at_most(1 + sum(text_of(r).count(m) for m in "!\uff01\u00a1"), 1) for r in rows]


@component("check")
def no_question(rows: list[Row]) -> list[float]:
    """The answer asks nothing back."""
    return _kept(["?" not in text_of(r) for r in rows])


@component("check")
def no_preamble(rows: list[Row]) -> list[float]:
    """The answer starts with its content, not with "Sure!" or "Here is"."""
    return _kept([not _PREAMBLE.search(text_of(r)) for r in rows])


@component("check")
def no_refusal(rows: list[Row]) -> list[float]:
    """The answer does not decline."""
    return _kept([not _REFUSAL.search(text_of(r)) for r in rows])


@component("check")
def no_first_person(rows: list[Row]) -> list[float]:
    """The answer does not speak of itself as "I", "me" or "my", quotations aside."""
    plain = [_NUMERAL.sub("", _QUOTED.sub("", text_of(r))) for r in rows]
    return [_at_most(1 + len(_FIRST_PERSON.findall(text)), 1) for text in plain]


@component("check")
def no_repetition(rows: list[Row], *, share: float = 0.2) -> list[float]:
    """No sentence stands twice, and at most `share` of the four-word runs repeat earlier ones."""
    _share(share, "no_repetition")
    return [
        0.0 if repeats_a_sentence(text_of(r)) else _at_most(repetition(text_of(r)), share)
        for r in rows
    ]


def _hits(text: str, terms: list[str]) -> int:
    return sum(1 for t in terms if re.search(rf"(?<!\w){re.escape(t)}(?!\w)", text, re.IGNORECASE))


def _terms(terms: list[str], name: str) -> list[str]:
    if not terms or not all(t.strip() for t in terms):
        raise InputError("give at least one word, none of them empty", where=name, seen=terms)
    return terms


@component("check")
def forbidden_words(rows: list[Row], *, words: list[str]) -> list[float]:
    """None of `words` (or phrases) stands in the answer, whatever the case."""
    terms = _terms(words, "check forbidden_words")
    return [_at_most(1 + _hits(text_of(r), terms), 1) for r in rows]


@component("check")
def must_include(rows: list[Row], *, words: list[str], all: bool = False) -> list[float]:
    """One of `words` (or phrases), or all of them, stands in the answer."""
    terms = _terms(words, "check must_include")
    need = len(terms) if all else 1
    found = [_hits(text_of(r), terms) for r in rows]
    return [1.0 if f >= need else BROKEN * f / need for f in found]


@component("check")
def language(rows: list[Row], *, code: str) -> list[float]:
    """The answer is written in the language `code` (en, fr, de, es, it, pt, nl, zh, ru, ...)."""
    if code not in STOP_WORDS and code not in SCRIPTS:
        raise InputError(
            f"no language {code!r}",
            where="check language",
            fix="Known: " + ", ".join([*STOP_WORDS, *SCRIPTS]),
        )
    return _kept([language_of(text_of(r), code) == code for r in rows])


@component("check")
def not_an_echo(rows: list[Row], *, share: float = 0.8) -> list[float]:
    """The answer says something of its own: under `share` of it is the prompt's own word runs.

    One of fewer than four words, which may choose among what is asked, is an echo of equal words.
    """
    _share(share, "not_an_echo")
    values: list[float] = []
    for row in rows:
        answer, prompt = (
            [w.lower() for w in words(t)] for t in (text_of(row), user_text(row.get("prompt")))
        )
        if len(answer) < 4:
            values.append(0.0 if answer and answer == prompt else 1.0)
            continue
        asked = {tuple(prompt[i : i + 3]) for i in range(len(prompt))}
        runs = [tuple(answer[i : i + 3]) for i in range(len(answer) - 2)]
        copied = sum(run in asked for run in runs) / len(runs)
        values.append(1.0 if copied < share else 0.0)
    return values


@component("check")
def on_topic(rows: list[Row], *, least: float = 0.3) -> list[float]:
    """The answer concerns the prompt: cosine of their sentence vectors is at least `least`."""
    _share(least, "on_topic", "least")
    return [
        1.0 if c >= least else BROKEN * max(c, 0.0) / least if least else 0.0
        for c in texts.relevance(rows)
    ]
