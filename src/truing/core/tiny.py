"""A Llama of 0.6 million parameters with a byte tokenizer: what unit and contract tests run on.

Made from a fixed seed, so that it needs no file and no network. Its weights are wide enough (0.08)
that next-token distributions differ from position to position; it has SmolLM2's traps on purpose:
the padding token is the end token, and input and output embeddings are one tensor.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from truing.core.modelfiles.stock import quiet

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STD = 0.08
BLOCKS = 3  # a first, one in the middle, a last


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, after the three special tokens of ChatML; 259 in all."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate([*SPECIAL, *letters])}
    core = Tokenizer(BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_config(blocks: int = BLOCKS) -> LlamaConfig:
    """Blocks of width 128, four query heads on two key heads, tied embeddings."""
    return LlamaConfig(
        vocab_size=259,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def fill(module: nn.Module, std: float, seed: int) -> None:
    """Norms 1 and all other weights drawn, by numbers that no release of a library changes."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, std, generator=source)


def tiny_model(
    seed: int = 0, blocks: int = BLOCKS
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A fresh module in eval mode (float32) and its tokenizer; the same bits for the same seed."""
    module = LlamaForCausalLM(tiny_config(blocks))
    fill(module, STD, seed)
    module.tie_weights()
    module.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return cast(LlamaForCausalLM, module.eval()), tiny_tokenizer()


def tiny_folder(path: str | Path, seed: int = 0, blocks: int = BLOCKS) -> Path:
    """Write the tiny model as a Hugging Face folder, ready for `Model.open`."""
    path = Path(path)
    module, tokenizer = tiny_model(seed, blocks)
    with quiet():
        module.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return path
