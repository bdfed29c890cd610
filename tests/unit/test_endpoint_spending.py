"""What a killed step has spent counts when it goes on; one that ended by itself begins anew."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from misbehaving import good, server

from truing.context import Context, Json, use
from truing.core.client import meter
from truing.core.endpoints import endpoint, limits, spending
from truing.core.generate import generate
from truing.errors import Stopped
from truing.models import Model

ASKED = ["Hello", "Why?", "Where to?", "When?", "Who is it?"]
PRICE = "input_price=1e6,output_price=2e6,concurrency=1"  # 7 + 2 * 3 = 13 for each reply
CHILD = """
import sys
from pathlib import Path
from truing.context import Context, use
from truing.core.endpoints import limits
from truing.core.endpoints.endpoint import Endpoint, together
from truing.core.endpoints.spending import book_of

url, said, folder = sys.argv[1:]
limits.keep(url, f"m?{said}")

async def ask():
    async with Endpoint(url, limits.meter(url, "m"), book_of(url, "m").add) as one:
        while True:
            await one.ask("/chat/completions", {"model": "m"})

with use(Context(folder=Path(folder))):
    together(ask)
"""


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    new_process(monkeypatch)


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process has in memory when it begins; one that was killed left the disk as it is."""
    monkeypatch.setattr(limits, "_said", {})
    monkeypatch.setattr(limits, "_whole", [])
    monkeypatch.setattr(spending, "_steps", {})


def asked(address: str, folder: Path, prompts: list[str] = ASKED) -> list[dict[str, Json]]:
    """Ask in a step; what was recorded of the costs."""
    with use(Context(folder=folder)) as context:
        try:
            generate(Model.open(address), prompts, max_tokens=3, greedy=True)
        finally:
            costs = [m for m in context.metrics if "endpoint_cost" in m]
    return costs


def cost(found: list[dict[str, Json]]) -> float:
    return sum(float(str(m["endpoint_cost"])) for m in found)


def test_kill_9_in_the_middle_of_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child: list[subprocess.Popen[bytes]] = []

    def script(n: int, body: dict[str, Any]) -> Any:
        if n == 3:  # three replies have come by then
            os.kill(child[0].pid, signal.SIGKILL)
        return good()

    step = tmp_path / "step"
    with server(script) as (url, log):
        command = [sys.executable, "-c", CHILD, url, PRICE, str(step)]
        child.append(subprocess.Popen(command, env=dict(os.environ)))
        assert child[0].wait(timeout=60) == -signal.SIGKILL
        with pytest.raises(
            Stopped, match=r"budget of 60 in cost.*3 requests, 30 tokens, a cost of 39"
        ):
            asked(f"{url}#m?{PRICE},cost=60", step)  # the next may cost more than 21
        assert len(log.asked) == 4
        new_process(monkeypatch)  # killed again, before it could close its books
        found = asked(f"{url}#m?{PRICE},cost=200", step)
        spent = meter(url, "m")
    # The fourth request's reply never came, so nothing is known of it.
    assert (spent.requests, spent.tokens, spent.cost) == (8, 80, 104.0) and cost(found) == 65


def test_what_was_killed_is_recorded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(lambda n, body: good()) as (url, _):
        address, step = f"{url}#m?{PRICE}", tmp_path / "step"
        with monkeypatch.context() as patch:  # killed before the cost of this request is recorded
            patch.setattr(spending.Book, "tell", lambda _: None)
            asked(address, step, ASKED[:2])
        path = step / spending.FILE
        path.write_bytes(path.read_bytes() + b"\n[1")  # and while it wrote
        new_process(monkeypatch)
        found = asked(address, step)
        assert cost(found) == 65 and meter(url, "m").requests == 5
        assert cost(asked(address, step)) == 0 and meter(url, "m").requests == 5
        new_process(monkeypatch)
        assert cost(asked(address, step, ["One more"])) == 13
        assert meter(url, "m").cost == meter().cost == 78
        spending.close()  # ends by itself
        new_process(monkeypatch)
        assert cost(asked(address, step, ["And more"])) == 13 and meter(url, "m").requests == 1


def test_all_that_a_step_asked_counts_among_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(lambda n, body: good()) as (url, log):
        one, two = (f"{url}#{name}?{PRICE}" for name in ("one", "two"))
        asked(one, tmp_path, ASKED[:3])
        new_process(monkeypatch)
        monkeypatch.setenv("TRUING_MAX_COST", "80")
        Model.open(one)
        with pytest.raises(Stopped, match=r"budget of 80 in cost.*3 requests, 30 tokens"):
            asked(two, tmp_path, ASKED[:3])  # 39 are spent, and one may take more than 41
        assert len(log.asked) == 3


def test_a_budget_that_stopped_a_step_is_there_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the message says: each time that the command is given some more replies come."""
    with server(lambda n, body: good()) as (url, log):
        for came in (2, 4):
            with pytest.raises(Stopped, match="budget of 2 requests"):
                asked(f"{url}#m?{PRICE},requests=2", tmp_path / "step")
            assert len(log.asked) == came
            spending.close()
            new_process(monkeypatch)
        assert cost(asked(f"{url}#m?{PRICE},requests=2", tmp_path / "step")) == 13


def test_plain_calls_write_nothing(tmp_path: Path) -> None:
    with server(lambda n, body: good()) as (url, _), use(Context()) as context:
        generate(Model.open(f"{url}#m?{PRICE}"), ASKED[:2], max_tokens=3, greedy=True)
        assert cost([m for m in context.metrics if "endpoint_cost" in m]) == 26
        assert not list(context.folder.glob("spent*")) and not spending._steps
