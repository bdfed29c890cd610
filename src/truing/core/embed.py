"""Sentence vectors: all-MiniLM-L6-v2, mean over the tokens, length one.

e(x) = h / |h| with h the mean of the last hidden states over the tokens of x (Sentence-BERT, arXiv
1908.10084). Texts are cut at 256 tokens, the length that the encoder was trained on. There is no
silent stand-in: without the encoder these functions raise.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray

from truing.context import current
from truing.core.batch.by_length import batches
from truing.core.journaled import kept_vectors
from truing.core.modelfiles import fetch
from truing.core.modelfiles.stock import quiet
from truing.core.passes.attention import on_device
from truing.doctor import device_of_machine
from truing.tables import content_hash

if TYPE_CHECKING:
    from transformers import BertModel, PreTrainedTokenizerBase

Vectors = NDArray[np.float32]
WIDTH = 384
MAX_TOKENS = 256
BATCH_TOKENS = 4096
BLOCK = 1024  # rows that are compared with as many at once
TEXTS = 512  # that a kill can cost
_seen: OrderedDict[str, Vectors] = OrderedDict()
_KEEP = 50_000  # vectors remembered within a process: 77 MB


@functools.cache
def encoder() -> tuple[BertModel, PreTrainedTokenizerBase]:
    """The encoder, on the accelerator where there is one, and its tokenizer; fetched when asked."""
    from transformers import AutoTokenizer, BertModel

    folder = fetch.fetch("minilm")
    with quiet():
        module = BertModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)
        moved = on_device(cast(torch.nn.Module, module.eval()), device_of_machine())
        return cast("BertModel", moved), AutoTokenizer.from_pretrained(folder)


def mean_of_tokens(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Unit vectors [B, D]: the mean over the tokens under the mask, divided by its length."""
    weight_BT1 = mask_BT[..., None].to(hidden_BTD.dtype)
    mean_BD = (hidden_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1.0)
    return torch.nn.functional.normalize(mean_BD, dim=-1)


def _encode(texts: Sequence[str]) -> Vectors:
    """Vectors of different texts, the longest first so that a batch wastes little padding."""
    module, tokenizer = encoder()
    ids = cast(
        "list[list[int]]",
        tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"],
    )
    vectors_ND = np.empty((len(ids), WIDTH), np.float32)
    done = 0
    for batch in batches([len(row) for row in ids], BATCH_TOKENS):
        width = len(ids[batch[0]])
        ids_BT = torch.zeros(len(batch), width, dtype=torch.long)  # filled here, moved at once
        mask_BT = torch.zeros(len(batch), width, dtype=torch.long)
        for row, i in enumerate(batch):
            ids_BT[row, : len(ids[i])] = torch.tensor(ids[i])
            mask_BT[row, : len(ids[i])] = 1
        ids_BT, mask_BT = ids_BT.to(module.device), mask_BT.to(module.device)
        with torch.inference_mode():
            hidden_BTD = module(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
            vectors_ND[batch] = mean_of_tokens(hidden_BTD, mask_BT).cpu().numpy()
        done += len(batch)
        if len(batch) < len(ids):  # a single batch is too quick to be told
            current().progress(done, len(ids), "texts embedded")
    return vectors_ND


def embed(texts: Sequence[str]) -> Vectors:
    """Sentence vectors.

    Args:
        texts: N strings; an empty one is encoded like any other.
    Returns:
        float32 [N, 384] of length one; a text's vector does not depend on the others beyond
        rounding, and the same list gives the same bits.
    Raises:
        InputError: the encoder is not there and cannot be fetched.
    """
    # Remembered by the whole list: the last bits of a vector depend on what it was batched with, so
    # that a memory of single texts would make a resumed step differ from one that was not killed.
    key = content_hash(list(texts))
    if key not in _seen:
        unique = {t: i for i, t in enumerate(dict.fromkeys(texts))}
        vectors_ND = _encode(list(unique)) if unique else np.empty((0, WIDTH), np.float32)
        _seen[key] = vectors_ND[[unique[t] for t in texts]]
    _seen.move_to_end(key)
    found = _seen[key].copy()
    while len(_seen) > 1 and sum(map(len, _seen.values())) > _KEEP:
        _seen.popitem(last=False)
    return found


def embedded(texts: Sequence[str]) -> Vectors:
    """Vectors as `embed` gives them, of each text once and some at a time, for many texts.

    What a stopped step had finished of them is read from its journal.
    """
    unique = {t: i for i, t in enumerate(dict.fromkeys(texts))}
    vectors_ND = kept_vectors("sentence", "minilm", list(unique), TEXTS, embed)
    return vectors_ND[[unique[t] for t in texts]]


def squared_distances(a_MD: Vectors, b_ND: Vectors) -> Vectors:
    """||a_i - b_j||^2 = 2 - 2 cos of unit vectors, [M, N]; never below zero."""
    d_MN = a_MD @ b_ND.T
    d_MN *= -2.0
    d_MN += 2.0
    return np.maximum(d_MN, 0.0, out=d_MN)


def nearest(a_MD: Vectors, b_ND: Vectors, k: int = 1) -> tuple[NDArray[np.int64], Vectors]:
    """The k nearest rows of b for each row of a: (indices [M, k], squared distances [M, k]).

    Equal distances go to the smaller index. All pairs are compared, in blocks.
    """
    k = min(k, len(b_ND))
    places = np.empty((len(a_MD), k), np.int64)
    distances = np.empty((len(a_MD), k), np.float32)
    for start in range(0, len(a_MD), BLOCK):
        d_BN = squared_distances(a_MD[start : start + BLOCK], b_ND)
        if k == 1:
            order = d_BN.argmin(axis=1, keepdims=True)
        else:
            order = np.argsort(d_BN, axis=1, kind="stable")[:, :k]
        places[start : start + BLOCK] = order
        distances[start : start + BLOCK] = np.take_along_axis(d_BN, order, axis=1)
    return places, distances


def near_earlier(places: Sequence[Vectors], threshold: float) -> NDArray[np.bool_]:
    """For each row whether an earlier one is nearer than `threshold`, in squared distance.

    Args:
        places: vectors [N, D]; of several, such as those of a prompt and its answer, two rows are
            near where they are so in each. All pairs are compared, in blocks.
    """
    near_N = np.zeros(len(places[0]), bool)
    for start in range(0, len(near_N), BLOCK):
        rows = slice(start, start + BLOCK)
        for before in range(0, start + 1, BLOCK):
            others = slice(before, before + BLOCK)
            near_BB = squared_distances(places[0][rows], places[0][others]) < threshold
            for v_ND in places[1:]:
                near_BB &= squared_distances(v_ND[rows], v_ND[others]) < threshold
            near_N[rows] |= (np.tril(near_BB, -1) if before == start else near_BB).any(axis=1)
        if len(near_N) > BLOCK:
            current().progress(min(start + BLOCK, len(near_N)), len(near_N), "rows compared")
    return near_N
