"""Programs rewarded by tests: what is run, what counts, and programs that try to get by without."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from truing import doctor
from truing.context import current
from truing.core import sandbox
from truing.core.judging.scores import check_reward
from truing.errors import InputError
from truing.method import score
from truing.tables import Row
from truing.train.reward.passes_tests import passes_tests, program_of, same_output

pytestmark = pytest.mark.skipif(bool(sandbox.available()), reason=sandbox.available())

DOUBLES = ["assert f(2) == 4", "assert f(-1) == -2", "assert f('a') == 'aa'"]


def answer(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\nThat is all."


def rows(tests: object, *programs: str) -> list[Row]:
    return [{"prompt": "p", "completion": answer(p), "tests": tests} for p in programs]


def test_the_share_of_tests_and_all_of_them() -> None:
    programs = (
        "def f(x): return 2 * x",  # all
        "def f(x): return 2 * abs(x)",  # the first alone: abs raises for a text
        "def f(x): return x + x if isinstance(x, int) else x",  # two of three
        "def f(x): return None",
        "def g(x): return 2 * x",
        "def f(x) return 2 * x",
        "raise SystemExit(0)",
    )
    want = [1, 1 / 3, 2 / 3, 0, 0, 0, 0]
    assert passes_tests(rows(DOUBLES, *programs)) == pytest.approx(want)
    assert passes_tests(rows(DOUBLES, *programs), score="all") == [1, 0, 0, 0, 0, 0, 0]
    # Names that a test defines are there for the next one, and one text may hold many tests.
    linked = ["n = f(3)", "assert n == 6"]
    assert passes_tests(rows(linked, programs[0])) == [1]
    whole = "def check(candidate):\n    assert candidate(1) == 2\n\ncheck(f)"
    assert passes_tests(rows(whole, programs[0], programs[3])) == [1, 0]


def test_what_is_read_and_printed() -> None:
    tests = [{"input": "2\n3\n", "output": "5"}, {"input": "1\n1\n", "output": "2\n\n"}]
    programs = (
        "print(int(input()) + int(input()), end=' \\n\\n')",
        "a = int(input())\nprint(a + 3)",  # the first alone
        "print(5)\nraise ValueError",
        "if __name__ == '__main__':\n    print(int(input()) + int(input()))",
    )
    assert passes_tests(rows(tests, *programs)) == [1, 0.5, 0, 1]
    assert same_output("a \nb", "a\nb\n") and not same_output("a\nb", "ab")


def test_no_way_around_the_tests() -> None:
    tricks = (
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "import os\nos.write(2, b'0\\n1\\n2\\n'); print('passed'); os._exit(0)",
        "import builtins\nbuiltins.compile = lambda *a: (_ for _ in ()).throw(SystemExit)",
        "import threading\nthreading.Timer(0.01, lambda: None).start()",
    )
    assert passes_tests(rows(DOUBLES, *tricks)) == [0] * len(tricks)
    secret = "[k for k in (f.f_locals, f.f_globals) for k in k.values()]"
    hunters = (
        # all that frames hold, on the way out to the first, while program and tests run
        "import os, sys, re\ndef hunt():\n    f, seen = sys._getframe(1), []\n"
        f"    while f:\n        seen += {secret}\n        f = f.f_back\n"
        "    text = repr(seen) + open('program.py').read()\n"
        "    os.lseek(0, 0, 0)\n    text += repr(os.read(0, 99))\n"
        "    for m in set(re.findall('[0-9a-f]{32}', text)):\n"
        "        for fd in range(1, 64):\n            try:\n"
        "                os.write(fd, f'\\n{m} 0\\n{m} 1\\n{m} 2\\n'.encode())\n"
        "            except OSError: pass\n"
        "hunt()\ndef f(x):\n    hunt()\n    raise ValueError",
        "import builtins\nbuiltins.exec = lambda *a, **k: None",
        "import os\nos.write = lambda *a: 9",
    )
    assert passes_tests(rows(DOUBLES, *hunters)) == [0] * len(hunters)
    printed = [{"input": "", "output": "4"}]
    early = ("import os\nos._exit(0)", "print(4)\nraise SystemExit(1)")
    assert passes_tests(rows(printed, *early)) == [0, 0]


def test_what_does_not_end_or_takes_too_much() -> None:
    began = time.monotonic()
    hangs = "def f(x):\n    while x < 0: pass\n    return 2 * x"
    swells = "def f(x): return [0] * 10**9"
    noisy = "print('x' * 10**6)\ndef f(x): return 2 * x"
    made = passes_tests(rows(DOUBLES, hangs, swells, noisy, hangs), seconds=1.0)
    assert made == pytest.approx([1 / 3, 0, 1, 1 / 3])
    assert current().metrics[-1] == {
        "programs": 4,
        "without_program": 0,
        "timed_out": 2,
        "output_cut": 0,
    }
    assert time.monotonic() - began < 12
    late = [{"input": "", "output": "1"}, {"input": "", "output": "1"}]
    assert passes_tests(rows(late, "print(1, flush=True)\nwhile True: pass"), seconds=0.5) == [0]


def test_right_programs_may_print_much() -> None:
    loud = (
        "import sys\nsys.stderr.write('x' * 70_000)\nprint('y' * 70_000)\n"
        "def f(x):\n    print('z' * 70_000, file=sys.stderr, flush=True)\n    return 2 * x"
    )
    assert passes_tests(rows(DOUBLES, loud)) == [1]
    many = [f"assert f({i}) == {2 * i}" for i in range(3000)]  # 100 kB of marks
    assert passes_tests(rows(many, "def f(x): return 2 * x"), seconds=20.0) == [1]
    long = [{"input": "70000", "output": "ab" * 35_000}, {"input": "1000000", "output": "a"}]
    assert passes_tests(rows(long, "print('ab' * (int(input()) // 2))")) == [0.5]
    assert current().metrics[-1]["output_cut"] == 1


def test_programs_run_side_by_side() -> None:
    asked = rows(["pass"], *(f"import time\ntime.sleep(0.6)  # {i}" for i in range(4)))
    began = time.monotonic()
    assert passes_tests(asked) == [1] * 4
    if doctor.cores() > 1:
        assert time.monotonic() - began < 4 * 0.6


def test_no_more_run_at_once_than_there_are_cores_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A right program that shares a core with many others does not end in time."""
    real, alone = sandbox.run, threading.Lock()

    def run(*given: Any, **named: Any) -> sandbox.Outcome:
        assert alone.acquire(blocking=False)
        try:
            return real(*given, **named)
        finally:
            alone.release()

    monkeypatch.setattr(sandbox, "run", run)
    monkeypatch.setattr(doctor, "cores", lambda: 1)
    assert passes_tests(rows(["pass"], *(f"x = {i}" for i in range(3)))) == [1] * 3


