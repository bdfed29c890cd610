"""Reward models that are no language models: transformers' classifiers of one label.

An encoder such as DeBERTa reads prompt and answer at once. Where its tokenizer has no chat template
they are a pair, written as the tokenizer writes pairs, with its separators and segments: so such
models are trained. Rows of about one length are read together, filled up on the right; decoders,
which would have to know which token is padding, read one row at a time.

Shapes: B rows, T tokens of the longest.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch

from truing.core.batch.by_length import batches
from truing.core.batch.template import no_template
from truing.core.chat import Prompt, completion_ids, prompt_ids
from truing.core.generate import rewritten
from truing.core.passes.scoring import check_fits
from truing.errors import InputError
from truing.surrogates import mended
from truing.tables import Row, prompt_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from truing.models import Loaded

Encoded = dict[str, list[int]]  # by the names of the module's arguments, each of T numbers
TOKENS = 4096  # of a batch, padding among them


def label_scores(loaded: Loaded, rows: Sequence[Row]) -> list[float]:
    """The one label's logit for each row's prompt and answer, in the order of the rows.

    Args:
        rows: with "prompt", "completion" and optionally "finished".
    Raises:
        InputError: another number of labels, or a row that is longer than the context.
    """
    labels = getattr(loaded.module.config, "num_labels", 0)
    if labels != 1:
        raise InputError(
            "a reward model has one label",
            where=loaded.model.name,
            seen=f"{labels} labels",
            fix="Give a classifier of one label, such as one from bradley_terry",
        )
    asked = rewritten(loaded.model, [cast(Prompt, prompt_of(row)) for row in rows])
    read = [_encoded(loaded.tokenizer, p, row) for p, row in zip(asked, rows, strict=True)]
    found = [0.0] * len(rows)
    pad = _padding(loaded)
    lengths = [len(one["input_ids"]) for one in read]
    for i, length in enumerate(lengths):
        check_fits(loaded, length, i)
    for batch in batches(lengths, TOKENS if pad is not None else 0):
        some = [read[i] for i in batch]
        longest = lengths[batch[0]]
        fill = {"input_ids": pad or 0}
        given = {
            name: torch.tensor(
                [o[name] + [fill.get(name, 0)] * (longest - len(o[name])) for o in some],
                device=loaded.device,
            )
            for name in some[0]
        }
        with torch.inference_mode(), loaded.run_time():
            logits_B1 = loaded.module(**given).logits
        for i, value in zip(batch, logits_B1[:, 0].tolist(), strict=True):
            found[i] = value
    return found


def _encoded(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, row: Row) -> Encoded:
    """Prompt and answer by the template, else as a pair."""
    answer = str(row["completion"])
    if tokenizer.chat_template:
        tail = completion_ids(tokenizer, answer, end=row.get("finished") is not False)
        ids = [*prompt_ids(tokenizer, prompt), *tail]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}
    if not isinstance(prompt, str):
        raise no_template(tokenizer)
    made = tokenizer(mended(prompt), mended(answer), return_attention_mask=True)
    return {name: cast("list[int]", made[name]) for name in made}


def _padding(loaded: Loaded) -> int | None:
    """The token to fill rows up with; None where rows are read one at a time."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    config = loaded.module.config
    masks = "attention_mask" in inspect.signature(loaded.module.forward).parameters  # not FNet
    encodes = type(config) in MODEL_FOR_MASKED_LM_MAPPING and masks
    if not encodes or getattr(config, "is_decoder", False):
        return None
    pad = getattr(config, "pad_token_id", None)
    return cast("int | None", loaded.tokenizer.pad_token_id if pad is None else pad)
