"""What was asked in a rollout, what was answered, and what each answer was rewarded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from truing.core.chat import answer_text
from truing.core.placed import PaidAt, at_tokens
from truing.core.tree import Node, group_tree
from truing.tables import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Asked:
    """A row that is answered: its prompt in tokens, and the answer given with it, if any."""

    row: Row
    ids: tuple[int, ...]
    given: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answer:
    """One answer: every token drawn with its log-probability, its words, how it came about.

    Args:
        ids: what follows the prompt; of several turns, with the replies in between.
        logprobs: of the tokens that carry loss, in order.
        text: the words, of the last turn where there are several.
        finished: whether it ended by itself.
        own: whether the policy drew it.
        loss: which of `ids` carry loss; () for all.
        turns: how many it is made of.
        paid: at each token with loss, what an environment gave for the turn that ends there, and
            what rewards gave at this place; () for nothing.
        more: columns that its reward sees, in place of the row's.
        limit: the setting that cut it off, where it is not finished.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finished: bool
    own: bool = True
    loss: tuple[bool, ...] = ()
    turns: int = 1
    paid: tuple[float, ...] = ()
    more: Row = field(default_factory=dict)
    limit: str = "max_tokens"

    @property
    def marks(self) -> tuple[bool, ...]:
        """Which of its tokens carry loss."""
        return self.loss or (True,) * len(self.ids)

    @property
    def last_turn(self) -> tuple[int, ...]:
        """Tokens of the policy's last turn, which `text` is the words of."""
        replies = [i for i, mark in enumerate(self.marks) if not mark]
        return self.ids[replies[-1] + 1 :] if replies else self.ids

    def paying(self, parts: Sequence[PaidAt], tokenizer: PreTrainedTokenizerBase) -> Answer:
        """The answer with what its reward gave inside of it, beside what is paid there already."""
        if not parts:
            return self

        def decode(ids: Sequence[int]) -> str:
            return answer_text(tokenizer, ids)

        more = at_tokens(self.last_turn, self.text, parts, decode)
        paid = list(self.paid) or [0.0] * sum(self.marks)
        first = len(paid) - len(more)
        paid[first:] = [a + b for a, b in zip(paid[first:], more, strict=True)]
        return replace(self, paid=tuple(paid))


@dataclass(frozen=True)
class Group:
    """The answers to one prompt and what each was rewarded.

    Args:
        number: of the prompt among all.
        prompt: token ids.
        answers: the policy's own first.
        reward: of each answer.
        terms: rewards before they were weighed, by name.
        greedy: reward of the policy's greedy answer, which is none of these; None without one.
    """

    number: int
    prompt: tuple[int, ...]
    answers: tuple[Answer, ...]
    reward: tuple[float, ...]
    terms: Mapping[str, Sequence[float]]
    greedy: float | None = None

    def tree(self) -> Node:
        """Its tree: the prompt once, a branch for each answer."""
        ids, marks = [a.ids for a in self.answers], [a.marks for a in self.answers]
        return group_tree(self.prompt, ids, marks)


def seen_by_rewards(asked: Asked, answer: Answer, rollout: str) -> Row:
    """The row that an answer is rewarded by: the data's columns, and the answer over them.

    The answer that the row brought along stays in sight as `given`, where the data has no such
    column itself; as one of the group it is its own reference.
    """
    row, own = asked.row, asked.row.get("completion")
    if isinstance(own, str):
        joined = bool(asked.given) and not answer.own
        row = {"given": answer.text if joined else own, **row}
    said = {"completion": answer.text, "finished": answer.finished, "rollout": rollout}
    return {**row, **said, **answer.more}
