"""How far a step is: one line that moves on a terminal, a plain log elsewhere; always on stderr.

And how long it has taken, over all the times that it was taken up.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import ParamSpec, cast

from truing.context import EVERY, Json, Metric
from truing.core import files
from truing.output import width

P = ParamSpec("P")

MOVES = 0.2  # seconds between two states of a terminal's line
BAR = 24
ENOUGH = (0.1, 100)  # share or number of a count from which on the rest is foretold
KEEP_EVERY = 5.0  # seconds of a step that a kill may leave uncounted


class _Count:
    """How far one count is, and how fast since it was first told of."""

    def __init__(self, done: int) -> None:
        self.first = self.done = done
        self.began = time.monotonic()

    def left(self, total: int) -> str:
        """How long the rest will take, once that can be told: answers end late and together."""
        done, spent = self.done - self.first, time.monotonic() - self.began
        enough = self.done >= ENOUGH[1] or self.done >= ENOUGH[0] * total
        if not enough or done < 1 or self.done >= total or spent <= 2:
            return ""
        return f", about {spent / done * (total - self.done):.0f} s left"


class Progress:
    """Progress of one step after the other.

    Args:
        head: put before every line, such as "[3/14] ".
    """

    def __init__(self, head: str = "") -> None:
        self.head, self.name = head, ""
        self.live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._said = 0.0
        self._counts: dict[str, _Count] = {}  # by label
        self._open = False

    def start(self, name: str, method: str) -> None:
        """A step begins."""
        self.name = name
        self._said = time.monotonic()
        self._counts = {}
        self._line(f"{self.head}{name} ({method})")

    def tell(self, done: int, total: int, label: str) -> None:
        """Called for every row or update; says something now and then."""
        # Answers are counted within updates: each count has a clock of its own.
        count = self._counts.get(label)
        if count is None or done < count.done:
            count = self._counts[label] = _Count(done)
        count.done = done
        now = time.monotonic()
        if now - self._said < (MOVES if self.live else EVERY):
            return
        self._said = now
        text = f"{label or self.name}: {done}/{total}{count.left(total)}"
        if self.live:
            filled = round(BAR * min(done / total, 1.0)) if total else 0
            bar = "#" * filled + "." * (BAR - filled)
            line = f"{self.head}{self.name} [{bar}] {text}"
            room = shutil.get_terminal_size().columns - 1  # a line that wraps cannot be taken back
            if width(line) > room:
                line = f"{self.head}{self.name} {text}"
            while width(line) > room:
                line = line[:-1]
            self._say(f"\r\033[K{line}", end="")
            self._open = True
        else:
            self._say(f"{self.head}{self.name}: {text}")

    def end(self, about: str, cached: bool, seconds: float, note: str = "") -> None:
        """The step has ended."""
        how = f"from the store (took {seconds:.1f} s)" if cached else f"{seconds:.1f} s"
        self._line(f"{self.head}{self.name}: {about}; {how}" + (f"; {note}" if note else ""))

    def _line(self, text: str) -> None:
        if self._open:
            self._say("\r\033[K", end="")
            self._open = False
        self._say(text)

    @staticmethod
    def _say(text: str, end: str = "\n") -> None:
        # Whoever read along may go away; that must not end hours of work.
        with contextlib.suppress(BrokenPipeError):
            print(text, end=end, file=sys.stderr, flush=True)


class Clock:
    """Seconds spent on a step and what endpoints cost it, before it was stopped, too.

    Both are kept in its scratch folder while there is something that a stopped step goes on from,
    such as replies that were paid for.
    """

    def __init__(self, scratch: Path) -> None:
        self.path = scratch / ".seconds"
        self.before, self.cost = 0.0, 0.0
        with contextlib.suppress(OSError, ValueError):
            kept = [float(word) for word in self.path.read_text().split()]
            self.before, self.cost, *_ = [*kept, 0.0, 0.0]
        self.began = self.kept = time.monotonic()

    @property
    def seconds(self) -> float:
        """Until now."""
        return self.before + time.monotonic() - self.began

    def keep(self, every: float = 0.0) -> None:
        """Write them down, unless that was done less than `every` seconds ago."""
        now = time.monotonic()
        if now - self.kept >= every and (self.cost or self.path.parent.is_dir()):
            self.kept = now
            with contextlib.suppress(OSError):  # the time is not worth a stop
                cost = f" {self.cost:.9g}" if self.cost else ""
                files.write_text(self.path, f"{self.seconds:.3f}{cost}\n")

    @contextlib.contextmanager
    def running(self, on_fault: Callable[[Clock], None] | None = None) -> Generator[None]:
        """The step runs inside; where it fails or is stopped, this is kept and `on_fault` told."""
        try:
            yield
        except BaseException:
            self.keep()
            if on_fault is not None:
                on_fault(self)
            raise

    def heard(self, call: Callable[P, None] | None) -> Callable[P, None] | None:
        """`call`, which now and then keeps the time too, so that it outlives a kill."""
        if call is None:
            return None

        def both(*args: P.args, **kwargs: P.kwargs) -> None:
            self.keep(KEEP_EVERY)
            call(*args, **kwargs)

        return both

    def paying(self, call: Metric | None) -> Metric:
        """`call`, told of what is observed, among which are the costs."""

        def both(values: dict[str, Json]) -> None:
            # A cost that arises aside, such as on held-out prompts, has words before its name.
            found = [v for name, v in values.items() if name.endswith("endpoint_cost")]
            cost = sum(float(cast(float, v)) for v in found)
            self.cost += cost
            self.keep(0.0 if cost else KEEP_EVERY)
            if call is not None:
                call(values)

        return both
