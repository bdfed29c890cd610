"""`truing doctor`: what is installed, what is missing, and how fast this machine multiplies."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from truing.context import Json

CORE = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pyarrow",
    "pydantic",
    "jinja2",
    "pyyaml",
    "httpx",
    "huggingface-hub",
)
OURS = ("dev", "trl")  # extras for who works on truing: nothing that a user runs lacks them
IMPORTED_AS = {"sklearn": "scikit-learn", "yaml": "pyyaml"}  # where a package has another name
PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
# Of a group of processes: limit, bytes in use, and which of these can be given back.
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")
# Of its processors: microseconds that it may compute in a period, and how long that is.
QUOTA_V1, QUOTA_V2 = ("cpu.cfs_quota_us", "cpu.cfs_period_us"), ("cpu.max",)
# Files of GPU drivers under /dev; and variables that decide which GPUs a process sees.
DEVICES = ("nvidia*", "nvhost*", "nvgpu*", "nvmap", "kfd", "dxg")
HIDING = (
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "CUDA_DEVICE_ORDER",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
)
SIZES = {"cpu": 1024, "cuda": 8192}  # of matrices whose products are timed


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def extras() -> dict[str, list[str]]:
    """Packages of each extra, as the installed distribution declares them; without `OURS`."""
    try:
        declared = metadata.requires("truing") or []
    except metadata.PackageNotFoundError:
        declared = []
    found: dict[str, list[str]] = {}
    for line in declared:
        match = re.match(r"([\w.-]+).*;.*extra == [\"']([\w-]+)[\"']", line)
        if match and match[2] not in OURS:
            found.setdefault(match[2], []).append(match[1])
    return found


def extra_of(module: str) -> str:
    """The extra that brings an importable module; "" when none does."""
    package = IMPORTED_AS.get(module, module)
    for extra, packages in extras().items():
        if package.replace("_", "-") in packages or package in packages:
            return extra
    return ""


def _groups(kind: str) -> Iterator[tuple[Path, bool]]:
    """(folder, whether of the second version) of each group of processes that this one is in.

    A container's too. `kind` is what the group limits.
    """
    groups = Path(PROC, "self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, kinds, name = line.split(":", 2)
        if kinds and kind not in kinds.split(","):
            continue
        root = CGROUP / kind if kinds else CGROUP
        here = root / name.lstrip("/")
        # A container sees its own group at the root, under whatever name it has outside.
        for folder in [here, *here.parents]:
            if not folder.is_relative_to(root):
                break
            yield folder, not kinds


def _limit(folder: Path, most: str, used: str, idle: str) -> list[tuple[int, int]]:
    """(limit, bytes in use) of a group that has a limit.

    Pages of files that were not used lately can be given back: they do not count as in use.
    """
    try:
        limit, now = (int((folder / name).read_text()) for name in (most, used))
        facts = dict(x.split() for x in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such file, or "max"
        return []
    return [(limit, max(0, now - int(facts.get(idle, 0))))]


def memory_gib() -> tuple[float, float]:
    """(total, available) memory in GiB; zeros where the system does not say.

    That of this machine, or of the container that this process is in where that has less.
    """
    path = Path(PROC, "meminfo")
    if not path.exists():
        return 0.0, 0.0
    facts = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    total, free = (int(facts.get(n, "0 kB").split()[0]) << 10 for n in ("MemTotal", "MemAvailable"))
    limits = [x for at, new in _groups("memory") for x in _limit(at, *(V2 if new else V1))]
    total = min([total, *(most for most, _ in limits)])
    free = min([free, *(max(0, most - used) for most, used in limits)])
    return round(total / 2**30, 1), round(free / 2**30, 1)


def cores() -> int:
    """Processors that this process can have: fewer than the machine's where its container has."""
    there = hasattr(os, "sched_getaffinity")
    found = len(os.sched_getaffinity(0)) if there else os.cpu_count() or 1
    for folder, new in _groups("cpu"):
        try:
            words = " ".join((folder / n).read_text() for n in (QUOTA_V2 if new else QUOTA_V1))
            most, period = map(int, words.split())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if most > 0:  # -1 is none
            found = min(found, max(1, most // period))
    return found


def cpu_name() -> str:
    """The processor's own name for itself."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_of_machine() -> str:
    """ "cuda" where PyTorch can use a GPU now, else "cpu": what everything computes on."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def matrix_speed(dtype: str = "float32", seconds: float = 1.0, size: int = 0) -> float:
    """Matrix products per second of this machine in GFLOP/s, on its accelerator if it has one.

    Args:
        size: of the matrices; 0 for such as keep the device busy.
    """
    import torch

    device = device_of_machine()
    size = size or SIZES[device]
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    for _ in range(3):
        torch.mm(a, a)
    if device == "cuda":
        torch.cuda.synchronize()
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(4):
            torch.mm(a, a)
        n += 4
        if device == "cuda":
            torch.cuda.synchronize()
    return round(2 * size**3 * n / (time.perf_counter() - start) / 1e9, 1)


def machine() -> dict[str, Json]:
    """Processor, cores and memory of this machine: what is known without PyTorch."""
    return {"cpu": cpu_name(), "cores": cores(), "memory_gib": memory_gib()[0]}


def hardware() -> dict[str, Json]:
    """Processor, cores, memory and accelerators of this machine."""
    import torch

    gpus: list[Json] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found: dict[str, Json] = {"threads": torch.get_num_threads(), "gpus": gpus}
    return machine() | found


def drivers() -> list[str]:
    """What the drivers of GPUs show of themselves, and what hides GPUs; none where there is none.

    As long as this is the same, and the packages are, PyTorch finds a GPU or finds none.
    """
    if sys.platform == "darwin":  # whose GPUs are of another sort
        return []
    found = sorted(str(path) for pattern in DEVICES for path in Path("/dev").glob(pattern))
    if not found and sys.platform == "linux":
        return []
    version = Path(PROC, "driver/nvidia/version")
    found += [version.read_text()] if version.is_file() else []
    return [sys.platform, *found, *(f"{n}={os.environ.get(n, '')}" for n in HIDING)]


def _measured() -> dict[str, object]:
    """Hardware and the two-second speed probe; what is wrong where torch cannot be used."""
    try:
        return {
            **hardware(),
            "memory_free_gib": memory_gib()[1],
            "gflops_float32": matrix_speed("float32"),
            "gflops_bfloat16": matrix_speed("bfloat16"),
        }
    except (ImportError, OSError) as error:
        return {"cpu": cpu_name(), "problem": f"torch cannot be imported: {error}"}
    except RuntimeError as error:  # of a GPU, in many lines
        first = str(error).partition("\n")[0]
        return {**machine(), "problem": f"torch cannot compute here: {first}"}


def examine() -> dict[str, object]:
    """All facts, the two-second speed probe included."""
    from truing import __version__
    from truing.core import sandbox
    from truing.core.modelfiles import fetch

    denied = sandbox.available()
    return {
        "truing": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {p: _version(p) for p in CORE},
        "extras": {n: all(map(_version, packages)) for n, packages in sorted(extras().items())},
        "sandbox": f"no: {denied}" if denied else "yes",
        **_measured(),
        "home": str(fetch.home()),
        "models_present": [m["name"] for m in fetch.catalogue() if m["present"]],
    }


def text(facts: dict[str, object]) -> str:
    """The facts for a person to read."""
    lines: list[str] = []
    threads, most = facts.get("threads"), facts.get("cores")
    # PyTorch knows nothing of a container's quota.
    slow = isinstance(threads, int) and isinstance(most, int) and threads > most
    for name, value in facts.items():
        if isinstance(value, dict):
            lines.append(f"{name}:")
            for key, inner in value.items():
                shown = "missing" if inner in ("", False) else "yes" if inner is True else inner
                hint = f"   pip install 'truing[{key}]'" if inner is False else ""
                lines.append(f"  {key:<14} {shown}{hint}")
        else:
            shown = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
            own = f"   more than cores: set OMP_NUM_THREADS={most}"
            lines.append(f"{name:<18} {shown}{own if slow and name == 'threads' else ''}")
    return "\n".join(lines)
