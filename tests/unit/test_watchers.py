"""What watches a run is told what its files say, and decides nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from truing import watchers
from truing.cli import main
from truing.errors import InputError, Stopped
from truing.pipeline import Result, run
from truing.recipe import load
from truing.reports import Report
from truing.store import Store
from truing.watchers import Watcher

PAIRS = [{"prompt": f"Say {i}", "chosen": f"It is {i}.", "rejected": "No."} for i in range(8)]
RECIPE = """\
name: small
models: {{base: {tiny}}}
steps:
  tuned: {{do: train/dpo, model: base, data: pairs.jsonl, steps: 4, batch: 2, rank: 2}}
  seen: {{do: evaluate/preference, model: tuned, data: pairs.jsonl}}
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_path: Path) -> Path:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in PAIRS))
    (tmp_path / "r.yaml").write_text(RECIPE.format(tiny=tiny_path))
    return tmp_path


class Told(Watcher):
    """Keeps all that it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def start(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.events.append(("start", folder, manifest))

    def metric(self, step: str, values: Mapping[str, Any]) -> None:
        self.events.append(("metric", step, values))

    def step(self, step: str, facts: Mapping[str, Any], measures: Any) -> None:
        self.events.append(("step", step, facts, measures))

    def end(self, manifest: Mapping[str, Any], page: Path) -> None:
        self.events.append(("end", manifest, page, page.is_file()))


def go(folder: Path, *watch: object, name: str = "r.yaml") -> Result:
    store = Store(folder / "store")
    return run(load(folder / name), folder / "runs", store=store, watch=cast(Any, watch))


def lines(result: Result | Path) -> list[dict[str, Any]]:
    place = result if isinstance(result, Path) else result.folder
    return [json.loads(t) for t in (place / "metrics.jsonl").read_text().splitlines()]


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars of TensorBoard by their tag, as (update, value) in the order of writing."""
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {t: [(e.step, e.value) for e in found.Scalars(t)] for t in found.Tags()["scalars"]}


def updates(run: Result, name: str) -> list[tuple[int, float]]:
    rows = [r for r in lines(run) if r["at"] == "tuned" and name in r and "step" in r]
    return [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in rows]


def test_it_is_told_what_the_files_say_and_the_same_from_the_store(folder: Path) -> None:
    first, again = Told(), Told()
    made = go(folder, first)
    start, *between, end = first.events
    assert start[:2] == ("start", made.folder) and set(start[2]["steps"]) == {"tuned", "seen"}
    said = [{"at": e[1], **e[2]} for e in between if e[0] == "metric"]
    assert json.loads(json.dumps(said)) == lines(made)
    assert [r["step"] for r in said if "grad_norm" in r] == [1, 2, 3, 4]
    ends = {e[1]: e for e in between if e[0] == "step"}
    report = cast(Report, made.results["seen"])
    assert list(ends) == ["tuned", "seen"] and ends["tuned"][3] == []
    assert ends["seen"][3] == list(report) != []
    assert ends["seen"][2] == made.run.steps["seen"] and ends["seen"][2]["status"] == "done"
    assert end[1]["status"] == "done" and end[2] == made.report and end[3]

    second = go(folder, again)  # another watcher, the same folder and the same steps
    assert second.folder == made.folder and second.line()["cached_steps"] == 2
    assert [e[1:3] for e in again.events if e[0] == "metric"] == [
        e[1:3] for e in between if e[0] == "metric"
    ]


def test_none_can_change_a_result_or_stop_a_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def clears(step: str, values: dict[str, Any]) -> None:
        values.clear()

    def leaves(step: str, values: dict[str, Any]) -> None:
        raise SystemExit(1)

    class Broken(Watcher):
        def start(self, folder: Path, manifest: Mapping[str, Any]) -> None:
            cast(dict[str, Any], manifest)["steps"].clear()
            raise RuntimeError("no way to http://me:secret@there")

    told = Told()
    made = go(folder, clears, leaves, Broken, told)
    err = capsys.readouterr().err
    assert err.count("warning: the watcher") == 2 and "secret" not in err
    assert "Broken' failed at 'start' and is told nothing more" in err
    assert "leaves' failed at 'metric'" in err
    assert told.events[-1][1]["status"] == "done"
    alone = run(load(folder / "r.yaml"), folder / "other", store=Store(folder / "apart"))
    key = made.results["tuned"].key
    assert key == alone.results["tuned"].key and set(made.run.steps) == {"tuned", "seen"}

    def known(run: Result) -> list[dict[str, Any]]:
        return [{n: v for n, v in row.items() if n != "seconds"} for row in lines(run)]

    assert known(made) == known(alone)


