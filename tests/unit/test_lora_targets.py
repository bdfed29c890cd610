"""Which linear layers an adapter is put on: one choice for training, its file and the forecast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file

from truing.context import current
from truing.core.modelfiles.lora import linears_of
from truing.core.passes import memory
from truing.core.passes.frozen_trunk import attach
from truing.core.tiny import tiny_model
from truing.core.training import TextTraining
from truing.errors import InputError
from truing.keys import step_key
from truing.method import methods
from truing.models import Adapter, Model
from truing.plan import Plan
from truing.tables import Row, Table

# PEFT asks transformers by a name that is going out of use.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
ROWS: list[Row] = [
    {"prompt": f"what is {i}?", "chosen": f"it is {i}.", "rejected": f"no {i}", "objective": i % 2}
    for i in range(4)
]
PAIRS = Table("pair", ROWS)
SMALL: dict[str, object] = {"steps": 2, "batch": 4, "lr": 1e-3, "rank": 2}
ONLINE: dict[str, object] = {
    **SMALL, "answers": 2, "max_tokens": 4, "rewards": {"n": {"use": "max_words", "n": 1}},
}  # fmt: skip
Q_V = {f"model.layers.{i}.self_attn.{n}_proj" for i in range(6) for n in "qv"}


@pytest.fixture
def model(deep_path: Path) -> Model:
    return Model.open(deep_path)


def adapter_of(made: object) -> Adapter:
    return next(c for c in cast(Model, made).changes if isinstance(c, Adapter))


def layers_of(made: object) -> tuple[set[str], set[str]]:
    """Names of the layers in an adapter's configuration, and in its file."""
    folder = adapter_of(made).path
    config = json.loads((folder / "adapter_config.json").read_text())
    stored = load_file(folder / "adapter_model.safetensors")
    names = {n.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for n in stored}
    return set(config["target_modules"]), names


def losses() -> list[object]:
    return [m["loss"] for m in current().metrics if "grad_norm" in m]


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("sft", {}),
        ("dpo", {"layers": 2}),
        ("bradley_terry", {}),
        ("mah_dpo", {"objectives": 2, "head_rank": 2}),
        ("grpo", ONLINE),
        ("ppo", ONLINE),
    ],
)
def test_adapters_lie_on_the_targets_alone(
    method: str, more: dict[str, object], model: Model
) -> None:
    data = PAIRS if more is not ONLINE else Table("prompt", [{"prompt": r["prompt"]} for r in ROWS])
    made = methods[method](model, data, **{**SMALL, **more, "targets": "q_proj, v_proj"})
    top = {n for n in Q_V if "layers" not in more or n.split(".")[2] in "45"}
    assert layers_of(made) == (top, top)


def test_training_is_that_of_peft_on_the_same_layers(model: Model) -> None:
    """One update of the mean log-likelihood, with PEFT's own adapter and torch's AdamW."""
    from peft import LoraConfig, get_peft_model

    rows = Table("example", [{"prompt": "say", "completion": "good morning"}])
    settings = {**SMALL, "steps": 1, "warmup": 0.0, "clip": 0.0, "schedule": "constant"}
    made = methods["sft"](model, rows, **settings, targets=["q_proj", "v_proj"], lora_alpha=4.0)
    module, tokenizer = tiny_model(blocks=6)
    begun = attach(
        module, TextTraining(rank=2, targets="q_proj,v_proj"), current().stream("adapter") % 2**31
    )
    assert begun is not None
    drawn = {n: p.detach().clone() for n, p in begun.named_parameters()}
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(tiny_model(blocks=6)[0], config)
    trained = {
        n.replace(".default", ""): p for n, p in theirs.named_parameters() if p.requires_grad
    }
    assert set(trained) == set(drawn)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(drawn[name])
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say"}], add_generation_prompt=True, tokenize=False
    )
    head = tokenizer(str(prompt), add_special_tokens=False)["input_ids"]
    tail = tokenizer("good morning<|im_end|>", add_special_tokens=False)["input_ids"]
    logits = theirs(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(tail))
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.0)
    loss.backward()
    optimizer.step()
    assert losses()[-1] == pytest.approx(loss.item(), abs=1e-4)
    found = load_file(adapter_of(made).path / "adapter_model.safetensors")
    for name, parameter in trained.items():
        moved = parameter.detach() - drawn[name]
        # Adam's first step is lr times the gradient's sign, up to rounding where it is next to 0.
        assert torch.allclose(found[name] - drawn[name], moved, atol=2e-4), name


