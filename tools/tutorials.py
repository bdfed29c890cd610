"""Run the fenced blocks of a tutorial in order, in an empty folder, and fail where one fails.

    ```bash                 by bash, which stops at the first failing command
    ```python               in one Python process for the whole tutorial
    ```yaml file=NAME       (or python, jsonl, ...) is written to that file
    ```text                 and all others are for reading only

What a block leaves running, such as a server, is ended after the last one. TRUING_HOME is a
temporary one that shares the models that were fetched before.

The README's blocks run as well, on a made-up model and few prompts: `SMALLER` says what is changed
in them, so that they take seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from truing.core import files
from truing.core.modelfiles import fetch

FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```[ ]*$", re.M | re.S)
MODELS = ("smollm2-135m-instruct", "minilm")
WORKERS = 2  # pages that run at a time
# In the README's blocks the one is written instead of the other, which must stand there. Neither
# topic nor margin is asked of pairs: what a model writes that was never taught is gibberish.
SMALLER = (
    ("smollm2-135m-instruct", "tiny"),
    ("limit=64", "limit=24"),
    ("held_out=32", "held_out=8"),
    ("k=4, max_tokens=64", "k=8, max_tokens=48, on_topic=-1.0, margin=0.0"),
    ("(way, held_out, rules)", "(way, held_out, rules, max_tokens=16)"),
    ("asked: everyday_prompts", "asked: few.jsonl"),
    ("held_out: 64", "held_out: 8"),
    (
        "prompts: training, principles: rules",
        "prompts: training, principles: rules, k: 8, max_tokens: 48, on_topic: -1.0, margin: 0.0",
    ),
    (
        "prompts: held_out, principles: rules",
        "prompts: held_out, principles: rules, max_tokens: 16",
    ),
)
END = "\x1eblock: "  # ends what a block of Python printed; the word after it says how it went
WORKER = """
import json, sys, traceback
names = {"__name__": "__main__"}
for line in sys.stdin:
    source, where = json.loads(line)
    try:
        exec(compile(source, where, "exec"), names)
        how = "done"
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        how = "failed"
    print("\\x1eblock: " + how, flush=True)
"""


@dataclass(frozen=True)
class Block:
    """One fenced block; `line` is that of its fence, `file` the name it is written to."""

    language: str
    file: str
    text: str
    line: int


@dataclass(frozen=True)
class Page:
    """A page to run: what is changed in its blocks, and what fills the folder beforehand."""

    path: Path
    changes: tuple[tuple[str, str], ...] = ()
    prepare: Callable[[Path], None] = lambda folder: None

    @property
    def name(self) -> str:
        return self.path.stem

    def blocks(self) -> list[Block]:
        """Its blocks, changed; a ValueError for a change that finds nothing."""
        text = self.path.read_text(encoding="utf-8")
        for old, new in self.changes:
            if old not in text:
                raise ValueError(f"{self.path.name}: {old!r} does not stand there any more")
            text = text.replace(old, new)
        return blocks(text)

    def runs(self) -> int:
        """How many of its blocks are run."""
        return sum(b.language in ("bash", "python") and not b.file for b in self.blocks())


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text."""
    found: list[Block] = []
    for match in FENCE.finditer(text):
        named = re.search(r"file=(\S+)", match[2])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(match[1], named[1] if named else "", match[3], line))
    return found


class Python:
    """One Python process; what a block defines, later ones see."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", WORKER],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self) -> Python:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()  # it holds nothing that has to be kept
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.wait()

    def run(self, source: str, where: str) -> tuple[bool, str]:
        """(went well, what it printed)."""
        send, read = self.process.stdin, self.process.stdout
        assert send is not None and read is not None
        send.write(json.dumps([source, where]) + "\n")
        send.flush()
        return _until_end(read)


def _until_end(read: IO[str]) -> tuple[bool, str]:
    said: list[str] = []
    for line in read:
        text, ended, how = line.partition(END)
        said.append(text)
        if ended:
            return how.strip() == "done", "".join(said)
    return False, "".join(said) + "\nthe Python process ended"


def shared_home(target: Path) -> Path:
    """A TRUING_HOME of its own with the fetched models linked in."""
    for name in MODELS:
        source = fetch.fetch(name)
        files.place_tree(source, target / "models" / name, link=True)
    return target


def _end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)


def _bash(text: str, folder: Path, environment: dict[str, str]) -> tuple[bool, str, int]:
    """(went well, what it printed, its process group, 0 where nothing of it runs any more)."""
    with tempfile.TemporaryFile("w+") as said:  # no pipe, which a server would hold open
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code, group = process.wait(), process.pid
        except BaseException:
            _end(process.pid)
            raise
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            group = 0
        said.seek(0)
        return code == 0, said.read(), group


def run_one(page: Page, home: Path, threads: int = 2) -> str:
    """Run one page; what went wrong, or ""."""
    environment = os.environ | {
        "TRUING_HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        "OMP_NUM_THREADS": str(threads),
    }
    with tempfile.TemporaryDirectory(prefix="truing-tutorial-") as scratch:
        folder = Path(scratch)
        page.prepare(folder)
        with Python(folder, environment) as python, contextlib.ExitStack() as running:
            for block in page.blocks():
                where = f"{page.path.name} line {block.line}"
                ok, said = True, ""
                if block.file:
                    (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
                    (folder / block.file).write_text(block.text, encoding="utf-8")
                elif block.language == "bash":
                    ok, said, group = _bash(block.text, folder, environment)
                    if group:
                        running.callback(_end, group)
                elif block.language == "python":
                    ok, said = python.run(block.text, where)
                if not ok:
                    return f"{where} failed:\n{block.text}\n{said}"
    return ""


def readme(root: Path) -> Page:
    """The README, whose blocks expect a checkout, on a made-up model and few prompts."""

    def prepare(folder: Path) -> None:
        from truing.core.tiny import tiny_folder

        tiny_folder(folder / "tiny", blocks=6)
        (folder / "recipes").symlink_to(root / "recipes")
        rows = (root / "data" / "everyday_prompts.jsonl").read_text(encoding="utf-8").split("\n")
        (folder / "few.jsonl").write_text("\n".join(rows[:24]) + "\n", encoding="utf-8")

    return Page(root / "README.md", SMALLER, prepare)


def run_all(folder: Path, names: list[str]) -> int:
    """Run the tutorials of a checkout's folder, and its README, two at a time; the exit code."""
    # The longest first, so that no core waits for one of them at the end.
    tutorials = sorted(map(Page, folder.glob("*.md")), key=lambda p: (-p.runs(), p.name))
    pages = [readme(folder.parents[1]), *tutorials]
    wanted = [p for p in pages if not names or p.name in names]
    if missing := set(names) - {p.name for p in wanted}:
        print(f"no such tutorial: {', '.join(sorted(missing))}")
        return 2
    # Beside the user's own, on the same file system, so that models are linked and not copied.
    fetch.home().mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix=".docs-", dir=fetch.home()))
    # Half of the time goes into starting processes, which one thread does.
    workers = min(WORKERS, len(wanted))
    threads = max(1, int(os.environ.get("OMP_NUM_THREADS", "2")) // workers)

    def run(page: Page) -> bool:
        began = time.monotonic()
        fault = run_one(page, home, threads)
        took = time.monotonic() - began
        told = f"{'FAILED' if fault else 'ran'}: {page.name} ({took:.0f} s)"
        print("\n".join(filter(None, [told, fault])), flush=True)
        return not fault

    try:
        shared_home(home)
        with ThreadPoolExecutor(workers) as pool:
            went = list(pool.map(run, wanted))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return 0 if all(went) else 1
