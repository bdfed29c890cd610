"""What a running step may know about its run: seeds, scratch folder, journal, progress, metrics.

The pipeline opens a `Context` around each step; a plain Python call gets a throw-away one. Methods
ask for it with `current()`, so that no method's signature carries plumbing.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import copy
import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from truing.core.files import expanded
from truing.errors import InputError

if TYPE_CHECKING:
    from truing.store import Noun

T = TypeVar("T")
EVERY = 20.0  # seconds between two lines of a log
Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


class Journal:
    """Durable key -> value lines that survive `kill -9`; the row-level memory of a long step.

    Values stay on the disk, in memory is where they lie. A torn last line (the process died while
    writing) is dropped when the journal is opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}  # of each key's line: where, and bytes
        self._lock = threading.Lock()
        good = self._load()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        if self._file.seek(0, os.SEEK_END) != good:
            self._file.truncate(good)

    def _load(self) -> int:
        good = 0
        if self.path.exists():
            with self.path.open("rb") as lines:
                for line in lines:
                    try:
                        key, _ = json.loads(line)
                    except ValueError:
                        break
                    if not line.endswith(b"\n"):
                        break
                    self._places[key] = (good, len(line))
                    good += len(line)
        return good

    def get(self, key: str) -> Json:
        """The value stored under `key`, or None."""
        if key not in self._places:
            return None
        start, size = self._places[key]
        own = self._file
        with self.path.open("rb") if own.closed else contextlib.nullcontext(own) as file:
            found, value = json.loads(os.pread(file.fileno(), size, start))
        if found != key:
            raise InputError(
                "its lines are not where they were written",
                where=str(self.path),
                fix="Let one process at a time work in this folder, and begin anew in another",
            )
        return value

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def put(self, key: str, value: Json) -> None:
        """Append and flush to the operating system: safe against the death of this process."""
        try:
            line = json.dumps([key, value], ensure_ascii=False).encode() + b"\n"
        except UnicodeEncodeError:  # a reply that was cut inside a character comes back as it was
            line = json.dumps([key, value]).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
            # Lines are added at the end, wherever that was: others may have written there, too.
            self._places[key] = (self._file.tell() - len(line), len(line))

    def close(self) -> None:
        """Flush to the disk and close."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def __del__(self) -> None:
        # The context of a plain call is never closed; its journals are when they are let go.
        if "_file" in self.__dict__:
            self._file.close()


Progress = Callable[[int, int, str], None]
Metric = Callable[[dict[str, Json]], None]


class Context:
    """One step's surroundings.

    Args:
        seed: the step's seed; every random stream is derived from it by name.
        folder: scratch that survives a kill and is handed to the resumed step; None makes a
            temporary one on first use, deleted when the process ends.
        on_progress: called with (done, total, label).
        on_metric: called with one flat dict per observation.
        name: what the step is called in its recipe.
    """

    def __init__(
        self,
        seed: int = 0,
        folder: str | Path | None = None,
        on_progress: Progress | None = None,
        on_metric: Metric | None = None,
        name: str = "",
    ) -> None:
        self.seed, self.name = seed, name
        self._folder = None if folder is None else expanded(folder)
        self._on_progress = on_progress
        self._on_metric = on_metric
        self._journals: dict[str, Journal] = {}
        self._temporary = False
        self.thrown_away = False  # True outside of any step
        self.beside: dict[str, Noun] = {}
        self._said = 0.0
        self.metrics: list[dict[str, Json]] = []

    @property
    def folder(self) -> Path:
        """Scratch folder of this step."""
        if self._folder is None:
            # Until the process ends, not until this object dies: a model that a plain call
            # returned has its files here.
            self._folder, self._temporary = Path(tempfile.mkdtemp(prefix="truing-")), True
            atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def for_calls(self) -> Context:
        """Itself, as what plain calls have around them: it is of no step."""
        self.thrown_away = True
        return self

    def anew(self) -> Context:
        """Another one for plain calls, of the same seed and told to the same listener."""
        return Context(self.seed, on_metric=self._on_metric).for_calls()

    def aside(self, prefix: str) -> Context:
        """Itself, but for what is observed: that is told to it by names with `prefix` before them.

        Scratch and journals are shared, so that only the first one is to be closed.
        """
        made = copy.copy(self)
        made._folder, made.metrics = self.folder, []
        made._temporary = self._temporary
        made._on_metric = lambda values: self.metric(
            **{f"{prefix}{name}": value for name, value in values.items()}
        )
        return made

    def told(self, values: dict[str, Json]) -> None:
        """Record what another context observed."""
        self.metric(**values)

    def part(self, name: str, seed: int) -> Context:
        """One that keeps journals and files in a part of this one's scratch, and tells it all."""
        made = Context(seed, self.folder / name, self.progress, self.told, self.name)
        made.beside = self.beside
        return made

    @property
    def stored(self) -> bool:
        """True in a step whose scratch outlives a kill."""
        return self._folder is not None and not self._temporary

    def stream(self, name: str) -> int:
        """A seed in [0, 2**63) for the named random stream of this step."""
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1

    def journal(self, name: str) -> Journal:
        """The row-level journal of that name; opened once, kept until the step ends."""
        if name not in self._journals:
            self._journals[name] = Journal(self.folder / f"{name}.jsonl")
        return self._journals[name]

    def chunks(
        self,
        journal: str,
        items: Sequence[T],
        size: int,
        name: Callable[[int, Sequence[T]], str],
        make: Callable[[int, Sequence[T]], Json],
        label: str,
    ) -> Iterator[tuple[Sequence[T], Json]]:
        """Items `size` at a time, each chunk with what `make` says of it, kept in a journal.

        Args:
            journal: its name; a chunk that is in it is not made again.
            size: what a kill can cost.
            name: of a chunk, from the number of its first item and the chunk: all that what is
                made depends on must be in it.
            make: what is kept, from the same two.
            label: of the progress.
        """
        notes = self.journal(journal)
        for start in range(0, len(items), size):
            chunk = items[start : start + size]
            key = name(start, chunk)
            if key not in notes:
                notes.put(key, make(start, chunk))
            yield chunk, notes.get(key)
            self.progress(start + len(chunk), len(items), label)

    def progress(self, done: int, total: int, label: str = "") -> None:
        """Tell how far the step is; cheap enough to call for every row."""
        if self._on_progress is not None:
            self._on_progress(done, total, label)
        elif self._due(done, total):
            with contextlib.suppress(BrokenPipeError):  # who does not read it is not told
                print(f"{label or 'working'}: {done}/{total}", file=sys.stderr, flush=True)

    def _due(self, done: int, total: int) -> bool:
        """True when a plain call is to say how far it is: every 2 s on a terminal, else in a log.

        The clock of a log begins with the first row, so that what is quick says nothing.
        """
        if one_of_several() and os.environ.get("RANK", "0") != "0":
            return False
        now, live = time.monotonic(), sys.stderr.isatty()
        self._said = self._said or (0.0 if live else now)
        due = now - self._said > 2 or done >= total if live else now - self._said >= EVERY
        self._said = now if due else self._said
        return due

    def metric(self, **values: Json) -> None:
        """Record one observation, such as a training step's loss."""
        self.metrics.append(values)
        if self._on_metric is not None:
            self._on_metric(values)

    def keep(self, name: str, noun: Noun) -> None:
        """Note a by-product of the step, such as a critic: it is stored beside what is returned.

        A second one of a name is called NAME-2. A plain call stores nothing and keeps none.
        """
        if self.thrown_away:
            return
        number = 1 + sum(n.partition("-")[0] == name for n in self.beside)
        self.beside[name if number == 1 else f"{name}-{number}"] = noun

    def close(self) -> None:
        """Close the journals; the scratch folder stays: results may have their files there."""
        for journal in self._journals.values():
            journal.close()
        self._journals.clear()


