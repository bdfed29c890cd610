"""General ability: log-loss on held-out text and accuracy on multiple-choice questions.

The side-effect column of every report. Log-loss L = -(1/T) sum_t log p(x_t | x_<t) in nats per
token over texts that no method here trains on; lower is better. A question is answered by the
choice whose tokens have the highest mean log-probability after it (no text is generated, because
a small model's verdicts are near chance while its probabilities are not). Intervals: bootstrap
over texts for the log-loss, those without a token to score left out; Wilson for the accuracy. Our
own measurement; no paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from truing.context import Json, current
from truing.core.batch.encoding import encode
from truing.core.batch.pieces import pieces
from truing.core.logprob import check, measure
from truing.core.modelfiles.reach import together_of
from truing.core.stats import ratio_bootstrap, wilson
from truing.core.tree import Node, group_tree, pack
from truing.errors import InputError
from truing.method import method
from truing.models import Loaded, Model
from truing.reports import Measure, Report
from truing.tables import Row, Table, content_hash

TEXTS = "prose"  # data sets shipped in the repository's data/
QUESTIONS = "common_knowledge"
BUDGET = 2048  # tokens computed at once
WHERE = "evaluate/ability"


def token_logp(logits_TV: Tensor, ids_T: Tensor) -> Tensor:
    """Log-probability of each token but the first, [T - 1], given those before it."""
    logp_TV = torch.log_softmax(logits_TV[:-1].float(), dim=-1)
    return logp_TV.gather(-1, ids_T[1:, None])[:, 0]


def best_choice(logps: Sequence[Tensor]) -> int:
    """Index of the choice with the highest mean token log-probability; the first on ties."""
    means = [float(logp_T.mean()) for logp_T in logps]
    return max(range(len(means)), key=lambda i: (means[i], -i))


def _plain(loaded: Loaded, ids: Sequence[int]) -> Tensor:
    ids_T = torch.tensor(ids, device=loaded.device)
    logits_TV = loaded.module(input_ids=ids_T[None]).logits[0]
    return token_logp(logits_TV, ids_T)


def _by_trees(loaded: Loaded) -> bool:
    """False for architectures whose rows must be computed one at a time."""
    try:
        check(loaded.module)
    except InputError:
        return False
    return True


def branch_logps(loaded: Loaded, trees: Sequence[Node], label: str) -> list[list[Tensor]]:
    """Log-probabilities of the loss tokens of each branch, [tree][branch], shared parts once."""
    found: list[list[Tensor]] = []
    with torch.inference_mode(), loaded.run_time():
        if not _by_trees(loaded):
            for i, tree in enumerate(trees, 1):
                rows = list(tree.rows())
                logps = [_plain(loaded, ids) for ids, _ in rows]
                masks = [torch.tensor(loss[1:], device=loaded.device) for _, loss in rows]
                found.append([logp[mask] for logp, mask in zip(logps, masks, strict=True)])
                current().progress(i, len(trees), label)
            return found
        for packed in pack(trees, BUDGET, share=True, device=loaded.device) if trees else []:
            made = measure(loaded.module, packed.to(loaded.device), grad=False)
            for logp_KT, mask_KT in zip(made["logp"], made["mask"] > 0, strict=True):
                rows = zip(logp_KT, mask_KT, strict=True)
                found.append([logp[mask] for logp, mask in rows if mask.any()])
            current().progress(len(found), len(trees), label)
    return found


def _encode(loaded: Loaded, text: str) -> list[int]:
    """Token ids of running text, led by the model's start token where it has one."""
    ids = encode(loaded.tokenizer, text)
    start = cast("int | None", loaded.tokenizer.bos_token_id)
    return ids if start is None else [start, *ids]


def text_losses(loaded: Loaded, texts: Sequence[str], max_length: int) -> list[tuple[float, int]]:
    """(summed loss in nats, number of tokens) of each text's first `max_length` tokens.

    What is longer than the model's context is scored in pieces that overlap by half of it.
    """
    context = together_of(loaded.module)
    trees: list[Node] = []
    whose: list[int] = []
    for i, text in enumerate(texts):
        ids = _encode(loaded, text)
        ids = ids[: max_length + 1] if max_length else ids
        if len(ids) > 1:
            made = pieces(ids, [True] * len(ids), context or len(ids))
            trees += made
            whose += [i] * len(made)
    found = [(0.0, 0)] * len(texts)
    for i, (logp_T,) in zip(whose, branch_logps(loaded, trees, "texts"), strict=True):
        nats, tokens = found[i]
        found[i] = (nats - float(logp_T.double().sum()), tokens + len(logp_T))
    return found


