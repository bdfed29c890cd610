"""Scores by a head on a language model's trunk: what reward models say of answers and of steps.

    s_t = w . h_t + b       h_t: last hidden state of token t, after the final norm, in float32

The score of an answer is that of its last token, which has seen prompt and answer; of a step, that
of the token that closes it. The head lies beside the model's own weights as further tensors
(`reward_head.weight` [1, D], `reward_head.bias` [1]), so that a reward model is a `Model` like any
other: an adapter or new weights, and a head. A head of values has a layer with a ReLU before that
(`reward_head.hidden`), and its scores are values as they are, where others are logits. What a head
was trained on lies beside it (`reward_head.sort`): answers, their steps, or reviews, in which an
answer stands beside the principles that it is judged by. A head of one sort says nothing of
another; where it is missing all uses are allowed.

Shapes: N tokens, M loss tokens, U trees, K branches, T loss tokens of a branch, D hidden size.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from truing.changes import Weights
from truing.core.chat import Prompt, completion_ids, prompt_ids, step_ids
from truing.core.files import new_folder
from truing.core.generate import rewritten
from truing.core.journaled import kept
from truing.core.logprob import measure, states
from truing.core.modelfiles.reach import too_long, width_of
from truing.core.passes.headed import holds_score
from truing.core.trainer import distributed
from truing.core.tree import Node, Packed, budget_for, group_tree, pack
from truing.errors import InputError
from truing.models import Loaded, Model
from truing.tables import Row, content_hash, prompt_of

HEAD = "reward_head"
HIDDEN = f"{HEAD}.hidden"
SORT = f"{HEAD}.sort"
ROUNDING = 1e-5  # share of its parts below which the sum of a gradient is rounding
CHUNK = 128  # prompts whose answers a kill can cost
SORTS = ("answers", "steps", "reviews")  # what a head scores, by its number in that tensor

# What heads that score no whole answer score, and what rewards by it.
OTHERS = {
    "steps": ("the steps of answers", "its steps, {use: step_reward, model: ...}"),
    "reviews": (
        "answers beside the principles that they are judged by",
        "principles, {use: salmon_reward, model: ..., principles: ...}",
    ),
}


class _Plus(torch.autograd.Function):
    """Scores and the constant of all, whose gradient is 0 where it is nothing but rounding.

    Losses of differences, as Bradley and Terry's, do not know the constant. What their gradients
    sum up to is noise, of which an optimizer that divides by its size would make whole steps.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, made_M: Tensor, constant_1: Tensor) -> Tensor:  # type: ignore[override]
        """Scores [M]."""
        return made_M + constant_1

    @staticmethod
    def backward(ctx: FunctionCtx, up_M: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Gradients of both."""
        total, size = up_M.sum(), up_M.abs().sum()
        return up_M, torch.where(total.abs() > ROUNDING * size, total, 0.0).reshape(1)


class ScoreHead(nn.Module):
    """One linear layer from states to scores, zero at first; with `hidden`, a ReLU layer below."""

    def __init__(self, width: int, hidden: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden or width))
        self.bias = nn.Parameter(torch.zeros(1))
        self.hidden = nn.Linear(width, hidden) if hidden else None

    def forward(self, rows_MD: Tensor) -> Tensor:
        """Scores [M]."""
        rows_MD = rows_MD.float()
        if self.hidden is not None:
            rows_MD = self.hidden(rows_MD).relu()
        made_M = torch.nn.functional.linear(rows_MD, self.weight)[:, 0]
        return cast(Tensor, _Plus.apply(made_M, self.bias))

    @staticmethod
    def of(loaded: Loaded, *, values: bool = False) -> ScoreHead:
        """The head that the model has, else a new one; one of values only where they are wanted."""
        if not values:
            check_linear(loaded)
        width = width_of(loaded.module)
        hidden = len(loaded.extra.get(f"{HIDDEN}.bias", ()))
        head = ScoreHead(width, hidden)
        for name, parameter in head.named_parameters(HEAD):
            if name in loaded.extra:
                with torch.no_grad():
                    parameter.copy_(loaded.extra[name])
        return head.to(loaded.device)

    def added_to(self, model: Model, folder: Path, sort: str = "") -> Model:
        """`model` with this head, stored in `folder`; what already lies there is taken as it is.

        Args:
            sort: what it was trained to score, one of `SORTS`; "" leaves that open.
        """
        if not folder.is_dir():
            with new_folder(folder) as partial:
                tensors = {n: p.detach().cpu().contiguous() for n, p in self.named_parameters(HEAD)}
                if sort:
                    tensors[SORT] = torch.tensor([SORTS.index(sort)])
                save_file(tensors, partial / f"{HEAD}.safetensors")
        return model.adding(Weights(folder))


def has_head(model: Model) -> bool:
    """True for a model with a score head, from training here or as transformers has them."""
    if model.is_served:
        return False
    return f"{HEAD}.weight" in model.folded().extra or holds_score(model)


def gives_values(model: Model) -> bool:
    """True for a model whose head's scores are values as they are, not logits."""
    return has_head(model) and f"{HIDDEN}.bias" in model.folded().extra


def sort_of(model: Model) -> str:
    """What a model's head was trained to score, one of `SORTS`; "" where none says so."""
    number = None if model.is_served else model.folded().extra.get(SORT)
    return "" if number is None else SORTS[int(number)]


def warn_of_head(loaded: Loaded, where: str) -> None:
    """Say that a head is kept which a training of the words does not train."""
    if f"{HEAD}.weight" in loaded.extra and distributed.leads():
        print(
            f"{where}: warning: the model has a score head, which is not trained and stays: as a "
            "reward it says what that head makes of the new weights, not what is learnt here",
            file=sys.stderr,
        )


def check_answers(model: Model, where: str) -> None:
    """Raise InputError for a head that was never trained at the end of a prompt and its answer."""
    sort = sort_of(model)
    if sort not in OTHERS:
        return
    what, way = OTHERS[sort]
    raise InputError(
        f"the model scores {what}, not whole answers",
        where=where,
        seen=model.name,
        fix=f"Reward by {way}, or give a model from bradley_terry, guard or outcome_reward",
    )


def check_reviews(model: Model, where: str) -> None:
    """Raise InputError for a model that was not trained on answers beside their principles.

    Models with another head, and language models without any. A head, or a classifier, of which
    nothing is known passes.
    """
    scores = has_head(model) or "generate" not in model.can
    if scores and sort_of(model) in ("", "reviews"):
        return
    raise InputError(
        "the model does not score answers beside the principles that they are judged by",
        where=where,
        seen=model.name,
        fix="Train one with salmon; what scores answers as they are is a reward_model elsewhere",
    )


def check_steps(model: Model, where: str) -> None:
    """Raise InputError for a model without a head, and for a head of whole answers."""
    if has_head(model) and sort_of(model) in ("", "steps"):
        return
    raise InputError(
        "the model scores whole answers, not their steps"
        if has_head(model)
        else "the model has no score head, and scores no steps",
        where=where,
        seen=model.name,
        fix="Train one with process_reward, outcome_process_reward or step_value",
    )


def check_logits(model: Model, where: str) -> None:
    """Raise InputError for a head of values: what it says is no logit of a probability."""
    if gives_values(model):
        raise InputError(
            "the model has a head of values, whose scores no sigmoid makes probabilities of",
            where=where,
            seen=model.name,
            fix="Give a classifier, such as one from guard, process_reward or bradley_terry",
        )


def sigmoid(score: float) -> float:
    """1 / (1 + e^-s), without overflow."""
    return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))


