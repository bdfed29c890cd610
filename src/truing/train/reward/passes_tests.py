"""Reward programs by the tests that they pass, each run in the sandbox.

    share   r = tests passed / tests
    all     r = 1 where every test is passed, else 0

The program is the last block in an answer, between lines of three backticks, that is labelled as
Python, or where none is, the last one without a label; an answer without one gets 0. Tests come
with the row, as a text or a list, of one sort:

    "assert f(2) == 4"                a program that follows the answer's in the same interpreter
                                      and fails where it raises, as those of MBPP and HumanEval do
    {"input": "2", "output": "4"}     what the answer's program reads, and what it must print, by
                                      line and without white space at the ends, as in APPS

Programs run side by side, one for each core that there is for this process, up to eight, in the
walls of `core.sandbox`: without network, files or further processes, each within `seconds` and
`memory_mb`. Tests of the first sort
share one run and its time: what comes after a test that does not end counts as failed. A test is
passed when words that are drawn anew for every run are written down after it, so that exiting early
passes nothing; what the program prints meanwhile is dropped. Of what a program prints for a test of
the second sort, 64 KiB more than twice the output that is wanted are read: `output_cut` counts the
programs that printed more.

A program shares the interpreter with tests of the first sort. One that sets out to can still pass
them without solving anything: by results that say they equal whatever they are compared with, by
putting others in the place of built-in functions that tests call, by reading the tests, by tracing
the frames that run them, or by searching the interpreter's memory for the words. Tests of the
second sort leave no such way, but their inputs can be told apart.

Rewards by unit tests as in CodeRL, arXiv 2207.01780, without its values for errors; our own form.
"""

from __future__ import annotations

import re
import secrets
import textwrap
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

from truing import doctor
from truing.context import current
from truing.core import sandbox
from truing.errors import InputError
from truing.method import component
from truing.own_checks import checks
from truing.specify.texts import text_of
from truing.tables import Row

WHERE = "reward passes_tests"
SECONDS, MEMORY_MB = 5.0, 256
MOST = 8  # programs that run at once
PYTHON = ("py", "python", "python3")
BLOCK = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.M | re.S)
# The answer is a module of its own: what it does as `__main__` alone is not done. What it prints
# goes nowhere. The mark is read from stdin, which is emptied, and from then on no variable of any
# frame holds it: it stays inside of the iterators, which ask for a test's outcome after they have
# made its line.
HARNESS = """\
def _outcomes(module, program, tests, run, made, empty):
    empty(0, 0)
    try:
        run(made(program, "answer.py", "exec"), module.__dict__)
    except BaseException:
        return
    for test in tests:
        try:
            run(made(test, "test", "exec"), module.__dict__)
        except BaseException:
            yield False
        else:
            yield True

import os, sys
from functools import partial
from itertools import compress
def _told(tests, told, end):
    module = sys.modules["answer"] = type(sys)("answer")
    nowhere = os.open("/dev/null", os.O_WRONLY)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)
    lines = [b" %d\\n" % i for i in range(len(tests))]
    sum(map(partial(os.write, told), compress(
        map(os.read(0, {size}).__add__, lines),
        _outcomes(module, {program!r}, tests, exec, compile, os.ftruncate),
    )))
    end(0)
_told({tests!r}, os.dup(2), os._exit)
"""


@dataclass(frozen=True)
class Job:
    """A program and its tests: programs, or pairs of what is read and what must be printed."""

    program: str
    tests: tuple[str, ...] | tuple[tuple[str, str], ...]


def program_of(text: str) -> str:
    """The last block in an answer that says it is Python, else the last one that says nothing.

    What says nothing beside a block of Python is often how to call it, or what it prints. "" where
    there is neither.
    """
    blocks = [(kind.lower(), body) for kind, body in BLOCK.findall(text)]
    labelled = [body for kind, body in blocks if kind in PYTHON]
    found = labelled or [body for kind, body in blocks if not kind]
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


class Result(NamedTuple):
    """How many tests a program passes; whether a run was stopped late, or printed too much."""

    right: int = 0
    late: bool = False
    cut: bool = False


def passed(job: Job, seconds: float, memory_mb: int) -> Result:
    """Run a program's tests."""
    if not job.program.strip():
        return Result()
    if isinstance(job.tests[0], str):
        mark, tests = secrets.token_hex(16), list(job.tests)
        code = HARNESS.format(program=job.program, tests=tests, size=len(mark))
        # The marks alone come by stderr.
        done = sandbox.run(
            code,
            stdin=mark,
            seconds=seconds,
            memory_mb=memory_mb,
            keep=sandbox.OUTPUT + 64 * len(tests),
        )
        told = set(done.stderr.splitlines())
        return Result(sum(f"{mark} {i}" in told for i in range(len(tests))), done.timed_out)
    count, late, cut = 0, False, False
    for read, wanted in cast("tuple[tuple[str, str], ...]", job.tests):
        keep = sandbox.OUTPUT + 2 * len(wanted.encode("utf-8", "surrogatepass"))
        done = sandbox.run(job.program, stdin=read, seconds=seconds, memory_mb=memory_mb, keep=keep)
        count += done.exit_code == 0 and not done.timed_out and same_output(done.stdout, wanted)
        late, cut = late or done.timed_out, cut or done.cut
    return Result(count, late, cut)


def _all_passed(jobs: Sequence[Job], seconds: float, memory_mb: int) -> dict[Job, Result]:
    """`passed` of each job, some at once; equal ones run once."""
    some = list(dict.fromkeys(jobs))
    if not some:
        return {}
    pool = ThreadPoolExecutor(min(len(some), doctor.cores(), MOST))
    try:
        return dict(zip(some, pool.map(lambda j: passed(j, seconds, memory_mb), some), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


def _check(settings: Mapping[str, object]) -> None:
    """What `core.judging.scores` asks before anything is drawn: that programs can be run here."""
    limits = {"seconds": SECONDS, "memory_mb": MEMORY_MB} | dict(settings)
    sandbox.run(
        "pass", seconds=cast(float, limits["seconds"]), memory_mb=cast(int, limits["memory_mb"])
    )


def _check_tests(rows: list[Row], *, column: str = "tests") -> None:
    """What `core.rl.gold` asks before anything is drawn."""
    for i, row in enumerate(rows, 1):
        tests_of(row, column, f"{WHERE} row {i}")


@component("reward")
@checks(_check, rows=_check_tests)
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
    shares = [found[job].right / len(job.tests) for job in jobs]
    current().metric(
        programs=len(jobs),
        without_program=sum(not j.program for j in jobs),
        timed_out=sum(found[j].late for j in jobs),
        output_cut=sum(found[j].cut for j in jobs),
    )
    return shares if score == "share" else [float(s == 1) for s in shares]
