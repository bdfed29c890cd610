"""Train a reward model that tells right solutions from wrong ones, at every token of a solution.

    loss = sum_t w_t (-y_t log sigmoid(s_t) - (1 - y_t) log sigmoid(-s_t)) / sum_t w_t

    outcome_reward           y_t = 1 iff the whole solution is right, 0 else          (ORM)
    outcome_process_reward   y_t = the label of the step that token t is part of      (OPRM)

s_t is a linear head on the last hidden state of token t; w_t is 1 on the solution, 0 on the prompt.
An outcome model says of a solution what its last token says, a process model what its steps' last
tokens say. The mixture of both is trained on rows of steps of two sorts: those with a label for
each step (`step_labels`), and whole solutions, whose steps all carry the outcome (`outcome_labels`
puts both together). Given rows of the first sort alone it is the paper's process reward model,
which learns at every token of a step; `process_reward` learns at the token that closes a step, as
is usual elsewhere. Tokens of a step that was cut carry no loss.

Source: "Easy-to-Hard Generalization: Scalable Alignment Beyond Human Supervision", arXiv
2403.09472; outcome models after arXiv 2110.14168.

Shapes: U rows, K = 1 branch, T tokens of a solution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from truing.core.chat import Prompt, prompt_ids
from truing.core.objective import Loss, Measurements, objective
from truing.core.training import Hook, hook
from truing.core.tree import Node
from truing.errors import InputError

if TYPE_CHECKING:
    from truing.core.batch.training_rows import Unit
    from truing.models import Loaded


def by_token(score_UT: Tensor, y_UT: Tensor, mask_UT: Tensor) -> Loss:
    """Cross-entropy to the labels y at each token, weighed by the mask."""
    per_token = -y_UT * logsigmoid(score_UT) - (1 - y_UT) * logsigmoid(-score_UT)
    right_UT = ((score_UT > 0) == (y_UT > 0.5)).float() * mask_UT
    seen = {"accuracy": (right_UT.sum(1) / mask_UT.sum(1).clamp(min=1)).detach()}
    return Loss(per_token, mask_UT, seen)


def spread(unit: Unit, start: int) -> Unit:
    """A row of steps in which each token of a step has the step's label.

    Args:
        unit: one in which the token that closes a step carries loss, with a label for each step.
        start: tokens of the prompt.
    """
    whole = cast(Node, unit.dialogue)
    labels = cast("Sequence[float]", unit.numbers["labels"])
    ends = [t for t, closes in enumerate(whole.loss) if closes]
    loss, of_token, first = [False] * len(whole.ids), list[float](), start
    for end, label in zip(ends, labels, strict=True):
        size = end + 1 - first
        loss[first : end + 1] = [True] * size
        of_token += [label] * size
        first = end + 1
    numbers = {**unit.numbers, "labels": of_token}
    return replace(unit, numbers=numbers, dialogue=Node(whole.ids, tuple(loss)))


@hook("every_token")
class EveryToken(Hook):
    """All tokens of a step are learnt from, not the one that closes it alone."""

    def units(
        self, loaded: Loaded, units: Sequence[Unit], prompts: Mapping[str, Prompt], limit: int
    ) -> list[Unit]:
        """The rows with loss, and their step's label, at every token after the prompt."""
        tokenizer = loaded.tokenizer
        return [spread(u, len(prompt_ids(tokenizer, prompts[u.id]))) for u in units]


@objective(
    paper="easy-to-hard", unit="token", needs=("scores",), rows="unpaired", columns={"label": None}
)
def outcome_reward(m: Measurements) -> Loss:
    """Train a reward model that tells right solutions from wrong ones, at their every token."""
    mask_UT = m.mask_UKT[:, 0]
    y_UT = (m["label"] > 0).float()[:, None].expand_as(mask_UT)
    return by_token(m["scores"][:, 0], y_UT, mask_UT)


@objective(
    paper="easy-to-hard",
    unit="token",
    needs=("scores",),
    rows="steps",
    columns={"labels": None},
    hook="every_token",
)
def outcome_process_reward(m: Measurements) -> Loss:
    """Train a reward model on labels of steps and of whole solutions, at every token of a step."""
    score_UT, mask_UT, y_UT = m["scores"][:, 0], m.mask_UKT[:, 0], m["labels"]
    # Columns are as wide as the longest row of the step, scores as that of the micro-batch.
    tokens = score_UT.shape[1]
    y_UT = pad(y_UT, (0, max(0, tokens - y_UT.shape[1])))[:, :tokens]
    if bool(((y_UT < 0) | (y_UT > 1)).any()):
        raise InputError(
            "labels of steps are shares from 0 to 1",
            where="column 'labels'",
            seen=[float(y_UT.min()), float(y_UT.max())],
            fix="Of ratings -1, 0 and 1 the last two are right steps: label them 0, 1 and 1",
        )
    return by_token(score_UT, y_UT, mask_UT)