_current: contextvars.ContextVar[Context | None] = contextvars.ContextVar("truing", default=None)


def one_of_several() -> bool:
    """True in a process that `torchrun` started together with others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def current() -> Context:
    """The running step's context; a throw-away one outside any step."""
    context = _current.get()
    if context is None:
        context = Context().for_calls()
        _current.set(context)
    return context


def forget() -> None:
    """Give later plain calls a new throw-away context: what this one notes holds no longer."""
    context = _current.get()
    if context is not None and context.thrown_away:
        _current.set(context.anew())


@contextlib.contextmanager
def seeded(seed: int | None) -> Generator[None]:
    """Inside the block random streams are of `seed`; None leaves them as they are.

    What is observed there is told to the context outside. In a step, journals and files are kept
    in a part of its scratch, by the seed.
    """
    outer = current()
    if seed is None or seed == outer.seed:
        yield
    elif outer.thrown_away:
        with use(Context(seed, on_metric=outer.told).for_calls()):
            yield
    else:
        with use(outer.part(f"seed-{seed}", seed)):
            yield


@contextlib.contextmanager
def in_part(name: str) -> Generator[None]:
    """Inside the block journals and files are kept in a part of the step's scratch.

    What is observed there is told to the context outside.
    """
    outer = current()
    with use(outer.part(name, outer.seed)):
        yield


@contextlib.contextmanager
def aside(prefix: str) -> Generator[None]:
    """Inside the block what is observed is told outside by names with `prefix` before them.

    Seeds, scratch, journals and progress stay what they are.
    """
    token = _current.set(current().aside(prefix))
    try:
        yield
    finally:
        _current.reset(token)


@contextlib.contextmanager
def use(context: Context) -> Generator[Context]:
    """Make `context` the current one inside the block, and close it afterwards."""
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)
        context.close()
