"""Every preference and supervised objective learns a rule, on rows that it has not seen as well.

Pairs of one rule: good answers end with "?", bad ones with "!". Whatever trains on such pairs alone
is trained on them: objectives of rows that pairs are or become, without a teacher. What then counts
follows from the declaration: chosen above rejected by the change of their log-probabilities where a
reference is needed, by these themselves where none is. Where a first step from the reference would
go the wrong way by default (DiscoPOP, see the card of the standard losses), the setting that turns
it is found and used. The shares asked for are the card's.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from truing.changes import Weights
from truing.context import Context, use
from truing.core.batch.row_kinds import is_taken
from truing.core.chat import completion_ids, prompt_ids
from truing.core.modelfiles.stock import quiet
from truing.core.objective import Measurements, Objective, objective_of
from truing.core.tiny import fill, tiny_config, tiny_tokenizer
from truing.core.trainer.own_samples import OwnSamples
from truing.core.training import HOOKS
from truing.core.weights import open_weights
from truing.merge.mixture_of_experts import mixture_of_experts
from truing.method import methods
from truing.models import Model
from truing.tables import Row, Table

WORDS = (
    "lime oak rain stone river cloud ash fern moss reed pine sand wind lake hill bird "
    "fish leaf bark root seed snow frost wave tide reef cave path field barn grass dew"
).split()
TRAIN, HELD_OUT = 0.9, 0.8
SEEN = 20  # rows trained on; the others are held out
HOW: dict[str, object] = {
    "rank": 0, "lr": 8e-3, "steps": 15, "batch": 8, "warmup": 0.0, "schedule": "constant",
}  # fmt: skip


def spec_of(name: str) -> Objective:
    return objective_of(methods[name].declared)


def from_pairs(name: str) -> bool:
    """Whether it is a loss on answers that plain pairs, and nothing else, can be trained by."""
    entry = methods[name].entry
    if entry.kind != "objective" or entry.group not in ("preference", "supervised"):
        return False
    spec = spec_of(name)
    return not spec.teachers and (spec.rows == "pair" or is_taken("pair", spec.rows))


LEARNING = [n for n in methods if from_pairs(n)]


def climbs(spec: Objective, settings: dict[str, object]) -> bool:
    """Whether descent from the reference parts chosen from rejected."""
    ones = torch.ones(4, 2 + len(spec.texts), 3)
    tensors = {n: -ones if n.endswith("logp") else 0.5 * ones for n in spec.needs}
    tensors["logp"] = leaf = (-ones).requires_grad_()
    columns = {n: torch.full((4,), d or 0.0) for n, d in spec.columns.items()}
    spec(Measurements(ones, tensors, columns), settings).total().backward()
    assert leaf.grad is not None
    return float(leaf.grad[:, 0].sum() - leaf.grad[:, 1].sum()) < 0


def turned(spec: Objective) -> dict[str, object]:
    """Settings of a loss on pairs under which a first step goes the right way; {} for its own."""
    usual = {n: p.default for n, p in spec.settings.items()}
    if spec.rows != "pair" or climbs(spec, usual):
        return {}
    for name, value in usual.items():
        for factor in (2, 4, 8):
            if isinstance(value, float) and climbs(spec, {**usual, name: factor * value}):
                return {name: factor * value}
    return {}


def rows_for(spec: Objective) -> list[Row]:
    """Pairs, with the columns and texts that the objective declares besides."""
    made: list[Row] = []
    for i, word in enumerate(WORDS):
        answer = f"{word} {WORDS[(7 * i + 3) % len(WORDS)]}"
        row: Row = {"prompt": f"say {word}", "chosen": f"{answer}?", "rejected": f"{answer}!"}
        row |= dict.fromkeys(spec.texts, f"{answer}?")
        if spec.heads:
            row[spec.heads] = i % 2
        made.append(row)
    return made


def log_probs(model: Model, rows: list[Row]) -> Tensor:
    """Log-probability of both answers, [N, 2], each row by itself from the model's own logits."""
    loaded = model.load_module()
    texts = [(str(r["prompt"]), str(r[name])) for r in rows for name in ("chosen", "rejected")]
    heads = [prompt_ids(loaded.tokenizer, prompt) for prompt, _ in texts]
    tails = [completion_ids(loaded.tokenizer, answer) for _, answer in texts]
    ids = [torch.tensor(h + t) for h, t in zip(heads, tails, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    with torch.no_grad():
        logp_NTV = loaded.module(padded).logits.log_softmax(-1)
    made: list[float] = []
    for i, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        at = torch.arange(len(head) - 1, len(head) + len(tail) - 1)
        made.append(float(logp_NTV[i, at, torch.tensor(tail)].sum()))
    return torch.tensor(made).reshape(-1, 2)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Two blocks of width 64, with the tokens and template of the tiny model."""
    config = tiny_config()
    config.hidden_size, config.num_hidden_layers, config.intermediate_size = 64, 2, 96
    config.num_attention_heads, config.num_key_value_heads = 2, 1
    module = LlamaForCausalLM(config)
    fill(module, 0.08, 0)
    module.tie_weights()
    folder = tmp_path_factory.mktemp("small")
    with quiet():
        module.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Model.open(folder)


def test_nearly_all_of_them_are_here() -> None:
    names = {methods[n].name for n in LEARNING}
    assert len(names) >= 40 and {"dpo", "kto", "d2o", "pro", "sft", "mah_dpo"} <= names
    assert [methods[n].name for n in LEARNING if turned(spec_of(n))] == ["discopop"]


@pytest.mark.parametrize("name", LEARNING)
def test_the_rule_is_learnt(name: str, small: Model, tmp_path: Path) -> None:
    spec = spec_of(name)
    model = small
    if any(n.startswith("router_") for n in spec.needs):
        model = mixture_of_experts({"base": small})
    how = HOW | turned(spec)
    if spec.hook and issubclass(HOOKS[spec.hook], OwnSamples):
        how |= {"samples": 2, "max_tokens": 6}
    rows = rows_for(spec)
    with use(Context(folder=tmp_path)) as context:
        made = methods[name](model, Table("pair", rows[:SEEN]), **how)
        if spec.heads:
            made = methods["blend_heads"](made, weights=[1.0, 1.0])
    losses = [float(str(m["loss"])) for m in context.metrics if "loss" in m]
    assert len(losses) == how["steps"] and isinstance(made, Model)
    # All weights were trained, and are a change: before those of heads and of what weighs these.
    changes = [c for c in made.weight_changes if isinstance(c, Weights)]
    assert len(changes) == len(made.changes) == (3 if spec.heads else 1)
    weights = open_weights(changes[0].path)
    assert {"model.norm.weight", "model.embed_tokens.weight"} <= set(weights)
    assert all(any(f"layers.{i}." in n for n in weights) for i in range(2))
    before, after = log_probs(model, rows), log_probs(made, rows)
    assert after.isfinite().all()
    reward = after - before if spec.with_reference else after
    right = (reward[:, 0] > reward[:, 1]).float()
    assert float(right[:SEEN].mean()) >= TRAIN and float(right[SEEN:].mean()) >= HELD_OUT
    # The model that it began with thinks otherwise.
    assert float((before[SEEN:, 0] > before[SEEN:, 1]).float().mean()) < 1 - HELD_OUT
