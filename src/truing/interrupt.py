"""Ctrl-C that cannot get lost in compiled code, and being told to end.

Python raises KeyboardInterrupt at whatever line runs when the key is pressed. Where compiled code
has called back into Python, as safetensors, Arrow and torch do, it may turn the exception into an
error of its own; the program would then call it a defect, and not what it was: a wish to stop.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Generator
from types import FrameType

TWICE = 1.0  # seconds within which a second SIGTERM is the first one: of the group, of the process


@contextlib.contextmanager
def heard() -> Generator[None]:
    """An error that follows Ctrl-C inside the block leaves it as KeyboardInterrupt.

    Outside the main thread, or where nobody listens to SIGINT, the block runs as it is.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        before(number, frame)

    signal.signal(signal.SIGINT, press)
    try:
        yield
    except Exception as error:
        if pressed:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def ended() -> Generator[None]:
    """SIGTERM inside the block is what Ctrl-C is, so that nothing is left half-made behind it.

    Outside the main thread, or where somebody listens to it, the block runs as it is.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    told = -TWICE

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal told
        if time.monotonic() - told < TWICE:
            return
        told = time.monotonic()
        listens = signal.getsignal(signal.SIGINT)
        if callable(listens):
            listens(signal.SIGINT, frame)
        else:  # such as in a shell's background, where Ctrl-C is ignored
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
