"""Reward models as other libraries have them: a score head as sequence classification.

transformers' classes score a text by a linear layer without a constant, on the state of the last
token that is not padding. That is a head of `truing.core.passes.scoring`, unless it has a constant
or padding is the token that ends an answer. Losses that know differences only, as Bradley and
Terry's, leave rounding noise in the constant: that much is left out, and the folder's README says
how much. The folder opens as a reward model here too (`truing.core.passes.headed`). The head is
kept in float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from truing.core.modelfiles.loaded import load_tokenizer
from truing.core.passes.scoring import HEAD, SORT, has_head, sort_of
from truing.models import Model

NOISE = 1e-3  # of the head's norm, which is about the spread of its scores
CRITIC = ("value_head.", "critic/")  # names of `truing.core.rl.critic`, which is not needed here


def class_of(folder: Path) -> str:
    """Name of transformers' class for sequence classification, "" where none scores as we do."""
    from transformers import AutoConfig
    from transformers.modeling_layers import GenericForSequenceClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    made: object = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if isinstance(made, type) and issubclass(made, GenericForSequenceClassification):
        return made.__name__
    return ""


def why_not(model: Model) -> str:
    """Why a plain folder cannot keep a model's heads; "" where it can, or there are none."""
    extra = model.folded().extra
    others = sorted(set(extra) - {f"{HEAD}.weight", f"{HEAD}.bias", SORT})
    if others:
        return f"it holds further tensors: {', '.join(others[:4])}"
    if not extra:
        return ""
    if sort_of(model) == "steps":
        return "it scores the steps of answers, and that class an answer's last token"
    if abs(_constant(extra)) > NOISE * float(extra[f"{HEAD}.weight"].float().norm()):
        return "its scores have a constant, which that class has not"
    fits = not model.builder and ("generate" in model.can or has_head(model))
    named = fits and class_of(model.folder)
    return "" if named else "transformers has no class that scores so for this architecture"


def _constant(extra: Mapping[str, Tensor]) -> float:
    return float(extra[f"{HEAD}.bias"])


def note(extra: Mapping[str, Tensor]) -> str:
    """What the README says of scores."""
    return (
        "\nScore texts that end with the token which ends the answer; a template may put a line "
        f"break behind it.\nOf every score the constant {_constant(extra):.3g} is left out.\n"
    )


def of_training(model: Model) -> bool:
    """True when all heads are critics, which only training goes on from."""
    return all(n.startswith(CRITIC) for n in model.folded().extra)


def tensors(
    folded: Mapping[str, Tensor], extra: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """What the class holds: the trunk, and the head by its name there."""
    yield from ((n, folded[n]) for n in folded if n.startswith("model."))
    yield "score.weight", extra[f"{HEAD}.weight"].float()


def describe(model: Model, folder: Path) -> None:
    """Change the configuration in `folder` to that of the class, with a token for padding alone."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(model)
    text = str(tokenizer.chat_template or "")
    free = {  # neither an answer nor a turn contains it
        i: str(t)
        for i, t in tokenizer.added_tokens_decoder.items()
        if t.special and str(t) not in text and i != tokenizer.eos_token_id
    }
    pad = config.get("pad_token_id")
    pad = pad if pad in free else next(iter(free), None)
    config |= {
        "architectures": [class_of(model.folder)],
        "id2label": {"0": "score"},
        "label2id": {"score": 0},
        "problem_type": "regression",
        "pad_token_id": pad,  # None: transformers takes one text at a time
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    path = folder / "tokenizer_config.json"
    if path.is_file():
        own = json.loads(path.read_text(encoding="utf-8")) | {
            "pad_token": None if pad is None else free[pad]
        }
        path.write_text(json.dumps(own, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
