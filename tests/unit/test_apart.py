"""Errors of one process, told to all."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path

import pytest

from truing.context import Context, Json, current, use
from truing.core.play.apart import apart
from truing.core.trainer import distributed
from truing.errors import InputError, TruingError


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the second of two, whose first has met nothing."""
    monkeypatch.setattr(distributed, "_now", distributed.Processes(1, 2))
    monkeypatch.setattr(
        distributed, "everyone", lambda v: [(None, []), pickle.loads(pickle.dumps(v))]
    )


@pytest.mark.parametrize("seen", [None, 3, "text", [1, "a"], "x" * 200])
@pytest.mark.usefixtures("second")
def test_an_error_says_in_all_what_it_says_in_one(seen: object, tmp_path: Path) -> None:
    error = InputError("is wrong", where="row 3", seen=seen, fix="Mend it")
    before = str(error)
    with pytest.raises(InputError) as met, use(Context(folder=tmp_path)), apart():
        raise error
    assert met.value is not error and str(met.value) == before


@pytest.mark.usefixtures("second")
def test_what_cannot_be_pickled_is_told_in_words(tmp_path: Path) -> None:
    lock = threading.Lock()
    with pytest.raises(InputError, match=r"is wrong \(seen: <unlocked _thread\.lock object"):
        with use(Context(folder=tmp_path)), apart():
            raise InputError("is wrong", seen=lock)
    with pytest.raises(TruingError, match="process 2 of 2: KeyError: 'k'"):
        with use(Context(folder=tmp_path)), apart():
            raise KeyError("k")


@pytest.mark.parametrize("rank", [0, 1])
def test_what_others_have_paid_the_first_records(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[object] = []

    def everyone(value: object) -> list[object]:
        sent.append(value)
        other = (None, [{"endpoint_cost": 2.0}])
        return [value, other] if not rank else [other, value]

    monkeypatch.setattr(distributed, "_now", distributed.Processes(rank, 2))
    monkeypatch.setattr(distributed, "everyone", everyone)
    heard: list[dict[str, Json]] = []
    with use(Context(folder=tmp_path, on_metric=heard.append)), apart():
        current().metric(endpoint_cost=1.0)
    costs = [{"endpoint_cost": 1.0}, {"endpoint_cost": 2.0}]
    assert heard == ([] if rank else costs)
    assert sent == [(None, costs[:1] if rank else [])]
