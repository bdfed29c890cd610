"""One command in several processes: the first one runs it, the others help where it trains.

Under `torchrun` every process is given the same command. The first runs it as if it were alone: it
alone reads data, makes decisions, writes the store and the run's folder, and speaks. The others
wait until it comes to a function marked `joint` (the training of a model), are sent its arguments,
and run it with the first; what it returns counts in the first only. So every step that is not
training costs nothing elsewhere, and nothing outside the engine knows of it.

An error that all meet is told once, by the first. When a process dies, collectives of the others
fail or `torchrun` ends them: the first says so, and the same command goes on from the last
checkpoint, with any number of processes.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import ParamSpec, TypeVar, cast

import torch.distributed as dist

from truing.context import Context, current, one_of_several, use
from truing.core.trainer import distributed
from truing.core.trainer.distributed import agree, begin, end, joined
from truing.core.trainer.meeting import LOOK
from truing.errors import Stopped, TruingError
from truing.faults import told
from truing.models import Model, held, hold, named
from truing.principles import Principles
from truing.recipe import executed, follow
from truing.tables import Table

P = ParamSpec("P")
T = TypeVar("T")
GRACE = 60.0  # seconds in which an error that all meet must have reached the first process
FIX = "The same command goes on from the last checkpoint"
ENDED = "stopped by torchrun, as when another process has ended"


@dataclass(frozen=True)
class _Call:
    """What the others are told to run, and the step that it belongs to."""

    module: str
    name: str
    given: bytes  # its arguments, pickled: they may be functions of the recipes
    seed: int
    folder: Path
    step: str
    held: tuple[Model | Table | Principles, ...]  # what arguments hold by key
    recipes: tuple[Path, ...]  # whose functions settings may name

    def run(self) -> None:
        """Run it, in silence."""
        follow(self.recipes)
        for one in self.held:
            hold(one)
        function = cast("Callable[..., object]", getattr(import_module(self.module), self.name))
        args, settings = pickle.loads(self.given)
        with use(Context(self.seed, self.folder, _silent, name=self.step)):
            function(*args, **settings)


def _silent(done: int, total: int, label: str) -> None:
    """Progress is the first process's to tell."""


class _State:
    """Where a process is."""

    def __init__(self) -> None:
        self.calls = 0  # that the first process has made so far, the end of each command included
        self.leading = False
        self.stopping = False  # an error is on its way out


_state = _State()


@contextlib.contextmanager
def together() -> Generator[distributed.Processes]:
    """Work in all processes at once inside the block, for a script that `torchrun` started.

    All of them must do the same there, such as to call `engine.train` with the same task; without
    `torchrun` it is a plain block.
    """
    if not one_of_several():
        yield distributed.now()
        return
    begin()
    with joined():
        yield distributed.now()
    end()


def lead(function: Callable[[], int]) -> int:
    """Run a command in the first process, and help it in all others; its exit code.

    Args:
        function: the command; called in the first process only.
    """
    try:
        processes, store = begin()
    except TruingError as error:
        print(f"truing: {error}", file=sys.stderr)
        return error.exit_code
    code = Stopped.exit_code
    if processes.rank:
        with contextlib.suppress(KeyboardInterrupt):
            code = _help(store)
    else:
        _state.leading, _state.stopping = True, False
        signal.signal(signal.SIGTERM, _terminated)
        try:
            code = function()
        finally:
            _state.stopping = bool(code)
            with contextlib.suppress(RuntimeError):  # torchrun itself may be gone
                store.set(f"call/{_state.calls}", "stop" if code else "end")
            _state.calls, _state.leading = _state.calls + 1, False
        if not code:  # else the others may be in the middle of something
            end()
    return code


def joint(function: Callable[P, T]) -> Callable[P, T]:
    """Mark a function that all processes run when the first one comes to it.

    Its arguments are sent to the others; they must be able to be pickled. It is found by its name
    in its module.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not _state.leading or distributed.now().size > 1:
            return function(*args, **kwargs)
        _, store = begin()
        number, context = _state.calls, current()
        kept = _held_in([*args, dict(kwargs)])
        _state.calls, _state.stopping = _state.calls + 1, False
        try:
            store.set(f"call/{number}", "join")
            with joined():
                agree(
                    _Call(
                        function.__module__,
                        function.__name__,
                        pickle.dumps((args, kwargs)),
                        context.seed,
                        context.folder,
                        context.name,
                        kept,
                        tuple(executed),
                    )
                )
                return function(*args, **kwargs)
        except BaseException as error:
            ended = _state.stopping  # whatever compiled code may have made of it
            # One that all meet, such as a loss that is not finite, may not be the command's end.
            _state.stopping = ended or not isinstance(error, TruingError)
            with contextlib.suppress(RuntimeError):  # torchrun itself may be gone
                store.set(f"failed/{number}", "")
            if ended:
                raise Stopped(ENDED, where=context.name, fix=FIX) from error
            if _parted(error):
                raise _alone(context.name, error) from error
            raise

    return call


def _held_in(value: object) -> tuple[Model | Table | Principles, ...]:
    """What arguments name or hold by key, and what that holds in turn."""
    found: dict[str, Model | Table | Principles] = {}
    keys = list(named(value))
    for key in keys:
        if key not in found:
            found[key] = held(key)
            keys += named(found[key])
    return tuple(found.values())


def _parted(error: BaseException) -> bool:
    """True for what collectives raise when another process has gone."""
    if isinstance(error, TruingError) or not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text


def _alone(where: str, seen: BaseException) -> Stopped:
    text = re.sub(r"\[\S+\] ", "", str(seen)).splitlines()[0]  # places in torch's own code
    return Stopped("another process of this command has ended", where=where, seen=text, fix=FIX)


def _terminated(number: int, frame: FrameType | None) -> None:
    """torchrun ends all processes when one has ended, or when it is ended itself.

    To the code that runs this is Ctrl-C, which no function takes for an error of its own.
    """
    if not _state.stopping:
        _state.stopping = True
        raise KeyboardInterrupt


# The others


def _help(store: dist.Store) -> int:
    """Join what the first process comes to until it has ended; the exit code."""
    while True:
        number = _state.calls
        while not store.check([f"call/{number}"]):
            time.sleep(LOOK)
        _state.calls += 1
        word = store.get(f"call/{number}")
        if word == b"end":
            end()
        if word != b"join":
            return 0
        try:
            with joined():
                agree(cast(_Call, None)).run()
        except Exception as error:
            if _parted(error):
                return Stopped.exit_code
            if not _failed_too(store, number):
                return _say(error)


def _failed_too(store: dist.Store, number: int) -> bool:
    """True when the first process has met an error in this call as well, and tells it."""
    until = time.monotonic() + GRACE
    while time.monotonic() < until:
        if store.check([f"failed/{number}"]):
            return True
        time.sleep(LOOK)
    return False


def _say(error: Exception) -> int:
    """Tell an error that only this process has met, as the first would have; its exit code."""
    processes, _ = begin()
    try:
        with told(""):
            raise error
    except TruingError as known:
        error = known
    except Exception as odd:
        traceback.print_exception(odd)
    print(f"truing: process {processes.rank + 1} of {processes.size}: {error}", file=sys.stderr)
    return error.exit_code if isinstance(error, TruingError) else 1
