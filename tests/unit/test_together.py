"""What leads several processes, in a group of one: attempts, errors, being told to end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from misbehaving import careless
from torch import nn

from truing.context import Context, use
from truing.core import together
from truing.core.trainer import distributed
from truing.core.trainer.distributed import Processes
from truing.core.trainer.meeting import meet
from truing.errors import Diverged, Stopped
from truing.interrupt import heard


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.TCPStore]:
    """torchrun's store, which outlives the processes that it starts; this is the only one."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "RANK": "0"}
    told |= {"WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    yield store
    distributed.end()


def met(port: int, size: int) -> list[str]:
    """What so many processes call their meeting."""

    def one(rank: int) -> str:
        return meet(dist.TCPStore("127.0.0.1", port, is_master=False), rank, size)

    with ThreadPoolExecutor(size) as processes:
        return list(processes.map(one, range(size)))


def test_no_attempt_reads_the_words_of_one_before(agent: dist.TCPStore) -> None:
    agent.set("asks/2", "one that died before it was answered")
    attempts = [met(agent.port, 3) for _ in range(3)]
    assert all(len(set(names)) == 1 for names in attempts)
    assert len({name for names in attempts for name in names}) == 3
    _, words = distributed.begin()
    words.set("call/0", "stop")
    distributed.end()
    _, words = distributed.begin()
    assert not words.check(["call/0"])


@pytest.fixture
def leading(
    agent: dist.TCPStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """In the middle of a command, of which torchrun may make an end."""
    for name, value in (("leading", True), ("calls", 0), ("stopping", False)):
        monkeypatch.setattr(together._state, name, value)
    before = signal.signal(signal.SIGTERM, together._terminated)
    with use(Context(folder=tmp_path)):
        yield
    signal.signal(signal.SIGTERM, before)


def diverged() -> None:
    raise Diverged("nan")


def compiled() -> None:
    """What compiled code may make of it."""
    try:
        signal.raise_signal(signal.SIGTERM)
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape") from None


@pytest.mark.usefixtures("leading")
@pytest.mark.parametrize("function", [careless, compiled])
def test_being_told_to_end_is_swallowed_by_no_function(function: Callable[[], object]) -> None:
    with pytest.raises(Stopped, match="stopped by torchrun"), heard():
        together.joint(function)()
    assert careless() == 1.0  # the same wish once more


@pytest.mark.usefixtures("leading")
def test_what_a_comparison_goes_on_after_is_not_the_end() -> None:
    with pytest.raises(Diverged):
        together.joint(diverged)()
    with pytest.raises(KeyboardInterrupt):
        careless()


@pytest.mark.usefixtures("agent")
def test_gradients_are_summed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed.begin()
    monkeypatch.setattr(distributed, "PIECE", 10)
    monkeypatch.setattr(distributed, "_now", Processes(0, 2))  # of which the other has met nobody
    parameters = [nn.Parameter(torch.ones(n)) for n in (4, 4, 3, 30, 5)]
    for parameter in parameters[:4]:
        parameter.grad = torch.rand_like(parameter)
    before = [p.grad.clone() for p in parameters[:4] if p.grad is not None]
    distributed.sum_gradients(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    assert len(grads) == 4 and all(map(torch.equal, grads, before))
    assert [g.untyped_storage().nbytes() // 4 for g in grads] == [8, 8, 3, 30]
