"""Methods, recipes and comparisons called from Python: what they take, their seed and their log."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pyarrow as pa
import pytest
import torch
from torch import nn

import truing
from truing import context
from truing.context import Context, current, use
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.principles import Principles
from truing.tables import Table

PAIRS = [{"prompt": f"Say {i}.", "chosen": f"It is {i}", "rejected": f"No {i}"} for i in range(4)]
SAME: list[dict[str, object]] = [{"id": 7, **row} for row in PAIRS]
ONCE: dict[str, Any] = {"steps": 1, "batch": 2, "rank": 2}


class Dataset:
    """As datasets.Dataset gives its rows: missing fields are None."""

    column_names = ("prompt", "chosen", "rejected", "note")

    def to_list(self) -> list[dict[str, object]]:
        return [row | {"note": None} for row in PAIRS]


@pytest.fixture
def model(tiny_path: Path) -> Model:
    return Model.open(tiny_path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in PAIRS))
    return path


def test_nouns_are_taken_by_name_and_rows_as_they_are(model: Model, file: Path) -> None:
    given = [Table("pair", PAIRS), file, str(file), PAIRS, tuple(PAIRS), Dataset()]
    given.append(pa.Table.from_pylist(PAIRS))
    tables = [methods["sample"](one, n=3) for one in given]
    assert all(isinstance(t, Table) and t.kind == "pair" for t in tables)
    assert len({t.key for t in tables}) == 1  # type: ignore[attr-defined]
    assert methods["linear"]({"a": str(model.folder), "b": model}).key == model.key  # type: ignore
    assert methods["linear"]([model, model.folder]).key == model.key  # type: ignore[attr-defined]
    assert methods["linear"](model).key == model.key  # type: ignore[attr-defined]


def test_a_method_called_as_its_command_is(tiny_path: Path, file: Path, tmp_path: Path) -> None:
    made = methods["dpo"](str(tiny_path), str(file), reference=None, **ONCE)
    assert isinstance(made, Model) and [c.kind for c in made.changes] == ["adapter"]
    made.save(tmp_path / "kept")


@pytest.mark.parametrize(
    ("nouns", "told"),
    [
        (("none-such", PAIRS), "none-such"),
        (("MODEL", "none.jsonl"), "none.jsonl"),
        (("MODEL", []), "input 'data': no rows"),
        (("MODEL", [1, 2]), r"input 'data' takes a Table \(seen: 'list'\). Give a truing.Table"),
        (("MODEL", {"train": PAIRS}), r"takes a Table \(seen: 'dict'\).*one split"),
        (("MODEL", [{"prompt": "a", "chosen": 3, "rejected": "b"}]), "row 1.*'chosen'"),
        (("MODEL", [{"prompt": "a", "chosen": "b"}]), "pair"),
        ((nn.Linear(1, 1), PAIRS), "input 'model' takes a Model .*Linear.*save_pretrained"),
        (
            (Table("pair", PAIRS), PAIRS),
            r"input 'model' takes a Model \(seen: 'truing.tables.Table'\)",
        ),
        (("MODEL", "MODEL"), "a folder without table.parquet"),
        (("MODEL", PAIRS, "MODEL", "MODEL", "MODEL"), "takes . inputs"),
        (("MODEL", None), "input 'data' .Table. is missing"),
        (("MODEL", SAME), "train/dpo: input 'data' row 2: field 'id' is that of row 1"),
        (("MODEL", Table("pair", SAME)), "train/dpo: table row 2: field 'id' is that of row 1"),
        ((), "input 'model' .Model. is missing"),
    ],
)
def test_mistakes_are_told_by_the_input(tiny_path: Path, nouns: Any, told: str) -> None:
    given = [str(tiny_path) if one == "MODEL" else one for one in nouns]
    with pytest.raises(InputError, match=told):
        methods["dpo"](*given, **ONCE)


def test_other_mistakes_in_a_call(model: Model) -> None:
    with pytest.raises(InputError, match="input 'model' is given twice"):
        methods["dpo"](model, PAIRS, model=model)
    with pytest.raises(InputError, match="Did you mean 'beta'"):
        methods["dpo"](model, PAIRS, bata=1)
    with pytest.raises(InputError, match=r"seed must be a whole number \(seen: 'a'\)"):
        methods["dpo"](model, PAIRS, seed="a")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'a' takes a Model"):
        methods["linear"]({"a": PAIRS})
    with pytest.raises(InputError, match="'principles' takes a Principles"):
        methods["principle_pairs"](model, [{"prompt": "a"}], [{"id": "a"}])


def test_rows_changed_in_place_are_other_rows(model: Model) -> None:
    table = Table("pair", PAIRS)
    made = [methods["dpo"](model, table, **ONCE)]
    for row in table:
        row["chosen"] = "Quite another"
    made.append(methods["dpo"](model, table, **ONCE))
    assert made[0].key != made[1].key


def test_what_a_notebook_shows() -> None:
    assert re.fullmatch(r"<\d+ methods: \d+ of specify, .*\d+ of train, .*>", repr(methods))
    plan = truing.Plan("mine")
    plan.step("few", "select/sample", data="helpful_pairs", n=2)
    assert repr(plan) == "Plan(mine, 1 steps: few)"
    # Which noun it is no type checker can know: users need no cast.
    assert get_type_hints(type(methods["dpo"]).__call__)["return"] is Any


def test_principles_from_their_file(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("- {id: short, text: Be brief., check: {use: max_words, n: 2}}\n")
    prompts = [{"prompt": "Hi"}]
    report = methods["adherence"](model, prompts, path, max_tokens=4)
    same = methods["adherence"](
        model, Table("prompt", prompts), Principles.read(path), max_tokens=4
    )
    assert [m.value for m in report] == [m.value for m in same]  # type: ignore


def weights(made: object) -> dict[str, torch.Tensor]:
    assert isinstance(made, Model)
    return dict(made.folded())


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[n], other[n]) for n in one)


def test_the_seed_of_a_call(model: Model, tmp_path: Path) -> None:
    plain, third = (methods["dpo"](model, PAIRS, **ONCE, **s) for s in ({}, {"seed": 3}))
    again = methods["dpo"](model, PAIRS, seed=3, **ONCE)
    assert alike(weights(third), weights(again)) and not alike(weights(third), weights(plain))
    assert alike(weights(methods["dpo"](model, PAIRS, seed=0, **ONCE)), weights(plain))
    with use(Context(seed=3, folder=tmp_path / "step")) as step:
        inside = methods["dpo"](model, PAIRS, **ONCE)
        other = methods["dpo"](model, PAIRS, seed=0, **ONCE)
        assert current() is step
    assert alike(weights(inside), weights(third)) and alike(weights(other), weights(plain))
    assert len([m for m in step.metrics if "loss" in m]) == 2  # both are told to the step
    assert (tmp_path / "step" / "seed-0").is_dir()


def test_what_a_seeded_call_observed_is_told_outside(model: Model) -> None:
    methods["dpo"](model, PAIRS, seed=5, **ONCE)
    assert [m for m in current().metrics if "loss" in m] and current().seed == 0


def test_what_is_made_outlives_its_context(model: Model, tmp_path: Path) -> None:
    with use(Context(seed=1)):
        made = methods["dpo"](model, PAIRS, **ONCE)
    assert isinstance(made, Model)
    assert Model.load(made.save(tmp_path / "kept")).key == made.key


RECIPE = """
data: {pairs: pairs.jsonl}
steps:
  few: {do: select/sample, data: pairs, n: 2}
