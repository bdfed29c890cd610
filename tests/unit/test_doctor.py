"""Memory that a process can have: the machine's, or less where its container has less."""

from __future__ import annotations

from pathlib import Path

import pytest

from truing import doctor

GIB = 2**30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 GiB, 48 of them available; its groups of processes are not said."""
    monkeypatch.setattr(doctor, "PROC", tmp_path / "proc")
    monkeypatch.setattr(doctor, "CGROUP", tmp_path / "cgroup")
    (tmp_path / "proc/self").mkdir(parents=True)
    facts = {"MemTotal": 64, "MemAvailable": 48}
    lines = [f"{n}:  {gib * 2**20} kB" for n, gib in facts.items()]
    (tmp_path / "proc/meminfo").write_text("\n".join(lines))
    return tmp_path


def group(folder: Path, names: tuple[str, str, str], limit: object, used: int, idle: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used * GIB}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {idle * GIB}\n")


def test_memory_of_the_machine(machine: Path) -> None:
    assert doctor.memory_gib() == (64.0, 48.0)
    (machine / "proc/self/cgroup").write_text("0::/\n")
    assert doctor.memory_gib() == (64.0, 48.0)
    group(machine / "cgroup", doctor.V2, "max", 10, 0)
    assert doctor.memory_gib() == (64.0, 48.0)
    (machine / "proc/meminfo").unlink()
    assert doctor.memory_gib() == (0.0, 0.0)


def test_memory_of_a_container(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("0::/outer/inner\n")
    # The innermost has no limit; what is read of files lies idle and can be given back.
    group(machine / "cgroup/outer/inner", doctor.V2, "max", 1, 0)
    group(machine / "cgroup/outer", doctor.V2, 8 * GIB, 6, 4)
    assert doctor.memory_gib() == (8.0, 6.0)
    group(machine / "cgroup/outer/inner", doctor.V2, 7 * GIB, 5, 1)
    assert doctor.memory_gib() == (7.0, 3.0)
    group(machine / "cgroup/outer/inner", doctor.V2, 7 * GIB, 9, 0)  # over its limit for a moment
    assert doctor.memory_gib() == (7.0, 0.0)


def test_memory_of_a_container_of_the_first_version(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("5:cpu,cpuacct:/a\n4:memory:/b/unseen\n0::/\n")
    group(machine / "cgroup/memory", doctor.V1, 16 * GIB, 12, 2)
    group(machine / "cgroup/cpu", doctor.V1, GIB, 1, 0)
    assert doctor.memory_gib() == (16.0, 6.0)
    group(machine / "cgroup/memory", doctor.V1, 2**63 - 4096, 12, 2)  # what "no limit" is here
    assert doctor.memory_gib() == (64.0, 48.0)