def check_linear(loaded: Loaded) -> None:
    """Raise InputError for a head of values, which training a linear one cannot go on from."""
    if f"{HIDDEN}.bias" in loaded.extra:
        raise InputError(
            "the model has a head of values already, and its scores are no logits",
            where=loaded.model.name,
            fix="Start from the model that it was trained on",
        )


def measured(module: nn.Module, head: ScoreHead, packed: Packed, *, grad: bool = True) -> Tensor:
    """Score at each loss token itself, [U, K, T], 0 at padding."""
    with torch.set_grad_enabled(grad):
        return packed.spread(head(states(module, packed)[packed.place_M]))


def by_prompt(
    loaded: Loaded, rows: Sequence[Row], values: Callable[[Packed], Tensor], name: str
) -> list[float]:
    """A number for each row's answer, the prompt of several rows computed once.

    The model's edits, prefix and rewriter are in force. What a stopped step had finished is read
    from its journal, so that the model must be as its key says, not in training.

    Args:
        rows: with "prompt", "completion" and optionally "finished".
        values: numbers [U, K] of a micro-batch.
        name: of these numbers, in the journal.
    Returns:
        them in the order of the rows; 0 for an empty answer that has no end either.
    """
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(content_hash(prompt_of(row)), []).append(i)
    found = [0.0] * len(rows)
    order: list[list[int]] = []
    asked: list[tuple[list[int], list[list[int]]]] = []
    told = rewritten(loaded.model, [cast(Prompt, prompt_of(rows[m[0]])) for m in groups.values()])
    for prompt, members in zip(told, groups.values(), strict=True):
        answers = {i: _answer(loaded, rows[i]) for i in members}
        some = [i for i in members if answers[i]]
        if some:
            order.append(some)
            head = prompt_ids(loaded.tokenizer, prompt)
            for i in some:
                check_fits(loaded, len(head) + len(answers[i]), i)
            asked.append((head, [answers[i] for i in some]))

    def make(some: Sequence[tuple[list[int], list[list[int]]]]) -> list[list[float]]:
        trees = [group_tree(*one) for one in some]
        return [value_K.tolist() for value_K in by_tree(loaded, trees, values)]

    made = kept(name, loaded.model.key, asked, CHUNK, make)
    for members, numbers in zip(order, made, strict=True):
        for i, value in zip(members, numbers, strict=False):
            found[i] = value
    return found


