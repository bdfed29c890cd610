"""The command line: what scripts rely on (JSON alone, exit codes) and what people are told."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from truing import __version__, cli, doctor, parser
from truing.catalogue import VERBS
from truing.errors import InputError, MissingExtra, Stopped
from truing.method import methods

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """(exit code, stdout, stderr) of `truing WORDS`."""

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


# list, show


def test_list_as_json_has_the_agreed_fields(run: Run) -> None:
    code, out, err = run("list", "--json")
    listed = json.loads(out)
    assert code == 0 and not err and len(listed) == len(methods)
    assert all(
        list(e) == ["name", "verb", "group", "field", "paper", "summary"]
        and all(isinstance(v, str) for v in e.values())
        for e in listed
    )
    order = [VERBS.index(e["verb"]) for e in listed]
    assert order == sorted(order)


def test_list_for_people_and_by_verb(run: Run) -> None:
    code, out, _ = run("list")
    assert code == 0 and all(methods[m].summary in out for m in methods)
    _, out, _ = run("list", "--verb", "train")
    assert "\nrl\n" in out and "\npreference\n" in out and "\ntrain\n" not in out
    assert "\nmerge\n" in run("list", "--verb", "merge")[1]  # which has no groups
    _, out, _ = run("list", "--verb", "merge", "--json")
    assert {e["verb"] for e in json.loads(out)} == {"merge"}
    assert json.loads(run("merge", "--json")[1]) == json.loads(out)
    code, out, err = run("list", "--verb", "mrege")
    assert (code, out) == (2, "") and "Did you mean 'merge'?" in err
    code, _, err = run("list", "--field", "txt")
    assert code == 2 and "Did you mean 'text'?" in err


def test_a_narrow_terminal_knows_the_same_commands(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    for words in (["list"], ["data"], ["show", "dpo"]):
        assert run(*words)[0] == 0


def test_components(run: Run) -> None:
    listed = json.loads(run("list", "--components", "--json")[1])
    assert {"name": "max_words", "kind": "check"}.items() <= next(
        e for e in listed if e["name"] == "max_words"
    ).items()
    code, out, _ = run("show", "check:max-words", "--json")
    assert code == 0 and json.loads(out)["usage"] == "{use: max_words, n: ...}"
    code, out, _ = run("show", "check:no_lists")
    assert code == 0 and "Written as: {use: no_lists, allow: 0}" in out
    code, _, err = run("show", "check:max_wrods")
    assert code == 2 and "Did you mean 'check:max_words'?" in err


def test_show(run: Run) -> None:
    code, out, _ = run("show", "dpo")
    assert code == 0 and "arXiv 2305.18290" in out and "--beta" in out and "0.1" in out
    code, out, _ = run("show", "train/dpo", "--json")
    found = json.loads(out)
    assert found["name"] == "train/dpo" and found["returns"] == "Model"
    optional = {"reference": "Model (optional)", "held_out": "Table (optional)"}
    assert found["inputs"] == {"model": "Model", "data": "Table", **optional}
    assert found["input_docs"]["data"].startswith("rows of kind `pair`")
    assert found["input_docs"]["model"] == "what is trained"
    beta = found["settings"]["beta"]
    assert beta["type"] == "float" and beta["default"] == 0.1 and beta["required"] is False


# models, data, doctor


def test_models_and_data(run: Run) -> None:
    code, out, _ = run("models", "--json")
    default = next(m for m in json.loads(out) if m["name"] == "smollm2-135m-instruct")
    assert code == 0 and default["licence"] == "apache-2.0" and default["present"] is False
    assert "not fetched" in run("models")[1]
    code, out, _ = run("data", "--json")
    sets = {d["name"]: d for d in json.loads(out)}
    assert code == 0 and sets["helpful_pairs"]["kind"] == "pair"
    assert sets["helpful_pairs"]["present"] is True and sets["helpful_pairs"]["licence"] == "MIT"
    assert "everyday_prompts" in run("data")[1]


def test_doctor(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[str] = []

    def quick(dtype: str = "float32") -> float:
        probed.append(dtype)
        return 12.5

    monkeypatch.setattr("truing.doctor.matrix_speed", quick)
    code, out, _ = run("doctor", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["truing"] == __version__ and facts["cores"] == doctor.cores()
    assert facts["sandbox"].startswith("no: ") or facts["sandbox"] == "yes"
    assert facts["packages"]["torch"] and facts["packages"]["transformers"]
    assert set(facts["extras"]) == {"gemma", "quant", "serve", "metrics", "watch", "wandb"}
    assert facts["gflops_float32"] == 12.5 and probed == ["float32", "bfloat16"]
    assert facts["memory_gib"] >= facts["memory_free_gib"] > 0 and facts["gpus"] is not None
    for name, there in facts["extras"].items():
        assert (f"pip install 'truing[{name}]'" in run("doctor")[1]) is not there


def test_the_speed_probe() -> None:
    from truing.doctor import matrix_speed

    assert matrix_speed("float32", seconds=0.01, size=64) > 0.01


# Mistakes


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["lst"], "unknown command 'lst'. Did you mean 'list'?"),
        (["trian", "dpo"], "Did you mean 'train'?"),
        (["dpo"], "Write: truing train dpo"),
        (["show", "dop"], "Did you mean 'dpo'?"),
        (["show", "train/dop"], "Did you mean 'train/dpo'?"),
        (["train", "dop"], "Did you mean 'dpo'?"),
        (["list", "--jsn"], "Did you mean '--json'?"),
        (["show"], "required: name"),
        (["run", "no/such.yaml"], "no/such.yaml"),
        (["--json", "train", "dop"], "unknown method 'dop'. Did you mean 'dpo'?"),
        (["--json", "lst"], "unknown command 'lst'"),
        (["train", "--json", "dop"], "unknown method 'dop'. Did you mean 'dpo'?"),
        (
            ["--seed", "3", "train", "dpo"],
            "after the command (seen: '--seed'). Write: truing train",
        ),
        (["train", "--seed", "3", "dpo"], "options come after the method (seen: '--seed'). Write"),
        (["train", "--beta=3", "robust-dpo"], "Write: truing train robust-dpo ... --beta=3"),
        (["train", "dpo", "--betta", "0.1"], "Did you mean 'beta'?"),
        (["train", "dpo", "--beta", "much"], "It is of type float"),
        (["train", "dpo", "--beta"], "expected one argument"),
        (["train", "dpo", "--seed", "x"], "invalid int"),
        (["train", "dpo"], "input --model (Model) is missing"),
        (["train", "dpo", "--model", "m"], "input --data (Table) is missing"),
        (["train", "dpo", "pairs.jsonl"], "without its name"),
        (["train", "dpo", "--schedule", "cosin"], "'cosine'"),
        (["models", "--fetch", "smolm2"], "Did you mean 'smollm2'?"),
        (
            ["train", "dpo", "--data", "a.jsonl", "--data", "b.jsonl"],
            "--data is given twice. Give one of them; truing select mixture makes one of",
        ),
        (["train", "dpo", "--beta", "0.1", "--beta=0.3"], "--beta is given twice"),
        (["run", "r.yaml", "--runs", "a", "--runs", "b"], "--runs is given twice"),
        (["store", "gc", "abc"], "store gc takes no key (seen: 'abc'). Only store export takes"),
        (["store", "verify", "--days", "0"], "store verify takes no days"),
        (["store", "ls", "--quarantined"], "store ls takes no quarantined"),
        (["store", "ls", "--adapter"], "store ls takes no adapter"),
    ],
)
def test_mistakes(run: Run, words: list[str], told: str) -> None:
    code, out, err = run(*words)
    assert code == 2 and bool(out) == ("--json" in words), err
    assert told in err and err.startswith("truing: ") and err.count("\n") == 1
    code, out, _ = run(*words, "--json")
    assert code == 2 and json.loads(out) == {"error": json.loads(out)["error"], "exit_code": 2}
    assert told in json.loads(out)["error"]


@pytest.mark.parametrize("given", ["a=TINY,b=TINY", "TINY, TINY", "a=TINY,c"])
def test_several_models_with_commas(run: Run, tiny_path: Path, given: str) -> None:
    words = ["merge", "linear", "--models", given.replace("TINY", str(tiny_path)), "--json"]
    code, out, err = run(*words)
    if given.endswith("c"):
        assert code == 2 and "unknown model 'c'" in err
    else:
        assert code == 0 and json.loads(out)["noun"] == "Model", err


def test_a_folder_with_a_comma_is_one(
    run: Run, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one,two", "three"):
        Path(name).symlink_to(tiny_path)
    words = ["merge", "linear", "--models", "a=one,two", "--models", "three", "--json"]
    code, _, err = run(*words)
    assert code == 0, err


def test_a_folder_that_holds_no_table(
    run: Run, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for data in ("mine", "."):
        code, _, err = run("train", "dpo", "--model", str(tiny_path), "--data", data)
        assert code == 2 and "a folder without table.parquet. Name a file, or one of" in err
    (tmp_path / "mine/pairs.jsonl").write_text("")
    _, _, err = run("train", "dpo", "--model", str(tiny_path), "--data", "mine")
    assert "Name a file, such as mine/pairs.jsonl" in err


def test_json_may_stand_first(run: Run) -> None:
    listed = run("list", "--verb", "merge", "--json")
    assert run("--json", "list", "--verb", "merge") == listed
    assert run("merge", "--json") == run("--json", "merge") == listed


def test_data_and_settings_are_checked_before_a_model_is_fetched(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fetched(*_: object) -> None:
        raise AssertionError("the model was opened before the rest was checked")

    monkeypatch.setattr("truing.models.Model.open", fetched)
    bad = tmp_path / "pairs.jsonl"
    bad.write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": 3}\n'
    )
    given = ["train", "dpo", "--model", "smollm2-135m-instruct", "--data"]
    code, _, err = run(*given, str(bad))
    assert code == 2 and "pairs.jsonl row 2" in err and "'chosen'" in err
    code, _, err = run(*given, str(tmp_path / "none.jsonl"))
    assert code == 2 and "no such file" in err
    code, _, err = run(*given, "helpful_pairs", "--beta", "x")
    assert code == 2 and "beta" in err


MODEL = "smollm2-135m-instruct"


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of models that would have been fetched, each of which ends its command."""
    found: list[str] = []

    def fetch(name: str) -> None:
        found.append(name)
        raise InputError(f"{name} would be fetched")

    monkeypatch.setattr("truing.core.modelfiles.fetch.fetch", fetch)
    monkeypatch.setattr("truing.core.modelfiles.fetch.from_hub", fetch)
    return found


