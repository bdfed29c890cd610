"""Masked experts: what routers then choose, on a mixture of the tiny model with itself."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch

from truing.context import Context, use
from truing.errors import InputError
from truing.evaluate.router_report import router_report
from truing.merge.mixture_of_experts import mixture_of_experts
from truing.method import methods
from truing.models import Model
from truing.steer.mask_experts import mask_experts
from truing.tables import Table

IDS = torch.tensor([[5, 80, 31, 7, 140, 66]])
LAYERS, EXPERTS, K = 3, 4, 2


@pytest.fixture(scope="module")
def sparse(tiny_path: Path) -> Model:
    return mixture_of_experts({"base": Model.open(tiny_path)})


def routed(model: Model) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What each router gives: logits [N, E], weights [N, k], experts [N, k]."""
    module, seen = model.load_module().module, []
    gates = [m for m in module.modules() if type(m).__name__ == "MixtralTopKRouter"]
    handles = [g.register_forward_hook(lambda _, __, out: seen.append(out)) for g in gates]
    with torch.no_grad():
        module(IDS)
    for handle in handles:
        handle.remove()
    return seen


def test_a_token_goes_to_the_next_likeliest(sparse: Model, tmp_path: Path) -> None:
    made = mask_experts(sparse, experts=[2])
    assert made.name.endswith("+mask(2)") and made.key != sparse.key
    made.save(tmp_path / "made")
    for model in (made, Model.open(tmp_path / "made")):
        for logits_NE, weight_Nk, index_Nk in routed(model):
            p_NE = logits_NE.softmax(-1)
            p_NE[:, 2] = -1.0
            best_Nk, at_Nk = p_NE.topk(K, -1)
            assert torch.equal(index_Nk, at_Nk)
            assert torch.allclose(weight_Nk, best_Nk / best_Nk.sum(-1, keepdim=True))
    assert any((index_Nk == 2).any() for _, _, index_Nk in routed(sparse))  # it was chosen before


def test_layers_alone_and_one_mask_on_another(sparse: Model) -> None:
    made = mask_experts(mask_experts(sparse, experts=[0], layers=[1]), experts=[3])
    loads = [
        cast("list[float]", sample["load"])
        for sample in router_report(made, Table("prompt", [{"prompt": "name a fern"}])).samples
        or ()
    ]
    assert len(loads) == LAYERS and all(load[3] == 0 for load in loads)
    assert loads[1][0] == 0 and any(load[0] > 0 for load in loads)


def test_masks_of_two_models_in_one_step_stay_apart(sparse: Model, tmp_path: Path) -> None:
    with use(Context(folder=tmp_path)):
        plain = mask_experts(sparse, experts=[3])
        both = mask_experts(mask_experts(sparse, experts=[0]), experts=[3])
    assert any((index_Nk == 0).any() for _, _, index_Nk in routed(plain))
    for _, _, index_Nk in routed(both):
        assert not ((index_Nk == 0) | (index_Nk == 3)).any()


def test_training_moves_no_masked_expert_back(sparse: Model) -> None:
    data = Table("example", [{"prompt": "say oak", "completion": "oak"}] * 4)
    made = mask_experts(sparse, experts=[1])
    tuned = methods["balanced_experts"](made, data, rank=0, steps=2, batch=2, bias_step=0.5)
    for _, _, index_Nk in routed(cast(Model, tuned)):
        assert not (index_Nk == 1).any()


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"experts": [4]}, "'experts' names what the model has not"),
        ({"experts": [0], "layers": [6]}, "'layers' names what the model has not"),
        ({"experts": []}, "leave out one"),
        ({"experts": [0, 1, 2]}, "as many as a token chooses"),
    ],
)
def test_mistakes_are_named(sparse: Model, wrong: dict[str, list[int]], said: str) -> None:
    with pytest.raises(InputError, match=said):
        mask_experts(sparse, **wrong)


def test_a_dense_model_has_no_experts(tiny_path: Path) -> None:
    with pytest.raises(InputError, match="no mixture of experts"):
        mask_experts(Model.open(tiny_path), experts=[0])
