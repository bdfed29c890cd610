"""What is given and would count for nothing is refused or told."""

from __future__ import annotations

from pathlib import Path

import pytest

from truing.core.judging.rewards import Rewards
from truing.core.trainer.preflight import check_given
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.references import reference
from truing.tables import Row, Table

PROMPTS = Table("prompt", [{"prompt": "a"}, {"prompt": "b"}])
SMALL: dict[str, object] = {
    "steps": 1, "batch": 2, "answers": 2, "rank": 2, "max_tokens": 2,
    "rewards": {"l": {"use": "share_of", "letters": "abc"}},
}  # fmt: skip


def test_a_partner_and_turns_without_an_environment(tiny_path: Path) -> None:
    model = Model.open(tiny_path)
    with pytest.raises(InputError, match="input 'partner' counts for nothing") as error:
        methods["grpo"](model, PROMPTS, partner=model, **SMALL)
    assert "{use: conversation}" in error.value.fix
    with pytest.raises(InputError, match="setting 'turns' counts for nothing"):
        methods["grpo"](model, PROMPTS, turns=2, **SMALL)
    told = {n: s.default for n, s in methods["grpo"].settings.items()}
    with pytest.raises(InputError, match="the step: input 'partner' counts"):
        check_given(told, {"data", "partner"}, lambda _: "the step")
    check_given(told | {"environment": {"use": "x"}}, {"data", "partner"}, lambda _: "the step")


def test_a_reference_that_nothing_is_compared_with(
    tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model.open(tiny_path)
    methods["grpo"](model, PROMPTS, reference=model, beta=0.0, **SMALL)
    assert "grpo: warning: the reference counts for nothing" in capsys.readouterr().err
    methods["grpo"](model, PROMPTS, reference=model, beta=0.1, **SMALL)
    assert "the reference counts for nothing" not in capsys.readouterr().err


def test_a_weight_of_a_value_that_no_reward_names() -> None:
    def counts(rows: list[Row]) -> list[dict[str, float]]:
        return [{"a": 1.0, "b": 2.0} for _ in rows]

    rows: list[Row] = [{"prompt": "p", "completion": "c", "finished": True}]
    refs = {"t": dict(reference(counts))}
    assert Rewards(refs, {"t": 2.0, "t/a": 1.0})(rows) == [5.0]
    with pytest.raises(InputError, match=r"unknown value of a reward 't/bb'.*'t/b'") as error:
        Rewards(refs, {"t/bb": 1.0}, where="train/x")(rows)
    assert error.value.where == "train/x setting 'weights'"