@pytest.mark.parametrize("named", [MODEL, "hub/name"])
def test_data_is_checked_before_a_model_inside_a_setting_is_fetched(
    run: Run, fetched: list[str], tiny_path: Path, tmp_path: Path, named: str
) -> None:
    words = ["train", "grpo", "--model", str(tiny_path)]
    words += ["--rewards", f"{{r: {{use: judged, model: {named}}}}}"]
    bad, good = tmp_path / "bad.jsonl", tmp_path / "good.jsonl"
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    good.write_text(json.dumps(row) + "\n")
    bad.write_text(good.read_text() + json.dumps(row | {"prompt": 3}) + "\n")
    code, _, err = run(*words, "--data", str(bad))
    assert code == 2 and "bad.jsonl row 2" in err and not fetched, err
    code, _, err = run(*words, "--data", str(good))
    assert code == 2 and "would be fetched" in err and fetched == [named], err


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("train grpo --rewards", "{r: {use: judged, model: smolm}}"),
        ("train grpo --rewards", "{r: {use: judged, model: {use: panel, judges: [MODEL, smolm]}}}"),
        ("train dpo --reference", "smolm"),
        ("merge linear --models", "a=MODEL,b=smolm"),
        ("evaluate win-rate --judge", "{use: panel, judges: [MODEL, smolm]}"),
    ],
)
def test_a_wrong_name_is_told_before_any_model_is_fetched(
    run: Run, fetched: list[str], words: str, value: str
) -> None:
    given = ["--model", MODEL, "--data", "helpful_pairs"]
    given = {
        "merge": [],
        "evaluate": ["--model", MODEL, "--baseline", MODEL, "--prompts", "everyday_prompts"],
    }.get(words.split()[0], given)
    code, _, err = run(*words.split(), value.replace("MODEL", MODEL), *given)
    assert code == 2 and "unknown model 'smolm'" in err and not fetched, err


