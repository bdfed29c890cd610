"""From GGUF to a Hugging Face folder: SmolLM2 exactly, other architectures by transformers.

Two facts of llama.cpp's files matter: query and key rows are stored with rotary pairs interleaved,
where transformers wants the halves one after the other; and SmolLM2 splits digits one by one before
its byte-level step, which generic converters of GGUF tokenizers lose.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from truing.core.modelfiles.gguf import Gguf
from truing.errors import InputError

_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # GGUF's token type of control tokens


def halves(w_OI: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of each head from pairs (0, d/2, 1, d/2 + 1, ...) to halves (0, 1, ..., d/2, ...)."""
    rows, columns = w_OI.shape
    split = w_OI.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows, columns)


def tensor_name(name: str) -> str:
    """The transformers name of a llama tensor in GGUF."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{_LAYER[part]}.weight"


def _config(source: Gguf) -> dict[str, object]:
    def fact(name: str) -> int:
        return int(cast(int, source.facts[f"llama.{name}"]))

    heads, width = fact("attention.head_count"), fact("embedding_length")
    eps = cast(float, source.facts["llama.attention.layer_norm_rms_epsilon"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": "float32",
        "eos_token_id": 2,
        "head_dim": width // heads,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": fact("feed_forward_length"),
        "max_position_embeddings": fact("context_length"),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": fact("block_count"),
        "num_key_value_heads": fact("attention.head_count_kv"),
        "pad_token_id": 2,
        # The file holds it in single precision: 1e-5 is meant.
        "rms_norm_eps": float(f"{eps:.6g}"),
        "rope_parameters": {
            "rope_theta": float(cast(float, source.facts["llama.rope.freq_base"])),
            "rope_type": "default",
        },
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": fact("vocab_size"),
    }


def _tokenizer(source: Gguf, target: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    tokens = cast("list[str]", source.facts["tokenizer.ggml.tokens"])
    merges = cast("list[str]", source.facts["tokenizer.ggml.merges"])
    types = cast("list[int]", source.facts["tokenizer.ggml.token_type"])
    pairs = [cast("tuple[str, str]", tuple(m.split(" "))) for m in merges]
    core = Tokenizer(BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    core.decoder = decoders.ByteLevel()
    special = [t for t, sort in zip(tokens, types, strict=True) if sort == _CONTROL]
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    core.save(str(target / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    template = cast(str, source.facts["tokenizer.chat_template"])
    (target / "chat_template.jinja").write_text(template, encoding="utf-8")


def smollm2(packed: Path, target: Path) -> None:
    """Write SmolLM2's GGUF as a folder of float32 safetensors, configuration and tokenizer.

    Nothing of it depends on library versions, so that its content hash is the same everywhere.
    """
    from safetensors.numpy import save_file

    source = Gguf(packed)
    if source.facts.get("general.architecture") != "llama":
        raise InputError(
            "not a llama model", where=str(packed), seen=source.facts.get("general.architecture")
        )
    config = _config(source)
    heads = {
        "attn_q": cast(int, config["num_attention_heads"]),
        "attn_k": cast(int, config["num_key_value_heads"]),
    }
    weights: dict[str, NDArray[np.float32]] = {}
    for name in source.names:
        tensor = source.tensor(name)
        part = name.split(".")[-2]
        weights[tensor_name(name)] = halves(tensor, heads[part]) if part in heads else tensor
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    (target / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    _tokenizer(source, target)


def with_transformers(packed: Path, target: Path) -> None:
    """Any architecture that transformers reads from GGUF (needs the package gguf), in float32."""
    import copy

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from truing.core.modelfiles.stock import quiet

    with quiet():
        loaded = AutoModelForCausalLM.from_pretrained(
            packed.parent, gguf_file=packed.name, dtype=torch.float32
        )
        config = copy.deepcopy(loaded.config)
        # As loaded it says "quantised", and then refuses to be saved.
        vars(config).pop("quantization_config", None)
        plain = type(loaded)(config)
        plain.load_state_dict(loaded.state_dict())
        plain.tie_weights()
        plain.generation_config = loaded.generation_config
        plain.save_pretrained(target)
        AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name).save_pretrained(target)
