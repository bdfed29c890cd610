"""Recipes and plans: every mistake named with its line, before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truing import recipe, sources
from truing.cli import main
from truing.core.endpoints import limits
from truing.errors import InputError
from truing.plan import Plan
from truing.signature import Setting

GOOD = """\
name: small
seed: 3
data: {mine: prompts.jsonl}
steps:
  clean:
    do: select/checked
    data: mine
    checks: [{use: min_words, n: 2}]
  part: {do: select/split, data: clean, part: train, held_out: 2, seed: 7}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why is it so?"}\n' * 3)
    return tmp_path


def load(folder: Path, text: str) -> Plan:
    (folder / "r.yaml").write_text(text)
    return recipe.load(folder / "r.yaml")


def test_a_good_recipe_is_a_checked_graph(folder: Path) -> None:
    plan = load(folder, GOOD)
    clean, part = plan.check()
    assert (clean.name, clean.seed, clean.edges()) == ("clean", 3, [])
    assert (part.name, part.seed, part.edges()) == ("part", 7, ["clean"])
    assert clean.sources["data"][""].text == str(folder / "prompts.jsonl")


@pytest.mark.parametrize(
    ("change", "line", "words"),
    [
        (("held_out: 2", "held_owt: 2"), 9, "Did you mean 'held_out'"),
        (("held_out: 2", "held_out: many"), 9, "setting 'held_out'"),
        (("select/checked", "select/chekced"), 6, "select/checked"),
        (("data: clean", "data: claen"), 9, "Did you mean 'clean'"),
        (("data: clean, ", ""), 9, "input 'data' (Table)"),
        (("steps:", "stebs:"), 4, "Did you mean 'steps'"),
        (("seed: 3", "seed: three"), 2, "whole number"),
        (("part: {", "clean: {"), 9, "stands twice"),
        (("do: select/split, ", ""), 9, "says what it does"),
        (("data: {mine: prompts.jsonl}", "data: {mine: 4}"), 3, "must be a text"),
        (("seed: 7}", "seed: 7"), 10, "not valid YAML"),
    ],
)
def test_mistakes_are_named_with_their_line(
    folder: Path, change: tuple[str, str], line: int, words: str
) -> None:
    with pytest.raises(InputError) as error:
        load(folder, GOOD.replace(*change))
    assert f"r.yaml line {line}" in str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        (
            "models: [a]\nmerge_method: ties\nbase_model: a\n",
            "mergekit has it: docs/from-others.md",
        ),
        ("model_name_or_path: a\nstage: dpo\n", "LLaMA-Factory has it: docs/from-others.md"),
        ("base_model: a\ndatasets: []\n", "axolotl has it: docs/from-others.md"),
        ("model_name_or_path: a\n", "TRL has it: docs/from-trl.md"),
        ("modles: {}\n", "Did you mean 'models'?"),
    ],
)
def test_a_configuration_of_another_tool_is_no_recipe(folder: Path, text: str, fix: str) -> None:
    with pytest.raises(InputError, match="unknown field") as error:
        load(folder, text)
    assert fix in error.value.fix


NAMED = """name: made
models:
  base: no/such/folder/here
  mine: {endpoint: "http://127.0.0.1:1/v1", model: m}
data:
  rows: prompts.jsonl
  others: missing.jsonl
steps:
  first: {do: evaluate/adherence, model: base, prompts: rows, principles: rules}
  rules: {do: specify/principles_file, path: rules.yaml}
"""


@pytest.mark.parametrize(
    ("change", "line", "words"),
    [
        (("name: made", "name: a b/c"), 1, "a plan's name becomes a folder"),
        (("prompts: rows", "prompts: others"), 7, "data others: missing.jsonl: no such file"),
        (("base: no/such", "base: no/such"), 3, "model base"),
    ],
)
def test_a_mistake_in_what_is_named_has_its_own_line(
    folder: Path, change: tuple[str, str], line: int, words: str
) -> None:
    (folder / "missing.csv").write_text("")
    (folder / "rules.yaml").write_text("- {id: brief, text: Be brief., check: {use: no_lists}}")
    with pytest.raises(InputError) as error:
        sources.open_sources(load(folder, NAMED.replace(*change)).check())
    said = str(error.value)
    assert f"r.yaml line {line}" in said.partition(": ")[0] and words in said
    assert error.value.fix and "step first" not in said


