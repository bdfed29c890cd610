"""What is kept of frozen models and of own answers does not grow without limit."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from truing.core import files, reference
from truing.core.files import home, make_room, make_room_for, make_room_once, place
from truing.core.identity import hashes
from truing.core.identity.hashes import file_hash, reading_all
from truing.core.reference import Reference
from truing.core.sampling import SamplingSettings
from truing.core.trainer import own_samples
from truing.core.trainer.own_samples import kept
from truing.core.tree import Node
from truing.models import Model

KIB = 1 << 10


def _file(path: Path, age: float, size: int = 8 * KIB) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    when = path.stat().st_mtime - age
    os.utime(path, (when, when))
    return path


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, so that no other test's files count."""
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    return home()


def test_the_longest_unused_go(tmp_path: Path) -> None:
    made = {age: _file(tmp_path / f"{age:02d}" / "x.bin", age) for age in (50, 10, 30)}
    make_room(tmp_path, 24 * KIB)
    assert all(p.exists() for p in made.values())
    make_room(tmp_path, 23 * KIB)
    assert [age for age, p in made.items() if p.exists()] == [10, 30]
    make_room(tmp_path, 0)
    assert not any(p.exists() for p in made.values())
    make_room(tmp_path / "missing", 0)


def test_once_a_process_and_folder(tmp_path: Path) -> None:
    old, other = _file(tmp_path / "a" / "old.bin", 9), _file(tmp_path / "b" / "old.bin", 9)
    make_room_once(tmp_path / "a", 0)
    assert not old.exists() and other.exists()
    own = _file(tmp_path / "a" / "own.bin", 9)
    make_room_once(tmp_path / "a", 0)
    assert own.exists()  # what a process writes itself stays
    make_room_once(tmp_path / "b", 0)
    assert not other.exists()


def test_again_when_an_eighth_of_the_limit_was_written(tmp_path: Path) -> None:
    limit = 64 * KIB
    old = [_file(tmp_path / f"{age}.bin", age) for age in range(90, 80, -1)]  # 80 KiB
    make_room_for(tmp_path, limit, 8 * KIB)
    assert [p.exists() for p in old] == [False] * 3 + [True] * 7
    _file(tmp_path / "a.bin", 2)
    more = _file(tmp_path / "more.bin", 1, 32 * KIB)
    make_room_for(tmp_path, limit, 0)  # nothing more is written: no look
    assert old[3].exists()
    make_room_for(tmp_path, limit, 8 * KIB)
    assert not any(p.exists() for p in old[:8]) and old[8].exists() and more.exists()


def test_small_files_count_by_the_room_they_take(tmp_path: Path) -> None:
    made = [_file(tmp_path / f"{i}.json", i, 1) for i in range(4)]
    block = made[0].stat().st_blocks * 512
    make_room(tmp_path, 2 * max(block, 1))
    assert [p.exists() for p in made] == [True, True, False, False]


def _tree(token: int) -> Node:
    return Node((1, 5, token), (False, False, False), (Node((7, 2), (True, True)),))


