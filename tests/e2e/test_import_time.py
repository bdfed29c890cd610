"""`import truing`, `truing --help` and `truing list` take under a second and never import torch."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

# What these three may not cost: each takes seconds or megabytes to import.
HEAVY = ("torch", "transformers", "tokenizers", "pyarrow", "numpy", "pydantic", "httpx", "peft")
CODE = """
import sys, time
began = time.process_time()
{what}
spent = time.process_time() - began
heavy = [name for name in {heavy} if name in sys.modules]
print(f"{{spent:.3f}} {{' '.join(heavy)}}", file=sys.stderr)
"""
MAIN = "from truing.cli import main\n"
WHAT = {
    "import truing": "import truing",
    "truing --help": MAIN + "try:\n    main(['--help'])\nexcept SystemExit:\n    pass",
    "truing list": MAIN + "assert main(['list']) == 0",
    "truing list --json": MAIN + "assert main(['list', '--json']) == 0",
    "a wrong word": MAIN + "assert main(['lst']) == 2",
    "len(truing.methods)": "import truing\nassert len(truing.methods) > 10",
    "the decorators": (
        "import truing.method\nfrom truing import method, component\n"
        "assert method() and component('check') and not isinstance(truing.method, type(sys))"
    ),
}


@pytest.mark.parametrize("name", WHAT)
def test_it_is_light(name: str) -> None:
    code = CODE.format(what=WHAT[name], heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spent, *heavy = done.stderr.splitlines()[-1].split()
    assert not heavy
    # Time of this process alone, which other work on the machine does not lengthen.
    assert float(spent) < 1.0


def test_the_command_starts_at_once() -> None:
    """Wall time, the best of three: the machine may be busy."""
    took: list[float] = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "truing.cli", "--version"], capture_output=True, text=True
        )
        took.append(time.perf_counter() - began)
        assert done.returncode == 0 and done.stdout.startswith("truing ")
        if took[-1] < 1.0:
            break
    assert min(took) < 1.0


@pytest.mark.parametrize("method", ["specify lint", "merge slerp", "select checked"])
def test_help_of_a_method_brings_what_it_needs_alone(method: str) -> None:
    """What an input holds is told without the engine, where the method is none of training."""
    words = [*method.split(), "--help"]
    what = f"try:\n    main({words})\nexcept SystemExit:\n    pass"
    code = CODE.format(what=MAIN + what, heavy=("transformers", "truing.core.objective"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "inputs:" in done.stdout
    assert len(done.stderr.splitlines()[-1].split()) == 1