def test_tensorboard_has_each_update_once_after_an_interruption(
    folder: Path, always_save: Callable[[], None]
) -> None:
    def stops(step: str, values: Mapping[str, Any]) -> None:
        if values.get("step") == 3:
            raise KeyboardInterrupt

    always_save()
    with pytest.raises(Stopped):  # Ctrl-C is none of a watcher's faults
        go(folder, "tensorboard", stops)
    (place,) = (folder / "runs").iterdir()
    assert [s for s, _ in curves(place)["tuned/loss"]] == [1, 2, 3]
    made = go(folder, "tensorboard")
    assert made.folder == place and made.line()["cached_steps"] == 0
    found = curves(place)
    for name in ("loss", "lr", "grad_norm"):
        assert found[f"tuned/{name}"] == updates(made, name), name
    assert [s for s, _ in found["tuned/loss"]] == [1, 2, 3, 4]
    assert {"seconds/tuned", "seconds/seen"} <= set(found)
    for m in cast(Report, made.results["seen"]):
        name = f"measures/seen/{m.name}{f', {m.category}' if m.category else ''}"
        assert found[name] == [(0, pytest.approx(m.value))], name
        if m.lo < m.hi:
            assert found[f"{name}, 95 % from"] == [(0, pytest.approx(m.lo))]
            assert found[f"{name}, 95 % to"] == [(0, pytest.approx(m.hi))]

    go(folder, "tensorboard")  # from the store
    assert curves(place)["tuned/loss"] == found["tuned/loss"]
    read = EventAccumulator(str(place / "tensorboard")).Reload()
    told = read.Tensors("run/report/text_summary")[0].tensor_proto.string_val[0].decode()
    assert told == f"done: {made.report.resolve()}"


def test_recipe_command_and_environment_name_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (folder / "few.yaml").write_text(
        "name: few\nsteps:\n  few: {do: select/near_duplicates, data: pairs.jsonl, exact: true}\n"
    )
    text = (folder / "few.yaml").read_text()
    assert main(["run", "few.yaml", "--runs", "c", "--watch", "tensorboard, tensorboard"]) == 0
    (by_command,) = (folder / "c").iterdir()
    assert "seconds/few" in curves(by_command)
    told = json.loads((by_command / "manifest.json").read_text())["command"]
    assert told == "truing run few.yaml --watch 'tensorboard, tensorboard' --runs c"
    (folder / "few.yaml").write_text(text + "watch: [tensorboard]\n")
    assert main(["run", "few.yaml", "--runs", "r"]) == 0
    (by_recipe,) = (folder / "r").iterdir()
    assert by_recipe.name == by_command.name and len(curves(by_recipe)["seconds/few"]) == 1
    (folder / "few.yaml").write_text(text)
    plan = load("few.yaml")
    plan.watch = "tensorboard"  # as a recipe in Python says it
    assert "seconds/few" in curves(run(plan, "p").folder)
    monkeypatch.setenv("TRUING_WATCH", "tensorboard")
    assert main(["run", "few.yaml", "--runs", "e"]) == 0
    (by_variable,) = (folder / "e").iterdir()
    assert "seconds/few" in curves(by_variable)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("watch: tensorbord", "few.yaml line 1: unknown watcher 'tensorbord'. Did you mean"),
        ("watch: [tensorboard, 3]", "few.yaml line 1: this is no watcher (seen: 3)"),
        ("watch: {tensorboard: yes}", "few.yaml line 1: this is no watcher"),
    ],
)
def test_what_is_none_is_told_with_its_line(
    folder: Path, line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "few.yaml").write_text(f"{line}\nsteps: {{a: {{do: deduplicate, data: x.jsonl}}}}\n")
    assert main(["run", str(folder / "few.yaml"), "--check"]) == 2
    assert said in capsys.readouterr().err


