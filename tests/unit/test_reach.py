"""What configurations say of rows, also where a language model's lies inside another."""

from __future__ import annotations

from torch import nn
from transformers import (
    Gemma3Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    RobertaConfig,
)

from truing.core.generation import prefix_cache
from truing.core.modelfiles.reach import context_in, context_of, together_in, too_long, width_of
from truing.core.trunk import blocks_of, share_of

FACTORS = [1.0] * 4
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": FACTORS, "long_factor": FACTORS}
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 99,
         "pad_token_id": 0}  # fmt: skip


def bare(config: PreTrainedConfig) -> nn.Module:
    """A module that has a configuration and nothing else."""
    module = nn.Module()
    module.config = config  # type: ignore[assignment]
    return module


def test_a_language_model_inside_another_is_asked() -> None:
    inner = {"hidden_size": 48, "sliding_window": 8, "max_position_embeddings": 50}
    module = bare(Gemma3Config(text_config=inner))
    assert (context_of(module), width_of(module)) == (50, 48)
    assert not prefix_cache.fits(module, 9)  # by its window, before anything is computed


def test_contexts() -> None:
    assert context_in(LlamaConfig(max_position_embeddings=70)) == 70
    assert context_in(RobertaConfig(max_position_embeddings=70, pad_token_id=1)) == 68
    sizes = {"max_position_embeddings": 256, "original_max_position_embeddings": 64, **SMALL}
    long = Phi3Config(rope_parameters=LONG, **sizes)
    assert (context_in(long), together_in(long)) == (256, 64)
    assert "LongRoPE" in too_long(bare(long), 65) and not too_long(bare(long), 64)
    assert "context of 70" in too_long(bare(LlamaConfig(max_position_embeddings=70)), 71)
    plain = Phi3Config(max_position_embeddings=256, **SMALL)
    assert together_in(plain) == 256


def test_blocks_are_the_language_models() -> None:
    """Qwen2.5-VL has more blocks for images than for words."""
    text = {**SMALL, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    vision = {"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32,
              "out_hidden_size": 32, "fullatt_block_indexes": [1]}  # fmt: skip
    module = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )
    assert len(blocks_of(module)) == 2 and share_of(module, 1.0).depth == 2
