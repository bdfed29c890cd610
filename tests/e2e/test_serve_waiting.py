"""How many requests may wait at a server, and what becomes of those whose clients leave."""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from truing.changes import Rewriter
from truing.core.generate import generate
from truing.models import Model
from truing.serve.openai_batch import Done, Event, Job
from truing.serve.openai_wire import Ask, Refused, read
from truing.serve.openai_worker import Worker


@pytest.fixture
def ask() -> Ask:
    data = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    return read(data, chat=True, name="tiny", default=8)


def _ignore(_: Event) -> None:
    pass


def test_gathered_jobs_still_count(tiny_path: Path, ask: Ask) -> None:
    worker = Worker(Model.open(tiny_path), waiting=3)
    jobs = [Job(ask, _ignore) for _ in range(3)]
    for job in jobs:
        worker.put(job)
    worker._gather()
    assert len(worker._waiting) == 3
    with pytest.raises(Refused) as caught:
        worker.put(Job(ask, _ignore))
    assert (caught.value.status, caught.value.code) == (503, "overloaded")
    assert worker._next_batch() == jobs  # they wait no more: as many others may
    for _ in range(3):
        worker.put(Job(ask, _ignore))
    with pytest.raises(Refused):
        worker.put(Job(ask, _ignore))


def test_places_come_back_from_bad_requests_and_lost_clients(tiny_path: Path, ask: Ask) -> None:
    worker = Worker(Model.open(tiny_path), waiting=2)
    told: list[Event] = []
    bad = read({"model": "tiny", "prompt": [[5000]]}, chat=False, name="tiny", default=8)
    for _ in range(3):
        worker.put(Job(bad, told.append))
        gone = Job(ask, _ignore)
        gone.gone.set()
        worker.put(gone)
        worker._gather()
        assert worker._waiting == []
    assert [type(e) for e in told] == [Refused] * 3


def test_when_all_have_left_there_is_no_batch(
    tiny_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = Worker(Model.open(tiny_path), waiting=2)
    left, answered, empty = Job(ask, _ignore), threading.Event(), threading.Event()
    prepare, next_batch = Worker._prepare, Worker._next_batch

    def leaving(self: Worker, job: Job) -> None:
        prepare(self, job)
        if job is left:
            job.gone.set()

    def watched(self: Worker) -> list[Job]:
        waiting = bool(self._waiting)
        batch = next_batch(self)
        if waiting and not batch:
            empty.set()
        return batch

    monkeypatch.setattr(Worker, "_prepare", leaving)
    monkeypatch.setattr(Worker, "_next_batch", watched)
    worker.put(left)
    worker.start()
    assert empty.wait(60)
    for _ in range(3):
        answered.clear()
        worker.put(Job(ask, lambda _: answered.set()))
        assert answered.wait(60)
    worker.stop()
    assert "Traceback" not in capsys.readouterr().err


def test_answers_that_were_delivered_hold_up_no_batch(tiny_path: Path) -> None:
    tiny = Model.open(tiny_path)
    text = generate(tiny, ["Hello"], greedy=True, max_tokens=40)[0][0].text
    told: dict[str, queue.Queue[Event]] = {name: queue.Queue() for name in "abc"}

    def job(name: str, said: str, **more: Any) -> Job:
        data = {"model": "tiny", "messages": [{"role": "user", "content": said}],
                "max_tokens": 1500, "temperature": 0, "stop": [text[4:8]]} | more  # fmt: skip
        return Job(read(data, chat=True, name="tiny", default=8), told[name].put)

    worker = Worker(tiny, waiting=3)
    short, long = job("a", "Hello"), job("b", "Why?", stream=True)
    for one in (short, long):
        worker.put(one)
    worker.start()
    assert isinstance(told["a"].get(timeout=60), Done)
    told["b"].get(timeout=60)
    long.gone.set()
    worker.put(job("c", "Hello", max_tokens=4))
    assert isinstance(told["c"].get(timeout=60), Done)
    worker.stop()
    assert not any(isinstance(event, Done) for event in told["b"].queue)


def test_where_prompts_are_rewritten_the_first_does_not_wait_for_all(
    tiny_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = Worker._prepare

    def slowly(self: Worker, job: Job) -> None:
        time.sleep(0.02)
        prepare(self, job)

    worker = Worker(Model.open(tiny_path), waiting=5)
    rewriting = Worker(Model.open(tiny_path).adding(Rewriter("polite")), waiting=5)
    monkeypatch.setattr(Worker, "_prepare", slowly)
    monkeypatch.setattr("truing.serve.openai_worker.rewritten", lambda model, prompts: prompts)
    for one, gathered in ((worker, 5), (rewriting, 2)):
        for _ in range(5):
            one.put(Job(ask, _ignore))
        one._gather()
        assert len(one._waiting) == gathered
