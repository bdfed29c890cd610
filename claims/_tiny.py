"""A small decoder with a closed vocabulary, trained from nothing: for comparisons over seeds.

Two layers of width 64 (about 120 thousand parameters) that know the words of the claim's own texts
and no other; what a larger model brings with it is taught here in some seconds by `train/sft`.
Words, numbers and punctuation marks are one token each, blank lines too; texts that are decoded
have a space between any two of them. With `exact`, texts come back letter for letter: a token has
the space before it, every digit is one, and tags and line ends are too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from truing.claims import Outcome, call, step
from truing.context import current
from truing.core.generate import generate
from truing.core.logprob import measure
from truing.core.modelfiles.stock import quiet
from truing.core.passes.scoring import by_prompt
from truing.core.tiny import fill
from truing.core.tree import Packed
from truing.models import Model
from truing.tables import Row, Table, content_hash

__all__ = [
    "FORMS", "TOPICS", "Outcome", "Row", "Table", "blank", "call", "drawn", "nats", "step",
    "taught", "vocabulary",
]  # fmt: skip

SPECIAL = ("<|unknown|>", "<|im_start|>", "<|im_end|>")
# What several claims ask about, and how.
TOPICS = [
    "river", "mountain", "garden", "village", "harbour", "forest", "meadow", "island", "valley",
    "bridge", "castle", "market", "station", "library", "museum", "tower", "lake", "beach",
    "street", "square",
]  # fmt: skip
FORMS = ("describe the {}", "tell me about the {}", "how is the {}", "what of the {}")
PIECE = r"\n\n|\w+|[^\w\s]"
EXACT = r"\n|</?\w+>| ?\d| ?[^\W\d]+| ?[^\w\s]|\s"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)
# Where a space belongs to the word after it, a role ends with its line.
TEMPLATE_LINES = TEMPLATE.replace("+ ' ' +", "+ '\\n' +").replace("assistant ", "assistant\\n")


def vocabulary(texts: Iterable[str], *, exact: bool = False) -> list[str]:
    """Every word, number and mark of the texts, in order."""
    piece = EXACT if exact else PIECE
    return sorted({found for text in texts for found in re.findall(piece, text)})


def tokenizer(
    words: Sequence[str], *, exact: bool = False, shown: bool = False
) -> PreTrainedTokenizerFast:
    """One token for each of the words, after the special ones and the names of the roles.

    Texts leave special tokens out; with `shown`, the end of a turn alone is one.
    """
    known = dict.fromkeys([*SPECIAL, "system", "user", "assistant", *words])
    core = Tokenizer(WordLevel({w: i for i, w in enumerate(known)}, unk_token=SPECIAL[0]))
    piece = Regex(EXACT if exact else PIECE)
    core.pre_tokenizer = pre_tokenizers.Split(piece, "removed", invert=True)
    if exact:
        core.decoder = decoders.Fuse()
    hidden = [t for t in SPECIAL if t == SPECIAL[2] or not shown]
    core.add_tokens([AddedToken(t, normalized=False) for t in SPECIAL if t not in hidden])
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in hidden])
    others = {} if shown else {"bos_token": SPECIAL[1], "unk_token": SPECIAL[0]}
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=SPECIAL[2], pad_token=SPECIAL[2], model_max_length=512,
        clean_up_tokenization_spaces=False, **others,
    )  # fmt: skip
    made.chat_template = TEMPLATE_LINES if exact else TEMPLATE
    return made


def blank(
    words: Sequence[str],
    seed: int,
    *,
    width: int = 64,
    layers: int = 2,
    exact: bool = False,
    shown: bool = False,
) -> Model:
    """A decoder with random weights; the same words, seed and size give the same bits.

    With `shown`, what it says is in its texts whole, special tokens too but for the end.
    """
    kind = f"tiny{'-exact' * exact}{'-shown' * shown}"
    name = f"{kind}-{content_hash([list(words), seed, width, layers], 4)}"
    folder = Path(current().folder) / name
    if not folder.is_dir():
        tokens = tokenizer(words, exact=exact, shown=shown)
        # One head of keys: attention over short rows costs what it takes to begin.
        config = LlamaConfig(
            vocab_size=len(tokens), hidden_size=width, intermediate_size=3 * width,
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=1,
            head_dim=width // 4, max_position_embeddings=512, rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        )  # fmt: skip
        module = LlamaForCausalLM(config)
        fill(module, 0.05, seed)
        module.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
        with quiet():
            module.save_pretrained(folder)
        tokens.save_pretrained(folder)
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return Model.open(folder).called(name)


def taught(model: Model, rows: Iterable[Row], seed: int, **settings: object) -> Model:
    """The model after supervised fine-tuning of all its weights on prompts and completions."""
    chosen = {"epochs": 4, "lr": 3e-3, "batch": 32, "rank": 0, **settings}
    return cast(Model, call("train/sft", model, Table("example", rows), seed=seed, **chosen))


def drawn(
    model: Model,
    prompts: Sequence[object],
    *,
    seed: int = 0,
    n: int = 1,
    max_tokens: int = 24,
    greedy: bool = False,
    temperature: float = 1.0,
) -> list[list[str]]:
    """Texts of n answers to each prompt."""
    with step(seed):
        made = generate(
            model, prompts, n=n, max_tokens=max_tokens, greedy=greedy, temperature=temperature,
            seed=seed,
        )  # type: ignore[arg-type]  # fmt: skip
    return [[c.text for c in answers] for answers in made]


def nats(model: Model, rows: Iterable[Row]) -> float:
    """Mean negative log-probability of the rows' completions, in nats per token."""
    loaded, items = model.load_module(), list(rows)

    def of(name: str) -> list[float]:
        def sums_UK(packed: Packed) -> torch.Tensor:
            made = measure(loaded.module, packed, grad=False)
            return (made["logp"] * made["mask"] if name == "logp" else made["mask"]).sum(-1)

        return by_prompt(loaded, items, sums_UK, name)

    return -sum(of("logp")) / sum(of("mask"))
