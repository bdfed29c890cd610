"""A user's mistakes at the command line: one clear line, exit code 2, nothing written."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from truing.cli import main
from truing.store import Store
from truing.tables import Table

PAIRS = [{"prompt": f"q{i}?", "chosen": f"yes {i}.", "rejected": f"no {i * 7}."} for i in range(8)]
RULE = "- {id: brief, text: Be brief., check: {use: max_words, n: 4}}\n"
Fails = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the tiny model, pairs, and a home of its own."""
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    work = tmp_path / "work"
    work.mkdir()
    shutil.copytree(tiny_path, work / "tiny")
    write(work / "pairs.jsonl", PAIRS)
    (work / "rules.yaml").write_text(RULE)
    monkeypatch.chdir(work)
    return work


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def tree(folder: Path) -> dict[str, int]:
    return {
        str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture
def fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs a command that must fail; gives its one line."""

    def run(*words: str, code: int = 2, files: dict[str, str] | None = None) -> str:
        for name, text in (files or {}).items():
            (folder / name).write_text(text)
        before = tree(folder)
        capsys.readouterr()
        assert main([w for word in words for w in word.split()]) == code
        said = capsys.readouterr()
        assert "Traceback" not in said.err and not said.out
        lines = [line for line in said.err.splitlines() if line.startswith("truing: ")]
        assert len(lines) == 1, said.err
        assert said.err.splitlines()[-1] == lines[0]  # the error is the last word, in one line
        assert tree(folder) == before and Store().keys() == []
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("- {id: brief, txt: Be brief.}\n", ["principle 1 (brief)", "'txt'", "'text'"]),
        ("- {id: brief, text: }\n", ["principle 1 (brief)", "'text' must be a text"]),
        (
            '- {id: "brief, calm", text: Be brief.}\n',
            ["principle 1 (brief, calm)", "'id' must be one word", "'text'"],
        ),
        (RULE + "- {id: brief, text: Be kind.}\n", ["principles 1 and 2", "same id", "'brief'"]),
        (
            RULE + "- {id: b, text: x, check: {use: max_wrods, n: 4}}\n",
            ["principle b", "'max_words'"],
        ),
        (
            RULE + "- {id: b, text: x, check: {use: max_words, m: 4}}\n",
            ["principle b", "'m'", "Known: n"],
        ),
        (RULE + "- {id: b, text: x, check: {use: max_words, n: few}}\n", ["'n'", "'few'", "int"]),
        (
            RULE + "- {id: b, text: x, check: {use: max_words, n: -3}}\n",
            ["principle b check max_words", "'n' must be 0 or more", "-3"],
        ),
        (
            RULE + "- {id: b, text: x, examples: [{prompt: 3, god: x}]}\n",
            ["principle 2 (b) example 1", "'prompt' must be a text", "3"],
        ),
        (
            RULE + "- {id: b, text: x, examples: [{prompt: a, god: x}]}\n",
            ["principle 2 (b) example 1", "'god'", "'good'"],
        ),
        (RULE + "- {id: b, text: x, examples: [{good: x}]}\n", ["example 1", "needs 'prompt'"]),
        (RULE + "- {id: b, text: x, examples: good}\n", ["'examples' must be a list", "'good'"]),
        (RULE + "- {id: b, text: x, check: max_words}\n", ["principle 2 (b)", "{use: name"]),
        (RULE + "- {id: b, text: x, priority: high}\n", ["'priority'", "whole number", "'high'"]),
        (RULE + "- just words\n", ["principle 2", "mapping with id and text"]),
        ("- {id: brief, text: [\n", ["not valid YAML", "line 2"]),
        ("principels: []\n", ["'principels'", "'principles'"]),
        ("schema_version: 9\nprinciples: []\n", ["schema_version 9", "reads 1"]),
        ("", ["no principles in the file", "'principles:'"]),
        ("a: 2020-13-45\n", ["not valid YAML"]),
    ],
)
def test_malformed_principles(fails: Fails, text: str, parts: list[str]) -> None:
    said = fails("specify principles_file --path bad.yaml", files={"bad.yaml": text})
    assert "bad.yaml" in said
    assert [p for p in parts if p not in said] == [], said


def test_missing_principles(fails: Fails) -> None:
    said = fails("specify principles_file --path nowhere.yaml")
    assert "nowhere.yaml: no such principles file" in said


TRAIN = "train dpo --model tiny --data"


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".csv"])
def test_a_fault_in_row_1234_of_a_large_file(fails: Fails, folder: Path, suffix: str) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": f"q{i}", "completion": f"a{i}", "label": i % 2 == 0} for i in range(3000)
    ]
    if suffix == ".csv":
        lines = ["prompt,completion,label", *(f"q{i},a{i},true" for i in range(3000))]
        lines[1233] = "q,a,perhaps"  # the header is line 1
        (folder / "big.csv").write_text("\n".join(lines))
        parts = ["big.csv row 1234", "'label' must be true or false", "'perhaps'"]
    else:
        rows[1233]["completion"] = {"text": "a"}
        write(folder / "big.jsonl", rows)
        parts = [f"big{suffix} row 1234", "'completion' must be str", "{'text': 'a'}"]
    if suffix == ".jsonl.gz":
        (folder / "big.jsonl.gz").write_bytes(gzip.compress((folder / "big.jsonl").read_bytes()))
    said = fails(f"train kto --model tiny --data big{suffix}")
    assert [p for p in parts if p not in said] == [], said


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"prompt": "a", "chosen": "b", "rejected": "c"', ["not valid JSON"]),
        ('["a", "b"]', ["must be a JSON object"]),
        ('{"prompt": "a", "chosen": "b"}', ["'rejected' is missing", "chosen, prompt"]),
        ('{"prompt": "a", "chosen": null, "rejected": "c"}', ["'chosen' is missing"]),
        ('{"prompt": [{"role": "user"}], "chosen": "b", "rejected": "c"}', ["{role, content}"]),
        ('{"prompt": 5, "chosen": "b", "rejected": "c"}', ["'prompt' must be str or list", "5"]),
    ],
)
def test_a_broken_line(fails: Fails, folder: Path, line: str, parts: list[str]) -> None:
    whole = (folder / "pairs.jsonl").read_text()
    said = fails(f"{TRAIN} cut.jsonl", files={"cut.jsonl": whole + line + "\n" + whole})
    assert [p for p in ["cut.jsonl row 9", *parts] if p not in said] == [], said


def test_files_that_are_no_tables(fails: Fails, folder: Path) -> None:
    whole = gzip.compress((folder / "pairs.jsonl").read_bytes())
    (folder / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert "cut.jsonl.gz row 1: cannot be read" in fails(f"{TRAIN} cut.jsonl.gz")
    (folder / "latin.csv").write_bytes(b"prompt,chosen,rejected\nq,caf\xe9,b\n")
    assert "latin.csv row 1: cannot be read" in fails(f"{TRAIN} latin.csv")
    (folder / "not.parquet").write_bytes(b"PAR1 not at all")
    assert "not.parquet: not a readable Parquet file" in fails(f"{TRAIN} not.parquet")
    said = fails(f"{TRAIN} pairs.txt", files={"pairs.txt": "a"})
    assert "pairs.txt: unknown sort of file. Known: .parquet, .jsonl" in said
    assert "nowhere.jsonl: no such file" in fails(f"{TRAIN} nowhere.jsonl")
    assert "'helpful_pairs'" in fails(f"{TRAIN} helpful_pears")


@pytest.mark.parametrize(("name", "text"), [("e.jsonl", ""), ("e.csv", "prompt,chosen,rejected\n")])
def test_empty_data(fails: Fails, name: str, text: str) -> None:
    said = fails(f"{TRAIN} {name}", files={name: text})
    assert f"{name}: no rows" in said and "at least one row" in said


def test_wrong_columns(fails: Fails, folder: Path) -> None:
    write(folder / "other.jsonl", [{"question": "a", "chosen": "b", "rejected": "c"}])
    said = fails(f"{TRAIN} other.jsonl")
    assert "needs rows of kind pair" in said and "other.jsonl" in said and "'question'" in said


def test_settings(fails: Fails) -> None:
    assert "unknown setting 'bta'. Did you mean 'beta'?" in fails(f"{TRAIN} pairs.jsonl --bta 1")
    said = fails(f"{TRAIN} pairs.jsonl --beta strong")
    assert "'beta'" in said and "'strong'" in said and "float" in said
    assert "'batch' must be at least 1 (seen: 0" in fails(f"{TRAIN} pairs.jsonl --batch 0")
    assert "'dpo'" in fails("train dop --model tiny --data pairs.jsonl")
    assert "--data (Table) is missing" in fails("train dpo --model tiny")


def test_data_and_settings_are_checked_before_a_model_is_sought(fails: Fails) -> None:
    model = "train dpo --model some/model-nobody-has --data"
    assert "'beta'" in fails(f"{model} pairs.jsonl --bta 1")
    assert "no rows" in fails(f"{model} e.jsonl", files={"e.jsonl": ""})


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"prompt": "q", "chosen": "same", "rejected": "same"}, ["chosen", "rejected"]),
        ({"prompt": "q", "chosen": " ", "rejected": "b"}, ["empty"]),
        ({"prompt": "q" * 3000, "chosen": "a", "rejected": "b"}, ["prompt", "1024 tokens"]),
    ],
)
def test_rows_that_nothing_can_be_learnt_from(
    fails: Fails, folder: Path, row: dict[str, object], parts: list[str]
) -> None:
    write(folder / "rows.jsonl", [row] * 3)
    said = fails(f"{TRAIN} rows.jsonl")
    assert [p for p in ["no row can be trained on", "3", *parts] if p not in said] == [], said


def test_a_template_whose_end_of_turn_is_not_the_models(fails: Fails, folder: Path) -> None:
    path = folder / "tiny" / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_end|>", "<|endoftext|>"))
    said = fails(f"{TRAIN} pairs.jsonl")
    assert "ends a turn with a token at which the model does not stop" in said
    assert "<|endoftext|>" in said
    told = re.search(r"NAME(\?end=.*);", said)
    assert told is not None
    assert main(["train", "dpo", "--model", f"tiny{told[1]}", "--data", "pairs.jsonl"]) == 0


def test_answers_that_never_end(fails: Fails, folder: Path) -> None:
    cut = [{**r, "chosen_finished": False, "rejected_finished": False} for r in PAIRS]
    write(folder / "cut.jsonl", cut)
    assert "no answer ends with a stop token that carries loss" in fails(f"{TRAIN} cut.jsonl")


def test_a_template_that_masks_everything(fails: Fails, folder: Path) -> None:
    (folder / "tiny" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    said = fails(f"{TRAIN} pairs.jsonl")
    assert "does not put an answer where it asks for one" in said


def test_damaged_models(fails: Fails, folder: Path) -> None:
    weights = folder / "tiny" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    said = fails(f"{TRAIN} pairs.jsonl")
    assert "model.safetensors" in said and "damaged or cut off" in said
    weights.write_bytes(whole)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "tiny" / name).unlink()
    said = fails(f"{TRAIN} pairs.jsonl")
    assert "tiny" in said and "no tokenizer" in said
    (folder / "tiny" / "config.json").write_text("{")
    assert "config.json: not valid JSON" in fails(f"{TRAIN} pairs.jsonl")


def test_an_adapter_of_another_model(fails: Fails, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    adapter = folder / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    config |= {"base_model_name_or_path": str(folder / "tiny")}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{stem}.lora_A.weight": torch.ones(2, 64),
        f"{stem}.lora_B.weight": torch.ones(64, 2),
    }
    save_file(tensors, adapter / "adapter_model.safetensors")
    said = fails("train dpo --model adapter --data pairs.jsonl")
    assert "q_proj" in said and "64" in said and "128" in said and "adapter" in said


def test_memory_is_forecast_before_anything_is_computed(
    fails: Fails, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("truing.core.trainer.start.memory_gib", lambda: (0.006, 0.006))
    write(folder / "long.jsonl", [{**r, "chosen": "yes " * 40} for r in PAIRS])
    said = fails(f"{TRAIN} long.jsonl")
    assert "training needs about" in said and "0.006 GiB of memory are free" in said
    assert "Lower max_length" in said
    assert "for the activations of a micro-batch. Lower max_length" in said
    assert "Lower max_length or budget" in fails(f"{TRAIN} long.jsonl --budget 512")
    said = fails(f"{TRAIN} long.jsonl --rank 100000")
    assert "GiB of it are for gradients and moments of what is trained. Lower rank" in said
    assert "max_length" not in said


def test_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str], always_save: Callable[[], None]
) -> None:
    always_save()
    rows = [{**r, "margin": 1e39 if i == 5 else 1.0} for i, r in enumerate(PAIRS)]
    write(folder / "far.jsonl", rows)
    command = "train bradley-terry --model tiny --data far.jsonl --batch 1 --lr 1e-5 --json"
    assert main(command.split()) == 3
    said = capsys.readouterr()
    line = json.loads(said.out)
    assert line["exit_code"] == 3 and "is not finite at step" in line["error"]
    assert "Traceback" not in said.err and Store().keys() == []
    bad = Table("pair", rows)[5]["id"]
    assert f"['{bad}']" in line["error"] and line["error"].endswith("lower the learning rate")
    kept = sorted(p.name for p in Store().root.glob("scratch/*/checkpoints-*/step-*"))
    step = int(re.search(r"not finite at step (\d+) of 8", line["error"])[1])  # type: ignore[index]
    assert kept == [f"step-{n:08d}" for n in (step - 2, step - 1) if n > 0]
    assert ("no step was saved yet" in line["error"]) == (step == 1)


def test_a_recipe_with_a_broken_row_runs_nothing(fails: Fails, folder: Path) -> None:
    recipe = (
        "steps:\n"
        "  rules: {do: specify/principles_file, path: rules.yaml}\n"
        "  clean: {do: select/checked, data: bad.jsonl, checks: [{use: min_words, n: 1}]}\n"
    )
    rows = [{"prompt": "a"}] * 40 + [{"prompt": 3}]
    said = fails(
        "run r.yaml",
        files={"r.yaml": recipe, "bad.jsonl": "".join(json.dumps(r) + "\n" for r in rows)},
    )
    assert "bad.jsonl row 41: field 'prompt'" in said
    assert not (folder / "runs").exists()
