"""General ability: log-loss on held-out text and accuracy on multiple-choice questions.

The side-effect column of every report. Log-loss L = -(1/T) sum_t log p(x_t | x_<t) in nats per
token over texts that no method here trains on; lower is better. A question is answered by the
choice whose tokens have the highest mean log-probability after it (no text is generated, because
a small model's verdicts are near chance while its probabilities are not). Intervals: bootstrap
over texts for the log-loss, Wilson for the accuracy. Our own measurement; no paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from truing.context import Json, current
from truing.core.stats import ratio_bootstrap, wilson
from truing.errors import InputError
from truing.method import method
from truing.models import Loaded, Model
from truing.reports import Measure, Report
from truing.tables import Row, Table

TEXTS = "prose"  # data sets shipped in the repository's data/
QUESTIONS = "common_knowledge"


def token_logp(logits_TV: Tensor, ids_T: Tensor) -> Tensor:
    """Log-probability of each token but the first, [T - 1], given those before it."""
    logp_TV = torch.log_softmax(logits_TV[:-1].float(), dim=-1)
    return logp_TV.gather(-1, ids_T[1:, None])[:, 0]


def best_choice(logps: Sequence[Tensor]) -> int:
    """Index of the choice with the highest mean token log-probability; the first on ties."""
    means = [float(logp_T.mean()) for logp_T in logps]
    return max(range(len(means)), key=lambda i: (means[i], -i))


def _logp(loaded: Loaded, ids: list[int]) -> Tensor:
    ids_T = torch.tensor(ids, device=loaded.device)
    with torch.inference_mode(), loaded.run_time():
        logits_TV = loaded.module(input_ids=ids_T[None]).logits[0]
        return token_logp(logits_TV, ids_T)


def _encode(loaded: Loaded, text: str) -> list[int]:
    """Token ids of running text, led by the model's start token where it has one."""
    ids = cast(list[int], loaded.tokenizer.encode(text, add_special_tokens=False))
    start = cast("int | None", loaded.tokenizer.bos_token_id)
    return ids if start is None else [start, *ids]


def text_loss(loaded: Loaded, text: str, max_tokens: int) -> tuple[float, int]:
    """(summed loss in nats, number of tokens) of the text's first `max_tokens` tokens."""
    ids = _encode(loaded, text)[: max_tokens + 1]
    if len(ids) < 2:
        return 0.0, 0
    logp_T = _logp(loaded, ids)
    return -float(logp_T.sum()), len(logp_T)


def answer_choice(loaded: Loaded, question: str, choices: Sequence[str]) -> int:
    """The model's choice for a question whose answers continue its text."""
    head = _encode(loaded, question)
    logps: list[Tensor] = []
    for choice in choices:
        tail = cast(
            list[int], loaded.tokenizer.encode(" " + choice.strip(), add_special_tokens=False)
        )
        logps.append(_logp(loaded, head + tail)[len(head) - 1 :])
    return best_choice(logps)


def _check_questions(questions: Table) -> list[tuple[str, list[str], int]]:
    found: list[tuple[str, list[str], int]] = []
    for i, row in enumerate(questions, 1):
        choices, answer = row.get("choices"), row.get("answer")
        listed = cast(list[object], choices) if isinstance(choices, list) else []
        if len(listed) < 2 or not isinstance(answer, int) or not 0 <= answer < len(listed):
            raise InputError(
                "a question needs 'prompt', 'choices' (two or more) and 'answer' (an index)",
                where=f"{questions.source} row {i}",
                seen={"choices": choices, "answer": answer},
            )
        found.append((str(row.get("prompt")), [str(c) for c in listed], answer))
    return found


@method(needs=("logprob",))
def ability(
    model: Model,
    texts: Table | None = None,
    questions: Table | None = None,
    *,
    max_tokens: int = 256,
    limit: int = 0,
) -> Report:
    """General ability: log-loss on held-out text and accuracy on multiple-choice questions.

    Args:
        max_tokens: tokens of each text that are read.
        limit: only so many texts and questions; 0 for all.
    """
    texts = texts or Table.read(TEXTS)
    asked = _check_questions(questions or Table.read(QUESTIONS))
    asked = asked[:limit] if limit else asked
    passages = texts.rows[:limit] if limit else texts.rows
    loaded = model.load_module()
    context = current()
    total = len(passages) + len(asked)
    rows: list[Row] = []
    for i, row in enumerate(passages, 1):
        nats, tokens = text_loss(loaded, str(row["text"]), max_tokens)
        parents = {"parents": [row["id"]]}
        rows.append({"text": str(row["text"]), "nats": nats, "tokens": tokens, "lineage": parents})
        context.progress(i, total, "ability")
    losses, sizes = [float(cast(float, r["nats"])) for r in rows], [r["tokens"] for r in rows]
    counts = [float(cast(int, n)) for n in sizes]
    value = sum(losses) / sum(counts)
    lo, hi = ratio_bootstrap(losses, counts)
    measures = [Measure("ability", value, lo, hi, len(rows), "nats per token", "", "lower")]
    right: list[bool] = []
    for i, (question, choices, answer) in enumerate(asked, len(passages) + 1):
        right.append(answer_choice(loaded, question, choices) == answer)
        context.progress(i, total, "ability")
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
    }
    return Report("general ability", measures, Table("text", rows), facts)
