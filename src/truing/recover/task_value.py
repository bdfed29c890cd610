"""How well a model does a task, as one number in [0, 1] that is higher when better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch

from truing.context import Json, current
from truing.core.chat import completion_ids, prompt_ids
from truing.errors import InputError
from truing.method import score
from truing.models import Loaded
from truing.tables import Row

CHUNK = 32  # answers that a kill can cost


def token_probability(loaded: Loaded, rows: Sequence[Row]) -> float:
    """exp(-mean loss) over all tokens of the rows' completions: their mean probability."""
    total, count = 0.0, 0
    for i, row in enumerate(rows, 1):
        answer = row.get("completion")
        if not isinstance(answer, str) or not answer:
            raise InputError(
                "field 'completion' is missing",
                where=f"task row {i}",
                fix="Give completions, or a task_check that scores generated answers",
            )
        head = prompt_ids(loaded.tokenizer, cast(str, row["prompt"]))
        tail = completion_ids(loaded.tokenizer, answer)
        ids_1T = torch.tensor([[*head, *tail]], device=loaded.device)
        with torch.inference_mode():
            logits_TV = loaded.module(input_ids=ids_1T, use_cache=False).logits[
                0, len(head) - 1 : -1
            ]
        logp_TV = torch.log_softmax(logits_TV.float(), dim=-1)
        total -= float(logp_TV.gather(-1, ids_1T[0, len(head) :, None]).sum())
        count += len(tail)
    return math.exp(-total / count)


def task_value(
    loaded: Loaded,
    rows: Sequence[Row],
    check: Mapping[str, object] | None,
    max_tokens: int = 128,
    *,
    note: str = "",
) -> float:
    """Mean satisfaction of a check by greedy answers, or without one the token probability.

    Args:
        loaded: may be in the middle of a change, so that no key of a model says what it is.
        note: what does, for the journal of the answers.
    """
    if check is None:
        return token_probability(loaded, rows)
    from truing.core.sampling import SamplingSettings, sample

    settings = SamplingSettings(max_tokens=max_tokens, greedy=True)

    def make(_: int, chunk: Sequence[Row]) -> Json:
        prompts = [prompt_ids(loaded.tokenizer, cast(str, r["prompt"])) for r in chunk]
        drawn = sample(loaded.module, prompts, settings)
        decode = loaded.tokenizer.decode
        return [str(decode(d[0].ids, skip_special_tokens=True)) for d in drawn]

    def name(start: int, _: Sequence[Row]) -> str:
        return f"{note}/{start}"

    found = current().chunks("task-answers", rows, CHUNK, name, make, "answers to the task")
    answered: list[Row] = [
        {**r, "completion": t}
        for chunk, texts in found
        for r, t in zip(chunk, cast("list[str]", texts), strict=True)
    ]
    values = score("check", check, answered, where="recover/weight_restore task_check")
    return math.fsum(values) / len(values)
