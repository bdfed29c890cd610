"""Pairs, and the last states of their answers by transformers' own passes, one text at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from truing.core.tiny import tiny_tokenizer
from truing.models import Model
from truing.tables import Row

WORDS = "lime oak rain stone river cloud ash fern moss reed pine sand".split()
PAIRS: list[Row] = [
    {"prompt": f"say {w} {i % 3}", "chosen": f"{w}, yes", "rejected": f"no {WORDS[(5 * i) % 12]}!"}
    for i, w in enumerate(WORDS)
]


def end_state(model: Model, prompt: str, answer: str) -> Tensor:
    """State [D] of the token that ends an answer, after the final norm."""
    tokenizer, loaded = tiny_tokenizer(), model.load_module()
    asked = [{"role": "user", "content": prompt}]
    head = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    ids = tokenizer.encode(f"{head}{answer}<|im_end|>", add_special_tokens=False)
    with torch.no_grad():
        made = loaded.module(torch.tensor([ids]), output_hidden_states=True)
    return made.hidden_states[-1][0, -1]


def plain_states(model: Model, rows: list[Row]) -> Tensor:
    """States [N, 2, D] of chosen and rejected answers, in float64."""
    sides = ("chosen", "rejected")
    each = [[end_state(model, str(r["prompt"]), str(r[s])) for s in sides] for r in rows]
    return torch.stack([torch.stack(both) for both in each]).double()
