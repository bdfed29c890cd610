"""What is known from before is not imported again, and nothing but its own code makes it known."""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import truing
from truing import catalogue, described, keys, loading
from truing.cli import main
from truing.core.identity import code, remembered
from truing.core.modelfiles import weight_files
from truing.described import Description
from truing.entry import Entry
from truing.errors import InputError
from truing.method import Method, methods
from truing.store import Store
from truing.tables import Table

PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}


# What a plan names inside settings; decoders are named by models alone, and take no settings there.
REGISTERED = {e.id: e for e in catalogue.registered() if e.component != "decoder"}


@pytest.mark.parametrize("name", REGISTERED)
def test_every_description_comes_back_as_it_was(name: str) -> None:
    method = Method(REGISTERED[name])
    made = described.described(method.declared, method.function, method.doc)
    record = json.loads(json.dumps(described._written(made)))
    back = described._read(record)
    assert back == made and repr(back) == repr(made)
    assert method.entry.names == tuple(filter(None, _names(method)))


def _names(method: Method) -> list[str]:
    spec = getattr(method.declared, "__online__", None)
    return [spec.follows, spec.pools] if spec is not None else []


def package(folder: Path, text: str, helper: str = "") -> Entry:
    """The entry of a method in a package that is not loaded."""
    code.forget_unloaded()
    (folder / "bring").mkdir(exist_ok=True)
    (folder / "bring" / "__init__.py").write_text("")
    (folder / "bring" / "helper.py").write_text(helper)
    (folder / "bring" / "main.py").write_text(text)
    (found,) = catalogue.scan(folder / "bring" / "main.py", "bring.main", "select", "", "bring")
    return found


TEXT = '''"""Rows."""
from truing.method import method
from truing.tables import Table
from bring import helper


@method()
def some(data: Table, *, n: int = 2) -> Table:
    """Some.

    Args:
        n: how many.
    """
    return data
'''


@pytest.fixture
def other(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages, which are no longer loaded afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(truing, "began", float("inf"))
    yield tmp_path
    for name in [n for n in sys.modules if n.partition(".")[0] == "bring"]:
        del sys.modules[name]
    code.forget_unloaded()
    code._known.clear()


@pytest.mark.parametrize(
    ("text", "helper"),
    [
        (TEXT.replace("n: int = 2", "n: int = 3"), ""),
        (TEXT.replace("how many", "so many"), ""),  # which help and errors say
        (TEXT, "x = 1\n"),
    ],
)
def test_another_text_is_described_anew(other: Path, text: str, helper: str) -> None:
    entry = package(other, TEXT)
    made = Description({}, {}, "Table")
    described.keep(entry, made)
    assert described.find(entry) == made
    assert described.find(package(other, text, helper)) is None
    assert described.find(package(other, TEXT)) == made


def test_what_was_edited_while_the_process_ran_is_not_kept(
    other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = package(other, TEXT)
    monkeypatch.setattr(truing, "began", (other / "bring" / "main.py").stat().st_mtime)
    described.keep(entry, Description({}, {}, "Table"))
    assert described.find(entry) is None


def test_a_description_that_would_not_come_back_is_not_kept(other: Path) -> None:
    text = TEXT.replace("n: int = 2", "n: Own = Own(2)").replace(
        "@method", "class Own(int):\n    pass\n\n\n@method"
    )
    method = Method(package(other, text))
    assert method.settings["n"].default == 2
    assert described.find(method.entry) is None


def test_the_key_is_that_of_the_code_that_runs(other: Path, tmp_path: Path) -> None:
    """A file that is edited between the checks of a plan and its step."""
    method = Method(package(other, TEXT))
    described.keep(method.entry, described_by(other))
    data, store = Table("prompt", [{"prompt": "Why?"}]), Store(tmp_path / "store")
    before = keys.step_key(method, {"data": data}, {"n": 2}, 0)
    (other / "bring" / "main.py").write_text(TEXT.replace("return data", "return data.head(1)"))
    importlib.invalidate_caches()
    assert keys.step_key(method, {"data": data}, {"n": 2}, 0) == before
    run = keys.key_to_run(method, {"data": data}, {"n": 2}, 0, store)
    assert run != before and run == keys.step_key(method, {"data": data}, {"n": 2}, 0)


def test_so_is_what_it_imports_only_when_it_runs(other: Path, tmp_path: Path) -> None:
    text = TEXT.replace("from bring import helper\n", "").replace(
        "    return data", "    from bring import helper\n\n    return helper.few(data)"
    )
    method = Method(package(other, text, "def few(data):\n    return data\n"))
    data, store = Table("prompt", [{"prompt": "Why?"}]), Store(tmp_path / "store")
    assert method.function and "bring.helper" not in sys.modules
    before = keys.step_key(method, {"data": data}, {"n": 2}, 0)
    (other / "bring" / "helper.py").write_text("def few(data):\n    return data.head(1)\n")
    importlib.invalidate_caches()
    assert keys.key_to_run(method, {"data": data}, {"n": 2}, 0, store) != before


def test_what_other_packages_of_the_user_say_counts(other: Path) -> None:
    (other / "elsewhere.py").write_text("DEFAULT = 2\n")
    text = TEXT.replace("from bring import helper", "from elsewhere import DEFAULT")
    made = Description({}, {}, "Table")
    described.keep(package(other, text), made)
    assert described.find(package(other, text)) == made
    (other / "elsewhere.py").write_text("DEFAULT = 7\n")
    assert described.find(package(other, text)) is None


def described_by(folder: Path) -> Description:
    """Of `TEXT`."""
    known = methods["select/sample"]
    setting = replace(known.settings["n"], default=2)
    return Description(dict(known.inputs), {"n": setting}, "Table")


@pytest.mark.parametrize("text", ["", "{", "null", "abc\n[1]", "\xff"])
def test_a_damaged_memory_is_none(home: Path, text: str) -> None:
    remembered.keep("a" * 32, {"x": 1})
    assert remembered.find("a" * 32) == {"x": 1}
    (home / "known" / ("a" * 32)).write_bytes(text.encode("latin-1"))
    assert remembered.find("a" * 32) is None
    remembered.keep("a" * 32, {"x": 2})
    assert remembered.find("a" * 32) == {"x": 2}


def test_a_memory_that_cannot_be_written_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "file"))
    remembered.keep("a" * 32, 1)
    assert remembered.find("a" * 32) is None