def test_what_is_named_in_python_or_typed_is_placed(folder: Path) -> None:
    plan = Plan("mine", folder=folder)
    plan.table("rows", "missing.jsonl")
    plan.step("few", "select/sample", data="rows", n=1)
    with pytest.raises(InputError, match=r"test_recipe.py line \d+ data rows: missing.jsonl"):
        sources.open_sources(plan.check())
    plan.override("data.rows=gone.jsonl")
    with pytest.raises(InputError, match=r"--set data rows: gone.jsonl"):
        sources.open_sources(plan.check())


def test_each_setting_is_validated_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    original = Setting.validate

    def counting(setting: Setting, value: object, *, where: str = "") -> object:
        seen.append(setting.name)
        return original(setting, value, where=where)

    monkeypatch.setattr(Setting, "validate", counting)
    load(folder, GOOD)
    # A component's once more, for the check of its own that it may have.
    assert sorted(seen) == ["checks", "held_out", "n", "n", "part"]


def test_an_edge_of_the_wrong_noun(folder: Path) -> None:
    text = GOOD + "  rules: {do: specify/principles_file, path: prompts.jsonl}\n"
    with pytest.raises(InputError, match=r"takes a Table.*makes a Principles"):
        load(folder, text.replace("data: clean", "data: rules"))


def test_a_circle(folder: Path) -> None:
    waits = "  after: {do: select/sample, data: part, n: 1}\n"
    text = GOOD.replace("data: mine\n", "data: part\n").replace("steps:\n", "steps:\n" + waits)
    with pytest.raises(InputError, match="circle") as error:
        load(folder, text)
    assert error.value.where.endswith("r.yaml line 6 step clean")
    assert error.value.seen == ["clean", "part"]
    with pytest.raises(InputError, match=r"r.yaml line 9 step part: a step waits for itself"):
        load(folder, GOOD.replace("data: clean", "data: part"))


def test_overrides(folder: Path) -> None:
    plan = load(folder, GOOD)
    plan.override("part.held_out=1")
    plan.override("seed=5")
    clean, part = plan.check()
    assert part.settings["held_out"] == 1
    assert clean.seed == 5
    with pytest.raises(InputError, match="Did you mean 'part'"):
        plan.override("parts.held_out=1")
    with pytest.raises(InputError, match=r"STEP\.SETTING=VALUE"):
        plan.override("part.held_out")


@pytest.mark.parametrize(
    ("method", "given", "value"),
    [
        ("train/grpo", "rewards={a: {use: max_words, n: 9}}", {"a": {"use": "max_words", "n": 9}}),
        ("train/grpo", 'rewards={"a": {"use": "no_lists"}}', {"a": {"use": "no_lists"}}),
        ("synthesize/magpie", "system=42", "42"),
        ("synthesize/magpie", "n=3", 3),
    ],
)
def test_an_override_is_read_as_an_option_is(method: str, given: str, value: object) -> None:
    plan = Plan("p")
    rows = {"data": "everyday_prompts"} if "grpo" in method else {"n": 2}
    plan.step("made", method, model="smollm2-135m-instruct", **rows)
    plan.override(f"made.{given}")
    (made,) = plan.check()
    assert made.settings[given.partition("=")[0]] == value


def test_a_model_of_an_override_may_say_what_it_consists_of() -> None:
    plan = Plan("p")
    plan.model("judge", "smollm2-135m-instruct")
    said = {"endpoint": "http://127.0.0.1:9/v1", "model": "large", "requests": 5}
    plan.override("models.judge={endpoint: http://127.0.0.1:9/v1, model: large, requests: 5}")
    assert plan.models["judge"] == limits.address(said)
    plan.override("models.judge=135")
    assert plan.models["judge"] == "135"


def test_names_of_steps(folder: Path) -> None:
    plan = load(folder, GOOD.replace("clean", "v1").replace("  part:", "  v1.0:"))
    plan.override("v1.0.held_out=1")
    assert plan.check()[1].settings["held_out"] == 1
    for name in ("a/b", "a=b", "''"):
        with pytest.raises(InputError, match=r"r\.yaml line 9 step.*without '/' and '='"):
            load(folder, GOOD.replace("  part:", f"  {name}:"))
    with pytest.raises(InputError, match=r"seen: 1\)\. Give mine or 1; .* in quotes$"):
        load(folder, GOOD.replace("clean", "1"))