# Exit codes, JSON alone


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("wrong"), 2),
        (Stopped("later"), 3),
        (KeyboardInterrupt(), 3),
        (ZeroDivisionError("ours"), 1),
    ],
)
def test_exit_codes(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fail() -> object:
        print("a library speaks")
        raise error

    monkeypatch.setattr("truing.doctor.examine", fail)
    found, out, err = run("doctor", "--json")
    assert found == code and json.loads(out)["exit_code"] == code
    assert ("Traceback" in err) is (code == 1) and "a library speaks" in err


def test_the_place_of_an_error_has_no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it has with Python 3.14.0, which makes it of a usage in colours."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    made: dict[str, object] = {}
    real = argparse.ArgumentParser.add_subparsers

    def noted(self: argparse.ArgumentParser, **named: Any) -> Any:
        made.update(named)
        return real(self, **named)

    monkeypatch.setattr(argparse.ArgumentParser, "add_subparsers", noted)
    assert parser.command_line().parse_args(["list"]).parser.prog == "truing list"
    assert made["prog"] == "truing"


def test_json_stands_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def chatty() -> object:
        print("a library speaks")
        return {"speed": float("inf"), "where": Path("x")}

    monkeypatch.setattr("truing.doctor.examine", chatty)
    code, out, err = run("doctor", "--json")
    assert code == 0 and json.loads(out) == {"speed": None, "where": "x"}
    assert "a library speaks" in err


def test_a_step_from_the_command_line(run: Run, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("principles:\n  - {id: a, text: Be brief., check: {use: max_words, n: 9}}\n")
    words = ["specify", "principles-file", "--path", str(rules)]
    code, out, err = run(*words)
    line = json.loads(out)
    assert code == 0 and line["job"] == "specify/principles_file" and err
    code, out, _ = run(*words, "--out", str(tmp_path / "saved"), "--json")
    assert json.loads(out)["cached"] is True and json.loads(out)["key"] == line["key"]
    assert (tmp_path / "saved" / "principles.json").is_file()


def test_the_place_of_the_result_is_checked_before_the_step_runs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("principles:\n  - {id: a, text: Say where.}\n")
    words = ["specify", "principles-file", "--path", str(rules), "--json", "--out"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with monkeypatch.context() as patch:
        patch.setattr("truing.pipeline.run_step", lambda *_, **__: pytest.fail("the step ran"))
        for place, told in (
            (tmp_path / "thesis", "holds other files"),
            (rules, "is written into a folder"),
            (rules / "inside", "cannot be written"),
            (Path("/proc/truing/out"), "cannot be written"),
        ):
            code, out, _ = run(*words, str(place))
            assert code == 2 and told in json.loads(out)["error"], out
    code, out, _ = run("serve", "openai", "--model", "http://127.0.0.1:9/v1#x", "--out", "x")
    assert code == 2
    monkeypatch.chdir(tmp_path / "thesis")
    for _ in range(2):  # a new folder, then one that holds an earlier result
        assert run(*words, "../new/saved")[0] == 0
    assert [p.name for p in (tmp_path / "new" / "saved").iterdir()] == ["principles.json"]
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_what_serve_can_do_is_told_without_its_packages(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise MissingExtra("uvicorn", "serve")

    monkeypatch.setattr("truing.command.run_method", missing)
    for words in (("serve",), ("serve", "--help")):
        code, out, _ = run(*words)
        assert code == 0 and "\n  openai " in out and "pip install 'truing[serve]'" in out
    assert run("serve", "openai", "--help")[0] == 2


def test_settings_that_are_not_numbers(run: Run, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {'so ' * n}"}) + "\n" for n in range(4)))
    words = ["select", "checked", "--data", str(data), "--json", "--checks"]
    code, out, _ = run(*words, '[{"use": "min_words", "n": 3}]')
    assert code == 0
    assert json.loads(run(*words, "[{use: min_words, n: 3}]")[1])["key"] == json.loads(out)["key"]
    code, out, _ = run(*words, "[{use: min_wrods, n: 3}]")
    assert code == 2 and "Did you mean 'min_words'?" in json.loads(out)["error"]


def test_why_and_claim_reach_their_commands(run: Run, tmp_path: Path) -> None:
    code, _, err = run("why", "no-such-row", "--run", str(tmp_path / "none"))
    assert code == 2 and "not the folder of a run" in err
    code, _, err = run("claim", "no-such-claim")
    assert code == 2 and "no-such-claim" in err


def test_help(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["list", "--help"], ["train", "dpo", "--help"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 0 and "usage: truing" in capsys.readouterr().out
    code, out, _ = run("train", "--help")
    assert code == 0 and "robust-dpo" in out
    code, out, _ = run()
    assert code == 0 and "doctor" in out


@pytest.mark.parametrize("words", [["list"], ["list", "--json"], ["doctr"], ["doctr", "--json"]])
def test_a_reader_that_goes_away(words: list[str]) -> None:
    command = [sys.executable, "-m", "truing.cli", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # before it has written anything
    said = process.stderr.read()
    process.stderr.close()
    expected = 2 if words[0] == "doctr" else 128 + signal.SIGPIPE
    assert process.wait() == expected, said
    assert said.count("\n") == (words[0] == "doctr") and "BrokenPipe" not in said


def test_a_list_cut_by_head() -> None:
    line = f"{sys.executable} -m truing.cli list | head -2; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    _, first, code = done.stdout.splitlines()
    # It may have written all before head went away.
    assert first == "specify" and code in ("0", "141") and not done.stderr


def test_a_broken_pipe_of_another_kind_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> object:
        raise BrokenPipeError("a worker died")

    monkeypatch.setattr("truing.doctor.examine", fail)
    code, _, err = run("doctor")
    assert code == 1 and "a worker died" in err
