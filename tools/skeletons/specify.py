"""My method: what it does for a user, in one sentence.

Say how texts become rules, which paper it is from (title, arXiv id), and where this differs from
the paper and why.
"""

from __future__ import annotations

from collections.abc import Sequence

from truing.method import method
from truing.principles import Principle, Principles
from truing.tables import Table


def rules(texts: Sequence[str]) -> list[Principle]:
    """One rule for each text."""
    return [Principle(id=f"rule-{i}", text=text.strip()) for i, text in enumerate(texts, 1)]


@method(paper="my-method", rows={"data": ("text",)}, within={"limit": (0, None)})
def my_method(data: Table, *, limit: int = 0) -> Principles:
    """My method: what it does for a user, in one sentence.

    Args:
        limit: only so many texts; 0 for all.
    """
    texts = [str(row["text"]) for row in data.expect("text", where="specify/my_method")]
    return Principles(rules(texts[:limit] if limit else texts), title="my_method")
