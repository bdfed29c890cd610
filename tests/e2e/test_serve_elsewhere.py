"""A served model that is served again: what comes through, and whose fault a failure is."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from misbehaving import good, server

from truing.changes import Prefix
from truing.core.endpoints import endpoint, limits
from truing.core.generate import generate
from truing.models import Model
from truing.serve import openai_worker
from truing.serve.openai import serving

USER = [{"role": "user", "content": "Hello there"}]
SYSTEM = {"role": "system", "content": "Speak like a pirate."}


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of the test's own, and nothing refused or said before."""
    monkeypatch.setenv("TRUING_HOME", str(tmp_path))
    monkeypatch.setenv("TRUING_API_KEY", "tok-en")
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(endpoint, "_refused", {})
    monkeypatch.setattr(limits, "_said", {})
    return tmp_path


@contextmanager
def again(url: str, *changes: Prefix) -> Generator[httpx.Client]:
    """A server of ours in front of one at an address."""
    far = Model.open(f"{url}#tiny")
    for change in changes:
        far = far.adding(change)
    with serving(far, token="tok-en", name="tiny") as outer:
        headers = {"Authorization": "Bearer tok-en"}
        with httpx.Client(base_url=outer.url, headers=headers, timeout=120) as client:
            yield client


def _ask(client: httpx.Client, said: str = "Hello there", **more: Any) -> httpx.Response:
    messages = [{"role": "user", "content": said}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 16, "temperature": 0} | more
    return client.post("/chat/completions", json=body)


def test_a_served_model_can_be_served_again(tiny_path: Path, home: Path) -> None:
    tiny = Model.open(tiny_path).called("tiny")
    asked = [SYSTEM, *USER]
    local = generate(tiny, [asked], greedy=True, max_tokens=16)[0][0].text
    with serving(tiny, token="tok-en") as inner, again(inner.url, Prefix([SYSTEM])) as client:
        for _ in range(3):
            reply = _ask(client).json()
            assert reply["choices"][0]["message"]["content"] == local
            assert "usage" not in reply  # of how many tokens its prompt is, is not known
            assert _ask(client, temperature=1.0).status_code == 200
        told = _ask(client, logprobs=True).json()["error"]
        assert (told["param"], told["code"]) == ("logprobs", "unsupported")
        assert not list((home / "replies").rglob("*.json"))  # what others are told is theirs
        outer = Model.open(f"{str(client.base_url).rstrip('/')}#tiny")
        made = generate(outer, [USER], greedy=True, max_tokens=16)[0][0]
        assert (made.text, made.logprobs) == (local, ())


def test_a_request_that_is_refused_there_spoils_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_worker, "GATHER", 0.5)
    bad = (400, {}, {"error": {"message": "too rude"}}, 0.1)

    def script(n: int, body: Any) -> Any:
        return bad if body["messages"][0]["content"] == "bad" else good()

    with server(script) as (url, log), again(url) as client, ThreadPoolExecutor(3) as pool:
        replies = list(pool.map(lambda said: _ask(client, said), ("bad", "good", "fine")))
        assert [r.status_code for r in replies] == [400, 200, 200]
        assert "too rude" in replies[0].json()["error"]["message"]
        asked = [body["messages"][0]["content"] for _, _, body in log.asked]
        assert asked.count("good") == asked.count("fine") == 1  # what came was not asked for again


@pytest.mark.parametrize("answer", [b"Hi!", {"error": {"message": "who?"}}, None])
def test_what_fails_there_is_not_the_client_s_fault(
    answer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    status = 401 if isinstance(answer, dict) else 200
    with server(lambda n, body: (status, {}, answer, 0.0)) as (url, _), again(url) as client:
        reply = _ask(client)
    if answer is None:  # nobody is there any more
        with again(url) as client:
            reply = _ask(client)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["code"]) == (502, "server_error", "upstream")
    assert "TRUING_API_KEY" not in error["message"]
    assert f"truing: {url}" in capfd.readouterr().err  # whoever runs the server sees the rest
