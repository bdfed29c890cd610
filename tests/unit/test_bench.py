"""The benchmarks' own arithmetic: which rows, how much work, what counts as agreement."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench import all as everything  # noqa: E402
from bench import compare, grpo, objectives, rows, runner, side_ours, training, work  # noqa: E402
from truing.core.logprob import measure  # noqa: E402
from truing.core.modelfiles import lora  # noqa: E402
from truing.core.tiny import tiny_config, tiny_model  # noqa: E402
from truing.core.tree import group_tree, pack  # noqa: E402
from truing.errors import InputError  # noqa: E402
from truing.models import Model  # noqa: E402


def pair(prompt: int, chosen: int, rejected: int) -> rows.Pair:
    return rows.Pair([1] * prompt, [2] * chosen, [3] * rejected)


def test_which_pairs_belong() -> None:
    assert rows.keeps(pair(10, 9, 5), False) and pair(10, 9, 5).longest == 19
    assert not rows.keeps(pair(10, 7, 5), False)  # not clearly longer
    assert not rows.keeps(pair(1020, 5, 2), False)  # the longer answer does not fit
    assert not rows.keeps(rows.Pair([1], [2], [2]), False)
    assert not rows.keeps(pair(500, 150, 150), True)
    assert rows.keeps(pair(700, 150, 150), True)
    assert not rows.keeps(pair(700, 20, 150), True)
    many = [pair(10, 9, 5), pair(1020, 5, 2), pair(11, 9, 5), pair(12, 9, 5)]
    assert [len(p.prompt) for p in rows.chosen_pairs(many, 2, False)] == [10, 11]
    with pytest.raises(InputError, match=r"fewer pairs that belong \(seen: 4\). Give 3 at most"):
        rows.chosen_pairs(many, 4, False)


def test_rows_are_read_from_beside_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "ROOT", tmp_path / "checkout")
    monkeypatch.setenv("TRUING_DATA", "")
    rows.find_data()
    assert not os.environ["TRUING_DATA"]
    beside = tmp_path / "shared" / "data"
    beside.mkdir(parents=True)
    (beside / "index.json").write_text("[]")
    rows.find_data()
    assert os.environ["TRUING_DATA"] == str(beside)
    assert "TRUING_DATA is not set: rows are read from ../shared/data" in capsys.readouterr().err
    monkeypatch.setenv("TRUING_DATA", "elsewhere")
    rows.find_data()
    assert os.environ["TRUING_DATA"] == "elsewhere" and not capsys.readouterr().err


@pytest.mark.parametrize("module", sorted({m for m, _, _ in everything.ROWS.values()}))
def test_missing_rows_are_told_before_a_model_is_opened(
    module: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(runner, "ROOT", tmp_path / "checkout")
    monkeypatch.setenv("TRUING_DATA", "")
    monkeypatch.setattr("truing.models.Model.open", lambda *_: pytest.fail("a model was opened"))
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main(["--json"])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and not out and err.count("\n") == 1
    assert err.startswith("bench: ") and "'hh_rlhf'" in err and "TRUING_DATA" in err


def test_steps_are_the_engines() -> None:
    steps = rows.steps_of(20, 8, 0)
    assert [len(s) for s in steps] == [8, 8, 4]
    assert sorted(i for s in steps for i in s) == list(range(20))
    assert steps == rows.steps_of(20, 8, 0) != rows.steps_of(20, 8, 1)


def test_work_by_hand() -> None:
    shape = work.Shape(2, 3, 1, 2, 1, 1, 5)
    assert shape.linears == [(2, 2), (2, 1), (2, 1), (2, 2), (2, 3), (2, 3), (3, 2)]
    assert shape.weights == 4 + 2 + 2 + 4 + 6 + 6 + 6 == 30
    assert work.pairs_of(3, [2, 1]) == 6 + (6 + 3) + (3 + 1)
    # One tree: 3 tokens of prompt and answers of 2 and 1; 19 pairs on 2 heads of size 1.
    linear, attention, head = 2 * 6 * 30, 4 * 19 * 2, 2 * 3 * 2 * 5
    forward = linear + attention + head
    trees = [(3, [2, 1])]
    full = work.flops(shape, trees, rank=0, reference=False)
    assert full == forward + 2 * linear + 2 * attention + 2 * head
    ends = sum(i + o for i, o in shape.linears)
    adapters = work.flops(shape, trees, rank=4, reference=True)
    assert adapters == 2 * forward + linear + 2 * attention + head + 4 * 6 * 4 * ends


def test_work_is_what_pytorch_counts() -> None:
    """The forward pass's linear layers and head, against PyTorch's own counter of the stock module.

    The counter takes attention in full squares and the head at each token: so it is given one row
    whose tokens all carry loss, and attention is left out on both sides.
    """
    shape = work.shape_of(tiny_config())
    module, _ = tiny_model()
    assert shape.weights == sum(
        m.weight.numel() for n, m in module.named_modules() if "proj" in n and "lm_head" not in n
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.ones(1, 40, dtype=torch.long))
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if "mm" in str(op))
    assert products == 2 * 40 * shape.weights + 2 * 40 * shape.hidden * shape.vocab
    # And our measuring takes no more than that: head on loss tokens only.
    (packed,) = pack([group_tree([1] * 30, [[2] * 10])])
    assert measure(module, packed, grad=False)["logp"].shape == (1, 1, 10)


def test_largest_difference() -> None:
    assert compare.largest_difference([1.0, 2.0], [1.0, 2.5]) == pytest.approx(0.2)
    assert compare.largest_difference([1.0], [1.0, 2.0]) == math.inf
    assert compare.largest_difference([], []) == math.inf
    assert compare.largest_difference([1e-6], [0.0], least=1.0) == pytest.approx(1e-6)
    assert compare.largest_difference([8.0], [4.0], least=1.0) == 1.0
    assert compare.rounded({"a": 1.23456789, "b": "x", "c": 3}) == {"a": 1.23457, "b": "x", "c": 3}


def test_cosine_of_changes() -> None:
    start = {"a": torch.tensor([10.0, 10.0])}
    one = {"a": torch.tensor([11.0, 10.0])}
    two = {"a": torch.tensor([10.0, 11.0])}
    assert compare.cosine(one, two) > 0.99
    assert compare.cosine(one, two, start) == pytest.approx(0.0)
    assert compare.cosine(one, one, start) == pytest.approx(1.0)
    assert compare.cosine(start, one, start) == 0.0
    with pytest.raises(ValueError, match="not the same tensors"):
        compare.cosine(one, {"b": torch.ones(2)})


def test_what_counts() -> None:
    good = {"max_loss_rel_diff": 1e-5, "max_gradnorm_rel_diff": 1e-4, "adapter_cosine": 0.9999}
    assert compare.agree(good)
    for name, wrong in (("max_loss_rel_diff", 2e-4), ("adapter_cosine", 0.99)):
        assert not compare.agree({**good, name: wrong})
    assert not compare.agree({**good, "max_gradnorm_rel_diff": math.inf})
    runs = {"a": {"seconds": 3.0}, "b": {"error": "killed"}, "c": {"seconds": 2.0}}
    assert compare.fastest(runs) == "c"
    with pytest.raises(ValueError, match="killed"):
        compare.fastest({"b": {"error": "killed"}})


def job() -> runner.Json:
    args = argparse.Namespace(model="", threads=1)
    return {
        "task": "dpo", "rows": [vars(pair(3, 2, 1)), vars(pair(4, 1, 2))], "rank": 4,
        "steps": [[1, 0]], "batch": 8, "lr": 2e-4, "adapter": "", "threads": args.threads,
    }  # fmt: skip


def test_a_part_of_the_rows() -> None:
    whole = {**job(), "rows": [vars(pair(3, 2, 1 + i)) for i in range(20)]}
    part = training.part_of(whole, 9)
    assert part["rows"] == whole["rows"][:9]
    assert sorted(i for s in part["steps"] for i in s) == list(range(9))
    assert training.trees_of(job()) == [(3, [2, 1]), (4, [1, 2])]
    assert training.trees_of({**job(), "task": "sft"}) == [(3, [2]), (4, [1])]
    assert training.trees_of({**job(), "task": training.REWARD}) == training.trees_of(job())
    two = training.part_of({**whole, "batch": 2}, 4)
    assert [len(s) for s in two["steps"]] == [2, 2]
    assert set(training.micro_batches()) == {f"micro-batch {m}" for m in (1, 2, 4, 8)}


def test_identity_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    (tmp_path / "side.py").write_text("1")
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "a.py").write_text("1")
    key = runner.key_of(job(), ["side.py", "core"])
    assert key == runner.key_of(dict(reversed(job().items())), ["side.py", "core"])
    assert key != runner.key_of({**job(), "lr": 1e-4}, ["side.py", "core"])
    (tmp_path / "core" / "a.py").write_text("2")
    assert key != runner.key_of(job(), ["side.py", "core"])


def test_a_side_is_run_once_and_failures_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "WORK", tmp_path / "work")
    (tmp_path / "bench").mkdir()
    side = tmp_path / "bench" / "side_ours.py"
    side.write_text(
        "import json, os, pathlib, sys\n"
        "job = json.loads(pathlib.Path(sys.argv[1]).read_text())\n"
        "if job['lr'] < 0: sys.exit('the rate is negative')\n"
        "folder = pathlib.Path(job['folder'])\n"
        "runs = len(list(folder.glob('run*')))\n"
        "(folder / f'run{runs}').touch()\n"
        "made = {'seconds': 1.0, 'runs': runs, 'threads': os.environ['OMP_NUM_THREADS']}\n"
        "(folder / 'made.json').write_text(json.dumps(made))\n"
    )
    first = runner.run("ours", job())
    assert (first["runs"], first["threads"]) == (0, "1")
    assert runner.run("ours", job()) == first
    assert runner.run("ours", job(), again=time.time() - 60) == first
    assert runner.run("ours", job(), again=time.time() + 60)["runs"] == 1
    failed = runner.run("ours", {**job(), "lr": -1.0})
    assert "exit code 1: the rate is negative" in str(failed["error"])


def test_results_are_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    args = argparse.Namespace(model="m", pairs=8, threads=1)
    runner.write("dpo", {"bench": "dpo", "ratio_best": 2.0}, {"rows": 1}, {"cpu": "x"}, args)
    found = json.loads((tmp_path / "dpo.json").read_text())
    assert found["ratio_best"] == 2.0 and found["machine"] == {"cpu": "x"}
    assert found["asked"] == {"model": "m", "pairs": 8, "threads": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["dpo.json"]
    runner.finish({"bench": "dpo", "ratio_best": 2.0}, True)
    assert json.loads(capsys.readouterr().out) == {"bench": "dpo", "ratio_best": 2.0}
    runner.finish({"bench": "dpo", "ratio_best": 2.0}, False)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bench"] == "dpo"


def test_rows_that_were_measured_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(everything, "RESULTS", tmp_path)
    where = {"date": "2026-01-02", "cpu": "Some CPU", "commit": "abc1234"}
    for name, (_, pairs, _) in everything.ROWS.items():
        told = runner.asked(runner.MODEL, pairs, runner.THREADS)
        text = json.dumps({"ratio_best": 2.0, "details": {}, "asked": told, "machine": where})
        (tmp_path / f"{name}.json").write_text(text)
    smoke = json.dumps({"ratio_best": 9.0, "asked": runner.asked("tiny", 8, 1)})
    with pytest.raises(SystemExit) as ended:
        everything.main(["--json"])
    assert not ended.value.code
    out, err = capsys.readouterr()
    line = json.loads(out)
    assert line["dpo"] == {"ratio_best": 2.0} and set(line) == {"bench", *everything.ROWS}
    told = "recorded on 2026-01-02, Some CPU, at abc1234; --again measures it here"
    assert all(f" {name}: {told}\n" in err for name in everything.ROWS)
    for name in ("dpo", "dpo_long"):  # without TRL's defaults, which one of them leaves out anyway
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "ratio_default": None}))
    assert everything.measured("dpo") is None and everything.measured("dpo_long") is not None
    same = {"max_loss_rel_diff": 1e-6, "max_gradnorm_rel_diff": 1e-6, "adapter_cosine": 1.0}
    for loss, counts in ((1e-6, True), (2e-4, False)):
        one = {**json.loads(path.read_text()), **same, "max_loss_rel_diff": loss}
        path.write_text(json.dumps(one))
        assert (everything.measured("dpo_long") is not None) is counts
    (tmp_path / "sft.json").write_text(smoke)
    assert everything.measured("sft") is None and everything.measured("reward") is not None
    with pytest.raises(SystemExit) as ended:
        everything.main(["dqo"])
    assert ended.value.code == 2


@pytest.fixture
def three_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three rows of `bench.all` that note how they were asked, and end as a file of each says."""
    for name in ("one", "two", "three"):
        kept = {"asked": runner.asked(runner.MODEL, 1, runner.THREADS), "ratio": 2.0}
        kept["machine"] = {"date": "2026-01-02", "cpu": "c", "commit": "abc"}
        (tmp_path / f"{name}.py").write_text(
            "import json, pathlib, sys\n"
            f"name, result = {name!r}, {kept!r}\n"
            "with open('asked.txt', 'a') as file:\n"
            "    print(name, sys.argv[-1], file=file)\n"
            "end = pathlib.Path(name)\n"
            "code = int(end.read_text()) if end.exists() else 0\n"
            "if code > 2:  # two sides that differ\n"
            "    result |= {'max_loss_rel_diff': 1.0, 'max_gradnorm_rel_diff': 0.0,"
            " 'adapter_cosine': 1.0}\n"
            "if code in (0, 3):\n"
            "    pathlib.Path(name + '.json').write_text(json.dumps(result))\n"
            "sys.exit(code % 3)\n"
        )
    for module in (runner, everything):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(everything, "STAMP", tmp_path / "again.json")
    told = {name: (name, 1, []) for name in ("one", "two", "three")}
    monkeypatch.setattr(everything, "ROWS", told)
    return tmp_path


