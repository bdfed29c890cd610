"""What a step has spent at endpoints, so that one that was killed knows it when it goes on.

Each request is a line in the step's scratch folder as soon as it is settled, before its reply is
kept. A step that was killed and goes on counts them: in the budget, and in what it cost, as far as
that was not recorded. A process that ends by itself, be it with an error, closes its books: the
same command then has its budget anew, as it says.

Of plain calls nothing is written, since nothing goes on from them.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import threading
from pathlib import Path
from typing import NamedTuple, cast

from truing.context import current
from truing.core import private
from truing.core.endpoints.limits import Amount, meter

FILE = "spent.jsonl"
ENDED = "ended"  # a line; others are [url, model, tokens, cost], or [url, model] where it was told
Model = tuple[str, str]  # address and name
_steps: dict[Path, dict[Model, Book]] = {}  # by the file of each
_guard = threading.Lock()


class Bill(NamedTuple):
    """So many requests, and what they took."""

    requests: int = 0
    tokens: int = 0
    cost: float = 0.0

    def plus(self, spent: Amount, requests: int = 1) -> Bill:
        """With more of them."""
        cost = self.cost + spent.cost
        return Bill(self.requests + requests, self.tokens + spent.tokens, cost)

    @property
    def amount(self) -> Amount:
        """What they took."""
        return Amount(self.tokens, self.cost)


class Book:
    """What a step has spent at one model.

    Args:
        model: its address and name.
        path: of the lines; None keeps none.
    """

    def __init__(self, model: Model, path: Path | None = None) -> None:
        self.model, self.path = model, path
        self.before = Bill()  # by a process that was killed
        self.untold = Bill()  # not recorded yet, be it by that one or by this
        self._lock = threading.Lock()

    def add(self, spent: Amount) -> None:
        """Write down a request."""
        with self._lock:
            self.untold = self.untold.plus(spent)
            _write(self.path, [*self.model, *spent])

    def carry(self) -> None:
        """Count what a killed process has spent against the model's own limits, once."""
        before, self.before = self.before, Bill()
        if before.requests and (own := meter(*self.model)).above is not None:
            own.carry(before.requests, before.amount)

    def tell(self) -> None:
        """Record what was spent and not recorded yet, where the model's price is known."""
        with self._lock:
            untold, self.untold = self.untold, Bill()
        if not untold.cost:
            return
        url, name = self.model
        current().metric(
            endpoint=private.keep_login(url.rstrip("/")),
            endpoint_model=name,
            endpoint_requests=untold.requests,
            endpoint_tokens=untold.tokens,
            endpoint_cost=untold.cost,
        )
        _write(self.path, list(self.model))


def _write(path: Path | None, line: object) -> None:
    """Append a line, safe against the death of this process."""
    if path is None:
        return
    # That a disk is full is told where the reply itself finds no place.
    with contextlib.suppress(OSError), path.open("ab") as file:
        file.write(b"\n" + json.dumps(line).encode())  # the line before may be torn


def _read(path: Path) -> dict[Model, Book]:
    """The books of a step as a killed process has left them, recorded and counted among all."""
    books: dict[Model, Book] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            found: object = json.loads(line)
        except ValueError:  # torn, or empty
            continue
        if not isinstance(found, list):
            for book in books.values():
                book.before = Bill()
            continue
        url, name, *spent = cast("list[str]", found)
        book = books.setdefault((url, name), Book((url, name), path))
        if not spent:
            book.untold = Bill()
            continue
        one = Amount(int(spent[0]), float(spent[1]))
        book.before, book.untold = book.before.plus(one), book.untold.plus(one)
    for book in books.values():
        book.tell()
        meter().carry(book.before.requests, book.before.amount)
    return books


def book_of(url: str, name: str) -> Book:
    """The book of the running step for a model, with what was spent before it was killed.

    Raises:
        InputError: a budget of money, and no price of what was spent.
    """
    context, model = current(), (url, name)
    if not context.stored:
        return Book(model)
    path = context.folder / FILE
    with _guard:
        if not _steps:
            atexit.register(close)
        if path not in _steps:
            _steps[path] = _read(path)
        book = _steps[path].setdefault(model, Book(model, path))
        book.carry()
    return book


def close() -> None:
    """Note in all books that this process has ended by itself."""
    for path in _steps:
        if path.is_file():
            _write(path, ENDED)
    _steps.clear()
