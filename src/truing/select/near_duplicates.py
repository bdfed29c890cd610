"""Remove near-duplicates: of each group of rows with nearly one meaning, the first is kept.

With e_i the unit sentence vector of row i and d_ij = ||e_i - e_j||^2 = 2 - 2 cos(e_i, e_j), the
similar set of i is S_i = {j != i: d_ij < threshold}; i is kept when S_i is empty or i < min S_i.
That is Magpie's rule (arXiv 2406.08464, threshold 0.05 with its 768-d encoder). The released code
looks at the 500 nearest neighbours; here all are compared, in blocks, so the rule is exact. It also
writes distance, number and least index of each row's neighbours; here duplicates are left out, and
no columns are written.

e_i is of what a row asks: its prompt, or all words of a dialogue but system messages and the last
answer, so that two that end in "Thanks!" are no duplicates for that. Rows that also hold answers
(pairs, examples, groups) are duplicates where every answer is near, too: several answers to one
prompt are what pairs are made for. `by: prompt` looks at the prompt alone, as Magpie does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

from truing.context import current
from truing.core.embed import embedded, near_earlier
from truing.kinds import Message, Row, user_text
from truing.method import method
from truing.readings import parting, sides_of
from truing.tables import Table

ANSWERS = ("chosen", "rejected", "completion", "completions", "steps")


def row_text(row: Row) -> str:
    """The text of a row: its prompt, its last user message or its text."""
    if "prompt" in row or "messages" in row:
        return user_text(row.get("prompt", row.get("messages")))
    return str(row.get("text", ""))


def instruction(row: Row) -> str:
    """What a row asks first, which is what Magpie tags and filters: of a dialogue no follow-up."""
    asked = row.get("prompt", row.get("messages"))
    messages = cast("list[Message]", asked if isinstance(asked, list) else [])
    users = [m.get("content", "") for m in messages if m.get("role") == "user"]
    return users[0] if users else row_text(row)


def asked_text(row: Row) -> str:
    """All that a row asks: its prompt, a dialogue up to its last answer, or its text."""
    if _of_dialogues(row):
        given, (chosen, rejected) = sides_of(row)
        messages = [*given, *chosen[: parting(chosen, rejected)]]
    elif isinstance(row.get("prompt", row.get("messages")), list):
        messages, _ = _dialogue(row)
    else:
        return row_text(row)
    return _words([m for m in messages if m.get("role") != "system"])


def _of_dialogues(row: Row) -> bool:
    """Whether a row holds two dialogues."""
    return isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list)


def _dialogue(row: Row) -> tuple[list[Message], list[Message]]:
    """Messages of a row, and the last one where it is an answer that the row holds."""
    messages = cast("list[Message]", row.get("prompt", row.get("messages")))
    ends = bool(messages) and messages[-1].get("role") == "assistant" and "prompt" not in row
    return (messages[:-1], messages[-1:]) if ends else (messages, [])


def answer_texts(row: Row) -> list[str]:
    """The answers that a row holds, each as one text; of a dialogue what it does not ask."""
    if _of_dialogues(row):
        _, (chosen, rejected) = sides_of(row)
        same = parting(chosen, rejected)
        return [_words(chosen[same:]), _words(rejected[same:])]
    found = [row[name] for name in ANSWERS if name in row]
    if "messages" in row and "prompt" not in row and (answer := _dialogue(row)[1]):
        found.append(answer)
    return [_words(answer) for answer in found]


def _words(answer: object) -> str:
    if not isinstance(answer, list):
        return str(answer)
    items = cast("list[object]", answer)
    return "\n".join(
        str(cast("Row", m).get("content") or "") if isinstance(m, dict) else str(m) for m in items
    )


def row_name(row: Row) -> str:
    """What tells rows that ask different things apart: all of it, or the id of a row without."""
    return asked_text(row) or str(row["id"])


def known(text: str) -> str:
    """A text as it is compared with others word for word."""
    return text.strip().lower()


def _kept(texts: Sequence[Sequence[str]], threshold: float) -> list[int]:
    """Numbers of the rows that the rule keeps.

    A row is near another that has as many texts where each is near the other's. Of equal rows,
    which would make many pairs, only the first is looked at.
    """
    first: dict[tuple[str, ...], int] = {}
    for i, row in enumerate(texts):
        # Nothing is nearer than 0, not even a text to itself.
        first.setdefault((*row, *([str(i)] if threshold == 0 else [])), i)
    as_long: dict[int, list[int]] = {}
    for i in first.values():
        as_long.setdefault(len(texts[i]), []).append(i)
    left_out: set[int] = set()
    for size, rows in as_long.items():
        places = [embedded([texts[i][place] for i in rows]) for place in range(size)]
        near = near_earlier(places, threshold)
        left_out.update(i for i, again in zip(rows, near, strict=True) if again)
    return [i for i in first.values() if i not in left_out]


@method(paper="magpie", within={"threshold": (0, 4)}, makes="data")
def near_duplicates(
    data: Table,
    *,
    threshold: float = 0.05,
    exact: bool = False,
    by: Literal["row", "prompt"] = "row",
) -> Table:
    """Remove near-duplicates: of each group of rows with nearly one meaning, the first is kept.

    Args:
        threshold: squared distance of two unit sentence vectors below which they are duplicates.
        exact: compare the texts themselves, without case, instead of their meaning.
        by: "row" keeps rows of one prompt whose answers differ; "prompt" one row of each prompt.
    """
    if len(data) < 2:
        return data
    texts = [[asked_text(r), *(answer_texts(r) if by == "row" else [])] for r in data]
    if exact:
        first: dict[tuple[str, ...], int] = {}
        for i, (row, parts) in enumerate(zip(data, texts, strict=True)):
            name = parts if any(parts) else [str(row["id"])]  # an image, say
            first.setdefault(tuple(map(known, name)), i)
        kept = list(first.values())
    elif not any(map(any, texts)):  # images and the like have no meaning that is compared here
        return data
    else:
        kept = _kept(texts, threshold)
    if left_out := len(data) - len(kept):
        current().metric(left_out=left_out)
    return data.take(kept).with_lineage(filter=f"near_duplicates {threshold:g}")