def test_reference_values(tiny_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Model.open(tiny_path).load_module().module
    old = _file(own_home / "reference" / "ab" / "old.safetensors", 1e6)
    first = Reference("key", "float32")
    first.sweep(module, [_tree(9)])
    (path,) = [p for p in own_home.rglob("*.safetensors") if p != old]
    assert old.exists() and first.computed == 1
    _file(path.with_name("beside.safetensors"), 5e5)
    os.utime(path, (1, 1))  # not used for long: reading it makes it young
    again = Reference("key", "float32")
    again.sweep(module, [_tree(9)])
    assert again.cached == 1 and path.stat().st_mtime > 1e6
    block = path.stat().st_blocks * 512
    monkeypatch.setattr(reference, "LIMIT", 2 * block)
    third = Reference("key", "float32")
    third.sweep(module, [_tree(9)])
    third.sweep(module, [_tree(10)])
    left = set((own_home / "reference").rglob("*.safetensors"))
    assert path in left and old not in left and len(left) == 2
    assert (third.cached, third.computed) == (1, 1)
    # A long process does not outgrow the limit either, and has what it measured.
    many = [_tree(token) for token in range(11, 19)]
    for tree in many:
        third.sweep(module, [tree])
    left = list((own_home / "reference").rglob("*.safetensors"))
    assert sum(p.stat().st_blocks * 512 for p in left) <= 2 * block
    assert all(third.of(tree) for tree in many)


def test_own_answers(tiny_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Model.open(tiny_path).load_module()
    how = SamplingSettings(max_tokens=4, seed=1)
    old = _file(own_home / "own" / "ab" / "old.json", 1e6)
    one = [[((1, 5, 9), 0)]]
    made = kept(loaded, one, how)
    (path,) = [p for p in (own_home / "own").rglob("*.json") if p != old]
    assert old.exists()
    os.utime(path, (1, 1))
    assert kept(loaded, one, how) == made and path.stat().st_mtime > 1e6
    block = path.stat().st_blocks * 512
    monkeypatch.setattr(own_samples, "LIMIT", 2 * block)
    kept(loaded, [[((1, 5, 8), 0)]], how)
    left = set((own_home / "own").rglob("*.json"))
    assert path in left and old not in left and len(left) == 2
    for token in range(10, 15):
        kept(loaded, [[((1, 5, token), 0)]], how)
    assert len(list((own_home / "own").rglob("*.json"))) <= 2


def test_caches_that_cannot_be_written_stop_nothing(tiny_path: Path, own_home: Path) -> None:
    own_home.mkdir()
    for name in ("reference", "own"):
        (own_home / name).write_text("no folder can be made here")
    loaded = Model.open(tiny_path).load_module()
    first = Reference("key", "float32")
    first.sweep(loaded.module, [_tree(9)])
    assert first.computed == 1 and first.of(_tree(9))
    assert kept(loaded, [[((1, 5, 9), 0)]], SamplingSettings(max_tokens=4, seed=1))


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(OSError), files.new_file(tmp_path / "of" / "one") as partial:
        partial.write_text("half")
        raise OSError(28, "No space left on device")
    assert not list((tmp_path / "of").iterdir())
    with files.new_file(tmp_path / "two") as mine, ThreadPoolExecutor() as pool:
        mine.write_text("mine")
        pool.submit(files.write_text, tmp_path / "two", "another thread's").result()
        assert mine.read_text() == "mine"


def test_hashes_of_files_that_are_gone_are_forgotten(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [_file(own_home / name, 0, 2048 * KIB) for name in ("kept.bin", "gone.bin", "new.bin")]
    for some in (made[:2], made[2:]):
        monkeypatch.setattr(hashes, "_hashes", None)  # as in a process of its own
        for path in some:
            file_hash(path)
        made[1].unlink(missing_ok=True)
    told = json.loads((own_home / "hashes.json").read_text())
    assert [path for path, _ in told.values()] == [str(made[i].resolve()) for i in (0, 2)]


def test_links_to_a_file_share_its_hash(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, other = (own_home / name / "a.bin" for name in ("one", "two", "other"))
    _file(one, 0, 2048 * KIB)
    _file(other, 9, 2048 * KIB).write_bytes(b"y" * 2048 * KIB)
    place(one, two, link=True)
    third = _file(own_home / "third.bin", 5, 2048 * KIB)
    monkeypatch.setattr(hashes, "_hashes", None)  # what other tests have hashed
    opened, open_one = list[str](), Path.open

    def counted(path: Path, *args: Any, **how: Any) -> Any:
        opened.extend([path.parent.name] if path.suffix == ".bin" else [])
        return open_one(path, *args, **how)

    monkeypatch.setattr(Path, "open", counted)
    assert file_hash(one) == file_hash(two) and opened == ["one"]
    with reading_all():
        assert [file_hash(p) == file_hash(one) for p in (two, other, one)] == [True, False, True]
    assert opened == ["one", "two", "other"]
    monkeypatch.setattr(hashes, "_hashes", {})  # of a process that began before them
    assert file_hash(third) and len(json.loads((own_home / "hashes.json").read_text())) == 3
    two.unlink()
    assert [file_hash(one), file_hash(one)] == [file_hash(third)] * 2
    assert opened[3:] == ["home", "one"]
    # A file of the same number, size and time elsewhere is another.
    state = one.stat()
    name = f"{state.st_ino}-{state.st_size}-{state.st_mtime_ns}"
    monkeypatch.setattr(hashes, "_hashes", {name: [str(other.resolve()), "wrong"]})
    assert file_hash(one) == file_hash(third)


def test_a_store_on_another_disk_is_of_the_cache(own_home: Path, tmp_path: Path) -> None:
    for folder in (own_home, tmp_path / "large"):
        folder.mkdir()
    (own_home / "store").symlink_to(tmp_path / "large")
    assert files.is_managed(own_home / "store" / "file") and not files.is_managed(tmp_path)
