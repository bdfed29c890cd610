"""Make a mixture of experts: models' feed-forward layers become experts, the rest is averaged.

    softmax    y = sum_{i in top k of p} (p_i / sum_{j in top k} p_j) E_i(x),   p = softmax(W x)
    switch     y = p_i E_i(x),   i the one expert of the largest p_i
    sigmoid    as softmax, with sigmoid(W x) in place of p

A Mixtral can have these gates; the others of the field's list are in `core.moe`, a layer for models
of one's own.

One model gives sparse upcycling: E copies of its layers, which compute exactly what it computed,
whatever the router says, until training parts them. Several give Branch-Train-Mix: each model's
layers are experts, attention, norms and embeddings the mean of all. `experts` are dealt to the
models in turn. W is drawn at random, or taken from `prompts`: w_i is the mean state, of length one,
that model i has before its feed-forward layer when it reads its own prompts (rows with a column
`role` that names the model). Each model is one expert then: copies would have the same row of W,
and nothing would part them.

The result is a Mixtral with its hub names, which stock transformers opens; train it whole with
`train/balanced_experts` (adapters reach attention alone); `evaluate/router_report` shows where its
tokens go. Layers of the Llama family without biases can be used. Kept weights of softmax and
sigmoid gates are renormalised, so that copies are exact; a single one would be 1 always and leave
its router without a gradient, so that they keep two experts at least. A switch keeps one and weighs
it by its probability: copies then give about 1/E of what the layer gave, which training has to make
up for. A gate other than softmax is a change beside the weights (see `core.passes.routers`), which
a plain folder for stock transformers cannot hold, and exporting says so. Sources: sparse upcycling,
arXiv 2212.05055; Branch-Train-MiX, arXiv 2403.07816; Switch, arXiv 2101.03961; sigmoid, arXiv
2412.19437; the design space, arXiv 2503.07137.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from truing.context import current
from truing.core.batch.same_tokenizer import same_tokens, templated
from truing.core.chat import Prompt, prompt_ids
from truing.core.files import new_folder, place
from truing.core.modelfiles.merging import without_critics
from truing.core.modelfiles.stock import quiet
from truing.core.passes.routers import Gate, with_gate
from truing.core.weights import OUTPUT, Folded, aligned, write
from truing.errors import InputError
from truing.merge.linear import average
from truing.method import method
from truing.models import Folder, Model, run_time_of
from truing.tables import Table, content_hash

if TYPE_CHECKING:
    from transformers import MixtralConfig, PreTrainedConfig

WHERE = "merge/mixture_of_experts"
STD = 0.02  # of random routers
EXPERT = {"gate": "w1", "down": "w2", "up": "w3"}
_LAYER = re.compile(r"^(.*layers\.(\d+)\.)mlp\.(gate|up|down)_proj\.weight$")
KEPT = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim hidden_act max_position_embeddings rms_norm_eps "
    "initializer_range rope_parameters bos_token_id eos_token_id pad_token_id attention_dropout"
)


def config_of(model: Model, experts: int, top_k: int, *, tied: bool) -> MixtralConfig:
    """The Mixtral configuration of a Llama-like model; an InputError for other architectures.

    Args:
        tied: whether the output head shares its weights with the embeddings.
    """
    from transformers import AutoConfig, MixtralConfig

    dense: PreTrainedConfig = AutoConfig.from_pretrained(model.folder, trust_remote_code=False)
    biased = getattr(dense, "attention_bias", False) or getattr(dense, "mlp_bias", False)
    if dense.model_type not in ("llama", "mistral") or biased:
        raise InputError(
            "only models of type llama or mistral, without biases, become a mixture of experts",
            where=f"{WHERE} {model.name}",
            seen=f"{dense.model_type} with biases" if biased else dense.model_type,
        )
    facts = {n: getattr(dense, n) for n in KEPT.split() if getattr(dense, n, None) is not None}
    facts["tie_word_embeddings"] = tied
    window = getattr(dense, "sliding_window", None)
    return MixtralConfig(
        **facts,
        sliding_window=window,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        architectures=["MixtralForCausalLM"],
    )


def mixture(
    folded: Mapping[str, Folded], experts: int, routers: Mapping[int, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the mixture by their hub names.

    Args:
        folded: weights by role, of one architecture.
        experts: dealt to the roles in turn.
        routers: W [E, D] of each layer.
    """
    shares = [1 / len(folded)] * len(folded)
    first = next(iter(folded.values()))
    for i, (name, theta) in enumerate(aligned(folded, where=WHERE), 1):
        current().progress(i, len(first), "mixing tensors")
        found = _LAYER.match(name)
        # These are a whole model's files, so that what was trained is rounded to their type here.
        each = [tensor.to(first.stored_dtype(name)) for tensor in theta.values()]
        if found is None:
            yield name, average(each, shares)
            continue
        head, layer, kind = f"{found[1]}block_sparse_moe", int(found[2]), found[3]
        for e in range(experts):
            # Copies: safetensors does not write two names for one piece of memory.
            yield f"{head}.experts.{e}.{EXPERT[kind]}.weight", each[e % len(each)].clone()
        if kind == "gate":
            yield f"{head}.gate.weight", routers[layer].to(each[0].dtype)


