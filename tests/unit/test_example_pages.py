"""The examples of the pages: in the shell, in Python and in a recipe they are one good call."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from truing import Measure, Plan, Report, Table, catalogue, cli, command
from truing.core.trainer.replay import check_stream
from truing.method import Method, methods

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import example_pages  # noqa: E402

OWN = sorted(e.id for e in catalogue.methods().values() if e.package == "truing")
ASKED = [{"prompt": f"How much is {i} and {i}?", "answer": str(2 * i)} for i in range(6)]
TOLD = [row | {"completion": f"It is {row['answer']}."} for row in ASKED]
FILES: dict[str, list[dict[str, object]]] = {
    "examples.jsonl": [*TOLD],
    "rated.jsonl": [row | {"label": bool(i % 2)} for i, row in enumerate(TOLD)],
    "scored.jsonl": [row | {"score": 0.1 * i} for i, row in enumerate(TOLD)],
    "groups.jsonl": [{"prompt": "Why?", "completions": ["So.", "No."], "scores": [1.0, 0.0]}],
    "steps.jsonl": [{"prompt": "Why?", "steps": ["First.", "Then."], "labels": [1, 0]}],
    "sums.jsonl": [*ASKED],
    "questions.jsonl": [*ASKED],
    "harmful.jsonl": [*ASKED],
    "patients.jsonl": [row | {"status": 1, "months": 3.0} for row in TOLD],
    "objectives.jsonl": [
        {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "objective": i} for i in range(2)
    ],
    "gold.jsonl": [{"prompt": "Why?", "chosen": "So.", "rejected": "No.", "gold": "Just so."}],
}
# As synthesize/online_stream saves them: token by token, in the order of drawing.
STREAM: list[dict[str, object]] = [
    {
        "prompt": "Why?", "rollout": i, "rollouts": 2, "prompt_ids": [5, 6],
        "chosen": "So.", "chosen_finished": True, "chosen_ids": [7, 2], "chosen_reward": 1.0,
        "rejected": "No.", "rejected_finished": True, "rejected_ids": [8, 2],
        "rejected_reward": 0.0,
    }
    for i in range(2)
]  # fmt: skip


def _sources(method: Method) -> Iterator[tuple[str, str]]:
    """(noun, source) of all that the example of a method names."""
    for name, value in example_pages.example(method).items():
        if name in method.inputs:
            several = value.values() if isinstance(value, dict) else [value]
            yield from ((method.inputs[name].noun, str(one)) for one in several)


@pytest.fixture(scope="module")
def place(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stand-in for everything that the examples name and a checkout has not."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    conflicts = folder / "recipes" / "dialectical_alignment" / "conflicts.jsonl"
    shutil.copy(conflicts, folder / "conflicts.jsonl")
    (folder / "patients.csv").write_text("months,died,age,stage\n5,1,40,2\n7,0,50,1\n")
    for name, rows in FILES.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    Table("pair", STREAM).save(folder / "stream")
    report = Report("said", [Measure("value", 0.5, 0.4, 0.6, 10)])
    for noun, source in {s for m in OWN for s in _sources(methods[m])}:
        if noun == "Report":
            report.save(folder / source)
        elif noun == "Model" and source.endswith("/"):
            shutil.copytree(tiny_path, folder / source)
    return folder


@pytest.mark.parametrize("name", OWN)
def test_the_recipe_would_run(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    method = methods[name]
    (step, given), *_ = yaml.safe_load(example_pages.step(method)).items()
    plan = Plan("example")
    plan.step(step, given.pop("do"), **given)
    (checked,) = plan.check()
    tables = {
        name: Table.read(sources[""].text)
        for name, sources in checked.sources.items()
        if method.inputs[name].noun == "Table" and not method.inputs[name].many
    }
    method.check(checked.settings, tables)
    if name == "train/replay":  # which asks for more than a kind of rows
        check_stream(tables["data"])
    local = [s for noun, s in _sources(method) if noun == "Model" and s.endswith("/")]
    assert all(Path(s, "config.json").is_file() for s in local)


@pytest.mark.parametrize("name", OWN)
def test_shell_and_python_say_what_the_recipe_says(name: str) -> None:
    method = methods[name]
    told = example_pages.example(method)
    inputs = {n: v for n, v in told.items() if n in method.inputs}
    program, verb, bare, *words = shlex.split(example_pages.command(method).replace("\\\n", ""))
    assert [program, verb, bare.replace("-", "_")] == ["truing", method.verb, method.name]
    parser: argparse.ArgumentParser = command._parser(method, helped=False)  # pyright: ignore
    read = vars(parser.parse_args(words))
    assert read.pop("out", "") == example_pages.out(method)
    for n, value in read.items():
        if n in method.settings:
            assert method.settings[n].parse(value) == method.settings[n].validate(told[n])
        elif isinstance(value, list):
            assert dict(one.split("=", 1) for one in value) == told[n]
        else:
            assert value == told[n]
    assert set(read) == set(told)

    call = ast.parse(example_pages.python(method)).body[0]
    assert isinstance(call, ast.Assign) and isinstance(call.value, ast.Call)
    given = dict(zip(method.inputs, map(ast.literal_eval, call.value.args), strict=False))
    given |= {str(k.arg): ast.literal_eval(k.value) for k in call.value.keywords}
    assert given == told
    required = [n for n, i in method.inputs.items() if not i.optional]
    assert set(required) <= set(inputs)


def test_an_example_runs_from_the_shell(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("TRUING_HOME", str(place / "home"))
    line = example_pages.command(methods["merge/ties"]).replace("\\\n", "")
    words = shlex.split(line.replace("smollm2-135m-instruct", "base/"))[1:]
    shutil.copytree("aligned", "base")
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["noun"] == "Model"
    assert Path("merged").is_dir()


def test_no_model_is_compared_or_merged_with_itself() -> None:
    for name in OWN:
        models = [s for noun, s in _sources(methods[name]) if noun == "Model"]
        assert len(models) == len(set(models)), name


def test_what_is_saved_elsewhere_is_saved_by_an_example() -> None:
    saved = {(methods[m].returns, example_pages.out(methods[m]).partition("/")[0]) for m in OWN}
    asked = {
        (noun, source.partition("/")[0])
        for m in OWN
        for noun, source in _sources(methods[m])
        if noun in ("Report", "Table") and "/" in source
    }
    assert {("Table", "stream"), ("Report", "refusals")} <= asked <= saved
    assert all(example_pages.out(methods[m]) for m in OWN if methods[m].returns == "Report")


@pytest.mark.parametrize("name", OWN)
def test_the_python_of_a_page_has_all_the_names_that_it_uses(name: str) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", example_pages.use_block(methods[name]), re.S)
    tree = ast.parse(block)
    assert ast.unparse(tree.body[0]) == "import truing"
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    made = {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    assert used - made == {"truing"}
