"""Running plans: the store, what runs again and what does not, manifests, faults."""

from __future__ import annotations

import datetime
import errno
import fcntl
import html
import importlib
import json
import math
import os
import re
import shlex
import sys
import threading
import time
from pathlib import Path

import pytest

from truing import context, lineage, naming, pipeline, recipe
from truing.cli import main
from truing.errors import InputError, Stopped
from truing.keys import modules_of, step_key
from truing.method import methods
from truing.models import Model
from truing.pipeline import Result
from truing.plan import Plan
from truing.principles import Principle, Principles
from truing.reports import Measure, Report
from truing.sources import need_abilities, open_sources
from truing.store import Store
from truing.tables import Table

ROWS = [{"prompt": f"What is number {i} good for?"} for i in range(8)] + [{"prompt": "Hm"}]
RULES = "- {id: brief, text: Be brief., check: {use: max_words, n: 4}}\n"
RECIPE = """\
name: small
steps:
  rules: {do: specify/principles_file, path: rules.yaml}
  clean: {do: select/checked, data: prompts.jsonl, checks: [{use: min_words, n: 2}]}
  part: {do: select/near_duplicates, data: clean, exact: true, threshold: 0.1}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    (tmp_path / "rules.yaml").write_text(RULES)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def run(folder: Path, store: Store, text: str = RECIPE) -> Result:
    (folder / "r.yaml").write_text(text)
    return pipeline.run(recipe.load(folder / "r.yaml"), folder / "runs", store=store)


def cached(result: Result) -> dict[str, bool]:
    return {n: bool(s["cached"]) for n, s in result.run.steps.items()}


def test_a_second_run_costs_nothing_and_has_the_same_content(folder: Path, store: Store) -> None:
    first, second = run(folder, store), run(folder, store)
    assert cached(first) == {"rules": False, "clean": False, "part": False}
    assert cached(second) == {"rules": True, "clean": True, "part": True}
    assert first.folder == second.folder
    assert [n.key for n in first.results.values()] == [n.key for n in second.results.values()]
    assert second.line()["cached_steps"] == 3
    assert Path(str(second.line()["report"])).is_file()
    left = store.scratch(str(first.run.steps["clean"]["key"]))
    left.mkdir(parents=True)  # as by a kill between keeping what it made and dropping this
    run(folder, store)
    assert not left.exists()


def test_one_setting_reruns_what_depends_on_it(folder: Path, store: Store) -> None:
    run(folder, store)
    other = run(folder, store, RECIPE.replace("n: 2", "n: 3"))
    # The other filter keeps the same rows, so what follows it is not made again.
    assert cached(other) == {"rules": True, "clean": False, "part": True}
    assert cached(run(folder, store, RECIPE.replace("threshold: 0.1", "threshold: 0.2"))) == {
        "rules": True,
        "clean": True,
        "part": False,
    }


def test_a_file_counts_by_its_content(folder: Path, store: Store) -> None:
    run(folder, store)
    (folder / "rules.yaml").write_text(RULES.replace("n: 4", "n: 5"))
    assert cached(run(folder, store)) == {"rules": False, "clean": True, "part": True}


def test_the_manifest_says_what_happened(folder: Path, store: Store) -> None:
    result = run(folder, store)
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["status"] == "done"
    step = manifest["steps"]["clean"]
    assert step["about"] == "8 prompt rows"
    assert step["artefact"] == result.results["clean"].key
    assert step["settings"]["checks"] == [{"use": "min_words", "n": 2}]
    assert {"torch", "python", "truing"} <= set(manifest["versions"])
    assert manifest["hardware"]["cores"] >= 1


def test_seconds_count_from_where_make_began(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set-up is in them, since `make` says when it began; what is no time is passed over."""
    monkeypatch.delenv("TRUING_STARTED", raising=False)
    assert 0 <= run(folder, store).line()["seconds"] < 100
    began = time.time() - 100
    monkeypatch.setenv("TRUING_STARTED", str(began))
    result = run(folder, store)
    assert 100 <= result.line()["seconds"] < 200
    manifest = json.loads((result.folder / "manifest.json").read_text())
    started = datetime.datetime.fromisoformat(manifest["started"])
    assert started.timestamp() == pytest.approx(began, abs=1e-3)
    monkeypatch.setenv("TRUING_STARTED", "today")
    assert 0 <= run(folder, store).line()["seconds"] < 100


