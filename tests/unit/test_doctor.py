"""What a process can have of a machine, or less where its container has less; GPUs of no use."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest
import torch

from truing import doctor, faults, keys
from truing.core import sandbox
from truing.errors import InputError

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


def test_processors_of_a_container(machine: Path) -> None:
    own = len(os.sched_getaffinity(0))
    assert doctor.cores() == own
    (machine / "proc/self/cgroup").write_text("0::/outer/inner\n")
    inner, outer = machine / "cgroup/outer/inner", machine / "cgroup/outer"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("max 100000\n")
    assert doctor.cores() == own
    (outer / "cpu.max").write_text("150000 100000\n")
    assert doctor.cores() == doctor.machine()["cores"] == 1
    (outer / "cpu.max").write_text("50000 100000\n")
    assert doctor.cores() == 1


def test_processors_of_a_container_of_the_first_version(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("4:memory:/\n5:cpu,cpuacct:/a\n0::/\n")
    folder = machine / "cgroup/cpu/a"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    for quota, found in ((-1, len(os.sched_getaffinity(0))), (100_000, 1)):
        (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        assert doctor.cores() == found


def test_more_threads_than_cores_are_told() -> None:
    assert "more than cores: set OMP_NUM_THREADS=2" in doctor.text({"cores": 2, "threads": 64})
    assert "OMP_NUM_THREADS" not in doctor.text({"cores": 2, "threads": 2})


NO_KERNEL = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel"


def test_a_gpu_of_no_use_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(dtype: str) -> float:
        raise RuntimeError(NO_KERNEL)

    monkeypatch.setattr(doctor, "matrix_speed", fail)
    monkeypatch.setattr(sandbox, "available", lambda: "denied here")
    facts = doctor.examine()
    assert str(facts["problem"]).endswith("execution on the device") and facts["memory_gib"]
    assert facts["sandbox"] == "no: denied here"
    with pytest.raises(InputError, match=r"GPU cannot be used.*CUDA_VISIBLE_DEVICES="):
        with faults.told("train/dpo"):
            fail("float32")


def test_extras_are_of_packages_that_truing_uses() -> None:
    root = Path(doctor.__file__).parents[2]
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    named = {re.split(r"[^\w-]", one)[0] for one in declared["dependencies"]}
    assert {*doctor.CORE} == named
    every = "\n".join(p.read_text() for p in (root / "src").rglob("*.py"))
    modules = {package: module for module, package in doctor.IMPORTED_AS.items()}
    through = {"gguf"}  # by transformers
    for extra, packages in declared["optional-dependencies"].items():
        for package in packages if extra not in doctor.OURS else ():
            name = re.split(r"[^\w-]", package)[0]
            module = modules.get(name, name.replace("-", "_"))
            used = re.search(rf"\b(?:import|from) {module}\b|\"{module}\"", every)
            assert used or name in through, (extra, name)


def test_extras_of_who_works_on_truing_are_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(doctor.__file__).parents[2]
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = declared["optional-dependencies"]
    lines = [f'{one}; extra == "{extra}"' for extra in extras for one in extras[extra]]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: lines)
    assert set(extras) - set(doctor.extras()) == {"dev", "trl"}


def test_one_place_says_what_everything_computes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of a step, and what its models are loaded on, cannot differ."""
    for found, wanted in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        assert doctor.device_of_machine() == keys.device_class() == wanted
    files = [p for p in Path(doctor.__file__).parent.rglob("*.py") if p != Path(doctor.__file__)]
    assert not [p for p in files if 'is_available() else "cpu"' in p.read_text("utf-8")]