def mean_states(model: Model, prompts: list[Prompt]) -> list[Tensor]:
    """Mean state before each feed-forward layer over the tokens of prompts, of length one, [D]."""
    loaded = model.load_module("float32")
    layers = [m for n, m in loaded.module.named_modules() if n.endswith("post_attention_layernorm")]
    totals = [torch.zeros(()) for _ in layers]

    def add(i: int, out: Tensor) -> None:
        totals[i] = totals[i] + out[0].float().sum(0).cpu()

    def listen(i: int) -> torch.utils.hooks.RemovableHandle:
        return layers[i].register_forward_hook(lambda _m, _x, out: add(i, cast(Tensor, out)))

    handles = [listen(i) for i in range(len(layers))]
    try:
        with torch.inference_mode():
            for prompt in prompts:
                ids_1T = torch.tensor([prompt_ids(loaded.tokenizer, prompt)], device=loaded.device)
                loaded.module(input_ids=ids_1T)
    finally:
        for handle in handles:
            handle.remove()
    return [nn.functional.normalize(t, dim=0) for t in totals]


def routers_of(
    models: Mapping[str, Model], prompts: Table | None, config: MixtralConfig
) -> dict[int, Tensor]:
    """W [E, D] of each layer: random, or from the states of each model on its own prompts."""
    experts, layers = config.num_local_experts, config.num_hidden_layers
    if prompts is None:
        source = torch.Generator().manual_seed(current().stream("routers") % 2**63)
        drawn = torch.randn(layers, experts, config.hidden_size, generator=source)
        return dict(enumerate(STD * drawn))
    own: dict[str, list[Prompt]] = {role: [] for role in models}
    for row in prompts.expect("prompt", "example", where=WHERE):
        if row.get("role") not in own:
            raise InputError(
                "column 'role' must name the model that a prompt is for",
                where=prompts.source,
                seen=row.get("role"),
                fix="The models are: " + ", ".join(own),
            )
        own[str(row["role"])].append(cast(Prompt, row.get("prompt", row.get("messages"))))
    if missing := [role for role, asked in own.items() if not asked]:
        raise InputError(
            "a model has no prompt",
            where=prompts.source,
            seen=missing,
            fix="Give rows whose column 'role' names it",
        )
    states = [mean_states(models[role], asked) for role, asked in own.items()]
    return {i: torch.stack([layer[i] for layer in states]) for i in range(layers)}


@method(
    paper="moe-survey",
    needs=("weights",),
    rows={"prompts": ("prompt", "example")},
    within={"experts": (0, None), "top_k": (0, None)},
)
def mixture_of_experts(
    models: dict[str, Model],
    prompts: Table | None = None,
    *,
    experts: int = 0,
    top_k: int = 0,
    gate: Gate = "softmax",
    keep: str = "",
) -> Model:
    """Make a mixture of experts: models' feed-forward layers become experts, the rest is averaged.

    Args:
        models: of one Llama-like architecture and tokenizer; a single one is upcycled.
        experts: of each layer, dealt to the models; 0: one a model, without prompts at least four.
        top_k: experts that a token is sent to; 0 takes one for a switch, else two.
        gate: what makes weights of the routers' logits.
        keep: role whose run-time changes the result carries, where they differ.
    """
    if not models:
        raise InputError("needs at least one model", where=WHERE)
    experts = experts or (max(4, len(models)) if prompts is None else len(models))
    top_k = top_k or (1 if gate == "switch" else 2)
    _check(experts, top_k, gate, len(models), prompted=prompts is not None)
    same_tokens(models, where=WHERE, bare=True)
    kept = run_time_of(models, keep, where=WHERE)
    first = next(iter(models.values()))
    folded = without_critics(models, WHERE)
    tied = not any(OUTPUT in one for one in folded.values())
    config = config_of(first, experts, top_k, tied=tied)
    asked = prompts.key if prompts is not None else ""
    mixed = [[role, m.weights_key] for role, m in models.items()]
    key = content_hash([WHERE, experts, top_k, current().seed, asked, mixed], 8)
    folder = current().folder / f"experts-{key}"
    if not folder.is_dir():
        routers = routers_of(models, prompts, config)
        with new_folder(folder) as partial:
            write(partial, mixture(folded, experts, routers))
            _rest(templated(models), config, partial)
    licences = [m.licence for m in models.values()]
    told = getattr(templated(models).base, "thinking", None)  # whose template they all have
    made = Model(Folder(folder, first.licence, told), kept, f"{first.name}+{experts} experts")
    beside = current().folder / f"gates-{gate}-{config.num_hidden_layers}"
    made = with_gate(made, gate, config.num_hidden_layers, beside)
    return made.with_licences(licences)


def _check(experts: int, top_k: int, gate: Gate, models: int, *, prompted: bool) -> None:
    seen = {"experts": experts, "top_k": top_k, "gate": gate, "models": models}
    if prompted and not experts == models >= 2:
        raise InputError(
            "with prompts each model is one expert, and there are two at least",
            where=WHERE,
            seen=seen,
            fix="Leave out experts, or leave out prompts",
        )
    fits = top_k == 1 if gate == "switch" else 2 <= top_k <= experts
    if experts < max(2, models) or not fits:
        raise InputError(
            "needs an expert for each model, two at least, and top_k from 2 to their number, or 1 "
            "for a switch",
            where=WHERE,
            seen=seen,
            fix="A single kept expert has weight 1 always but for a switch: no router learns so",
        )


def _rest(model: Model, config: MixtralConfig, folder: Path) -> None:
    """Configuration, tokenizer and template of the mixture."""
    with quiet():
        config.save_pretrained(folder)
    for name, path in model.local.parts().items():
        if ".safetensors" not in name and name != "config.json":
            place(path, folder / name, link=False)