def answered(loaded: Loaded, questions: Sequence[tuple[str, Sequence[str]]]) -> list[int]:
    """The model's choice for each question, whose answers continue its text."""
    trees: list[Node] = []
    for question, choices in questions:
        tails = [encode(loaded.tokenizer, f" {c.strip()}", before=question) for c in choices]
        trees.append(group_tree(_encode(loaded, question), tails))
    return [best_choice(logps) for logps in branch_logps(loaded, trees, "questions")]


def _check_questions(questions: Table) -> list[tuple[str, list[str], int]]:
    found: list[tuple[str, list[str], int]] = []
    for i, row in enumerate(questions):
        choices, answer = row.get("choices"), row.get("answer")
        listed = cast(list[object], choices) if isinstance(choices, list) else []
        indexed = isinstance(answer, int) and 0 <= answer < len(listed)
        if len(listed) < 2 or not indexed or not isinstance(row.get("prompt"), str):
            raise InputError(
                "a question needs a text 'prompt', two 'choices' or more and their index 'answer'",
                where=questions.place(i),
                seen={"choices": choices, "answer": answer},
            )
        found.append((str(row["prompt"]), [str(c) for c in listed], cast(int, answer)))
    return found


@method(
    needs=("logprob",),
    defaults={"texts": "prose", "questions": "common_knowledge"},
    rows={"texts": ("text",), "questions": ("prompt",)},
    within={"max_length": (0, None), "limit": (0, None)},
)
def ability(
    model: Model,
    texts: Table | None = None,
    questions: Table | None = None,
    *,
    max_length: int = 256,
    limit: int = 0,
) -> Report:
    """General ability: log-loss on held-out text and accuracy on multiple-choice questions.

    Args:
        max_length: tokens of each text that are read; 0 for all. A text longer than the model's
            context is scored in pieces, each token with half a context before it at least.
        limit: only so many texts and questions; 0 for all.
    """
    for name, value in (("max_length", max_length), ("limit", limit)):
        if value < 0:
            raise InputError(f"setting {name!r} must be at least 0", where=WHERE, seen=value)
    texts = (Table.read(TEXTS) if texts is None else texts).expect("text", where=WHERE)
    questions = Table.read(QUESTIONS) if questions is None else questions
    asked = _check_questions(questions.expect("prompt", where=WHERE))
    asked = asked[:limit] if limit else asked
    passages = texts.rows[:limit] if limit else texts.rows
    loaded = model.load_module()
    rows: list[Row] = []
    spent = text_losses(loaded, [str(r["text"]) for r in passages], max_length)
    if not any(tokens for _, tokens in spent):
        raise InputError(
            "no text has two tokens, and the first is not scored",
            where=texts.source,
            seen=f"{len(passages)} texts",
        )
    for row, (nats, tokens) in zip(passages, spent, strict=True):
        parents = {"parents": [row["id"]]}
        rows.append({"text": str(row["text"]), "nats": nats, "tokens": tokens, "lineage": parents})
    losses = [nats for nats, tokens in spent if tokens]
    counts = [float(tokens) for _, tokens in spent if tokens]
    value = sum(losses) / sum(counts)
    lo, hi = ratio_bootstrap(losses, counts)
    measures = [Measure("ability", value, lo, hi, len(counts), "nats per token", "", "lower")]
    chosen = answered(loaded, [(question, choices) for question, choices, _ in asked])
    right = [c == answer for c, (_, _, answer) in zip(chosen, asked, strict=True)]
    if right:
        lo, hi = wilson(sum(right), len(right))
        measures.append(
            Measure("choices", sum(right) / len(right), lo, hi, len(right), "share", "", "higher")
        )
    facts: dict[str, Json] = {
        "kind": "ability",
        "metric": "held-out nats per token",
        "model": model.name,
        "model_key": model.key,
        "right": [int(r) for r in right],
        "questions": content_hash(asked, 8),  # that two reports can be compared by
    }
    return Report("general ability", measures, Table("text", rows), facts)
