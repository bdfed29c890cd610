"""A folder is replaced whole, at whatever moment the process is killed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from truing.core import files
from truing.core.files import new_folder
from truing.errors import InputError
from truing.models import Model

KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from truing.core import files

moment, seen = int(sys.argv[2]), 0

def deadly(real):
    def call(*given, **named):
        global seen
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **named)
    return call

Path.rename = deadly(Path.rename)
os.unlink = deadly(os.unlink)
os.rmdir = deadly(os.rmdir)
with files.new_folder(Path(sys.argv[1])) as partial:
    for name in ("a", "b", "c"):
        (partial / name).write_text("new")
"""


def _fill(target: Path, text: str) -> None:
    with new_folder(target) as partial:
        for name in ("a", "b", "c"):
            (partial / name).write_text(text)


def _words(target: Path) -> list[str]:
    return [p.read_text() for p in sorted(target.iterdir())]


def _alone(target: Path) -> bool:
    """Nothing lies beside it but what a killed process was about to write."""
    left = [p.name for p in target.parent.iterdir() if p.name != target.name]
    return not any(n.endswith((".old", ".gone")) for n in left)


def test_every_file_and_every_name_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of folders below it, its own new name, and those of new folders above it."""
    flushed: list[str] = []
    sync = os.fsync

    def noted(handle: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    target = tmp_path / "new" / "er" / "made"
    with new_folder(target) as partial:
        (partial / "below").mkdir()
        (partial / "below" / "a").write_text("new")
    assert flushed[:3] == [str(partial / "below"), str(partial / "below" / "a"), str(partial)]
    assert flushed[3:] == [str(target.parent), str(target.parent.parent), str(tmp_path)]
    flushed.clear()
    _fill(target, "again")
    assert flushed[3:] == [flushed[3], str(target.parent)]


def test_a_file_system_that_flushes_no_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def picky(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(os, "fsync", picky)
    _fill(tmp_path / "made", "new")
    assert _words(tmp_path / "made") == ["new"] * 3


@pytest.mark.parametrize("moment", range(1, 9))
def test_killed_at_any_moment(moment: int, tmp_path: Path) -> None:
    target = tmp_path / "model"
    _fill(target, "old")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(target), str(moment)], timeout=120, check=False
    )
    assert done.returncode == (-signal.SIGKILL if moment < 8 else 0)
    # Whole where it is there; the next call finds the old one or the new one, and no third thing.
    assert not target.exists() or _words(target) in (["old"] * 3, ["new"] * 3)
    with pytest.raises(ZeroDivisionError), new_folder(target):
        raise ZeroDivisionError
    assert _words(target) in (["old"] * 3, ["new"] * 3) and _alone(target)
    _fill(target, "last")
    assert _words(target) == ["last"] * 3 and _alone(target)


LAYERED = """
import os, sys
from pathlib import Path
from truing.core import files

target = Path(sys.argv[1])
with files.new_folder(target) as partial:
    (partial / "a").write_text("new")
assert [p.name for p in target.parent.iterdir()] == ["model"]
assert [p.read_text() for p in target.iterdir()] == ["new"]
files.put_aside(target.parent.parent / "other", target.parent / "aside", "b")
assert os.listdir(target.parent.parent) == ["models"]
"""


def test_a_folder_of_a_container_s_image_is_replaced(tmp_path: Path) -> None:
    """Where lower layers lie (overlayfs) files can be deleted, and folders take no other name."""
    for name in ("lower/models/model", "lower/other", "upper", "work", "seen"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("models/model/a", "models/model/b", "other/a", "other/b"):
        (tmp_path / "lower" / name).write_text("old")
    layers = "lowerdir=lower,upperdir=upper,workdir=work,userxattr"
    mount = f"mount -t overlay -o {layers} none seen"
    probe = ["unshare", "-Urm", "sh", "-c", mount]
    there = shutil.which("unshare")
    if not there or subprocess.run(probe, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("this system lets no user mount layers in a namespace")
    line = f'{mount} && exec "$0" -c "$1" seen/models/model'
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", line, sys.executable, LAYERED],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_folder_has_the_rights_that_the_user_gives(tmp_path: Path) -> None:
    earlier = os.umask(0o007)
    try:
        _fill(tmp_path / "made", "new")
    finally:
        os.umask(earlier)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o770


def test_a_save_after_a_kill_is_not_refused(tiny_path: Path, tmp_path: Path) -> None:
    """A half-deleted folder used to hold other files."""
    model, target = Model.open(tiny_path), tmp_path / "saved"
    model.save(target)
    target.rename(tmp_path / ".saved.abcdefgh.0.old")
    model.save(target)
    assert Model.load(target).key == model.key
    assert _alone(target)


def test_neighbours_with_longer_names_are_left_alone(tmp_path: Path) -> None:
    other = tmp_path / ".model.b.abcdefgh.0.old"
    other.mkdir()
    _fill(tmp_path / "model", "new")
    assert other.is_dir()


def test_files_and_links_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("file", "link"):
        with pytest.raises(InputError, match="not a folder"):
            _fill(tmp_path / name, "new")
    assert (tmp_path / "file").read_text() == "mine" and not _words(tmp_path / "folder")


def test_another_process_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It puts its own folder there after the old one was put aside: it is replaced in turn."""
    target = tmp_path / "model"
    _fill(target, "old")
    real, calls = Path.rename, 0

    def rename(self: Path, to: Path) -> Path:
        nonlocal calls
        made = real(self, to)
        calls += 1
        if calls == 1:
            target.mkdir()
            (target / "a").write_text("theirs")
        return made

    monkeypatch.setattr(Path, "rename", rename)
    _fill(target, "new")
    assert _words(target) == ["new"] * 3 and _alone(target)


def test_a_target_that_cannot_be_written_stays(tmp_path: Path) -> None:
    target = tmp_path / "model"
    _fill(target, "old")

    class Denied(type(target)):  # type: ignore[misc]
        def rename(self, to: Path) -> Path:
            if to == target and self.suffix != ".old":
                raise PermissionError(13, os.strerror(13))
            return Path(shutil.move(self, to))

    partial = Denied(tmp_path / ".model.abcdefgh")
    partial.mkdir()
    with pytest.raises(PermissionError):
        files._swap(partial, target)
    assert _words(target) == ["old"] * 3
