"""Reward models as transformers has them, taken apart: a language model's trunk and a score head.

Its classes for sequence classification hold a decoder's trunk and one layer, `score.weight` [1, D],
without a constant. Read as the language model of that architecture with the head beside it
(`truing.core.passes.scoring`), it scores in trees, and training, a critic among it, goes on from
it. Words it has none: what output layer the class for language models adds was never trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from truing.errors import InputError
from truing.models import Folder

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig

    from truing.models import Model

SCORE, HEAD = "score.weight", "reward_head"
MARK = "truing_wordless"


def holds_score(model: Model) -> bool:
    """Whether a model's base is such a reward model."""
    if not isinstance(model.base, Folder):
        return False
    config = model.base.config
    names, labels = config.get("architectures"), config.get("id2label")
    name = str(cast("list[object]", names)[0]) if isinstance(names, list) and names else ""
    one = len(cast("dict[str, object]", labels)) == 1 if isinstance(labels, dict) else False
    folded = model.folded() if one and name.endswith("ForSequenceClassification") else None
    return folded is not None and (SCORE in folded or SCORE in folded.base)


def take_apart(
    model: Model, config: PreTrainedConfig, state: dict[str, Tensor], extra: dict[str, Tensor]
) -> None:
    """Make a configuration and weights those of the language model, and put the head into `extra`.

    Nothing is changed where the model is no such reward model, or there is no class for it.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if not holds_score(model) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    named = cast("type[object]", MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    config.architectures = [named.__name__]
    config.tie_word_embeddings = True  # the class wants an output layer
    weight_1D = state.pop(SCORE, None)
    if weight_1D is not None and f"{HEAD}.weight" not in extra:
        extra |= {f"{HEAD}.weight": weight_1D.float(), f"{HEAD}.bias": weight_1D.new_zeros(1)}
    setattr(config, MARK, True)


def check_words(module: nn.Module) -> None:
    """Raise InputError for a module that scores and whose words mean nothing."""
    if getattr(getattr(module, "config", None), MARK, False):
        raise InputError(
            "a reward model in transformers' form, which scores texts and has no words of its own",
            seen=type(module).__name__,
            fix="Give a language model, such as the one that it was trained from",
        )
