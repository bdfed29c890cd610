"""Work of which each of several processes does a share by itself, such as playing episodes."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Generator

from truing.context import Context, Json, Metric, current, use
from truing.core.trainer import distributed
from truing.errors import TruingError, shorten


class Shown(str):
    """What an error has seen, as its message shows it: any process can be told that."""

    def __repr__(self) -> str:
        return str(self)


@contextlib.contextmanager
def apart() -> Generator[None]:
    """Let each process work on its own share inside the block, as if it were alone.

    All but the first are silent there and have a scratch folder of their own, since two cannot
    write one journal; what they observe, such as costs, the first one records. All leave the block
    together: an error that one has met is raised in all.
    """
    here = distributed.now()
    if here.size == 1:
        yield
        return
    error: Exception | None = None
    seen: list[dict[str, Json]] = []  # by this process, where it is not the first
    try:
        with distributed.alone(), _own_scratch(here.rank, seen.append):
            yield
    except Exception as met:
        error = met
    told = error if isinstance(error, TruingError) else None
    if error is not None and told is None:
        where = f"process {here.rank + 1} of {here.size}"
        told = TruingError(f"{type(error).__name__}: {error}", where=where)
    if told is not None and told.seen is not None:
        told.seen = Shown(shorten(told.seen))
    found = distributed.everyone((told, seen))
    for _, observed in found if not here.rank else ():
        for values in observed:
            current().metric(**values)
    first = next((e for e, _ in found if e is not None), None)
    if first is None:
        return
    if error is not None and told is not error:  # a fault of the code, to be shown where it is
        if not here.rank:
            raise error
        traceback.print_exception(error)
    raise first


@contextlib.contextmanager
def _own_scratch(rank: int, see: Metric) -> Generator[None]:
    if not rank:
        yield
        return
    context = current()
    folder = context.folder / f"process-{rank}"
    with use(Context(context.seed, folder, lambda *_: None, see, context.name)):
        yield
