"""What a text is like: its words and sentences, how it repeats itself, its language, its topic."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from truing.tables import Row, user_text

# Scripts that put no spaces between words: Thai, Lao, Burmese, Khmer; kana; Chinese characters.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
JOINERS = "\u200c\u200d"  # say how letters of one word are drawn
# Sentences end where white space follows a stop, and at full-width stops wherever they are.
_SENTENCE = re.compile(
    r"(?<=[.!?\u2026\u0964\u0965\u061f\u06d4])[\"'\u201d\u2019)]*\s+|\n+"
    r"|(?<=[\u3002\uff01\uff1f\uff61])(?![\u3002\uff01\uff1f\uff61])"
    r"[\"'\u201d\u2019\u300d\u300f\uff09)]*\s*"
)
# The commonest function words: enough to tell these languages apart in a sentence or two.
STOP_WORDS = {
    "en": "the of and to in is that for it with as on are this be was by you an or not",
    "fr": "le la les des et est une dans que pour qui sur pas avec vous sont ce cette aux du",
    "de": "der die das und ist ein eine nicht zu den mit von sie auf es dem im auch als wir",
    "es": "el los las que en una por con para es del se no su al como lo este muy pero",
    "it": "il che di per una sono con non gli della nel anche questo alla dei si del piu ha i",
    "pt": "o os que em uma para com nao por mais dos como das se ao foi sua seu pelo isso",
    "nl": "de het een van en is dat niet op te zijn met voor die aan er om ook maar wij",
}
SCRIPTS = {
    "zh": r"[\u4e00-\u9fff]",
    "ja": r"[\u3040-\u30fa\u30fc-\u30ff]",  # without the dot between the parts of a name
    "ko": r"[\uac00-\ud7af]",
    "ru": r"[\u0400-\u04ff]",
    "ar": r"[\u0600-\u06ff]",
    "hi": r"[\u0900-\u097f]",
    "el": r"[\u0370-\u03ff]",
}
KANA = 0.05  # Japanese mixes at least so much of it into the characters it has from Chinese


def text_of(row: Row) -> str:
    """The answer of a row, without white space around it."""
    return str(row.get("completion", "")).strip()


@functools.cache
def _word() -> re.Pattern[str]:
    """A word: letters and digits with their marks; one character of a script without spaces."""
    marks = [c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c)[0] == "M"]
    mark, letter = f"[{''.join(marks)}{JOINERS}]", rf"[^\W_{UNSPACED}]"
    run = f"{letter}+(?:{mark}+{letter}*)*"
    return re.compile(rf"(?=[^\W_])[{UNSPACED}]{mark}*|{run}(?:['\u2019-]{run})*")


def words(text: str) -> list[str]:
    """Words of a text: runs of letters and digits; hyphens and apostrophes join.

    Vowel signs and accents belong to their letters. Scripts that put no spaces between words count
    by their characters.
    """
    return _word().findall(text)


def sentences(text: str) -> list[str]:
    """Sentences, split after closing punctuation and at line ends."""
    return [p.strip() for p in _SENTENCE.split(text) if p.strip()]


def repetition(text: str) -> float:
    """Share of the groups of four words that repeat an earlier one; 0 for short texts."""
    found = [w.lower() for w in words(text)]
    grams = [tuple(found[i : i + 4]) for i in range(len(found) - 3)]
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


def repeats_a_sentence(text: str) -> bool:
    """True when a sentence of four words or more stands in the text twice."""
    long = [" ".join(w.lower() for w in words(s)) for s in sentences(text) if len(words(s)) >= 4]
    return any(count > 1 for count in Counter(long).values())


def language_of(text: str, default: str = "en") -> str:
    """Language of a text by script, then by its commonest words; `default` where none shows."""
    letters = sum(c.isalpha() for c in text)
    written = {code: len(re.findall(pattern, text)) for code, pattern in SCRIPTS.items()}
    if written["ja"] > KANA * (written["ja"] + written["zh"]):
        written["ja"] += written.pop("zh")
    for code, count in written.items():
        if letters and count > 0.3 * letters:
            return code
    found = Counter(w.lower() for w in words(text))
    counts = {code: sum(found[w] for w in listed.split()) for code, listed in STOP_WORDS.items()}
    best = max(counts.values())
    if best == 0 or counts.get(default, 0) == best:
        return default
    return max(counts, key=lambda code: counts[code])


def relevance(rows: list[Row]) -> list[float]:
    """Cosine of the sentence vectors of prompt and answer (all-MiniLM-L6-v2), 0 when empty."""
    if not rows:
        return []
    from truing.core.embed import TEXTS, embed
    from truing.core.journaled import kept

    def cosines(some: Sequence[tuple[str, str]]) -> list[float]:
        unique = list(dict.fromkeys(text for pair in some for text in pair))
        place = {text: i for i, text in enumerate(unique)}
        vectors = embed(unique)
        return [float(vectors[place[p]] @ vectors[place[a]]) if p and a else 0.0 for p, a in some]

    pairs = [(user_text(r.get("prompt")), text_of(r)) for r in rows]
    return kept("relevance", "minilm", pairs, TEXTS, cosines)