def test_mistakes_of_a_command_or_variable_come_before_anything_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for option in ("--watch", "--report-to"):
        assert main(["train", "dpo", option, "tensorboard"]) == 2
        assert "truing run --watch tensorboard" in capsys.readouterr().err
    assert main(["run", "r.yaml", "--watch", "mlflow"]) == 2
    assert "--watch: unknown watcher 'mlflow'. Known: tensorboard, wandb" in capsys.readouterr().err
    monkeypatch.setenv("TRUING_WATCH", "wandbb")
    with pytest.raises(InputError, match=r"TRUING_WATCH: unknown watcher 'wandbb'"):
        go(folder)
    monkeypatch.delenv("TRUING_WATCH")
    # None there is what Python takes for a package that is not installed.
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.delitem(sys.modules, "truing.watchers.tensorboard", raising=False)
    with pytest.raises(InputError, match="'tensorboard' is needed here") as error:
        go(folder, "tensorboard")
    assert "pip install 'truing[watch]'" in error.value.fix and not (folder / "runs").exists()
    with pytest.raises(InputError, match="cannot be made: ValueError: not today"):
        watchers.watched([type("Late", (Watcher,), {"__init__": _late})])


def _late(self: object) -> None:
    raise ValueError("not today")


PACKAGE = """\
import sys
from truing.watchers import Watcher

def said(step, values):
    print("line of", step, *values, file=sys.stderr)

class Last(Watcher):
    def end(self, manifest, page):
        print("last:", manifest["status"], file=sys.stderr)

other = 3
"""
ENTRIES = """\
[truing.watchers]
said = watches_runs:said
last = watches_runs:Last
no = watches_runs:other
"""


def test_a_package_brings_one_by_an_entry_point(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = folder / "site" / "watches_runs-1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: watches-runs\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(ENTRIES)
    (folder / "site" / "watches_runs.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(folder / "site")
    monkeypatch.chdir(folder)
    rows = [{"prompt": "One", "completion": "a"}, {"prompt": "One", "completion": "a"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "few.yaml").write_text(
        "steps: {few: {do: select/near_duplicates, data: rows.jsonl, exact: true}}\n"
    )
    assert main(["run", "few.yaml", "--watch", "said,last"]) == 0
    (place,) = (folder / "runs").iterdir()
    err = capsys.readouterr().err
    assert err.count("line of few") == len(lines(place)) > 0 and "last: done" in err
    assert main(["run", "few.yaml", "--watch", "no"]) == 2
    assert "watch: no: this is no watcher (seen: 3)" in capsys.readouterr().err


def test_wandb_keeps_a_run_of_each_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    code = "import sys; from truing.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, "run", "r.yaml", "--watch", "wandb"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for _ in range(2):
        done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and "warning: the watcher" not in done.stderr, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["job"] == "small"
    (place,) = (folder / "runs").iterdir()
    (file,) = place.glob("wandb/offline-run-*/run-*.wandb")
    history, summary = _of_wandb(file)
    rows = [r for r in lines(place) if "grad_norm" in r]
    assert [r["tuned/step"] for r in history if "tuned/loss" in r] == [1, 2, 3, 4]
    assert [r["tuned/loss"] for r in history if "tuned/loss" in r] == [r["loss"] for r in rows]
    assert summary["status"] == "done" and summary["report"].endswith("report.html")
    assert {"seconds/tuned", "seconds/seen"} <= set(summary)
    assert any(name.startswith("measures/seen/") for name in summary)


def _of_wandb(file: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows of its history, its summary) in a file of Weights & Biases' own."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore

    history: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for data in _records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        for rows, items in (
            (history, record.history.item),
            (None, [*record.summary.update, *record.run.summary.update]),
        ):
            found = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
            if rows is None:
                summary |= found
            elif found:
                rows.append(found)
    return history, summary


def _records(data: bytes) -> list[bytes]:
    """Records of a log in LevelDB's format, whose parts lie in blocks of 32 KiB."""
    found, part, at = [], b"", 7  # behind its head
    while at < len(data):
        left = 32768 - at % 32768
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6 : at + 7]
        if left < 7 or kind == b"\0":
            at += left
            continue
        part += data[at + 7 : at + 7 + size]
        if kind in b"\1\4":  # whole, or the last part
            found, part = [*found, part], b""
        at += 7 + size
    return found
