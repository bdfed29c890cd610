"""Preference on held-out pairs against transformers' own log-probabilities, row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from truing.core.tiny import tiny_model
from truing.errors import InputError
from truing.evaluate.preference import accuracy, preference
from truing.models import Model
from truing.tables import Row, Table

ROWS: list[Row] = [
    {"prompt": "Say one.", "chosen": "one", "rejected": "a number, which is two"},
    {"prompt": "Say two.", "chosen": "it is two", "rejected": "one"},
    {"prompt": "Say three.", "chosen": "three", "rejected": "3"},
]


def test_ties_count_one_half() -> None:
    assert accuracy([1.0, 2.0, 3.0], [0.0, 2.0, 4.0]) == [1.0, 0.5, 0.0]


def test_margins_are_those_of_single_unpacked_rows(tiny_path: Path) -> None:
    model = Model.open(tiny_path)
    report = preference(model, Table("pair", ROWS))
    loaded = model.load_module()

    def mean(row: Row, name: str) -> float:
        head = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        ids = loaded.tokenizer.encode(head + f"{row[name]}<|im_end|>")
        start = len(loaded.tokenizer.encode(head))
        with torch.no_grad():
            logp = loaded.module(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(logp[i - 1, ids[i]]) for i in range(start, len(ids))) / (len(ids) - start)

    wanted = [mean(r, "chosen") - mean(r, "rejected") for r in ROWS]
    assert report.samples is not None
    assert report.samples.column("margin") == pytest.approx(wanted, abs=1e-5)
    assert report.get("margin").value == pytest.approx(sum(wanted) / 3, abs=1e-5)
    assert report.get("preference").value == sum(m > 0 for m in wanted) / 3
    twice = [{**r, "id": f"{i} {r['prompt']}"} for i in range(2) for r in ROWS]
    for once, again in zip(report, preference(model, Table("pair", twice)), strict=True):
        ends = [(m.n, round(m.lo, 4), round(m.hi, 4)) for m in (once, again)]
        assert ends[0] == ends[1] and once.n == 3  # pairs of one prompt go together


def test_a_tie_is_half_of_what_is_counted(tmp_path: Path) -> None:
    module, tokenizer = tiny_model()
    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()  # all words are as likely
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    row: Row = {"prompt": "Say one.", "chosen": "a", "rejected": "b"}
    tied = preference(Model.open(tmp_path), Table("pair", [row])).get("preference")
    assert tied.value == 0.5 and tied.lo + tied.hi == pytest.approx(1.0)


def test_rows_that_are_no_pairs_are_refused(tiny_path: Path) -> None:
    with pytest.raises(InputError, match="pair"):
        preference(Model.open(tiny_path), Table("prompt", [{"prompt": "x"}]))