def all_of(folder: Path, *words: str) -> tuple[object, list[str]]:
    """Exit code of `bench.all WORDS`, and the rows that it had measured, with their last flag."""
    (folder / "asked.txt").write_text("")
    with pytest.raises(SystemExit) as ended:
        everything.main([*words, "--json"])
    return ended.value.code, (folder / "asked.txt").read_text().splitlines()


def test_a_run_that_was_stopped_goes_on(three_rows: Path) -> None:
    (three_rows / "two").write_text("2")  # what a user can mend ends the whole run
    code, asked = all_of(three_rows, "--again")
    assert code == 2 and [a.split()[0] for a in asked] == ["one", "two"]
    since = asked[0].split()[1]
    assert since.startswith("--again=") and float(since.partition("=")[2]) <= time.time()
    (three_rows / "two").unlink()
    # Other rows are another run; of the same, those that are done stay, parts too by their time.
    assert all_of(three_rows, "one") == (0, [])
    assert all_of(three_rows, "--again") == (0, [f"two {since}", f"three {since}"])
    assert not (three_rows / "again.json").exists()
    code, asked = all_of(three_rows, "--again")
    assert len(asked) == 3 and not any(since in a for a in asked)


def test_a_row_that_does_not_agree_has_failed(
    three_rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (three_rows / "two").write_text("3")
    code, asked = all_of(three_rows)
    line = json.loads(capsys.readouterr().out)
    assert code == 1 and asked == ["one --json", "two --json", "three --json"]
    assert line == {"bench": "all", "one": {"ratio": 2.0}, "two": "failed", "three": {"ratio": 2.0}}
    assert all_of(three_rows) == (1, ["two --json"])


def test_the_committed_results_are_those_of_the_rows() -> None:
    for name in everything.ROWS:
        found = everything.measured(name)
        assert found is not None and everything.origin(found), name


def test_what_was_compared_came_to_the_same() -> None:
    told = {n: json.loads((runner.RESULTS / f"{n}.json").read_text()) for n in everything.ROWS}
    compared = {n: one for n, one in told.items() if "max_loss_rel_diff" in one}
    assert set(told) - set(compared) == {"sampling", "beta_sweep", "trunk"}  # no training of TRL's
    for name, one in compared.items():
        assert one["max_loss_rel_diff"] <= 1e-4 and one["max_gradnorm_rel_diff"] <= 1e-3, name
        assert one["adapter_cosine"] >= 0.999, name
    assert set(told["dpo"]) >= {
        "ratio_best", "ratio_default", "memory_ratio", "loss_first", "loss_last", "peak_fraction",
        "trl_settings",
    }  # fmt: skip
    assert told["dpo"]["loss_first"] == pytest.approx(math.log(2), abs=1e-5)
    assert told["dpo"]["loss_last"] < told["dpo"]["loss_first"]


def test_the_readme_tells_the_recorded_ratios() -> None:
    begins = {
        "dpo": "DPO, LoRA", "dpo_long": "DPO on long prompts", "dpo_full": "DPO, all weights",
        "sft": "SFT", "sampling": "sampling", "beta_sweep": "a second DPO run", "reward": "reward",
        "trunk": "DPO of the top", "objectives": "five losses", "grpo": "GRPO",
    }  # fmt: skip
    table: dict[str, str] = {}  # a row, with those below it that begin with "the same"
    last = ""
    for line in (ROOT / "bench" / "README.md").read_text().splitlines():
        if line.startswith("| ") and line.count("|") > 4:
            last = last if line.startswith("| the same") else line[2:]
            table[last] = table.get(last, "") + line
    assert set(begins) == set(everything.ROWS)
    for name, begin in begins.items():
        (told,) = (text for row, text in table.items() if row.startswith(begin))
        numbers = set(re.findall(r"\d+\.\d+", told))
        found = json.loads((runner.RESULTS / f"{name}.json").read_text())
        for ratio in (v for k, v in found.items() if k.startswith("ratio") and v is not None):
            assert {f"{ratio:.1f}", f"{ratio:.2f}"} & numbers, (name, ratio)


def test_versions_for_the_other_environment() -> None:
    assert runner.TRL == "1.16.0" and f"trl=={runner.TRL}" in runner.PEERS
    versions = runner.pinned()
    assert versions["torch"] and versions["transformers"] and "#" not in "".join(versions)
    seen = runner.environment(Path("/x"), 2)
    assert seen["OMP_NUM_THREADS"] == "2" and seen["TRUING_HOME"] == "/x/truing"
    assert runner.THREADS == 2


# Our side, on the tiny model


@pytest.fixture
def told(tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> runner.Json:
    """A job of three pairs; one update takes two of them."""
    monkeypatch.setattr(training, "WORK", tmp_path / "work")
    monkeypatch.setattr(training, "BATCH", 2)
    args = argparse.Namespace(model=str(tiny_path), threads=1)
    pairs = [rows.Pair([5 + i, 6, 7], [8, 9, 10 + i], [11, 12]) for i in range(3)]
    return training.job_of(training.REWARD, args, pairs, full=False)


def test_five_losses_share_one_reference_pass(told: runner.Json, tmp_path: Path) -> None:
    several = {**told, "losses": objectives.LOSSES}
    assert side_ours.wanted(told) == [(training.REWARD, {})]
    assert side_ours.wanted({**told, "task": "dpo"}) == [("dpo", {"beta": 0.1})]
    made = {
        name: side_ours.run(several, name, own, tmp_path / name, tmp_path / f"{name}.safetensors")
        for name, own in side_ours.wanted(several)
    }
    assert [m["reference_computed"] for m in made.values()] == [1, 0, 0, 0, 0]
    first = {name: m["losses"][0] for name, m in made.items()}
    # At the start policy and reference are one.
    assert first["dpo"] == pytest.approx(math.log(2))
    assert first["ipo"] == pytest.approx(25.0) and first["hinge"] == pytest.approx(1.0)
    assert first["simpo"] > 0 and first["cpo"] > first["dpo"]
    assert all(len(m["losses"]) == 2 and m["grad_norms"][0] > 0 for m in made.values())


def test_our_side_begins_with_the_adapter_of_both(told: runner.Json, tmp_path: Path) -> None:
    module = Model.open(str(told["model"])).load_module("float32", "cpu", fresh=True).module
    other = lora.attach(module, training.RANK, 1.0, seed=training.SEED + 1)
    side_ours.begin(other, str(told["adapter"]))
    begun = load_file(Path(str(told["adapter"])) / lora.WEIGHTS)
    values = dict(other.named_parameters())
    assert values.keys() == begun.keys()
    assert all(torch.equal(values[name], begun[name]) for name in begun)


def test_a_reward_model_begins_with_the_given_head(told: runner.Json, tmp_path: Path) -> None:
    path = tmp_path / "trained.safetensors"
    made = side_ours.run(told, training.REWARD, {}, tmp_path / "run", path)
    assert made["reference_computed"] == 0 and len(made["losses"]) == 2
    assert made["losses"][0] != pytest.approx(math.log(2), abs=1e-5)  # a head of zeros would give
    same = {**made, "folder": str(tmp_path), "runs": [made]}
    agreed = training.agreement(same, same, told)
    assert compare.agree(agreed) and agreed["adapter_cosine"] == pytest.approx(1.0)
    kept = load_file(path)
    assert "reward_head.weight" in kept and "reward_head.bias" not in kept
    begun = load_file(str(told["head"]))["reward_head.weight"]
    moved = (kept["reward_head.weight"] - begun).abs().max()
    assert 0 < moved < 5e-4  # two updates at a rate of 2e-4


def test_recorded_answers_are_learnt_from_again(told: runner.Json, tmp_path: Path) -> None:
    prompts = [{"prompt": [5 + i, 6, 7]} for i in range(4)]
    online = training.part_of(
        {**told, "task": "grpo", "rows": prompts, "batch": 2, "passes": 1, "answers": 3,
         "tokens": 4, "letters": "0123456789:;<=>?@"}, 4
    )  # fmt: skip
    free = side_ours.run_online(online, tmp_path / "free", tmp_path / "free.safetensors")
    assert len(free["losses"]) == 2 and free["tokens"] <= 2 * 2 * 3 * 4
    assert 0 < free["generation_seconds"] < free["seconds"]
    assert free["update_seconds"] == free["seconds"] - free["generation_seconds"]
    first = json.loads(json.dumps(free["first"]))
    again = grpo.recorded(online, first)
    assert [r["prompt"] for r in again["rows"]] == [
        prompts[i]["prompt"] for i in online["steps"][0]
    ]
    made = side_ours.run_online(again, tmp_path / "again", tmp_path / "again.safetensors")
    assert made["tokens"] == sum(len(c["ids"]) for group in first for c in group)
    assert made["losses"][0] == pytest.approx(free["losses"][0], abs=1e-6)
    assert made["grad_norms"][0] == pytest.approx(free["grad_norms"][0], rel=1e-4)
    # By construction the first loss is 0; the second has ratios other than 1.
    assert made["losses"][0] == pytest.approx(0.0, abs=1e-6)
    assert made["losses"][1] < -1e-6


def test_line_of_grpo() -> None:
    def side(seconds: float, generation: float) -> runner.Json:
        return {
            "seconds": seconds, "generation_seconds": generation, "peak_rss": 10, "tokens": 7,
            "update_seconds": seconds - generation, "skipped": [0.0, 0.5],
        }  # fmt: skip

    made = {"ours": side(3.0, 1.0), "ours_again": side(5.0, 1.0), "best": side(16.0, 4.0)}
    line = grpo.row_of(made, {"adapter_cosine": 1.0}, {"micro_batch": 2})
    assert (line["ratio_best"], line["ratio_generation"], line["ratio_update"]) == (4.0, 4.0, 4.0)
    assert line["groups_skipped"] == 0.25 and line["adapter_cosine"] == 1.0


def test_total_of_five_losses() -> None:
    made = {n: {"seconds": 10.0, "reference_seconds": 0.0} for n in objectives.LOSSES}
    for name in ("dpo", "ipo", "hinge"):
        made[name]["reference_seconds"] = 2.0
    assert objectives.totals(made) == (46.0, 50.0)
    good = {"max_loss_rel_diff": 1e-6, "max_gradnorm_rel_diff": 1e-5, "adapter_cosine": 1.0}
    bad = {"max_loss_rel_diff": 1e-3, "max_gradnorm_rel_diff": 1e-6, "adapter_cosine": 0.9}
    assert objectives.worst({"dpo": good, "ipo": bad}) == {
        "max_loss_rel_diff": 1e-3, "max_gradnorm_rel_diff": 1e-5, "adapter_cosine": 0.9,
    }  # fmt: skip
    assert sorted(sum(objectives.TRAINERS.values(), ())) == sorted(objectives.LOSSES)
    assert objectives.without_opponent(["dpo", "bco"]) == ["ppo", "xpo", "nash_md"]


def test_a_failed_run_ends_the_benchmark() -> None:
    assert runner.ended({"ours": {"seconds": 1.0}}) == {"ours": {"seconds": 1.0}}
    with pytest.raises(SystemExit, match=r"best failed: exit code 1 \(log.txt\)"):
        runner.ended({"best": {"error": "exit code 1", "log": "log.txt"}})