def check_fits(loaded: Loaded, tokens: int, row: int) -> None:
    """Raise InputError for a row, counted from 0, that is longer than the model's context."""
    if wrong := too_long(loaded.module, tokens):
        raise InputError(
            wrong,
            where=f"{loaded.model.name} row {row + 1}",
            fix="Shorten such rows, leave them out, or lower max_tokens where answers are drawn",
        )


def by_tree(
    loaded: Loaded, trees: Sequence[Node], values: Callable[[Packed], Tensor]
) -> Iterator[Tensor]:
    """What `values` says of each tree, in order; what trees begin with alike is computed once.

    The model's edits are in force; what they are told (prefix, rewriter) is in the trees already.
    Args:
        values: [U, K, ...] of a micro-batch of U trees.
    Returns:
        [K, ...] of each tree, on the CPU; K is that of the widest tree of its micro-batch.
    """
    for packed in (
        pack(trees, budget_for(loaded.device), share=True, device=loaded.device) if trees else []
    ):
        with torch.inference_mode(), loaded.run_time():
            made = values(packed.to(loaded.device)).cpu()
        yield from made


def tail_logps(loaded: Loaded, *, mean: bool = False) -> Callable[[Packed], Tensor]:
    """For `by_tree`: log p [U, K] of the loss tokens of each branch, or its mean over them."""

    def values_UK(packed: Packed) -> Tensor:
        made = measure(loaded.module, packed, grad=False)
        count_UK = made["mask"].sum(-1).clamp(min=1) if mean else 1.0
        return (made["logp"] * made["mask"]).sum(-1) / count_UK

    return values_UK


def end_states(loaded: Loaded) -> Callable[[Packed], Tensor]:
    """For `by_tree`: the last hidden state [U, K, D] of each branch's last token, in float32."""

    def ends_UKD(packed: Packed) -> Tensor:
        ends_UK = packed.ends_UK
        return states(loaded.module, packed)[ends_UK.flatten()].view(*ends_UK.shape, -1).float()

    return ends_UKD


def answer_logps(loaded: Loaded, rows: Sequence[Row], *, mean: bool = False) -> list[float]:
    """log p(y | x) of each row's answer, or its mean over tokens; 0 for an empty text."""
    name = "mean_logps" if mean else "logps"
    return by_prompt(loaded, rows, tail_logps(loaded, mean=mean), name)


def _answer(loaded: Loaded, row: Row) -> list[int]:
    ended = row.get("finished") is not False
    return completion_ids(loaded.tokenizer, str(row["completion"]), end=ended)


def head_scores(reward: Model, rows: Sequence[Row], sort: str = "answers") -> list[float]:
    """Score of each row's answer at its last token; an InputError for a head of another sort.

    Args:
        sort: what the answers are, "answers" or "reviews".
    """
    (check_reviews if sort == "reviews" else check_answers)(reward, reward.name)
    loaded = reward.load_module()
    head = _own_head(loaded)

    def last_UK(packed: Packed) -> Tensor:
        ends_UK = packed.ends_UK
        return head(states(loaded.module, packed)[ends_UK.flatten()]).view(ends_UK.shape)

    return by_prompt(loaded, rows, last_UK, "scores")


def step_scores(reward: Model, rows: Sequence[Row], separator: str) -> list[list[float]]:
    """Score at the end of each step of each row; rows have "prompt" and "steps".

    Raises:
        InputError: the model has no head, or one of whole answers.
    """
    check_steps(reward, reward.name)
    loaded = reward.load_module()
    head = _own_head(loaded)
    asked = rewritten(reward, [cast(Prompt, prompt_of(row)) for row in rows])
    trees = [
        step_tree(loaded, {**row, "prompt": prompt}, separator)
        for row, prompt in zip(rows, asked, strict=True)
    ]
    for i, tree in enumerate(trees):
        check_fits(loaded, tree.longest, i)
    found: list[list[float]] = []
    for packed in (
        pack(trees, budget_for(loaded.device), share=True, device=loaded.device) if trees else []
    ):
        with torch.inference_mode(), loaded.run_time():
            score_UKT = measured(loaded.module, head, packed.to(loaded.device), grad=False)
        for score_T, mask_T in zip(score_UKT[:, 0], packed.mask_UKT[:, 0], strict=True):
            found.append(score_T[: int(mask_T.sum())].tolist())
    return found


def step_tree(loaded: Loaded, row: Mapping[str, object], separator: str) -> Node:
    """A row's prompt and steps, the last token of each step carrying loss."""
    head = prompt_ids(loaded.tokenizer, cast(Prompt, prompt_of(row)))
    pieces = step_ids(loaded.tokenizer, cast("list[str]", row["steps"]), separator)
    ids, loss = list(head), [False] * len(head)
    for piece in pieces:
        ids += piece
        loss += [False] * (len(piece) - 1) + [True]
    return Node(tuple(ids), tuple(loss))


def _own_head(loaded: Loaded) -> ScoreHead:
    if f"{HEAD}.weight" not in loaded.extra:
        raise InputError(
            "the model has no score head",
            where=loaded.model.name,
            fix="Train one with a reward method, such as bradley_terry",
        )
    return ScoreHead.of(loaded, values=True)
