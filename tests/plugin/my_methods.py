"""Keep rows with long answers, and a check of politeness."""

from __future__ import annotations

from truing import Table, component, method


@method()
def long_answers(data: Table, *, least: int = 20) -> Table:
    """Keep rows with long answers.

    Args:
        least: number of words that an answer must have.
    """
    return data.where(lambda row: len(str(row["completion"]).split()) >= least)


@component("check")
def polite(rows: list[dict[str, object]], *, word: str = "please") -> list[float]:
    """The answer says `word`."""
    return [float(word in str(row["completion"]).lower()) for row in rows]
