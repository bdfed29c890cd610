"""Online methods without a pull to the reference, groups of one, the size of groups foreseen."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from truing.context import Context, use
from truing.core.online import online_of
from truing.core.rl import train_online
from truing.core.rl.online_prompts import Prompts
from truing.core.trainer.start import Start
from truing.method import methods
from truing.models import Model
from truing.tables import Table

WORDS = "lime oak rain stone".split()
LETTERS = {"letters": {"use": "share_of", "letters": "abcdefghijklmnop"}}
SMALL: dict[str, object] = {
    "steps": 1, "batch": 4, "answers": 2, "max_tokens": 5, "rank": 2, "rewards": LETTERS,
}  # fmt: skip


@pytest.mark.parametrize("name", ["nash_md", "xpo", "online_dpo"])
def test_no_pull_is_a_setting_of_losses_that_compare(
    name: str, tiny_path: Path, tmp_path: Path
) -> None:
    data = Table("prompt", [{"prompt": f"say {w}"} for w in WORDS])
    with use(Context(folder=tmp_path)) as context:
        methods[name](Model.open(tiny_path), data, beta=0.0, **SMALL)
    (step,) = [m for m in context.metrics if "loss" in m]
    assert math.isfinite(float(str(step["loss"])))
    # Of a margin that counts for nothing nothing is learnt; the others have terms beside it.
    assert (float(str(step["grad_norm"])) > 0) == (name != "online_dpo")


def test_groups_of_one_are_not_called_flat(tiny_path: Path, tmp_path: Path) -> None:
    data = Table("prompt", [{"prompt": f"say {w}"} for w in WORDS])
    for name, answers in (("reinforce_plus_plus", 1), ("rloo", 2)):
        with use(Context(folder=tmp_path / name)) as context:
            methods[name](Model.open(tiny_path), data, **SMALL | {"answers": answers})
        (step,) = [m for m in context.metrics if "loss" in m]
        assert ("flat" in step) == (answers > 1)


@pytest.mark.parametrize(("name", "branches"), [("xpo", 4), ("grpo", 2), ("grao", 2)])
def test_memory_is_forecast_by_all_branches_of_a_group(
    name: str, branches: int, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Prompts] = []

    class Seen(Exception):
        pass

    def look(start: Start, prompts: Prompts, *_: object) -> None:
        seen.append(prompts)
        raise Seen

    monkeypatch.setattr(train_online, "check_prompts", look)
    kind = online_of(methods[name].declared).rows
    rows = [{"prompt": "say oak", **({"completion": "o" * 30} if kind == "example" else {})}]
    with use(Context(folder=tmp_path)), pytest.raises(Seen):
        methods[name](Model.open(tiny_path), Table(kind, rows), **SMALL)
    (one,) = seen[0].asked
    assert (len(one.given) > 29) == (kind == "example")
    assert seen[0].largest == len(one.ids) + len(one.given) + 5 * branches
