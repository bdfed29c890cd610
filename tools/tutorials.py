"""Run the fenced blocks of a tutorial in order, in an empty folder, and fail where one fails.

    ```bash                 by bash, which stops at the first failing command
    ```python               in one Python process for the whole tutorial
    ```yaml file=NAME       (or python, jsonl, ...) is written to that file
    ```text                 and all others are for reading only

TRUING_HOME is a temporary one that shares the models that were fetched before.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from truing.core import fetch, files

FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```[ ]*$", re.M | re.S)
MODELS = ("smollm2-135m-instruct", "minilm")
END = "\x1e"  # ends what a block of Python printed; the word after it says how it went
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
    print("\\x1e" + how, flush=True)
"""


@dataclass(frozen=True)
class Block:
    """One fenced block; `line` is that of its fence, `file` the name it is written to."""

    language: str
    file: str
    text: str
    line: int


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


def run_one(path: Path, home: Path) -> str:
    """Run one tutorial; what went wrong, or ""."""
    environment = os.environ | {
        "TRUING_HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }
    with tempfile.TemporaryDirectory(prefix="truing-tutorial-") as scratch:
        folder = Path(scratch)
        with Python(folder, environment) as python:
            for block in blocks(path.read_text(encoding="utf-8")):
                where = f"{path.name} line {block.line}"
                ok, said = True, ""
                if block.file:
                    (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
                    (folder / block.file).write_text(block.text, encoding="utf-8")
                elif block.language == "bash":
                    done = subprocess.run(
                        ["bash", "-euo", "pipefail", "-c", block.text],
                        cwd=folder,
                        env=environment,
                        capture_output=True,
                        text=True,
                        check=False,
                    )
                    ok, said = done.returncode == 0, done.stdout + done.stderr
                elif block.language == "python":
                    ok, said = python.run(block.text, where)
                if not ok:
                    return f"{where} failed:\n{block.text}\n{said}"
    return ""


def run_all(folder: Path, names: list[str]) -> int:
    """Run the tutorials of a folder; the exit code."""
    wanted = [p for p in sorted(folder.glob("*.md")) if not names or p.stem in names]
    if missing := set(names) - {p.stem for p in wanted}:
        print(f"no such tutorial: {', '.join(sorted(missing))}")
        return 2
    # Beside the user's own, on the same file system, so that models are linked and not copied.
    fetch.home().mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix=".docs-", dir=fetch.home()))
    failed = 0
    try:
        shared_home(home)
        for path in wanted:
            began = time.monotonic()
            fault = run_one(path, home)
            took = time.monotonic() - began
            print(
                f"{'FAILED' if fault else 'ran'}: tutorial {path.stem} ({took:.0f} s)", flush=True
            )
            if fault:
                failed += 1
                print(fault)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return 1 if failed else 0
