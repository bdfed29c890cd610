"""Errors name a remedy: the commonest ones at the command line, and how many in the code do not.

`ALLOWED` is what is left: some messages say all that there is to do. It may only fall.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import truing
from truing.cli import main
from truing.errors import InputError, beside, no_file, stems, yaml_fix

ROOT = Path(truing.__file__).parent
ALLOWED = 199
# Of truing.errors; MissingExtra says by itself what to install.
ERRORS = {"InputError", "Damaged", "Unread", "OtherVersion"}


def classes(tree: ast.Module) -> set[str]:
    """Names under which a file knows InputError and its subclasses, its own among them."""
    known = {
        name.asname or name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "truing.errors"
        for name in node.names
        if name.name in ERRORS
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and known & {ast.unparse(b) for b in node.bases}:
            known.add(node.name)
    return known


def without_fix(source: str) -> list[int]:
    """Lines of a file where such an error is made without a remedy, or with an empty one."""
    tree = ast.parse(source)
    known = classes(tree)
    lines: list[int] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in known:
            fixes = [k.value for k in node.keywords if k.arg in ("fix", None)]
            if all(isinstance(f, ast.Constant) and not f.value for f in fixes):
                lines.append(node.lineno)
    return sorted(lines)


def test_what_counts() -> None:
    head = "from truing.errors import InputError, Stopped, MissingExtra\n"
    made = {
        "raise InputError('a')": [2],
        "raise InputError('a', fix='')": [2],
        "raise InputError('a', fix='Do b')": [],
        "raise InputError('a', fix=b)": [],
        "raise InputError(*a, **b)": [],
        "raise Stopped('a')": [],
        "raise MissingExtra('a', 'b')": [],
        "def made():\n    return InputError('a')": [3],
        "class Own(InputError): ...\nraise Own('a')": [3],
        "class Other: ...\nOther('a')": [],
    }
    assert {code: without_fix(head + code) for code in made} == made
    assert without_fix("class InputError: ...\nInputError('a')") == []


def test_errors_without_a_remedy_do_not_become_more() -> None:
    found = {
        str(path.relative_to(ROOT)): lines
        for path in sorted(ROOT.rglob("*.py"))
        if path.name != "errors.py" and (lines := without_fix(path.read_text(encoding="utf-8")))
    }
    places = "\n".join(f"src/truing/{n} lines {', '.join(map(str, k))}" for n, k in found.items())
    total = sum(map(len, found.values()))
    assert total <= ALLOWED, f"give the new ones a remedy, a `fix`: they are among\n{places}"
    assert total == ALLOWED, f"only {total} of {ALLOWED} are left: lower ALLOWED"


Says = Callable[..., str]


@pytest.fixture
def says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Says:
    """Runs a command that must fail in a folder of some files; gives its one line."""
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (work / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 2)
    (work / "notes").write_text("a")
    (work / "rules.yaml").write_text("- {id: brief, text: Be brief.}\n")

    def run(words: str, **files: str) -> str:
        for name, text in files.items():
            (work / name.replace("_", ".")).write_text(text)
        capsys.readouterr()
        assert main(words.split()) == 2
        (said,) = re.findall("^truing: .*$", capsys.readouterr().err, re.MULTILINE)
        return said

    return run


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ("train dpo --data pairs.jsonl", "Give --model a folder, a name of `truing models`"),
        ("train dpo --model m", "Give --data a file of rows (.jsonl, .csv, .parquet)"),
        ("train dpo --model m --data piars.jsonl", "Did you mean 'pairs.jsonl'?"),
        ("train dpo --model m --data pairs.json", "Did you mean 'pairs.jsonl'?"),
        ("train dpo --model m --data other.jsonl", "there are: pairs.jsonl"),
        ("train dpo --model m --data sub/pairs.jsonl", "There is no folder 'sub'"),
        ("train dpo --model m --data pairs", "Did you mean 'pairs.jsonl'?"),
        ("train dpo --model m --data pairs.jsonl --max-tokens 9", "Did you mean 'max_length'?"),
        ("train dpo --model ./nots --data pairs.jsonl", "It is looked for in"),
        (
            'evaluate frontier --arms {"a":["x"],"b":["y"]}',
            "Give --divergences NAME=SOURCE, once for each; a source is the folder of a report",
        ),
        ("specify principles_file --path rule.yaml", "Did you mean 'rules.yaml'?"),
        ("specify principles_file --path other.yaml", "there are: rules.yaml"),
        ("run rules.yml", "Did you mean 'rules.yaml'?"),
        ("run .", "this is a folder, and no recipe. In '.' there are: rules.yaml"),
        ("run elsewhere/recipe.yaml", "There is no folder 'elsewhere'"),
        ("specify principles_file --path rules.yaml --out notes", "Name a new folder"),
        ("why some-row --run runs", "`truing run` wrote below --runs"),
        ("compare --methods dpo,dpo --data pairs.jsonl", "dpo,dpo@beta=0.3"),
        ('select checked --data pairs.jsonl --checks [{"n":3}]', "`truing list --components`"),
        (
            'select checked --data pairs.jsonl --checks [{"use":"min_words"}]',
            "{use: min_words, n: ...}",
        ),
    ],
)
def test_commands_say_what_to_do(says: Says, words: str, fix: str) -> None:
    assert fix in says(words)


STEPS = "steps:\n  few: {do: select/sample, data: pairs.jsonl, n: 1}\n"


@pytest.mark.parametrize(
    ("recipe", "fix"),
    [
        ("name: x\n", "Write the first below 'steps:'"),
        ("steps: [a, b]\n", "Write lines of 'name: value' there"),
        ("steps:\n  a: {data: pairs.jsonl}\n", "Such as do: train/dpo"),
        ("steps:\n\ta: {do: train/dpo}\n", "Indent with spaces, not with tabs"),
        (STEPS + "  b: {do: select/sample, n: 1}\n", "Add data: few"),
        (
            "steps:\n  a: {do: select/sample, n: 1}\n  b: {do: select/sample, n: 1, data: a}\n",
            "Add data: a file of rows",
        ),
        ("steps:\n  few: {do: select/sample, data: piars.jsonl}\n", "Did you mean 'pairs.jsonl'?"),
        ("steps:\n  few: {do: select/sample, data: pairs}\n", "Did you mean 'pairs.jsonl'?"),
        (STEPS + "  b: {do: select/sample, data: fww}\n", "Did you mean 'few'?"),
        (
            STEPS + "  b: {do: evaluate/adherence, principles: rulse.yaml}\n",
            "Did you mean 'rules.yaml'?",
        ),
        (
            STEPS + "  b: {do: evaluate/adherence, principles: few.yaml}\n",
            "In '.' there are: r.yaml, rules.yaml",
        ),
        (STEPS + "  b: {do: evaluate/adherence, model: ./few}\n", "It is looked for in"),
        (
            STEPS + "  b: {do: evaluate/frontier}\n",
            "{NAME: SOURCE, ...}; a source is the folder of",
        ),
        ("steps:\n  b: {do: select/sample, n: 1}\n", "Add data: a file of rows"),
        (
            "data: {mine: pairs.jsonl}\n"
            + STEPS
            + "  rules: {do: specify/principles_file, path: rules.yaml}\n"
            "  b: {do: select/sample, data: rules, n: 1}\n",
            "makes a Principles. Give mine or few",
        ),
        ("schema_version: 9\n" + STEPS, "Write schema_version: 1"),
    ],
)
def test_recipes_say_what_to_do(says: Says, recipe: str, fix: str) -> None:
    assert fix in says("run r.yaml", r_yaml=recipe)


def test_an_override_without_its_step(says: Says) -> None:
    said = says("run r.yaml --set n=2", r_yaml=STEPS)
    assert "Write STEP.n=VALUE; the steps are few" in said
    assert "the seed must be a whole number" in says("run r.yaml --set seed=x")
    assert says("run r.yaml --set n=2", r_yaml="name: x\n").endswith("; there is no step")


@pytest.mark.parametrize(
    ("row", "fix"),
    [
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "Put quotes around it"),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "Write true or false, without quotes"),
        ({"prompt": "a", "completion": "b", "score": "3"}, "Write the number without quotes"),
        ({"prompt": "a", "completions": "b", "scores": [1]}, "a list"),
    ],
)
def test_values_of_another_type(says: Says, row: dict[str, object], fix: str) -> None:
    method = {"chosen": "dpo", "label": "kto", "score": "sft", "scores": "plackett_luce"}
    kind = next(m for name, m in method.items() if name in row)
    said = says(f"train {kind} --model m --data bad.jsonl", bad_jsonl=json.dumps(row) + "\n")
    assert "row 1" in said and fix in said


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("prompt,chosen,rejected\na,b, c,d\n", "Put quotes around a field that holds a comma"),
        ("prompt,completions,scores\na,b; c,1; 0\n", "Save the rows as .jsonl, where a list is"),
        ('- {id: a, text: "x\\ty", check: [c}\n', "Close the bracket"),
        ("- {id: 3, text: a}\n", "Put quotes around it"),
        ("- {id: a, text: }\n", "Write its words behind 'text:'"),
        ("- a rule\n", "Write {id: a-name, text: The rule.}"),
        ("- id: a\n  text: No: never\n", "Put quotes around a text that holds ': '"),
        ("- {id: a, text: b, examples: [c]}\n", "{prompt: ..., good: ...}"),
    ],
)
def test_files_say_what_to_do(says: Says, text: str, fix: str) -> None:
    if text.startswith("prompt"):
        assert fix in says("train dpo --model m --data bad.csv", bad_csv=text)
    else:
        assert fix in says("specify principles_file --path bad.yaml", bad_yaml=text)


def test_a_file_that_breaks_off(says: Says, tmp_path: Path) -> None:
    (tmp_path / "work" / "rows.jsonl.gz").write_bytes(b'{"prompt": "a"}\n')
    assert "a file that is not compressed has no .gz" in says(
        "train dpo --model m --data rows.jsonl.gz"
    )


def test_inputs_of_python_calls() -> None:
    dpo = truing.methods["dpo"]
    with pytest.raises(InputError, match=r"'model' \(Model\) is missing.*save_pretrained writes"):
        dpo()
    with pytest.raises(InputError, match=r"takes 4 inputs.*They are model, data, reference, held"):
        dpo("m", "d", "r", "h", "x")
    with pytest.raises(InputError, match=r"given twice.*The first inputs are model: give it by"):
        dpo("m", model="m")


def test_what_lies_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("recipe.yaml", "recipe.py", ".recipes.yaml"):
        (tmp_path / name).touch()
    assert beside(tmp_path / "recipes.py") == f"Did you mean {str(tmp_path / 'recipe.py')!r}?"
    assert beside(tmp_path / "recipes.yaml") == f"Did you mean {str(tmp_path / 'recipe.yaml')!r}?"
    assert beside(tmp_path / "zzz") == ""
    assert beside(tmp_path / "zzz", (".py",)).endswith("there are: recipe.py")
    for i in range(12):
        (tmp_path / f"{i}.yaml").touch()
    assert beside(tmp_path / "zzz", (".yaml",)).endswith("7.yaml, ...")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    assert beside(tmp_path / "link") == ""
    monkeypatch.chdir(tmp_path)
    assert beside(Path("zzz")) == f"It is looked for in {str(tmp_path)!r}"
    error = no_file("recipe", "recipe.yml", (".yaml", ".py"))
    assert str(error) == "recipe.yml: no such recipe. Did you mean 'recipe.yaml'?"


def test_names_with_points_are_compared_but_for_their_ending(tmp_path: Path) -> None:
    for name in ("data.v1.jsonl", "data.v2.jsonl", "v1.0-train.jsonl", "v1.2-dev.jsonl"):
        (tmp_path / name).touch()
    asked = {"data.v1.jsonl.gz": "data.v1.jsonl", "v1.0-tain.jsonl": "v1.0-train.jsonl"}
    for name, meant in asked.items():
        assert beside(tmp_path / name) == f"Did you mean {str(tmp_path / meant)!r}?"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    rules = tmp_path / "rules"
    rules.mkdir()
    error = no_file("principles file", rules, (".yaml", ".json"))
    assert (
        str(error)
        == f"{rules}: this is a folder, and no principles file. Name a file: .yaml, .json"
    )
    (rules / "a.yaml").touch()
    (tmp_path / "other.yaml").touch()
    assert no_file("recipe", rules, (".yaml",)).fix == f"In {str(rules)!r} there are: a.yaml"


def test_of_a_huge_folder_a_part_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(9):
        (tmp_path / f"name-{i}.jsonl").touch()
    assert len(stems(tmp_path)) == 9
    monkeypatch.setattr("truing.errors.MANY", 4)
    assert len(stems(tmp_path)) == 4 and "Did you mean" in beside(tmp_path / "name.jsonl")


def test_the_current_folder_may_be_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir("gone")
    (tmp_path / "gone").rmdir()
    assert beside(Path("zzz")) == "It is looked for in '.'"
    assert beside(Path("sub/zzz")) == "There is no folder 'sub', seen from '.'"


def test_a_recipe_elsewhere_is_told_paths_from_its_own_folder(says: Says, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "rows.jsonl").touch()
    (tmp_path / "far" / "r.yaml").write_text("steps:\n  a: {do: select/sample, data: rosw.jsonl}\n")
    assert says("run ../far/r.yaml").endswith("Did you mean 'rows.jsonl'?")


def test_remedies_of_yaml_are_of_what_its_reader_says() -> None:
    import yaml

    wanted = {
        "a:\n\t- b": "tabs",
        "a: b: c": "': '",
        "a: `b`": "quotes",
        "a: @b": "quotes",
        "a: %b": "quotes",
        "a: [b": "bracket",
        "a: {b: [c}": "bracket",
    }
    for text, word in wanted.items():
        with pytest.raises(yaml.YAMLError) as caught:
            yaml.safe_load(text)
        assert word in yaml_fix(" ".join(str(caught.value).split())), text
    assert yaml_fix("found undefined alias 'x'") == ""