def test_all_linear_by_name_is_what_it_is_without(model: Model) -> None:
    """To the bit."""
    methods["dpo"](model, PAIRS, **SMALL)
    plain = losses()
    methods["dpo"](model, PAIRS, **SMALL, targets="all-linear")
    assert losses()[len(plain) :] == plain and len(plain) == 2


def test_which_layers_there_are() -> None:
    module, _ = tiny_model(blocks=6)
    every = set(linears_of(module))
    assert len(every) == 7 * 6 and "lm_head" not in every
    assert set(linears_of(module, "q_proj,v_proj")) == Q_V
    assert set(linears_of(module, ["self_attn.q_proj", "v_proj"])) == Q_V
    assert list(linears_of(module, layers=1)) == [n for n in linears_of(module) if ".5." in n]
    assert list(linears_of(module, "layers.5.mlp.up_proj")) == ["model.layers.5.mlp.up_proj"]


def test_the_forecast_counts_the_same_layers() -> None:
    module, _ = tiny_model(blocks=6)
    made = memory.forecast(module, TextTraining(rank=4, targets="q_proj,v_proj"))
    # A and B, their gradients and two moments in float32; and merged weights.
    sides = (128 + 128) + (128 + 64)
    weights = 128 * 128 + 128 * 64
    assert made.state == 6 * (4 * 4 * 4 * sides + 4 * weights)
    top = memory.forecast(module, TextTraining(rank=4, targets=["down_proj"], layers=2))
    assert top.state == 2 * (4 * 4 * 4 * (384 + 128) + 4 * 384 * 128)


def test_targets_are_part_of_a_steps_key(model: Model) -> None:
    method, keys = methods["dpo"], set[str]()
    for given in ({}, {"targets": "q_proj"}, {"targets": ["q_proj", "v_proj"]}):
        keys.add(step_key(method, {"model": model, "data": PAIRS}, method.validate(given), 0))
    assert len(keys) == 3
    plain = method.validate({"targets": "all-linear"})
    assert step_key(method, {"model": model, "data": PAIRS}, plain, 0) in keys


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"targets": "q_porj"}, r"setting 'targets': no linear layer is called 'q_porj'.*'q_proj'"),
        ({"targets": ["v_proj", "xyz"]}, r"'xyz'.*Known: down_proj, gate_proj"),
        ({"targets": "lm_head"}, "no linear layer is called 'lm_head'"),
        ({"targets": "q_proj", "layers": 9}, "the model has 6 blocks"),
        ({"targets": "q_proj", "rank": 0}, "setting 'targets' names layers for an adapter"),
        ({"targets": " , "}, "setting 'targets' names no layer"),
        ({"targets": 3}, "setting 'targets'"),
    ],
)
def test_mistakes(settings: dict[str, object], told: str, model: Model) -> None:
    for method, data in (("dpo", PAIRS), ("grpo", Table("prompt", [{"prompt": "x"}]))):
        more = SMALL if method == "dpo" else ONLINE
        with pytest.raises(InputError, match=told):
            methods[method](model, data, **{**more, **settings})
    assert not losses()


def test_a_recipe_is_refused_before_it_runs(model: Model) -> None:
    plan = Plan("mine")
    plan.step(
        "a", "train/dpo", model=str(model.folder), data="answer_or_ask",
        rank=0, targets=["q_proj"],
    )  # fmt: skip
    with pytest.raises(InputError, match="with rank 0 there is none"):
        plan.check()