"""


def test_run_takes_a_recipe(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    for given in (path, str(path)):
        made = truing.run(given, tmp_path / "runs")
        assert len(made.results["few"]) == 2  # type: ignore[arg-type]
    assert made.run.steps["few"]["cached"] is True
    with pytest.raises(InputError, match="no such recipe"):
        truing.run(tmp_path / "none.yaml")
    with pytest.raises(InputError, match=r"this is no plan .*a truing.Plan"):
        truing.run({"steps": {}})  # type: ignore[arg-type]


class Stderr(io.StringIO):
    def __init__(self, live: bool) -> None:
        super().__init__()
        self.live = live

    def isatty(self) -> bool:
        return self.live


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    yield now


@pytest.mark.parametrize("live", [False, True])
def test_a_plain_call_says_how_far_it_is(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, live: bool
) -> None:
    err = Stderr(live)
    monkeypatch.setattr(sys, "stderr", err)
    plain = Context()
    for i in range(1, 91):  # a row each second
        plain.progress(i, 90, "rows")
        clock[0] += 1
    said = [
        int(line.removeprefix("rows: ").partition("/")[0])
        for line in err.getvalue().split("\n")[:-1]
    ]
    assert said == ([*range(1, 91, 3), 90] if live else [21, 41, 61, 81])


def test_other_processes_of_torchrun_are_silent(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "a"), ("WORLD_SIZE", "2"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    plain = Context()
    for i in range(3):
        plain.progress(i, 3, "rows")
        clock[0] += context.EVERY + 1
    assert capsys.readouterr().err == ""