def test_which_block_is_the_program() -> None:
    two = "```python\nfirst = 1\n```\nor better\n```py\nsecond = 2\n```\n```text\nout\n```"
    assert program_of(two) == "second = 2\n"
    assert program_of("```\nplain = 1\n```") == "plain = 1\n"
    assert program_of("- so:\n  ```python\n  x = 1\n  if x:\n      y = 2\n  ```") == (
        "x = 1\nif x:\n    y = 2\n"
    )
    assert (
        program_of("```python\ncut = 1") == program_of("x = 1") == program_of("```js\n1\n```") == ""
    )
    usage = "```python\nx = 1\n```\nUsage:\n```\n$ python x.py\n```"
    assert program_of(usage) == "x = 1\n"
    assert program_of("```\na = 1\n```\n```sh\nls\n```\n```\nb = 2\n```") == "b = 2\n"
    bare: Row = {"prompt": "p", "completion": "def f(x): return 2 * x", "tests": DOUBLES}
    assert passes_tests([bare]) == [0]


def test_code_before_the_program() -> None:
    row = rows(["assert area(1) == math.pi"], "def area(r): return math.pi * r * r")[0]
    assert passes_tests([row]) == [0]
    assert passes_tests([row | {"first": "import math"}], setup="first") == [1]
    assert passes_tests([row | {"first": None}], setup="first") == [0]


@pytest.mark.parametrize("tests", [None, [], "", [""], ["assert 1", 2], [{"input": "1"}], 3])
def test_rows_without_tests_are_named(tests: object) -> None:
    asked = [*rows(DOUBLES, "def f(x): return 2 * x"), *rows(tests, "x = 1")]
    with pytest.raises(InputError, match=r"row 2: column 'tests' must hold tests"):
        passes_tests(asked)


def test_as_a_reward_and_its_limits() -> None:
    asked = rows(DOUBLES, "def f(x): return 2 * x")
    ref: dict[str, object] = {"use": "passes_tests", "score": "all"}
    check_reward(ref)
    assert score("reward", ref, asked) == [1.0] and passes_tests([]) == []
    for wrong, told in (({"seconds": 0}, "seconds"), ({"memory_mb": 8}, "memory_mb")):
        with pytest.raises(InputError, match=told):
            check_reward({**ref, **wrong})


def test_without_the_sandbox_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise sandbox._Refused("no namespaces")

    monkeypatch.setattr(sandbox, "_probe", refused)
    with pytest.raises(InputError, match="only in the sandbox"):
        check_reward({"use": "passes_tests"})
