"""What online training does with prompts that leave no room, and with values all alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from truing.context import Context, Journal
from truing.core.drawing import Completion
from truing.core.objective import Measurements
from truing.core.rl.advantages import whiten
from truing.core.rl.answers import Asked
from truing.core.rl.collect import Collector, _Speaker
from truing.core.rl.online_prompts import read_prompts
from truing.core.sampling import SamplingSettings
from truing.core.tiny import tiny_tokenizer
from truing.core.trainer import distributed
from truing.errors import InputError
from truing.tables import Row, Table
from truing.train.rl.salmon_ppo import whitened
from truing.train.rl.urpo import Players

SUM: Row = {"prompt": "q", "answer": "3"}
GRADED: Row = {"prompt": "p", "completions": ["x" * 50, "y" * 50], "scores": [1.0, 0.0]}


def test_a_pools_own_prompts_are_what_must_fit() -> None:
    tokenizer, pool = tiny_tokenizer(), Players(1, 4, "")
    rows = Table("prompt", [SUM, GRADED])
    asked, said = read_prompts(rows, tokenizer, 200, 10, "", "urpo", pool)
    assert [one.row["prompt"] for one in asked] == ["q"] and said["left_out_long"] == 1
    asked, said = read_prompts(rows, tokenizer, 2000, 10, "", "urpo", pool)
    # The referee's prompt has both candidates: it is what memory is forecast by.
    assert len(asked) == 2 and len(asked[1].ids) > 400 and "left_out_long" not in said
    with pytest.raises(InputError, match="no prompt leaves room"):
        read_prompts(Table("prompt", [GRADED]), tokenizer, 200, 10, "", "urpo", pool)


def test_the_policy_is_not_asked_what_leaves_no_room(tmp_path: Path) -> None:
    asked: list[int] = []

    def draw(
        prompts: Sequence[Sequence[int]], sampling: SamplingSettings, first: Sequence[int]
    ) -> list[list[Completion]]:
        asked.append(len(prompts))
        return [[Completion(f"{len(p)}", (1,), (0.0,))] * sampling.n for p in prompts]

    context = Context(folder=tmp_path)
    parts = ([], [draw], None, Players(1, 4, ""), tiny_tokenizer(), tmp_path, context, None)
    journal = Journal(tmp_path / "said.jsonl")
    say = _Speaker(Collector(*parts, 60), journal, "r", SamplingSettings(max_tokens=5))
    (short,), (long,), (again,) = say(["aa", "b" * 90, "cc"], 1)
    journal.close()
    assert short and long == "" and again == short and asked == [2]


def test_each_process_draws_in_every_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a journal is read by any number of them."""
    asked = [Asked({"prompt": str(i)}, (i,)) for i in range(8)]
    calls: list[int] = []

    def draw(
        prompts: Sequence[Sequence[int]], sampling: SamplingSettings, first: Sequence[int]
    ) -> list[list[Completion]]:
        calls.append(len(prompts))
        return [[Completion(f"{p[0]}", (1,), (0.0,))] * sampling.n for p in prompts]

    def drawn(name: str) -> list[str]:
        parts = (asked, [draw], None, None, tiny_tokenizer(), tmp_path, Context(folder=tmp_path))
        journal, how = Journal(tmp_path / name), SamplingSettings(n=64, max_tokens=5)
        made = Collector(*parts).drawn(journal, "r", draw, asked, how, 0)
        journal.close()
        assert all(len(items) == 64 for items in made)
        return [items[0][2] for items in made]

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "_now", distributed.Processes(0, 4))
        patch.setattr(distributed, "agree", lambda value: value)
        patch.setattr(distributed, "gathered", lambda own: own * 4)  # others draw the same
        assert drawn("four.jsonl") == list("00004444") and calls == [1, 1]
    assert drawn("four.jsonl") == list("00004444") and calls == [1, 1]
    first, *_ = (tmp_path / "four.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "killed.jsonl").write_bytes(first)
    assert drawn("killed.jsonl") == list("00004567") and calls == [1] * 6


@pytest.mark.parametrize("value", [-57.1, -19.3, 41.7, 1e6])
def test_equal_values_give_no_advantage(value: float) -> None:
    """The rounding of a mean is no signal, and no square root of less than nothing."""
    mask = torch.ones(4, 3, 7)
    assert whiten(torch.full_like(mask, value), mask).abs().max() == 0
    r = Measurements(mask, {}, {})
    assert whitened(torch.full_like(mask, value), r, 7).abs().max() == 0
    kept = whitened(torch.full_like(mask, value), r, 7, shift=False)
    assert torch.allclose(kept, torch.full_like(mask, value))
    short = mask.clone()
    short[0, 0, 4:] = 0.0
    made = whitened(torch.full_like(mask, value), Measurements(short, {}, {}), 7)
    assert bool(made.isfinite().all()) and made[0, 0, 5] == 0