def test_an_override_may_mend_a_bad_value(folder: Path) -> None:
    (folder / "r.yaml").write_text(GOOD.replace("held_out: 2", "held_out: many"))
    _, part = recipe.load(folder / "r.yaml", ["part.held_out=1"]).check()
    assert part.settings["held_out"] == 1
    with pytest.raises(InputError, match=r"r\.yaml line 9 step part: setting 'held_out'"):
        recipe.load(folder / "r.yaml", ["part.seed=1"])
    with pytest.raises(
        InputError, match=r"^--set part\.held_out=few step part: setting 'held_out'"
    ):
        recipe.load(folder / "r.yaml", ["part.held_out=few"])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("qwen?thinking=true", "{folder}/qwen?thinking=true"),  # beside the recipe
        ("{folder}/qwen?thinking=false", "{folder}/qwen?thinking=false"),
        ("smollm2?thinking=true", "smollm2?thinking=true"),
        ("owner/name?thinking=true", "owner/name?thinking=true"),
        ("mine", "{folder}/qwen?thinking=true"),
        ("mine?thinking=false", "{folder}/qwen?thinking=false"),
        ("owner/name@feature/x", "owner/name@feature/x"),
        ("owner/name@feature/x?thinking=true", "owner/name@feature/x?thinking=true"),
    ],
)
def test_what_a_model_is_told_stands_behind_its_name(folder: Path, given: str, text: str) -> None:
    (folder / "qwen").mkdir()
    plan = load(
        folder,
        "models: {mine: 'qwen?thinking=true'}\n"
        "data: {mine_too: prompts.jsonl}\n"
        f"steps:\n  a: {{do: train/sft, model: '{given.format(folder=folder)}', "
        "data: mine_too}\n",
    )
    (step,) = plan.check()
    assert step.sources["model"][""].text == text.format(folder=folder)


def test_a_model_that_is_told_something_and_is_not_there(folder: Path) -> None:
    step = "steps:\n  a: {do: train/sft, model: 'qwem?thinking=true', data: prompts.jsonl}\n"
    with pytest.raises(InputError, match=r"no step, file or model called 'qwem\?thinking=true'"):
        load(folder, step).check()


def test_a_path_of_the_command_line_is_relative_to_the_current_directory(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "rules.yaml").write_text("- {id: a, text: Of the recipe.}\n")
    text = GOOD + "  rules: {do: specify/principles_file, path: rules.yaml}\n"
    here = tmp_path_factory.mktemp("here")
    (here / "rules.yaml").write_text("- {id: a, text: Typed.}\n")
    (here / "prompts.jsonl").write_text('{"prompt": "typed?"}\n')
    monkeypatch.chdir(here)

    def sources(*overrides: str) -> list[Path]:
        (folder / "r.yaml").write_text(text)
        plan = recipe.load(folder / "r.yaml", overrides)
        keys.add(plan.key)
        clean, _, rules = plan.check()
        found = [clean.sources["data"][""].text, str(rules.settings["path"])]
        return [Path(f).resolve().parent for f in found]

    keys: set[str] = set()
    assert sources() == [folder, folder]
    assert sources("rules.path=rules.yaml") == [folder, here]
    assert sources("clean.data=prompts.jsonl") == [here, folder]
    assert sources("data.mine=prompts.jsonl") == [here, folder]
    assert sources("clean.data=mine") == [folder, folder]  # a name of the recipe stays one
    assert len(keys) == 4
    (here / "prompts.jsonl").unlink()
    with pytest.raises(InputError, match=r"--set clean\.data=prompts\.jsonl step clean.*no step"):
        sources("clean.data=prompts.jsonl")


