"""Weight changes as functions on tensors: a LoRA adapter, whole tensors, differences, entries, and
output heads blended into one.

`core.weights.Folded` applies them in order, in float32 at least, and rounds last.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from truing.changes import Weights
from truing.core.modelfiles import jsonfile
from truing.errors import InputError

if TYPE_CHECKING:
    from truing.core.weights import Stored

Tensor = torch.Tensor
ADAPTER = "adapter_model.safetensors"
HEADS = "vocab_heads"  # see `core.passes.vocab_heads`
BLEND = f"{HEADS}.weights"  # of each head, in a change that makes one of them
# Words of `init_lora_weights` under which PEFT takes the first adapter out of the base's weights
# (PiSSA, OLoRA, CorDA, LoRA-GA) or puts quantised ones in their place (LoftQ).
MOVED = ("pissa", "olora", "corda", "lora_ga", "loftq")
CONVERT = (
    "Convert it in PEFT, with the model as it was trained: "
    "model.save_pretrained(FOLDER, path_initial_model_for_weight_conversion=UNTRAINED), where "
    "UNTRAINED is the adapter's folder from before training; or, which LoftQ needs, "
    "model.merge_and_unload().save_pretrained(FOLDER)"
)
MERGE = "Merge it in PEFT, model.merge_and_unload().save_pretrained(FOLDER), and give that folder"
GROWN = (
    "Where tokens were added, merge it in PEFT, with the model as it was trained: "
    "model.merge_and_unload().save_pretrained(FOLDER); tokenizer.save_pretrained(FOLDER). Else put "
    "it on the model that its adapter_config.json names"
)
# What PEFT's configuration may say that makes more of an adapter than W + s B A on linear layers.
MORE = {
    "use_dora": "DoRA adapters",
    "trainable_token_indices": "adapters that train the embeddings of some tokens",
    "alora_invocation_tokens": "adapters that act on some tokens alone (aLoRA)",
    "layer_replication": "adapters on layers that are repeated",
    "target_parameters": "adapters on parameters",
    "arrow_config": "adapters that are chosen among (Arrow)",
    "use_qalora": "QALoRA adapters",
    "use_bdlora": "adapters of blocks (BD-LoRA)",
}
UNMERGED = ("alora_invocation_tokens", "arrow_config", "use_qalora")  # which PEFT cannot merge
SCORE = "score.weight"  # of transformers' sequence classification
_LORA = re.compile(r"^base_model\.model\.(.+)\.lora_([AB])\.(?:default\.)?weight$")


def _adapter_config(folder: Path) -> dict[str, object]:
    path = folder / "adapter_config.json"
    try:
        config = jsonfile.read(path)
    except OSError as error:
        raise InputError(f"not a readable adapter: {error}", where=str(path)) from None
    except InputError as error:
        error.message = f"not a readable adapter: {error.message}"
        raise
    if config.get("peft_type") != "LORA":
        raise InputError(
            "only LoRA adapters fold into weights",
            where=str(path),
            seen=config.get("peft_type"),
            fix=MERGE,
        )
    if more := next((n for n in MORE if config.get(n)), ""):
        raise InputError(
            f"{MORE[more]} are not supported",
            where=str(path),
            seen={more: config[more]},
            fix="Give one that was trained without" if more in UNMERGED else MERGE,
        )
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(MOVED):
        raise InputError(
            "this adapter belongs to base weights that its initialisation changed, and would be "
            "wrong on the base's own",
            where=str(path),
            seen=f"init_lora_weights {begun!r}",
            fix=CONVERT,
        )
    alphas = config.get("alpha_pattern") or {}
    if not isinstance(alphas, dict):
        raise InputError("'alpha_pattern' must be a mapping", where=str(path), seen=alphas)
    for alpha in (config.get("lora_alpha"), *cast("dict[str, object]", alphas).values()):
        if alpha is not None and not isinstance(alpha, (int, float)):
            raise InputError("'lora_alpha' must be a number", where=str(path), seen=alpha)
    return config


def lora_scale(config: Mapping[str, object], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2312.03732).

    `alpha_pattern` of the configuration overrides alpha for modules whose name ends in its key.
    """
    alpha = float(cast(float, config.get("lora_alpha") or rank))
    for pattern, value in cast("dict[str, float]", config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = float(value)
            break
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


class AdapterPatch:
    """A LoRA adapter of PEFT's file format as a function on tensors: W + scale B A."""

    def __init__(self, folder: Path, tensors: Stored) -> None:
        self.folder, self.tensors = folder, tensors
        self.config = _adapter_config(folder)
        self.modules: dict[str, dict[str, str]] = {}
        self.whole: dict[str, str] = {}
        for name in self.tensors:
            found = _LORA.match(name)
            if found:
                self.modules.setdefault(found[1], {})[found[2]] = name
            elif ".lora_" in name:
                raise InputError(
                    "this sort of LoRA tensor is not supported",
                    where=str(folder),
                    seen=name,
                    fix=MERGE,
                )
            else:  # a module saved whole (PEFT's modules_to_save) or a trained bias
                self.whole[name.removeprefix("base_model.model.")] = name

    def names(self) -> set[str]:
        """Names of the weights that it changes, as the module calls them."""
        return {f"{m}.weight" for m in self.modules} | set(self.whole)

    def whole_name(self, name: str) -> str | None:
        """How the file calls the tensor that takes the old one's place; None where none does."""
        return self.whole.get(name)

    def brought(self, name: str) -> dict[str, Tensor]:
        """What the base has no place for: the score head of a reward model, as it is called here.

        Raises:
            InputError: anything else, which would be lost.
        """
        tensor = self.tensors[self.whole[name]]
        if name == SCORE and len(tensor) == 1:
            return {"reward_head.weight": tensor.float(), "reward_head.bias": torch.zeros(1)}
        raise InputError(
            f"the adapter brings {name!r}, for which the model has no place",
            where=str(self.folder),
            fix=MERGE,
        )

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise an InputError where a weight of that shape cannot be changed by it."""
        if name in self.whole:
            own, fix = self.tensors.shape(self.whole[name]), GROWN
        else:
            parts = self.modules[name.removesuffix(".weight")]
            own = (self.tensors.shape(parts["B"])[0], self.tensors.shape(parts["A"])[1])
            own = own[::-1] if self.config.get("fan_in_fan_out") else own
            fix = "Put it on the model that its adapter_config.json names"
        if own != shape:
            raise InputError(
                "the adapter does not fit the model",
                where=f"{self.folder} {name}",
                seen=f"{own} on {shape}",
                fix=fix,
            )

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """A [R, I] and s B [O, R] of a linear layer."""
        a_RI, b_OR = (self.tensors[self.modules[module][part]].float() for part in "AB")
        return a_RI, lora_scale(self.config, module, len(a_RI)) * b_OR

    def apply(self, name: str, old: Tensor) -> Tensor:
        """The folded tensor in the old one's dtype, at least float32; so is the product."""
        if name in self.whole:
            return self.tensors[self.whole[name]].to(old.dtype)
        parts = self.modules[name.removesuffix(".weight")]
        a_RI = self.tensors[parts["A"]].float()
        b_OR = self.tensors[parts["B"]].float()
        scale = lora_scale(self.config, name.removesuffix(".weight"), a_RI.shape[0])
        step = scale * (b_OR @ a_RI)
        return old + (step.T if self.config.get("fan_in_fan_out") else step)


def stacked(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One A and B for several: B_1 A_1 + B_2 A_2 = [B_1 B_2] [A_1; A_2]."""
    return torch.cat([a_RI for a_RI, _ in pairs]), torch.cat([b_OR for _, b_OR in pairs], 1)


class WeightsPatch:
    """Whole tensors that replace, differences that are added, or single entries (see `Weights`)."""

    def __init__(self, change: Weights, tensors: Stored) -> None:
        self.path, self.tensors = change.path, tensors
        self.delta, self.sparse = change.delta, change.sparse

    def names(self) -> set[str]:
        """Names of the weights that it changes."""
        if self.sparse:
            return {n.removesuffix(".at") for n in self.tensors if n.endswith(".at")}
        return set(self.tensors)

    def whole_name(self, name: str) -> str | None:
        """How the file calls the tensor that takes the old one's place; None where none does."""
        return None if self.delta or self.sparse else name

    def brought(self, name: str) -> dict[str, Tensor]:
        """A tensor that the base has no place for, such as a value head."""
        return {name: self.tensors[name]}

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise an InputError where a weight of that shape cannot be changed by it."""
        if not self.sparse and (own := self.tensors.shape(name)) != shape:
            raise InputError(
                "the change does not fit the model",
                where=f"{self.path} {name}",
                seen=f"{own} on {shape}",
                fix="Put it on the model that it was made for",
            )

    def apply(self, name: str, old: Tensor) -> Tensor:
        """The new tensor in the old one's dtype, in which a sum is taken, too."""
        if self.sparse:
            new = old.clone()
            values = self.tensors[f"{name}.to"].to(old.dtype)
            new.view(-1)[self.tensors[f"{name}.at"]] = values
            return new
        new = self.tensors[name]
        if not self.delta:
            return new.to(old.dtype)
        return old + new.to(old.dtype)


class BlendPatch:
    """Output heads blended into one: W (I + sum_i w_i U_i V_i) for the vocabulary's own W.

    Args:
        up_HDr, down_HrD: U and V of each head.
        weight_H: w.
    """

    def __init__(self, up_HDr: Tensor, down_HrD: Tensor, weight_H: Tensor) -> None:
        self.up_HDr, self.down_HrD, self.weight_H = up_HDr, down_HrD, weight_H

    def apply(self, name: str, old: Tensor) -> Tensor:
        """The blended head in the old one's dtype."""
        up_HDr = self.up_HDr.to(old.dtype) * self.weight_H.to(old.dtype)[:, None, None]
        up_DR = up_HDr.permute(1, 0, 2).flatten(1)  # all ranks of all heads side by side
        return old + (old @ up_DR) @ self.down_HrD.to(old.dtype).flatten(0, 1)
