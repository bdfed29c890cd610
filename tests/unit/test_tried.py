"""Trials of modules: one for each kind, and one for each module that has none or does not pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from truing.core import logprob
from truing.core.modelfiles import lora
from truing.core.passes.tried import Tried, kind_of
from truing.core.tiny import tiny_model


def module(seed: int = 0, blocks: int = 3) -> nn.Module:
    return tiny_model(seed, blocks)[0]


def test_weights_are_no_part_of_a_kind() -> None:
    assert kind_of(module(0)) == kind_of(module(1)) is not None
    assert kind_of(module()) != kind_of(module(blocks=2))
    assert kind_of(module()) != kind_of(module().to(torch.bfloat16))
    assert kind_of(module()) != kind_of(module().train())
    scaled = module()
    scaled.config.rms_norm_eps = 1e-3
    assert kind_of(module()) != kind_of(scaled)
    low = [module(), module(), module()]
    for made, rank in zip(low, (2, 2, 3), strict=True):
        lora.attach(made, rank, 2.0, seed=rank)
    assert kind_of(low[0]) == kind_of(low[1]) not in (None, kind_of(module()), kind_of(low[2]))
    assert kind_of(nn.Linear(2, 2)) is None  # no configuration says what it does


class Own(nn.Linear):
    """A part that somebody wrote."""


def hooked(made: nn.Module) -> None:
    made.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def replaced(made: nn.Module) -> None:
    made.get_submodule("model.layers.1.mlp.up_proj").forward = lambda x: x


def adapted_by_others(made: nn.Module) -> None:
    lora.attach(made, 2, 2.0, seed=0)
    replaced(made)


def rebuilt(made: nn.Module) -> None:
    made.model.layers[1].mlp.up_proj = Own(128, 384, bias=False)


@pytest.mark.parametrize("change", [hooked, replaced, adapted_by_others, rebuilt])
def test_what_is_not_stock_has_no_kind(change: Callable[[nn.Module], None]) -> None:
    made = module()
    change(made)
    assert kind_of(made) is None


def test_code_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = kind_of(module())
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: x)
    assert kind_of(module()) != before


def test_a_kind_is_tried_once_where_it_passes() -> None:
    tried: list[bool] = []

    def trial(result: bool) -> bool:
        tried.append(result)
        return result

    for result, times in ((True, 1), (False, 2)):
        memory: Tried[bool] = Tried()
        tried.clear()
        made = module(), module()
        for one in (*made, *made):
            assert memory(one, partial(kind_of, one), partial(trial, result)) is result
        assert tried == [result] * times
    memory = Tried()
    tried.clear()
    made = module(), module()  # alive both: what has ended may leave its place to the next
    for one in made:
        memory(one, lambda: None, partial(trial, True))
    assert tried == [True, True]


def test_a_module_of_a_kind_that_was_tried_computes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logprob.check(module())
    monkeypatch.setattr(logprob, "_compare", lambda *_: pytest.fail("it was tried again"))
    logprob.check(module(1))
    changed = module(1)
    hooked(changed)
    with pytest.raises(pytest.fail.Exception):
        logprob.check(changed)