def test_a_fault_of_a_step_names_it_and_keeps_what_was_done(folder: Path, store: Store) -> None:
    text = RECIPE.replace("n: 2", "n: 99")
    with pytest.raises(InputError, match=r"r\.yaml line 4 step clean.*none of 9 rows"):
        run(folder, store, text)
    (made,) = (folder / "runs").iterdir()
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    assert [s["status"] for s in manifest["steps"].values()] == ["done", "failed", "pending"]
    assert "none of 9 rows" in manifest["steps"]["clean"]["error"]


def test_a_page_that_fails_does_not_hide_what_happened(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> Path:
        raise ValueError("no such page")

    monkeypatch.setattr("truing.report.write", broken)
    with pytest.raises(InputError, match="none of 9 rows"):
        run(folder, store, RECIPE.replace("n: 2", "n: 99"))
    assert "is not written: no such page" in capsys.readouterr().err


def test_a_step_that_failed_has_its_seconds_and_its_cost(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from truing.select import checked as module

    def slow(*_: object) -> list[bool]:
        context.current().metric(endpoint_cost=0.25)
        time.sleep(0.3)
        raise InputError("no more", where="here")

    monkeypatch.setattr(module, "passing", slow)
    with pytest.raises(InputError, match="no more"):
        run(folder, store)
    (made,) = (folder / "runs").iterdir()
    step = json.loads((made / "manifest.json").read_text())["steps"]["clean"]
    assert step["seconds"] >= 0.3 and step["cost"] == 0.25
    assert re.search(r"clean: \d+\.\d.s, cost 0\.25", (made / "report.html").read_text())


def test_the_page_tells_the_command_that_makes_the_run_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUING_HOME", str(folder / "home"))
    runs, recipe_path = folder / "my runs", str(folder / "r.yaml")
    words = ["run", recipe_path, "--set", "part.threshold=0.2", "--runs", str(runs)]
    assert main(words) == 0
    (page,) = runs.glob("*/report.html")
    said = re.search("<dt>command</dt><dd><code>(.*?)</code>", html.unescape(page.read_text()))
    assert said is not None and shlex.split(said[1]) == ["truing", *words]
    plan = recipe.load(recipe_path)
    plan.override("part.token=a word")
    assert plan.command == ["run", recipe_path, "--set", "part.token=***"]


def test_a_step_that_leaves_no_row_is_named_by_the_one_that_needs_some(
    folder: Path, store: Store
) -> None:
    (folder / "heads.jsonl").write_text('{"prompt": "Things to see:"}\n{"prompt": "To do:"}\n')
    text = (
        "name: small\nsteps:\n"
        "  kept: {do: select/magpie_filter, data: heads.jsonl}\n"
        "  part: {do: select/near_duplicates, data: kept, exact: true}\n"
    )
    for _ in range(2):  # made, and from the store
        with pytest.raises(InputError) as error:
            run(folder, store, text)
        said = "r.yaml line 4 step part: input 'data' has no rows: step kept left none"
        assert said in str(error.value)
    (made,) = (folder / "runs").iterdir()
    steps = json.loads((made / "manifest.json").read_text())["steps"]
    assert steps["kept"]["about"] == "0 prompt rows"
    assert [s["status"] for s in steps.values()] == ["done", "failed"]


def test_bad_data_is_found_before_anything_runs(folder: Path, store: Store) -> None:
    with (folder / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": 5}\n')
    with pytest.raises(InputError, match=r"prompts\.jsonl row 10: field 'prompt'"):
        run(folder, store)
    assert not store.keys()
    assert not (folder / "runs").exists()


def test_an_interrupted_step_keeps_its_scratch_and_goes_on(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from truing.select import checked as module

    def interrupt(*_: object) -> list[bool]:
        context.current().journal("rows").put("first", 1)
        raise KeyboardInterrupt

    method = methods["select/checked"]
    table = Table("prompt", ROWS)
    settings = method.validate({"checks": [{"use": "min_words", "n": 2}]})
    with monkeypatch.context() as patch:
        patch.setattr(module, "passing", interrupt)
        with pytest.raises(Stopped, match="interrupted"):
            pipeline.perform(method, {"data": table}, settings, store=store)
    key = step_key(method, {"data": table}, settings, 0)
    assert (store.scratch(key) / "rows.jsonl").read_text() == '["first", 1]\n'
    result = pipeline.perform(method, {"data": table}, settings, store=store)
    assert len(result.artefact) == 8
    assert not store.scratch(key).exists()


def test_the_seconds_of_a_step_are_all_that_were_spent_on_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from truing.select import checked as module

    method, table = methods["select/checked"], Table("prompt", ROWS)
    settings = method.validate({"checks": [{"use": "min_words", "n": 2}]})
    kept = store.scratch(step_key(method, {"data": table}, settings, 0)) / ".seconds"
    seen: list[float] = []

    def interrupt(*_: object) -> list[bool]:
        context.current().journal("rows").put("first", 1)
        time.sleep(0.2)
        context.current().metric(rows=1)  # a kill after this loses nothing
        seen.append(float(kept.read_text()))
        time.sleep(0.2)
        raise KeyboardInterrupt

    monkeypatch.setattr("truing.progress.KEEP_EVERY", 0.0)
    original, on_metric = module.passing, list[object]().append
    monkeypatch.setattr(module, "passing", interrupt)
    for _ in range(2):
        with pytest.raises(Stopped):
            pipeline.perform(method, {"data": table}, settings, store=store, on_metric=on_metric)
    assert seen[0] >= 0.2 and seen[1] >= 0.6
    monkeypatch.setattr(module, "passing", original)
    result = pipeline.perform(method, {"data": table}, settings, store=store)
    assert result.seconds >= 0.8
    assert store.facts(result.key)["seconds"] == pytest.approx(result.seconds, abs=0.01)


def test_a_full_disk_is_a_stop_that_can_be_resumed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "check_space", full)
    method = methods["select/near_duplicates"]
    settings = method.validate({"exact": True})
    with pytest.raises(Stopped, match="disk is full") as error:
        pipeline.perform(method, {"data": Table("prompt", ROWS)}, settings, store=store)
    assert error.value.exit_code == 3
    assert not store.keys()


def test_a_model_that_cannot_do_it_is_refused_before_anything_runs(folder: Path) -> None:
    plan = Plan("served", folder=folder)
    plan.model("far", "http://127.0.0.1:9/v1#some")
    plan.step("drawn", "synthesize/magpie", model="far")
    with pytest.raises(InputError, match="needs a model that can weights"):
        pipeline.run(plan, folder / "runs", store=Store(folder / "store"))


@pytest.mark.parametrize(
    ("method", "role", "lacks"),
    [
        ("train/dpo", "reference", "needs a reference that can logprob and weights"),
        ("train/forward_kl", "teacher", "needs a teacher that can logprob and weights"),
        ("train/grpo", "reward_model", "needs a reward model that can weights"),
    ],
)
def test_every_role_is_tested_before_anything_is_fetched(
    folder: Path, monkeypatch: pytest.MonkeyPatch, method: str, role: str, lacks: str
) -> None:
    monkeypatch.setattr(Model, "open", lambda _: pytest.fail("a model was opened"))
    far = "http://127.0.0.1:9/v1#some"
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "completion": "So."}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    plan = Plan("served", folder=folder, source="p.py")
    data = {"prompts" if "prompts" in methods[method].inputs else "data": "rows.jsonl"}
    plan.step("made", method, model="smollm2-135m-instruct", **{role: far}, **data)
    with pytest.raises(InputError, match=rf"step made: {method} {lacks}.*this one can generate"):
        pipeline.run(plan, folder / "runs", store=Store(folder / "store"))
    words = [*method.replace("_", "-").split("/"), "--model", "smollm2-135m-instruct"]
    words += [f"--{role.replace('_', '-')}", far]
    words += [w for n, t in data.items() for w in (f"--{n}", str(folder / t))]
    assert main(words) == 2


def test_a_judge_may_be_served_and_a_reward_model_may_only_classify() -> None:
    served, label = frozenset({"generate"}), frozenset({"hidden", "weights"})
    need_abilities(methods["cyclealign"], "judge", "", served, where="")
    need_abilities(methods["grpo"], "reward_model", "", label, where="")
    need_abilities(methods["grpo"], "partner", "", served, where="")
    with pytest.raises(InputError, match="needs a reward model that can weights") as refused:
        need_abilities(methods["grpo"], "reward_model", "", served, where="")
    assert "served_reward" in refused.value.fix and "judged" in refused.value.fix
    with pytest.raises(InputError, match="needs a models a that can weights"):
        need_abilities(methods["merge/linear"], "models", "a", served, where="")


def test_one_text_may_name_two_things(folder: Path) -> None:
    both = folder / "both"
    Principles([Principle("brief", "Be brief.")]).save(both)
    Table("prompt", ROWS).save(both)
    plan = Plan("two", folder=folder)
    plan.model("far", "http://127.0.0.1:9/v1#some")
    given = {"prompts": "both", "principles": "both"}
    plan.step("seen", "evaluate/adherence", model="far", **given)
    opened = open_sources(plan.check())
    assert {noun: type(found).__name__ for (noun, _), found in opened.items()} == {
        "Table": "Table", "Principles": "Principles", "Model": "Model"
    }  # fmt: skip


def test_store_verify_gc_and_export(folder: Path, store: Store) -> None:
    result = run(folder, store)
    assert store.verify() == []
    assert {row["noun"] for row in store.ls()} == {"Principles", "Table"}
    assert store.gc() == []
    run(folder, store, RECIPE.replace("threshold: 0.1", "threshold: 0.2"))
    key = str(result.run.steps["part"]["key"])
    store.export(key[:10], str(folder / "out"))
    assert Table.load(folder / "out").key == result.results["part"].key
    store.export(f"{result.folder}/part", str(folder / "by_step"))
    assert Table.load(folder / "by_step").key == result.results["part"].key
    with pytest.raises(InputError, match=r"unknown step 'parts'.*'part'"):
        store.export(f"{result.folder}/parts", str(folder / "none"))
    (result.folder / "manifest.json").unlink()
    assert store.gc() == []  # it may have been moved
    _older(store.root / "roots", 40)
    assert [g["key"] for g in store.gc()] == [key]
    table = next((store.root / "artefacts").glob("*/*/data/table.parquet"))
    table.write_bytes(b"damaged")
    assert len(store.verify()) == 1
    with pytest.raises(InputError, match="0 artefacts"):
        store.find("zz")


def test_code_keys_ignore_words_and_see_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from truing.core.identity import code

    (tmp_path / "plug").mkdir()
    (tmp_path / "plug/__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))

    def key(main: str, helper: str) -> str:
        (tmp_path / "plug/main.py").write_text(main)
        (tmp_path / "plug/helper.py").write_text(helper)
        code._known.clear()
        return code.code_key(["plug.main"])

    main = 'from plug import helper\ndef f():\n    "words"\n    return helper.g()\n'
    first = key(main, "def g():\n    return 1\n")
    assert key(main.replace('"words"', '"others"  # why'), "def g(): return 1\n") == first
    assert key(main, "def g():\n    return 2\n") != first
    assert key(main.replace("helper.g()", "helper.g() + 1"), "def g():\n    return 1\n") != first


def test_why_leads_back_to_principle_and_filters(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(folder, store)
    monkeypatch.setattr(pipeline, "Store", lambda: store)
    part = result.results["part"]
    assert isinstance(part, Table)
    found = lineage.why(str(part[0]["id"])[:8], run=result.folder)
    assert found.made_by == "clean (select/checked)"
    assert found.kept_by == ["part (select/near_duplicates)"]
    assert "['checked min_words', 'near_duplicates 0.1']" in found.text()
    with pytest.raises(InputError, match="no rows have an id"):
        lineage.why("zzzz", run=result.folder)
    said = lineage.Found("r", {"completion": "\x1b[2J\x9b2J Hi\tthere"}).text()
    assert said.endswith(r"\x1b[2J\x9b2J Hi there")  # spelt, so that no terminal obeys it


def test_rows_of_different_files_that_have_one_id(folder: Path) -> None:
    """Both files count from 1: a sample of one does not come from a row of the other."""
    train = Table("prompt", [{"id": i, "prompt": f"trained on {i}"} for i in ("7", "9")])
    lineage_of: dict[str, object] = {"parents": ["7"]}
    sample = {"prompt": "held out", "completion": "a", "lineage": lineage_of}
    samples = Table("example", [sample, {"id": "9", "prompt": "q", "completion": "b"}])
    results = {"part": train, "report": Report("r", [Measure("m", 1, 1, 1, 1)], samples)}
    steps: dict[str, dict[str, context.Json]] = {
        "part": {"method": "select/sample", "key": "k", "inputs": {"data": ["train.jsonl"]}},
        "report": {"method": "evaluate/x", "key": "k", "inputs": {"prompts": ["held.jsonl"]}},
    }
    rows = lineage.Rows(results, steps)
    found = rows.trace(*rows.find(str(samples[0]["id"])))
    assert found.made_by == "report (evaluate/x)"
    assert [p.made_by for p in found.parents] == ["a source outside this run"]
    with pytest.raises(InputError, match="part/9 or report/9"):
        rows.find("9")
    assert rows.trace(*rows.find("report/9")).row["completion"] == "b"
    steps["report"]["inputs"] = {"prompts": ["part"]}
    rows = lineage.Rows(results, steps)
    found = rows.trace(*rows.find(str(samples[0]["id"])))
    assert [p.made_by for p in found.parents] == ["part (select/sample)"]


def test_a_step_that_takes_rows_of_one_id_from_two_files() -> None:
    def told(taken: list[str], prompts: dict[str, str], start: str) -> list[str]:
        results = {n: Table("prompt", [{"id": "1", "prompt": p}]) for n, p in prompts.items()}
        given = {"a": ["a.jsonl"], "b": ["b.jsonl"], "c": taken}
        steps: dict[str, dict[str, context.Json]] = {
            n: {"method": "x", "key": "k", "inputs": {"data": [*given[n]]}} for n in prompts
        }
        rows = lineage.Rows(results, steps)
        found = rows.trace(*rows.find(start))
        return [found.made_by, *found.kept_by]

    prompts = {"a": "A", "b": "B", "c": "A"}
    assert told(["a", "b"], prompts, "b/1") == ["b (x)"]
    assert told(["a", "b"], prompts, "c/1") == ["a (x)", "c (x)"]
    with pytest.raises(InputError, match="a/1 or b/1"):
        told(["a", "b"], prompts, "1")
    changed = {"a": "A", "b": "A", "c": "C"}  # one row, which c changes
    assert told(["a", "b"], changed, "1") == ["a (x)", "b (x)", "c (x)"]
    assert told(["a"], prompts | {"c": "C"}, "c/1") == ["a (x)", "c (x)"]


def test_why_of_results_that_are_gone(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(folder, store)
    result.folder.rename(moved := folder / "archive")
    monkeypatch.setattr(pipeline, "Store", lambda: store)
    assert store.gc() == []  # a moved run is no deleted one
    part = result.results["part"]
    assert isinstance(part, Table)
    id = str(part[0]["id"])
    assert lineage.why(id, run=moved).id == id
    store.gc(days=0)
    with pytest.raises(InputError, match="results of 3 of 3 steps are not in the store"):
        lineage.why(id, run=moved)


def test_what_settings_name_by_its_key_is_in_use(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUING_HOME", str(folder / "home"))
    store = Store()
    store.put(key := "a1" * 16, Principles([Principle("brief", "Be brief.")]), {})
    assert naming.found_at(key[:14]) is not None
    assert store.gc(days=1) == []
    _older(store.root / "recent" / key, 2)
    assert [g["key"] for g in store.gc(days=1)] == [key]


def test_who_waits_for_a_step_is_told(
    folder: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[Result] = []
    waiter = threading.Thread(target=lambda: done.append(run(folder, store)))
    key = str(run(folder, store).run.steps["part"]["key"])
    told, said, end = "part: another process makes this step; waiting for it", "", time.time() + 60
    with store.lock(key):
        waiter.start()
        while told not in said and time.time() < end:
            time.sleep(0.05)
            said += capsys.readouterr().err
        assert told in said and not done
    waiter.join()
    assert len(done) == 1


def test_a_file_system_without_locks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setenv("TRUING_HOME", str(folder / "home"))
    monkeypatch.setattr(fcntl, "flock", absent)
    assert main(["run", str(folder / "r.yaml"), "--runs", str(folder / "runs")]) == 2
    said = capsys.readouterr().err
    assert "this file system has no locks" in said and "Set TRUING_HOME to a disk" in said


def test_lists_of_a_row_are_shown_whatever_they_hold() -> None:
    row: dict[str, object] = {
        "prompt": [{"role": "user", "content": "Why?"}], "scores": [0.5, 1.0], "steps": ["a", "b"],
        "score": 0.5, "label": False, "margin": 0, "note": "", "given": None, "names": {},
    }  # fmt: skip
    said = lineage.Found("id", row, "made (x)").text()
    assert "prompt    Why?" in said and "[0.5, 1.0]" in said and "['a', 'b']" in said
    assert [line.split() for line in said.splitlines()[4:]] == [
        ["score", "0.5"], ["label", "False"], ["margin", "0"]
    ]  # fmt: skip


def test_a_single_method_from_the_command_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(folder / "prompts.jsonl")
    command = ["select", "near-duplicates", "--data", data, "--exact", "--json"]
    assert main([*command, "--out", str(folder / "out")]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["job"], line["cached"]) == ("select/near_duplicates", False)
    assert len(Table.load(folder / "out")) == 9
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["cached"] is True
    assert main([*command, "--treshold", "3"]) == 2
    assert "Did you mean 'threshold'" in capsys.readouterr().err


def _older(path: Path, days: float) -> None:
    for one in (path, *path.rglob("*")):
        os.utime(one, (time.time() - days * 86400,) * 2)


def test_results_of_single_commands_are_kept_for_a_while(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUING_HOME", str(folder / "home"))
    command = ["select", "near-duplicates", "--data", str(folder / "prompts.jsonl"), "--exact"]

    def collected(*words: str) -> int:
        assert main([*command, "--json"]) == 0
        key = json.loads(capsys.readouterr().out)["key"]
        _older(Store().root / "recent" / key, 20)
        assert main(["store", "gc", *words, "--json"]) == 0
        gone = json.loads(capsys.readouterr().out)
        assert gone in ([], [{"key": key, "deleted": "artefact"}])
        return len(gone)

    assert [collected(), collected("--days", "21"), collected("--days", "19")] == [0, 0, 1]
    assert collected("--days", "0") == 1 and not list((Store().root / "recent").iterdir())
    assert main(["store", "gc", "--days", "-1"]) == 2


def test_scratch_that_nobody_goes_on_from_is_collected(folder: Path, store: Store) -> None:
    for key in ("old", "new", "runs", "run"):
        store.scratch(key).mkdir(parents=True)
        (store.scratch(key) / "rows.jsonl").write_text("")
        _older(store.scratch(key), 0 if key == "new" else 40)
    (folder / "stopped").mkdir()
    (folder / "stopped" / "manifest.json").write_text("{}")
    store.roots.keep_run(folder / "stopped", ["run"])
    with store.lock("runs"):  # a step that says nothing for long
        assert store.gc() == [{"key": "old", "deleted": "scratch"}]
    assert store.gc(41) == []
    assert store.gc() == [{"key": "runs", "deleted": "scratch"}]
    (folder / "stopped" / "manifest.json").unlink()
    assert store.gc() == []  # it may have been moved
    _older(store.root / "roots", 40)
    assert store.gc() == [{"key": "run", "deleted": "scratch"}]


def test_principles_enter_the_key_with_the_code_of_their_checks() -> None:
    rules = Principles([Principle("brief", "Be brief.", check={"use": "max_words", "n": 4})])
    found = modules_of(methods["evaluate/adherence"], {}, {"principles": rules})
    assert found == {"truing.evaluate.adherence", "truing.specify.checks"}


def test_a_run_that_goes_on_keeps_what_it_referred_to(
    folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder, store)
    original = pipeline.perform

    def once(method: object, *args: object, **values: object) -> object:
        if values["name"] == "clean":
            raise KeyboardInterrupt
        return original(method, *args, **values)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "perform", once)
        with pytest.raises(Stopped):
            run(folder, store)
    assert store.gc() == []
    assert cached(run(folder, store)) == {"rules": True, "clean": True, "part": True}


def test_one_process_at_a_time_runs_in_a_folder(
    folder: Path,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original, codes = pipeline.perform, []

    def crowded(method: object, *args: object, **values: object) -> object:
        if values["name"] == "clean":
            values["on_metric"]({"rows": 9})  # type: ignore[operator]
            words = ["run", str(folder / "r.yaml"), "--runs", str(folder / "runs"), "--json"]
            codes.append(main(words))
        return original(method, *args, **values)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "perform", crowded)
        result = run(folder, store)
    assert codes == [3]
    told = json.loads(capsys.readouterr().out)["error"]
    assert "another process runs this recipe" in told and str(result.folder) in told
    assert f"process {os.getpid()} on " in told
    assert (result.folder / "metrics.jsonl").read_text() == '{"at": "clean", "rows": 9}\n'
    assert json.loads((result.folder / "manifest.json").read_text())["status"] == "done"
    assert all(cached(run(folder, store)).values())  # the folder is free again


def no_constant(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


def test_what_is_no_number_is_null_wherever_json_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from truing.select import checked as module

    original = module.passing

    def lost(*args: object) -> object:
        context.current().metric(loss=math.nan, bound=math.inf)
        return original(*args)  # type: ignore[arg-type]

    bad = {"loss": [math.nan, -math.inf, 1.0]}
    monkeypatch.setattr(module, "passing", lost)
    monkeypatch.setattr(pipeline, "summary_of", lambda _: bad)
    monkeypatch.setenv("TRUING_HOME", str(folder / "home"))
    words = ["run", str(folder / "r.yaml"), "--runs", str(folder / "runs")]
    for more in ([], ["--json"]):
        assert main([*words, *more]) == 0
        line = json.loads(capsys.readouterr().out, parse_constant=no_constant)
        assert line["loss"] == [None, None, 1.0]
    written = [*folder.glob("runs/*/*.json*"), *folder.glob("home/store/artefacts/*/*/*.json*")]
    seen = [
        json.loads(text, parse_constant=no_constant)
        for path in written
        for text in (
            path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        )
    ]
    assert seen.count({"at": "clean", "loss": None, "bound": None}) == 1
    assert seen.count({"loss": None, "bound": None}) == 1


def test_a_report_of_what_is_no_number_is_the_same_after_reading(store: Store) -> None:
    measures = [Measure("gap", math.nan, math.nan, math.inf, 0), Measure("n", 1.0, 1.0, 1.0, 1)]
    report = Report("odd", measures, meta={"ratio": math.nan})
    store.put("0" * 32, report, {})
    (path,) = store.root.rglob("report.json")
    json.loads(path.read_text(), parse_constant=no_constant)
    back = store.load("0" * 32)
    assert isinstance(back, Report) and math.isnan(back.get("gap").value)
    assert back.key == report.key and store.verify() == []


def test_runs_on_a_disk_that_is_not_there_keep_their_artefacts(folder: Path, store: Store) -> None:
    run(folder, store)
    (folder / "runs").rename(folder / "elsewhere")
    assert all(row["used"] for row in store.ls())
    assert store.gc() == []


def test_a_damaged_artefact_is_told_and_made_again(
    folder: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(folder, store)
    place = store._place(str(result.run.steps["clean"]["key"]))
    (place / "artefact.json").write_text("{")
    assert [row for row in store.ls() if "fault" in row]
    again = run(folder, store)
    assert cached(again) == {"rules": True, "clean": False, "part": True}
    assert "is made again" in capsys.readouterr().err
    assert store.verify() == []


def test_inputs_that_are_null_or_one_of_many(folder: Path) -> None:
    plan = Plan("null", folder=folder)
    plan.model("base", "http://127.0.0.1:9/v1#some")
    plan.step("mixed", "merge/linear", models="base")
    plan.step("picked", "select/deita", data="prompts.jsonl", model=None)
    mixed, picked = plan.check()
    assert set(mixed.sources["models"]) == {"0"}
    assert set(picked.sources) == {"data"}


def test_a_server_ends_the_graph(folder: Path) -> None:
    plan = Plan("end", folder=folder)
    plan.model("base", "http://127.0.0.1:9/v1#some")
    plan.step("served", "serve/openai", model="base")
    plan.step("part", "select/near_duplicates", data="prompts.jsonl", exact=True)
    assert [c.name for c in plan.check()] == ["part", "served"]


def test_code_of_what_a_decoder_holds_is_part_of_the_key(tiny_path: Path) -> None:
    from truing.models import Model

    rules = Principles([Principle("brief", "Be brief.", check={"use": "max_words", "n": 4})])
    picky = methods["best_of_n"](Model.open(tiny_path), rules, n=2)
    assert isinstance(picky, Model)
    found = modules_of(methods["evaluate/ability"], {}, {"model": picky})
    assert {"truing.decode.best_of_n", "truing.specify.checks"} <= found


def test_a_package_may_import_its_modules_by_dots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from truing.core.identity import code

    (tmp_path / "dots").mkdir()
    (tmp_path / "dots/__init__.py").write_text("from .impl import f\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    keys: set[str] = set()
    for value in (1, 2):
        (tmp_path / "dots/impl.py").write_text(f"def f():\n    return {value}\n")
        code._known.clear()
        for name in ("dots", "dots.impl"):  # as in a process of its own
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        keys.add(code.code_key(["dots"]))
    assert len(keys) == 2


def test_what_a_kill_left_beside_artefacts_is_none(tmp_path: Path) -> None:
    left = tmp_path / "artefacts" / "16" / ".16aa.left"
    left.mkdir(parents=True)
    (left / "artefact.json").write_text("{}")
    assert Store(tmp_path).keys() == [] and Store(tmp_path).verify() == []
