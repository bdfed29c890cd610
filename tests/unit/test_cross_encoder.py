"""Classifiers as rewards: prompt and answer as the tokenizer's pair, many rows at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from truing.core.judging.rewards import score_model
from truing.errors import InputError
from truing.models import Model

WORDS = ["[CLS]", "[SEP]", "[PAD]", "[UNK]", *"abcdefgh"]
ROWS = [
    {"prompt": "a b c", "completion": "d e"},
    {"prompt": "h", "completion": "a b c d e f g h"},
    {"prompt": "a b c", "completion": "e d"},
    {"prompt": "a", "completion": ""},
]
SIZES = {
    "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_labels": 1,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32,
    "pad_token_id": 2,
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """Words, and pairs with their segments, as BERT's."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 0), ("[SEP]", 1)],
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=core, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
        unk_token="[UNK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


@pytest.fixture(params=["bert", "roberta"])
def reward(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    """A small encoder with one label."""
    torch.manual_seed(0)
    if request.param == "bert":
        module = BertForSequenceClassification(BertConfig(**SIZES))
    else:
        module = RobertaForSequenceClassification(RobertaConfig(**SIZES, type_vocab_size=2))
    for parameter in module.parameters():  # so that segments and places are seen in the scores
        torch.nn.init.normal_(parameter, std=0.3)
    module.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return Model.open(tmp_path)


def test_scores_are_the_tokenizers_pairs_whatever_is_read_with_them(reward: Model) -> None:
    loaded, own = reward.load_module(), tokenizer()
    with torch.inference_mode():
        wanted = [
            float(loaded.module(**own(r["prompt"], r["completion"], return_tensors="pt")).logits)
            for r in ROWS
        ]
    assert len({round(w, 3) for w in wanted}) == len(ROWS)
    assert score_model(reward, ROWS) == pytest.approx(wanted, abs=1e-5)


def test_rows_are_read_together(reward: Model) -> None:
    seen: list[int] = []
    module = reward.load_module().module
    handle = module.register_forward_pre_hook(
        lambda m, a, k: seen.append(len(k["input_ids"])), with_kwargs=True
    )
    score_model(reward, ROWS * 3)
    handle.remove()
    assert seen == [3 * len(ROWS)]


def test_dialogues_need_a_template(reward: Model) -> None:
    with pytest.raises(InputError, match="template") as error:
        score_model(reward, [{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}])
    assert error.value.fix
