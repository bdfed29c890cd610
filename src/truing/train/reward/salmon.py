"""One reward model for all principles: it scores an answer by those that are written beside it.

    -logsigmoid(s(x, y_w | P) - s(x, y_l | P)) - imitation mean_t log p(y_w,t)

The model reads the answer first, then the question, then the guideline with the principles, and a
stub that stops where the verdict would come; s is a linear head on the last hidden state of that
stub's last token, which so has seen the principles P of the row after the answer. Change them and
the same weights reward something else: a negative definition among them ("The answer is
long-winded") turns the preference round. Of a dialogue the question is all of it with its
speakers, as the judge read it that compared the answers.

A review that is too long loses the middle of the question, then of the answer, never the end: what
was cut is counted (`cut_question`, `cut_answer`), and a row whose principles leave no room is left
out. The same is done where answers are rewarded, within the model's context.

`imitation`, which SALMON itself has not (0), is a language model's loss on the chosen answer's own
tokens (arXiv 2307.04964, weight 1); an answer stands before its question, so p is of it as such.

Rows are pairs with the optional column `principles`, a list of sentences; without it the answer is
judged as a whole; synthesize/salmon makes such rows. Swapping the two answers and the label leaves
the loss as it is. The wording of the layout is our own.

The reward `salmon_reward` asks such a model (train/reward/salmon_reward.py).

Source: "SALMON: Self-Alignment with Instructable Reward Models", arXiv 2310.05910. Differences: the
layout is written through the model's own chat template, and no padding exists, so the last position
is the stub's end by construction.

Shapes: U pairs, K = 2 branches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from truing.core.batch.row_kinds import nothing_left
from truing.core.batch.training_rows import Reader
from truing.core.chat import completion_ids, prompt_ids
from truing.core.judging.judge_form import shown
from truing.core.objective import Loss, Measurements, objective
from truing.core.training import Hook, hook
from truing.errors import InputError
from truing.tables import Row, Table, prompt_of
from truing.train.reward.bradley_terry import bradley_terry, with_imitation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLE = (
    "You review an answer that an assistant gave. Read the answer, the question and the guideline, "
    "then say how well the answer keeps to the guideline."
)
WHOLE = "The answer is helpful, honest and harmless."
LEAST = 64  # characters of a question or an answer that cutting leaves
GAP = " ... "
OPEN_END = {"chosen_finished": False, "rejected_finished": False}


def reviewed(prompt: object, answer: str, principles: Sequence[str]) -> str:
    """The text that is scored: answer, question, guideline, and the stub of a verdict."""
    listed = "\n".join(f"- {p}" for p in principles or [WHOLE])
    return (
        f"Answer:\n{answer}\n\nQuestion:\n{shown({'prompt': prompt})}\n\nGuideline:\n{listed}\n\n"
        "By this guideline, the quality of the answer is"
    )


def shortened(text: str, keep: int) -> str:
    """A text without its middle: `keep` characters, the first and the last, around a gap."""
    if keep >= len(text):
        return text
    return f"{text[: keep - keep // 2]}{GAP}{text[len(text) - keep // 2 :]}"


def fitted(
    prompt: object, answer: str, principles: Sequence[str], fits: Callable[[str], bool]
) -> tuple[str, str] | None:
    """The review and what was cut: "", "question", or "answer" too; None where nothing fits."""
    question = shown({"prompt": prompt})
    if fits(whole := reviewed(question, answer, principles)):
        return whole, ""

    def cut(part: str, keep: int) -> str:
        q, a = (keep, len(answer)) if part == "question" else (LEAST, keep)
        return reviewed(shortened(question, q), shortened(answer, a), principles)

    for part, text in (("question", question), ("answer", answer)):
        low, high = LEAST, len(text)
        if low >= high or not fits(cut(part, low)):
            continue
        while high - low > 1:  # cut(part, low) fits, cut(part, high) does not
            middle = (low + high) // 2
            low, high = (middle, high) if fits(cut(part, middle)) else (low, middle)
        return cut(part, low), part
    return None


def within(tokenizer: PreTrainedTokenizerBase, limit: int) -> Callable[[str], bool]:
    """Whether a review and all that a template puts around it have at most `limit` tokens."""
    left = limit - len(prompt_ids(tokenizer, ROLE))
    return lambda text: len(completion_ids(tokenizer, text, end=False)) <= left


def principles_of(row: Row, where: str) -> list[str]:
    """The row's principles; an InputError unless they are a list of sentences."""
    found = row.get("principles") or []
    if not isinstance(found, list) or not all(isinstance(p, str) for p in found):
        raise InputError("column 'principles' must be a list of texts", where=where, seen=found)
    return cast("list[str]", found)


@hook("reviewed")
class Reviewed(Hook):
    """Pairs in the layout of a principle-following reward model."""

    def rows(self, data: Table, reader: Reader) -> Table:
        """The same pairs, each answer inside its review, as far as there is room for it."""
        fits = within(reader.tokenizer, reader.limit)
        made: dict[int, Row] = {}
        for i, row in enumerate(data):
            told = principles_of(row, data.place(i))
            asked = prompt_of(row)
            found = [fitted(asked, str(row[n]), told, fits) for n in ("chosen", "rejected")]
            reviews = [review for review in found if review is not None]
            if len(reviews) < len(found):
                reader.counts["left_out_long"] += 1
                continue
            reader.counts.update(f"cut_{part}" for _, part in reviews if part)
            (chosen, _), (rejected, _) = reviews
            answer = chosen[: chosen.index("\n\nQuestion:\n")]
            tokens = len(completion_ids(reader.tokenizer, answer, end=False))
            texts = {"prompt": ROLE, "tools": None, "chosen": chosen, "rejected": rejected}
            made[i] = {**row, **texts, **OPEN_END, "answer_tokens": tokens}
        if not made:
            raise nothing_left(data, reader.counts, reader.spec.name, reader.limit)
        return data.remade("pair", made.values(), list(made))


def answer_alone(m: Measurements) -> Measurements:
    """The same with the chosen answer's own tokens in place of the whole review's."""
    place_T = torch.arange(m.mask_UKT.shape[-1], device=m.mask_UKT.device)
    inside_UT = place_T < m["answer_tokens"][:, None]
    return replace(m, mask_UKT=m.mask_UKT * inside_UT[:, None])


@objective(
    paper="salmon",
    unit="pair",
    needs=("scores", "logp"),
    rows="pair",
    columns={"margin": 0.0, "answer_tokens": 1.0},
    hook="reviewed",
    only={"logp": "imitation"},
)
def salmon(m: Measurements, *, imitation: float = 0.0) -> Loss:
    """One reward model for all principles: it scores an answer by those written beside it.

    Args:
        imitation: weight of the chosen answer's negative log-likelihood; 0 saves a second pass.
    """
    made = bradley_terry(m)
    return with_imitation(made, answer_alone(m), imitation) if imitation else made
