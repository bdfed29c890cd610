"""Reward programs by the tests that they pass, each run in the sandbox.

    share   r = tests passed / tests
    all     r = 1 where every test is passed, else 0

The program is the last block of Python in an answer, between lines of three backticks; an answer
without one gets 0. Tests come with the row, as a text or a list, of one sort:

    "assert f(2) == 4"                a program that follows the answer's in the same interpreter
                                      and fails where it raises, as those of MBPP and HumanEval do
    {"input": "2", "output": "4"}     what the answer's program reads, and what it must print, by
                                      line and without white space at the ends, as in APPS

Programs run side by side, one for each core up to eight, in the walls of `core.sandbox`: without
network, files or further processes, each within `seconds` and `memory_mb`. Tests of the first sort
share one run and its time: what comes after a test that does not end counts as failed. A test is
passed when words that are drawn anew for every run are written down after it, so that exiting early
passes nothing. A program shares the interpreter with these tests, so one that sets out to change
what `assert` compares may succeed: tests of the second sort leave no such way.

Rewards by unit tests as in CodeRL, arXiv 2207.01780, without its values for errors; our own form.
"""

from __future__ import annotations

import os
import re
import secrets
import textwrap
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, cast

from truing.context import current
from truing.core import sandbox
from truing.errors import InputError
from truing.method import component
from truing.specify.texts import text_of
from truing.tables import Row

WHERE = "reward passes_tests"
SECONDS, MEMORY_MB = 5.0, 256
MOST = 8  # programs that run at once
PYTHON = ("", "py", "python", "python3")
BLOCK = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.M | re.S)
# The answer is a module of its own: what it does as `__main__` alone is not done.
HARNESS = """\
def _run(write, module, modules, program, tests, mark):
    modules["answer"] = module
    try:
        exec(compile(program, "answer.py", "exec"), module.__dict__)
    except BaseException:
        return
    for i, test in enumerate(tests):
        try:
            exec(compile(test, f"test {{i + 1}}", "exec"), module.__dict__)
        except BaseException:
            continue
        write(2, f"\\n{{mark}} {{i}}\\n".encode())

import os, sys
_run(os.write, type(sys)("answer"), sys.modules, {program!r}, {tests!r}, {mark!r})
os._exit(0)
"""


@dataclass(frozen=True)
class Job:
    """A program and its tests: programs, or pairs of what is read and what must be printed."""

    program: str
    tests: tuple[str, ...] | tuple[tuple[str, str], ...]


def program_of(text: str) -> str:
    """The last block of Python in an answer; "" where there is none."""
    found = [body for kind, body in BLOCK.findall(text) if kind.lower() in PYTHON]
    return textwrap.dedent(found[-1]) if found else ""


def tests_of(row: Row, column: str, where: str) -> tuple[str, ...] | tuple[tuple[str, str], ...]:
    """The tests that a row brings; an InputError where they are none."""
    given = row.get(column)
    items = cast("list[object]", given) if isinstance(given, list) else [given]
    programs = [t for t in items if isinstance(t, str) and t.strip()]
    if items and len(programs) == len(items):
        return tuple(programs)
    pairs: list[tuple[str, str]] = []
    for item in items:
        facts = cast("Mapping[str, object]", item) if isinstance(item, Mapping) else {}
        read, printed = facts.get("input"), facts.get("output")
        if isinstance(read, str) and isinstance(printed, str):
            pairs.append((read, printed))
    if items and len(pairs) == len(items):
        return tuple(pairs)
    raise InputError(
        f"column {column!r} must hold tests: programs, or pairs {{input: ..., output: ...}}",
        where=where,
        seen=given,
        fix="Name the column of the tests: {use: passes_tests, column: ...}",
    )


def same_output(said: str, wanted: str) -> bool:
    """True where two outputs agree by line, white space at the ends of lines and texts aside."""
    a, b = ([line.rstrip() for line in text.strip().splitlines()] for text in (said, wanted))
    return a == b


def passed(job: Job, seconds: float, memory_mb: int) -> tuple[int, bool]:
    """(tests that a program passes, whether one of its runs was stopped at the time limit)."""
    if not job.program.strip():
        return 0, False
    if isinstance(job.tests[0], str):
        mark = secrets.token_hex(16)
        code = HARNESS.format(program=job.program, tests=list(job.tests), mark=mark)
        done = sandbox.run(code, seconds=seconds, memory_mb=memory_mb)
        told = set(done.stderr.splitlines())
        return sum(f"{mark} {i}" in told for i in range(len(job.tests))), done.timed_out
    count, late = 0, False
    for read, wanted in cast("tuple[tuple[str, str], ...]", job.tests):
        done = sandbox.run(job.program, stdin=read, seconds=seconds, memory_mb=memory_mb)
        count += done.exit_code == 0 and not done.timed_out and same_output(done.stdout, wanted)
        late |= done.timed_out
    return count, late


def _all_passed(jobs: Sequence[Job], seconds: float, memory_mb: int) -> dict[Job, tuple[int, bool]]:
    """`passed` of each job, some at once; equal ones run once."""
    some = list(dict.fromkeys(jobs))
    if not some:
        return {}
    pool = ThreadPoolExecutor(min(len(some), os.cpu_count() or 1, MOST))
    try:
        return dict(zip(some, pool.map(lambda j: passed(j, seconds, memory_mb), some), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


@component("reward")
def passes_tests(
    rows: list[Row],
    *,
    column: str = "tests",
    setup: str = "",
    score: Literal["share", "all"] = "share",
    seconds: float = SECONDS,
    memory_mb: int = MEMORY_MB,
) -> list[float]:
    """Share of its tests that the program in an answer passes in the sandbox, or all of them.

    Args:
        column: of the tests: a program, a list of them, or a list of {input: ..., output: ...}.
        setup: column with code that stands before the answer's, such as imports; "" for none.
        score: the share of the tests, or 1 for all of them and 0 for any less.
        seconds: that a run may take: of all test programs of an answer, or of one pair.
        memory_mb: that it may take.
    """
    jobs: list[Job] = []
    for i, row in enumerate(rows, 1):
        tests, program = tests_of(row, column, f"{WHERE} row {i}"), program_of(text_of(row))
        before = str(row.get(setup) or "") if setup else ""
        jobs.append(Job(f"{before}\n{program}" if before and program else program, tests))
    found = _all_passed(jobs, seconds, memory_mb)
    shares = [found[job][0] / len(job.tests) for job in jobs]
    current().metric(
        programs=len(jobs), without_program=sum(not j.program for j in jobs),
        timed_out=sum(found[j][1] for j in jobs),
    )  # fmt: skip
    return shares if score == "share" else [float(s == 1) for s in shares]


def _check(settings: Mapping[str, object]) -> None:
    """What `core.scores` asks before anything is drawn: that programs can be run here at all."""
    limits = {"seconds": SECONDS, "memory_mb": MEMORY_MB} | dict(settings)
    sandbox.run(
        "pass", seconds=cast(float, limits["seconds"]), memory_mb=cast(int, limits["memory_mb"])
    )


passes_tests.__dict__["__truing_check__"] = _check
