"""Rewards that fall inside of an answer: numbers at positions of its text, and the tokens there.

A reward gives one number for an answer, or numbers at positions of it (`Placed`), such as one for
each step. Whoever compares whole answers sees their sum. Methods whose rewards are those of tokens
(ppo, reinforce_plus_plus) pay each number at the token that completes the text before its position.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence

from truing.surrogates import UNFINISHED

PaidAt = tuple[int, float]  # characters of the answer that come before, and what is paid there


class Placed(float):
    """Numbers at positions of an answer's text; as a number their sum.

    Args:
        parts: (position, number) each, in any order. A position counts the characters of the
            answer up to where the number falls; one beyond the end is the answer's last token.
    """

    parts: tuple[PaidAt, ...]

    def __new__(cls, parts: Sequence[PaidAt], total: float | None = None) -> Placed:
        """Their sum, `total` where it is known exactly; not a number where one is not finite."""
        values = [value for _, value in parts]
        whole = math.nan
        if all(map(math.isfinite, values)):
            whole = math.fsum(values) if total is None else total
        made = super().__new__(cls, whole)
        made.parts = tuple(parts)
        return made


def closings(text: str, separator: str) -> list[list[int]]:
    """Of each step of `steps_of(text, separator)` the positions of what closes it.

    They are those of the separator's characters, so that one that is several tokens, such as the
    two newlines of a blank line, is paid at each. A last step that nothing closes ends the text.
    """
    made: list[list[int]] = []
    at = 0
    for piece in text.split(separator):
        end = at + len(piece)
        closed = end < len(text)
        if piece.strip():
            made.append([end + i + 1 for i in range(len(separator))] if closed else [len(text)])
        at = end + len(separator)
    return made


def at_tokens(
    ids: Sequence[int], text: str, parts: Sequence[PaidAt], decode: Callable[[Sequence[int]], str]
) -> list[float]:
    """What is paid at each token, [T]: sums of the parts that fall there.

    Args:
        ids: the answer's tokens, its end included; one at least.
        text: its words, which `parts` speak of, without the white space around them.
        decode: words of the first tokens.
    """
    before = max(0, decode(ids).find(text))  # white space that the words begin with

    def written(token: int) -> int:
        # A character of which only some bytes are there yet stands as this mark.
        return len(decode(ids[: token + 1]).rstrip(UNFINISHED))

    paid = [0.0] * len(ids)
    for position, value in parts:
        token = len(ids) - 1
        if position <= len(text):
            token = bisect_left(range(token), before + position, key=written)
        paid[token] += value
    return paid
