"""The schedule by inverse square root and AdamW's own settings, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from truing.core.engine import optimizer_for
from truing.core.training import Training
from truing.errors import InputError
from truing.method import methods


def test_inverse_square_root_with_a_warm_up_from_a_tenth() -> None:
    settings = Training(schedule="inverse_sqrt", warmup=0.2)
    rates = [settings.rate(step, 100) for step in range(100)]
    # Twenty updates of warm-up: step / 20, at least 0.1; then sqrt(20 / step).
    assert rates[:4] == [0.1, 0.1, 0.1, pytest.approx(3 / 20)]
    assert rates[10] == 0.5 and rates[19] == 0.95 and rates[20] == 1.0
    assert rates[80] == pytest.approx(0.5) and rates[45] == pytest.approx(math.sqrt(20 / 45))
    none = Training(schedule="inverse_sqrt", warmup=0.0)
    assert [none.rate(s, 9) for s in range(5)] == pytest.approx([1.0, 1.0, 2**-0.5, 3**-0.5, 0.5])


def test_other_schedules_are_as_they_were() -> None:
    for schedule, wanted in (("constant", [1.0, 1.0]), ("linear", [1.0, 0.5])):
        settings = Training(schedule=schedule, warmup=0.0)  # type: ignore[arg-type]
        assert [settings.rate(s, 4) for s in (0, 2)] == wanted
    warm = Training(schedule="constant", warmup=0.5)
    assert [warm.rate(s, 4) for s in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_adam_by_hand() -> None:
    """Two steps of one number, with bias corrections, for the house's settings and the paper's."""
    for beta2, eps in ((0.999, 1e-8), (0.95, 1e-6)):
        chosen = {} if beta2 == 0.999 else {"adam_beta2": beta2, "adam_epsilon": eps}
        weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = optimizer_for([weight], Training(**chosen))
        value, first, second = 1.0, 0.0, 0.0
        for step, gradient in enumerate((1e-5, -3e-5), 1):
            weight.grad = torch.tensor([gradient], dtype=torch.float64)
            for group in optimizer.param_groups:
                group["lr"] = 0.01
            optimizer.step()
            first = 0.9 * first + 0.1 * gradient
            second = beta2 * second + (1 - beta2) * gradient**2
            root = math.sqrt(second / (1 - beta2**step))
            value -= 0.01 * first / (1 - 0.9**step) / (root + eps)
        assert float(weight.detach()) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"adam_beta2": 1.0}, r"'adam_beta2' must be in \[0, 1\)"),
        ({"adam_beta2": -0.1}, r"'adam_beta2' must be in \[0, 1\)"),
        ({"adam_epsilon": 0.0}, "'adam_epsilon' must be above 0"),
        ({"adam_epsilon": math.inf}, "'adam_epsilon' must be above 0"),
    ],
)
def test_out_of_range(settings: dict[str, float], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Training(**settings).check("x")  # type: ignore[arg-type]


def test_every_training_has_them_and_their_defaults_are_unchanged() -> None:
    for name in ("sft", "dpo", "grpo", "ppo_max", "urpo"):
        found = methods[name].settings
        assert (found["adam_beta2"].default, found["adam_epsilon"].default) == (0.999, 1e-8)
        method = methods[name]
        assert method.validate({"schedule": "inverse_sqrt"})["schedule"] == "inverse_sqrt"
    critics = {"critic_rollouts", "clip_value", "vf", "critic_rate"}
    assert critics <= set(methods["ppo"].settings) and critics <= set(
        methods["salmon_ppo"].settings
    )
    assert not critics & set(methods["grpo"].settings)
    defaults = {n: methods["ppo"].settings[n].default for n in ("critic_rollouts", "vf")}
    assert defaults == {"critic_rollouts": 0, "vf": 0.1}
