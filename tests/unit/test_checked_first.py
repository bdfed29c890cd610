"""What a plan or a command would refuse is refused before a model is opened or a step runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from truing import pipeline, recipe
from truing.cli import main
from truing.core.preflight import check_rows
from truing.errors import InputError
from truing.method import methods
from truing.models import Model
from truing.plan import Plan
from truing.store import Store
from truing.tables import Table

PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
FAR = "smollm2-135m-instruct"
Told = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Model, "open", lambda *_: pytest.fail("a model was opened"))
    monkeypatch.chdir(tmp_path)
    rows = {
        "pairs": [PAIR | {"prompt": f"Why {i}?"} for i in range(12)],
        "prompts": [{"prompt": "Why?"}],
        "typo": [{"prompt": "Why?", "chosn": "So.", "rejected": "No."}],
        "labelled": [{"prompt": "Why?", "completion": "So.", "lable": True}],
    }
    for name, items in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in items))
    (tmp_path / "good.yaml").write_text("- {id: a, text: Be brief., check: {use: max_words, n: 4}}")
    (tmp_path / "bad.yaml").write_text("- {id: a, text: Be brief., check: {use: max_wrds, n: 4}}")
    return tmp_path


@pytest.fixture
def told(folder: Path, capsys: pytest.CaptureFixture[str]) -> Told:
    """The one line of a command that must fail."""

    def run(words: str) -> str:
        capsys.readouterr()
        assert main(words.split()) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said.splitlines()[-1]

    return run


@pytest.mark.parametrize(
    ("method", "given", "part"),
    [
        ("train dpo", "--lr -1", "'lr' must be at least 0"),
        ("train dpo", "--steps -3", "'steps' must be at least 0"),
        ("train dpo", "--batch 0", "'batch' must be at least 1"),
        ("train dpo", "--epochs 0", "steps and epochs are 0"),
        ("train dpo", "--rank -1", "'rank' must be at least 0"),
        ("train dpo", "--beta nan", "'beta': must be finite"),
        ("train dpo", "--beta -1", "'beta' must be at least 0"),
        ("train robust-dpo", "--label-smoothing 0.7", "'label_smoothing' must be in [0, 0.5)"),
        ("train ld-dpo", "--alpha 2", "'alpha' must be in [0, 1]"),
        ("train tr-dpo", "--share 3", "'share' must be in (0, 1]"),
        ("train grpo", "--answers 0", "'answers' must be at least 1"),
        ("train grpo", "--answers 1", "'answers' must be at least 2"),
        ("train grpo", "--top-p 2", "top_p"),
    ],
)
def test_settings_out_of_range(told: Told, method: str, given: str, part: str) -> None:
    data = "prompts.jsonl" if "grpo" in method else "pairs.jsonl"
    said = told(f"{method} --model {FAR} --data {data} {given}")
    assert part in said and f"truing {method}" in said
    name, value = given.removeprefix("--").split()
    plan = Plan("p")
    plan.step("rules", "specify/principles_file", path="good.yaml")
    plan.step("made", method.replace(" ", "/"), model=FAR, data=data)
    plan.override(f"made.{name.replace('-', '_')}={value}")
    with pytest.raises(InputError) as error:
        plan.check()
    assert part in str(error.value) and "step made" in str(error.value)


def test_a_port_that_is_none(told: Told) -> None:
    said = told(f"serve {FAR} --port 99999999")
    assert "'port' must be from 0 to 65535" in said
    assert "'waiting' must be at least 1" in told(f"serve {FAR} --waiting 0")


@pytest.mark.parametrize(
    ("method", "data", "parts"),
    [
        ("train/dpo", "prompts", ["needs rows of kind pair, got 'prompt'"]),
        ("train/dpo", "typo", ["Did you mean 'chosen' by 'chosn'?"]),
        ("train/kto", "labelled", ["Did you mean 'label' by 'lable'?"]),
        ("train/grao", "prompts", ["needs rows of kind example"]),
    ],
)
def test_rows_of_another_kind(
    folder: Path, told: Told, method: str, data: str, parts: list[str]
) -> None:
    said = told(f"{method.replace('_', '-').replace('/', ' ')} --model {FAR} --data {data}.jsonl")
    assert all(p in said for p in parts), said
    for through in (False, True):
        plan = Plan("p", folder=folder)
        plan.step("rules", "specify/principles_file", path="good.yaml")
        given = f"{data}.jsonl"
        if through:
            plan.step("some", "select/sample", data=given, n=1)
            given = "some"
        plan.step("made", method, model=FAR, data=given)
        with pytest.raises(InputError) as error:
            pipeline.run(plan, folder / "runs")
        assert all(p in str(error.value) for p in parts)
        assert not (folder / "runs").exists() and Store().keys() == []


ASKED = {"prompt": [{"role": "user", "content": "Why?"}]}
MESSAGES = {"messages": [*ASKED["prompt"], {"role": "assistant", "content": "So."}]}
ROWS: dict[str, dict[str, object]] = {
    "prompt": ASKED,
    "messages": MESSAGES,
    "example": ASKED | {"completion": "So."},
    "pair": ASKED | {"chosen": "So.", "rejected": "No."},
    "unpaired": ASKED | {"completion": "So.", "label": True},
    "group": ASKED | {"completions": ["So.", "No."], "scores": [1, 0]},
    "steps": ASKED | {"steps": ["So.", "No."], "labels": [1, 0]},
    "dialogue_pair": dict.fromkeys(("chosen", "rejected"), MESSAGES["messages"]),
    "text": {"text": "So."},
    "record": {"start": 3},
}
PLAIN = {
    name: rows
    for name in methods
    if (rows := methods[name].declared.__dict__.get("__truing__", {}).get("rows"))
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_functions_take_what_they_themselves_expect(name: str) -> None:
    method = methods[name]
    settings = {n: s.default for n, s in method.settings.items()}
    taken: set[str] = set()
    for given, kinds in PLAIN[name].items():
        for like, row in ROWS.items():
            table = Table("", [row])
            try:
                table.expect(*kinds)
            except InputError as error:
                with pytest.raises(InputError) as told:
                    method.check(settings, {given: table}, where="here")
                assert told.value.message == error.message
            else:
                method.check(settings, {given: table}, where="here")
                taken.add(like)
    assert taken and taken < set(ROWS)
    assert "prompt" not in taken or "messages" in taken


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("evaluate preference --data typo.jsonl", ["kind pair", "Did you mean 'chosen' by"]),
        ("evaluate adherence --prompts text.jsonl --principles good.yaml", ["kind prompt"]),
        ("attack lora-undo --data prompts.jsonl", ["kind example, got 'prompt'"]),
        ("merge mixture-of-experts --models {m} --prompts text.jsonl", ["kind prompt or example"]),
    ],
)
def test_plain_functions_refuse_rows_before_a_model_is_opened(
    folder: Path, told: Told, words: str, parts: list[str]
) -> None:
    (folder / "text.jsonl").write_text('{"text": "So."}\n')
    said = told(words.replace("{m}", FAR) if "{m}" in words else f"{words} --model {FAR}")
    assert all(p in said for p in parts), said


def test_the_input_whose_rows_are_refused_is_named(folder: Path) -> None:
    (folder / "text.jsonl").write_text('{"text": "So."}\n')
    (folder / "r.yaml").write_text(
        "steps:\n  seen:\n    do: evaluate/refusal_rate\n"
        f"    model: {FAR}\n    prompts: prompts.jsonl\n    neutral: text.jsonl\n"
    )
    with pytest.raises(InputError, match=r"r\.yaml line 6 step seen: needs rows of kind prompt"):
        pipeline.run(recipe.load(folder / "r.yaml"), folder / "runs")
    assert Store().keys() == []


def test_an_environments_tasks_may_be_of_any_kind() -> None:
    tasks = Table("record", [{"start": 3}])
    grpo = methods["train/grpo"]
    settings = grpo.validate({"environment": {"use": "running_sum"}})
    grpo.check(settings, {"data": tasks})
    with pytest.raises(InputError, match="needs rows of kind prompt"):
        grpo.check(grpo.validate({}), {"data": tasks})


def test_a_column_that_only_some_settings_need() -> None:
    method, data = (
        methods["grpo_top_kl"],
        {"data": Table("prompt", [{"prompt": "a", "compl": "b"}])},
    )
    method.check(method.validate({}), data)
    with pytest.raises(InputError, match=r"'completion'.*Did you mean 'completion' by 'compl'\?"):
        method.check(method.validate({"ptx": 0.1}), data)


def test_rows_that_are_converted_pass() -> None:
    check_rows(Table("pair", [PAIR]), "unpaired", "kto", ["label"])
    check_rows(Table("pair", [PAIR]), "example", "sft")


def test_the_checks_of_principles_are_resolved_before_a_step_runs(folder: Path, told: Told) -> None:
    for words in (
        f"synthesize principle-pairs --model {FAR} --prompts prompts.jsonl --principles bad.yaml",
        "specify principles-file --path bad.yaml",
    ):
        assert "Did you mean 'max_words'?" in told(words)
    for given in ({"principles": "bad.yaml"}, {"principles": "rules"}):
        plan = Plan("p", folder=folder)
        plan.step("few", "select/sample", data="pairs.jsonl", n=2)
        plan.step("rules", "specify/principles_file", path="bad.yaml")
        plan.step("seen", "evaluate/adherence", model=FAR, prompts="prompts.jsonl", **given)
        with pytest.raises(InputError, match=r"step .*Did you mean 'max_words'\?"):
            pipeline.run(plan, folder / "runs")
        assert Store().keys() == []


def test_a_comparison_of_too_many_rows(told: Told) -> None:
    common = f"compare --methods dpo --model {FAR} --seeds 1"
    said = told(f"{common} --data pairs.jsonl --budget 200 --held-out 4")
    assert "--budget 200" in said and "--held-out 4" in said and "12 rows" in said
    assert "needs rows of kind pair" in told(f"{common} --data prompts.jsonl --budget 1")


def test_nearest_names(told: Told, folder: Path) -> None:
    said = told(f"train dpo --model {FAR} --data pairs.jsonl --bata 0.2")
    assert said == "truing: truing train dpo: unknown setting 'bata'. Did you mean 'beta'?"
    said = told(f"compare --methods preferenc --model {FAR} --data pairs.jsonl")
    assert "Did you mean 'preference'?" in said
    plan = Plan("p", folder=folder)
    plan.step("made", "train/dpo", model=FAR, data="pairs.jsonl", bata=0.2)
    with pytest.raises(InputError, match=r"'bata'. Did you mean 'beta'\?"):
        plan.check()


def test_a_name_that_no_model_or_data_set_of_the_recipe_has(folder: Path) -> None:
    (folder / "r.yaml").write_text(
        f"models: {{base: {FAR}}}\ndata: {{mine: pairs.jsonl}}\n"
        "steps:\n  made: {do: train/dpo, model: base, data: mine}\n"
    )
    with pytest.raises(InputError, match=r"unknown model 'bsae'. Did you mean 'base'\?"):
        recipe.load(folder / "r.yaml", ["models.bsae=x"])
    with pytest.raises(InputError, match=r"unknown data set 'mnie'. Did you mean 'mine'\?"):
        recipe.load(folder / "r.yaml", ["data.mnie=x"])
    assert recipe.load(folder / "r.yaml", ["models.base=a/b"]).models == {"base": "a/b"}


@pytest.mark.parametrize(
    ("method", "settings", "part"),
    [
        ("grpo", {"environment": {"use": "runing_sum"}}, "Did you mean 'running_sum'?"),
        ("grpo", {"rewards": {"short": {"use": "max_wrds", "n": 4}}}, "Did you mean 'max_words'?"),
        ("ppo", {"refill": 2}, "groups of equal rewards teach here too"),
        ("grao", {"environment": {"use": "running_sum"}}, "was given in no episode"),
    ],
)
def test_what_settings_refer_to(method: str, settings: dict[str, object], part: str) -> None:
    plan = Plan("p")
    plan.step("made", f"train/{method}", model=FAR, data="everyday_prompts", **settings)
    with pytest.raises(InputError) as error:
        plan.check()
    assert part in str(error.value) and "setting" in str(error.value)
