"""Embedders of whole rows: by meaning, by a model's own last state, by exact text.

An embedder takes rows with "text" (all turns as one text) and "messages" (the whole dialogue) and
an optional model, and returns one vector per row: an array [N, D]. What `deita` compares rows by is
the cosine of two of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch

from truing.core.batch.encoding import encode
from truing.core.chat import chat_text
from truing.core.embed import embedded
from truing.core.generate import rewritten
from truing.core.journaled import Vectors, kept_vectors
from truing.core.passes.scoring import by_tree, end_states
from truing.core.tree import example_tree
from truing.errors import InputError
from truing.method import component
from truing.models import Loaded, Model
from truing.select.near_duplicates import known
from truing.tables import Message, Row

STATES = 32  # rows of a language model
WIDTH = 256  # of the vectors of exact texts, as many bits


@component("embedder")
def sentence(rows: list[Row], model: Model | None = None) -> Vectors:
    """Sentence vectors of the row's text (all-MiniLM-L6-v2, its first 256 tokens)."""
    return embedded([str(r["text"]) for r in rows])


@component("embedder")
def exact(rows: list[Row], model: Model | None = None) -> Vectors:
    """Equal vectors for equal texts, whatever the case, and all but orthogonal ones for others.

    They point to a random corner of a cube, by the text: cosines of others have mean 0 and standard
    deviation 1/16.
    """
    texts = [known(str(r["text"])).encode() for r in rows]
    digests = b"".join(hashlib.blake2b(t, digest_size=WIDTH // 8).digest() for t in texts)
    bits_ND = np.unpackbits(np.frombuffer(digests, np.uint8)).reshape(-1, WIDTH)
    return ((2.0 * bits_ND - 1) / WIDTH**0.5).astype(np.float32)


@component("embedder")
def last_state(
    rows: list[Row], model: Model | None = None, *, centre: bool = False, max_length: int = 512
) -> Vectors:
    """The model's last hidden state at the end of the dialogue, as Deita has it.

    Args:
        centre: subtract the mean of all rows: the states of a small model all point one way, so
            that as they are a tau of 0.9 may keep a single row. The paper's are of a 13B model.
        max_length: most that are read of a row, its last ones.
    """
    if model is None:
        raise InputError("needs a model", where="embedder last_state", fix="Give the step a model")
    loaded = model.load_module()
    asked = rewritten(model, [cast("list[Message]", r["messages"]) for r in rows])
    ids = [dialogue_ids(loaded, cast("list[Message]", one))[-max_length:] for one in asked]
    vectors_ND = kept_vectors(
        "last_state", model.key, ids, STATES, lambda chunk: last_states(loaded, chunk)
    )
    return vectors_ND - vectors_ND.mean(axis=0) if centre else vectors_ND


def dialogue_ids(loaded: Loaded, messages: Sequence[Message]) -> list[int]:
    """Token ids of a whole dialogue by the model's template, or of its words without one."""
    if not loaded.tokenizer.chat_template:
        words = "\n".join(str(m["content"]) for m in messages)
        return encode(loaded.tokenizer, words, special=True)
    return encode(loaded.tokenizer, chat_text(loaded.tokenizer, messages, answer=False))


def last_states(loaded: Loaded, rows: Sequence[Sequence[int]]) -> Vectors:
    """Last hidden states [N, D] of the last tokens, after the final norm, in float32."""
    trees = [example_tree(ids, [False] * len(ids)) for ids in rows]
    return torch.stack([v_KD[0] for v_KD in by_tree(loaded, trees, end_states(loaded))]).numpy()
