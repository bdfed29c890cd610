"""TR-DPO's loss is DPO's; its reference moves by share * policy + (1 - share) * reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from objective_numbers import pairs
from torch import nn

from truing.core.objective import objective_of
from truing.core.training import HOOKS, MovingReference
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.tables import Table
from truing.train.preference.dpo import dpo
from truing.train.preference.tr_dpo import tr_dpo


class Held:
    name, steps = "held", ()

    def __init__(self) -> None:
        self.module = nn.Linear(1, 1)
        self.lengths_N = torch.zeros(0)
        self.policy = {"w": torch.tensor([8.0])}
        self.ref = {"w": torch.tensor([0.0])}

    def trained(self) -> dict[str, torch.Tensor]:
        return self.policy

    def reference(self) -> dict[str, torch.Tensor]:
        return self.ref


def test_loss_is_dpo() -> None:
    assert torch.equal(tr_dpo(pairs(), beta=0.2).per_unit, dpo(pairs(), beta=0.2).per_unit)
    assert HOOKS[objective_of(tr_dpo).hook] is MovingReference
    # It starts as the model itself, so there is none to give.
    assert set(methods["tr_dpo"].inputs) == {"model", "data", "held_out"}


def test_reference_by_hand() -> None:
    held, hook = Held(), MovingReference(share=0.25, every=2)
    seen = []
    for step in range(1, 5):
        hook.after_step(held, step)
        seen.append(held.ref["w"].item())
    assert seen == [0.0, 2.0, 2.0, 3.5]  # 0.25 * 8; 0.25 * 8 + 0.75 * 2
    MovingReference(share=1.0, every=1).after_step(held, 5)
    assert held.ref["w"].item() == 8.0
    with pytest.raises(InputError, match=r"'share' must be in \(0, 1\]"):
        MovingReference(share=0.0)
    with pytest.raises(InputError, match="'every' must be at least 1"):
        MovingReference(every=0)


def test_a_reference_that_never_moves_in_time_is_told(
    tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Table("pair", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    small: dict[str, object] = {"steps": 3, "batch": 2, "rank": 2}
    one = Model.open(tiny_path)
    methods["tr_dpo"](one, table, **small)
    said = capsys.readouterr().err
    assert said.count("tr_dpo: warning: the reference moves after every 512 updates") == 1
    assert "there are 3" in said
    methods["tr_dpo"](one, table, every=3, **small)  # a move after the last update moves nothing
    assert "tr_dpo: warning: the reference moves" in capsys.readouterr().err
    methods["tr_dpo"](one, table, every=2, **small)
    assert "the reference moves" not in capsys.readouterr().err