def test_other_packages_are_another_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = remembered.installed()
    (tmp_path / "more-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert remembered.installed() != before
    again = remembered._installed.__wrapped__
    once = again((str(tmp_path),))
    os.utime(tmp_path / "more-1.0.dist-info", (1, 1))  # the same version, installed anew
    assert again((str(tmp_path),)) != once


def test_checks_that_passed_are_known_by_all_that_they_look_at(home: Path) -> None:
    method = methods["train/dpo"]
    settings, data = method.validate({}), Table("pair", [PAIR])
    found = {
        keys.asked(method, settings, {"data": data}),
        keys.asked(method, settings, {}),
        keys.asked(method, settings | {"beta": 0.2}, {"data": data}),
        keys.asked(method, settings, {"data": Table("pair", [PAIR, PAIR])}),
        keys.asked(method, settings | {"mix": {"sft": 0.5}}, {"data": data}),
        keys.asked(methods["train/ipo"], settings, {"data": data}),
    }
    assert len(found) == 6 and "" not in found
    assert keys.asked(method, settings | {"mix": {"nothing": 0.5}}, {}) == ""


def test_losses_that_online_methods_add_are_in_the_key() -> None:
    method = methods["train/grpo"]
    plain = keys.modules_of(method, method.validate({}), {})
    mixed = keys.modules_of(method, method.validate({"mix": {"ipo": 0.1}}), {})
    assert mixed - plain == {methods["train/ipo"].entry.module}


def test_weights_that_were_whole_are_opened_again_once_they_differ(
    tiny_path: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_path, tmp_path / "m")
    weight_files.check_weights(tmp_path / "m")
    monkeypatch.delitem(sys.modules, weight_files.READER, raising=False)
    weight_files.check_weights(tmp_path / "m")
    assert weight_files.READER not in sys.modules
    weights = tmp_path / "m" / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 8)
    with pytest.raises(InputError, match="damaged or cut off"):
        weight_files.check_weights(tmp_path / "m")


def test_pytorch_is_asked_once_for_each_state_of_the_drivers(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    state = ["linux", "/dev/nvidia0"]

    def found() -> str:
        asked.append(state[-1])
        return "cuda"

    monkeypatch.setattr(keys, "drivers", lambda: state)
    monkeypatch.setattr(keys, "device_of_machine", found)
    monkeypatch.setitem(sys.modules, "torch", sys)
    assert [keys.device_class() for _ in range(2)] == ["cuda"] * 2
    assert len(asked) == 2  # where it is there anyway, it is asked
    monkeypatch.delitem(sys.modules, "torch")
    for more in ([], ["CUDA_VISIBLE_DEVICES=1"]):
        state += more
        assert [keys.device_class() for _ in range(3)] == ["cuda"] * 3
    assert len(asked) == 4
    state.clear()
    assert keys.device_class() == "cpu" and len(asked) == 4


def test_a_gpu_that_cannot_be_used_is_looked_for_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ["cuda", "cpu", "cpu"]
    monkeypatch.setattr(keys, "drivers", lambda: ["linux", "/dev/nvidia0"])
    monkeypatch.setattr(keys, "device_of_machine", found.pop)
    monkeypatch.delitem(sys.modules, "torch")
    assert [keys.device_class() for _ in range(4)] == ["cpu", "cpu", "cuda", "cuda"]
    assert not found


@pytest.mark.parametrize("own", [True, False])
def test_only_a_command_keeps_for_good_what_it_has_imported(
    monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    """A notebook or a test calls `main` with words: its own garbage must go as before.

    A command's later garbage, such as models, must go, too.
    """
    frozen: list[bool] = []
    torch = sys.modules["torch"]

    def imported(name: str) -> object:
        sys.modules["torch"] = torch
        return sys.modules[name]

    entry = methods["select/sample"].entry
    assert loading.module_of(entry)
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    monkeypatch.setattr(loading, "in_command", not own)
    monkeypatch.setattr(sys, "argv", ["truing", "doctor", "--nothing"])
    assert main(None if own else ["doctor", "--nothing"]) == 2
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(importlib, "import_module", imported)
    for _ in range(3):
        assert loading.module_of(entry).__name__ == "truing.select.sample"
    assert frozen == ([False] if own else []) and gc.isenabled()
    loading.in_command = False
