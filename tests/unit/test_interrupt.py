"""Ctrl-C is a wish to stop, also where compiled code makes another error of it."""

from __future__ import annotations

import signal
import threading

import pytest

from truing import interrupt
from truing.errors import Stopped
from truing.pipeline import told


def pressed_in_compiled_code() -> None:
    """What safetensors does when Ctrl-C arrives while it asks a storage for its shape."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape") from None


def test_an_error_after_ctrl_c_is_the_wish_to_stop() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupt.heard():
        pressed_in_compiled_code()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_step_that_it_hits_is_stopped_and_not_failed() -> None:
    with pytest.raises(Stopped, match="interrupted"), told("outer"), told("inner"):
        pressed_in_compiled_code()


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ValueError, match="mine"), told("step"):
        raise ValueError("mine")


def test_another_thread_may_use_it() -> None:
    seen: list[BaseException] = []

    def work() -> None:
        try:
            with interrupt.heard():
                raise ValueError("mine")
        except ValueError as error:
            seen.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [str(e) for e in seen] == ["mine"]
