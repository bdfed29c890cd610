"""Errors say what is wrong, where, what was seen and what to do; and survive another process."""

from __future__ import annotations

import pickle

import pytest

from truing.errors import (
    InputError,
    MissingExtra,
    Stopped,
    TruingError,
    nearest,
    shorten,
    unknown,
)


def test_the_message_has_all_parts() -> None:
    error = InputError("is wrong", where="file row 3", seen=[1], fix="Do this")
    assert str(error) == "file row 3: is wrong (seen: [1]). Do this"
    assert str(InputError("is wrong")) == "is wrong"
    assert str(InputError("is wrong", seen=0)) == "is wrong (seen: 0)"


def test_exit_codes() -> None:
    codes = {TruingError: 1, InputError: 2, MissingExtra: 2, Stopped: 3}
    assert {kind: kind.exit_code for kind in codes} == codes


def test_they_are_also_what_python_calls_them() -> None:
    assert issubclass(InputError, ValueError) and issubclass(MissingExtra, ImportError)
    assert all(issubclass(e, TruingError) for e in (InputError, Stopped, MissingExtra))


@pytest.mark.parametrize(
    "error",
    [
        TruingError("a", where="b", seen={"c": 1}, fix="d"),
        InputError("a", where="b"),
        Stopped("a", fix="d"),
        MissingExtra("gguf", "gemma", where="gemma3-270m"),
    ],
)
def test_they_cross_processes(error: TruingError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error)


def test_long_values_are_cut() -> None:
    assert len(shorten("x" * 500)) == 120 and shorten("x" * 500).endswith("...")
    assert shorten("x", 3) == "'x'"


def test_the_nearest_name() -> None:
    assert nearest("bata", ["beta", "lr"]) == "beta"
    assert nearest("weight-decay", ["weight_decay"]) == "weight_decay"
    assert nearest("Beta", ["beta"]) == "beta"
    assert nearest("qqqq", ["beta", "lr"]) is None


def test_unknown_names() -> None:
    assert str(unknown("setting", "bata", ["beta"], where="dpo")) == (
        "dpo: unknown setting 'bata'. Did you mean 'beta'?"
    )
    assert str(unknown("setting", "qq", ["b", "a"])) == "unknown setting 'qq'. Known: a, b"
    assert str(unknown("setting", "qq", [f"n{i:02}" for i in range(9)], limit=2)).endswith(
        "Known: n00, n01, ..."
    )
    assert str(unknown("setting", "qq", [])).endswith("There is none to choose from")