def test_a_python_recipe_is_the_same_plan(folder: Path) -> None:
    (folder / "r.py").write_text(
        "import truing\n"
        "def recipe():\n"
        "    plan = truing.Plan('small', seed=3)\n"
        "    plan.table('mine', 'prompts.jsonl')\n"
        "    clean = plan.step('clean', 'select/checked', data='mine',\n"
        "                      checks=[{'use': 'min_words', 'n': 2}])\n"
        "    plan.step('part', 'select/split', data=clean, part='train', held_out=2,\n"
        "              seed=7)\n"
        "    return plan\n"
    )
    assert recipe.load(folder / "r.py").key == load(folder, GOOD).key
    (folder / "empty.py").write_text("x = 1\n")
    with pytest.raises(InputError, match="neither a plan"):
        recipe.load(folder / "empty.py")


PYTHON = """\
import truing

def recipe():
    plan = truing.Plan("small")
    plan.step("part", "select/near_duplicates", data="prompts.jsonl")
    return plan
"""


@pytest.mark.parametrize(
    ("change", "line", "words"),
    [
        (("return plan", "return plam"), 6, "NameError: name 'plam'"),
        (("def recipe():", "def recipe(:"), 3, "not valid Python"),
        (("import truing", "import truing, json; json.loads('{')"), 1, "(raised in "),
        (("import truing", "import no_such_module"), 1, "ModuleNotFoundError"),
        (("import truing", "import sys; sys.exit('a token is missing')"), 1, "a token is missing"),
        (('Plan("small")', 'Plan("../small")'), 4, "becomes a folder"),
        (("return plan", "return plan.step('part', 'select/split')"), 6, "the same name"),
        (("near_duplicates", "near_duplikates"), 5, "Did you mean"),
        (("prompts.jsonl", "promts.jsonl"), 5, "step part: input 'data'"),
    ],
)
def test_a_fault_in_a_python_recipe_is_one_message_with_its_line(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    change: tuple[str, str],
    line: int,
    words: str,
) -> None:
    (folder / "r.py").write_text(PYTHON.replace(*change))
    assert main(["run", str(folder / "r.py")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"truing: {folder / 'r.py'} line {line}") and words in said
    assert said.count("\n") == 1


def test_a_helper_of_a_python_recipe_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    (folder / "my_helper_of_recipes.py").write_text("x = 1\nif\n")
    (folder / "r.py").write_text("import my_helper_of_recipes\n")
    with pytest.raises(InputError, match=r"my_helper_of_recipes\.py line 2: not valid Python"):
        recipe.load(folder / "r.py")


names = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Z")), max_size=12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.recursive(names | st.integers() | st.none(), lambda x: st.dictionaries(names, x)))
def test_no_mapping_ever_ends_in_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, data: object
) -> None:
    import yaml

    folder = tmp_path_factory.mktemp("any")
    with pytest.raises(InputError):
        load(folder, yaml.safe_dump({"steps": data}))


MERGED = """
steps:
  first: &first
    {do: train/dpo, model: smollm2-135m-instruct, data: pairs.jsonl, beta: 0.2, lr: 1.0e-3}
  second: &second {<<: *first, beta: 0.3}
  third: &third {<<: *second, lr: 2.0e-3}
  fourth: {<<: [{do: train/ipo, beta: 0.7}, *third]}
"""


def test_steps_share_settings_by_merge_keys(folder: Path) -> None:
    (folder / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    steps = load(folder, MERGED).check()
    assert {s.name: (s.step.method, s.settings["beta"], s.settings["lr"]) for s in steps} == {
        "first": ("train/dpo", 0.2, 1e-3), "second": ("train/dpo", 0.3, 1e-3),
        "third": ("train/dpo", 0.3, 2e-3), "fourth": ("train/ipo", 0.7, 2e-3),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("step", "line", "words"),
    [
        ("{do: train/dpo, <<: 3}", 2, "'<<' takes other mappings"),
        ("&a {do: train/dpo, <<: *a}", 2, "'<<' takes other mappings"),
        ("{do: train/dpo, beta: 1, beta: 2}", 2, "'beta' stands twice"),
        ("{do: train/dpo, lr: 2020-13-45}", 2, "step x: 'lr' cannot be read: month must be"),
    ],
)
def test_what_yaml_itself_cannot_take_is_named(
    folder: Path, step: str, line: int, words: str
) -> None:
    with pytest.raises(InputError) as error:
        load(folder, f"steps:\n  x: {step}\n")
    told = str(error.value)
    assert told.startswith(f"{folder / 'r.yaml'} line {line}") and words in told
