"""The server over HTTP: its protocol, its refusals, its batches, its end."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from truing import catalogue, cli
from truing.changes import Decoder, Edits, Prefix
from truing.core import hooks
from truing.core.chat import prompt_ids
from truing.core.generate import generate
from truing.errors import InputError
from truing.kinds import split_tools
from truing.method import methods
from truing.models import Model
from truing.serve import openai, openai_app, openai_batch, openai_wire, openai_worker
from truing.serve.openai import serving
from truing.serve.openai_calls import Form
from truing.serve.openai_reply import Reply

USER = [{"role": "user", "content": "Hello there"}]
SYSTEM = {"role": "system", "content": "Speak like a pirate."}


@pytest.fixture(scope="module")
def tiny(tiny_path: Path) -> Model:
    return Model.open(tiny_path).called("tiny")


@pytest.fixture(scope="module")
def http(tiny: Model) -> Iterator[httpx.Client]:
    with serving(tiny) as made:
        headers = {"Authorization": f"Bearer {made.token}"}
        with httpx.Client(base_url=made.url, headers=headers, timeout=120) as client:
            yield client


def _chat(http: httpx.Client, **body: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": USER, "max_tokens": 16, "temperature": 0} | body
    reply = http.post("/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def _local(model: Model, **settings: Any) -> str:
    return generate(model, [USER], greedy=True, **({"max_tokens": 16} | settings))[0][0].text


def _chunks(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with http.stream("POST", path, json=body | {"stream": True}) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.mark.parametrize("given", ["\\ud83d", "caf\u00e9 \\ud83d!"])
def test_half_a_character_is_none(http: httpx.Client, given: str) -> None:
    """JSON can say it, as where a stream was cut; it counts as the sign for the unreadable."""
    whole = given.replace("\\ud83d", "\ufffd")
    common = '"model": "tiny", "max_tokens": 4, "temperature": 0'
    for path, before, after in (
        ("/chat/completions", '"messages": [{"role": "user", "content": "', '"}]'),
        ("/completions", '"echo": true, "logprobs": 1, "prompt": "', '"'),
    ):
        made: list[object] = []
        for text in (given, whole):
            body = f"{{{common}, {before}{text}{after}}}"
            reply = http.post(path, content=body, headers={"Content-Type": "application/json"})
            assert reply.status_code == 200, reply.text
            made.append(reply.json()["choices"])
        assert made[0] == made[1]


def test_a_chat(http: httpx.Client, tiny: Model) -> None:
    reply = _chat(http, n=2, logprobs=True, top_logprobs=3)
    assert reply["object"] == "chat.completion"
    assert [c["message"]["content"] for c in reply["choices"]] == [_local(tiny)] * 2
    assert reply["choices"][0]["finish_reason"] == "length"
    expected = generate(tiny, [USER], greedy=True, max_tokens=16)[0][0]
    content = reply["choices"][1]["logprobs"]["content"]
    assert [t["logprob"] for t in content] == pytest.approx(expected.logprobs, abs=1e-5)
    for token in content:
        top = [t["logprob"] for t in token["top_logprobs"]]
        assert len(top) == 3
        assert top == sorted(top, reverse=True)
        assert token["logprob"] == pytest.approx(top[0], abs=1e-5)  # greedy takes the likeliest
    usage = reply["usage"]
    assert usage["completion_tokens"] == 32
    assert usage["total_tokens"] == usage["prompt_tokens"] + 32


def test_streams_concatenate_to_the_same_text(http: httpx.Client, tiny: Model) -> None:
    body = {"model": "tiny", "messages": USER, "max_tokens": 40, "temperature": 0}
    chunks = _chunks(http, "/chat/completions", body | {"stream_options": {"include_usage": True}})
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({c["id"] for c in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]]
    assert "".join(deltas) == _local(tiny, max_tokens=40)
    assert sum(map(bool, deltas)) > 5  # written piece by piece
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == 40


def test_streams_of_several_drawn_answers(http: httpx.Client) -> None:
    body = {"model": "tiny", "messages": USER, "max_tokens": 24, "n": 3, "seed": 4}
    whole = http.post("/chat/completions", json=body).json()["choices"]
    texts = ["", "", ""]
    for chunk in _chunks(http, "/chat/completions", body):
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [c["message"]["content"] for c in whole]
    assert len(set(texts)) == 3


def test_stop_texts_before_the_least_length_stop_nothing(http: httpx.Client, tiny: Model) -> None:
    """In a stream, too, and in answers that end before others of their batch."""
    text = _local(tiny, max_tokens=40)
    stop = next(c for c in text if c.isascii() and text.count(c) > 1)
    least = len(text[: text.find(stop) + 1].encode()) + 1  # no fewer than its tokens
    told: dict[str, Any] = {"max_tokens": 40, "stop": [stop], "min_tokens": least}
    want = _local(tiny, **told)
    assert stop in want and len(want) < len(text)
    assert _chat(http, **told)["choices"][0]["message"]["content"] == want
    body = {"model": "tiny", "messages": USER, "temperature": 0} | told
    chunks = _chunks(http, "/chat/completions", body)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == want
    for one in _chat(http, **told, n=4, temperature=1.0, seed=5)["choices"]:
        ended = one["finish_reason"] == "stop"
        assert ended or len(one["message"]["content"].encode()) > 30


def test_stop_texts_are_held_back_in_streams(http: httpx.Client, tiny: Model) -> None:
    text = _local(tiny, max_tokens=40)
    stop = "<\x0c"
    assert stop in text
    body = {"model": "tiny", "messages": USER, "max_tokens": 40, "temperature": 0, "stop": [stop]}
    whole = http.post("/chat/completions", json=body).json()["choices"][0]
    assert whole["message"]["content"] == text[: text.find(stop)]
    assert whole["finish_reason"] == "stop"
    chunks = _chunks(http, "/chat/completions", body)
    deltas = [c["choices"][0]["delta"].get("content", "") for c in chunks]
    assert "".join(deltas) == text[: text.find(stop)]
    long = _chat(http, max_tokens=40, stop="a text that is longer than sixteen characters")
    assert long["choices"][0]["message"]["content"] == text
    chunks = _chunks(http, "/chat/completions", body | {"stop": ["a" * 1_000_000]})
    deltas = [c["choices"][0]["delta"].get("content", "") for c in chunks]
    assert "".join(deltas) == text


def test_seeds(http: httpx.Client) -> None:
    def text(**body: Any) -> str:
        return _chat(http, temperature=1.0, **body)["choices"][0]["message"]["content"]

    assert text(seed=1) == text(seed=1)
    assert len({text(seed=1), text(seed=2), text(), text()}) == 4


def test_plain_text(http: httpx.Client, tiny: Model) -> None:
    loaded = tiny.load_module()
    ids = loaded.tokenizer("ab")["input_ids"]
    body = {"model": "tiny", "prompt": ["ab", "cd"], "max_tokens": 5, "temperature": 0}
    reply = http.post("/completions", json=body).json()
    assert [c["index"] for c in reply["choices"]] == [0, 1]
    same = http.post("/completions", json=body | {"prompt": [ids]}).json()["choices"][0]
    assert same["text"] == reply["choices"][0]["text"]
    chunks = _chunks(http, "/completions", body | {"prompt": "ab"})
    assert "".join(c["choices"][0]["text"] for c in chunks) == same["text"]
    echo = http.post("/completions", json=body | {"prompt": "ab", "echo": True, "logprobs": 1})
    choice = echo.json()["choices"][0]
    assert choice["text"] == "ab" + same["text"]
    facts = choice["logprobs"]
    assert facts["tokens"][:2] == ["a", "b"]
    assert facts["text_offset"][:3] == [0, 1, 2]
    assert facts["token_logprobs"][0] is None
    assert len({len(v) for v in facts.values()}) == 1 == len({len(facts["tokens"])})


def test_log_likelihoods_as_evaluation_harnesses_read_them(http: httpx.Client, tiny: Model) -> None:
    """They ask for one token more than they score, leave it out and look for the likeliest."""
    loaded = tiny.load_module()
    greedy = generate(tiny, [USER], greedy=True, max_tokens=13)[0][0]
    prompt = prompt_ids(loaded.tokenizer, USER)
    *ids, last = [*prompt, *greedy.ids]
    body = {"model": "tiny", "prompt": [ids], "max_tokens": 1, "logprobs": 1, "echo": True,
            "temperature": 0}  # fmt: skip
    for ends in ([], [last]):  # the one token more may end the answer
        facts = http.post("/completions", json=body | {"stop_token_ids": ends}).json()
        facts = facts["choices"][0]["logprobs"]
        scored = facts["token_logprobs"][len(prompt) : -1]
        assert scored == pytest.approx(greedy.logprobs[:-1], abs=1e-4)
        tops = [max(t.values()) for t in facts["top_logprobs"][len(prompt) : -1]]
        assert scored == tops  # to the bit: they compare so


def test_a_long_prompt_is_scored_without_all_of_its_logits(
    http: httpx.Client, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"model": "tiny", "prompt": "Once upon a time " * 20, "max_tokens": 0, "echo": True,
            "logprobs": 2}  # fmt: skip
    whole = http.post("/completions", json=body).json()["choices"][0]["logprobs"]
    monkeypatch.setattr("truing.core.logprob.CHUNK", 16 * 259)
    rows: list[int] = []
    head = tiny.load_module().module.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_hook(lambda *a: rows.append(a[2].shape[-2]))
    try:
        parts = http.post("/completions", json=body).json()["choices"][0]["logprobs"]
    finally:
        hook.remove()
    assert max(rows, default=0) <= 16
    assert parts["tokens"] == whole["tokens"] and len(parts["tokens"]) == 340
    assert parts["token_logprobs"][1:] == pytest.approx(whole["token_logprobs"][1:], abs=1e-5)
    module, ids = tiny.load_module().module, tiny.load_module().tokenizer(body["prompt"])
    with torch.inference_mode():
        logp = module(torch.tensor([ids["input_ids"]])).logits[0].log_softmax(1)
    own = [float(p[i]) for p, i in zip(logp, ids["input_ids"][1:], strict=False)]
    assert parts["token_logprobs"][1:] == pytest.approx(own, abs=1e-4)


def test_of_tokens_that_look_alike_the_likeliest_is_told() -> None:
    asked = {"model": "tiny", "prompt": "a", "logprobs": 2}
    ask = openai_wire.read(asked, chat=False, name="tiny", default=8)
    token = openai_wire.Token("x", -0.1, [("\ufffd", -0.1), ("\ufffd", -6.2)])
    answer = openai_wire.Answer("x", "stop", 1, [token])
    (choice,) = Reply(ask, "tiny", "1", Form()).whole([answer], 1)["choices"]  # type: ignore[misc]
    assert choice["logprobs"]["top_logprobs"] == [{"\ufffd": -0.1}]  # type: ignore[index]


def test_models_and_health(http: httpx.Client) -> None:
    assert [m["id"] for m in http.get("/models").json()["data"]] == ["tiny"]
    assert http.get("/models/tiny").json()["id"] == "tiny"
    assert http.get("/models/other").status_code == 404
    root = str(http.base_url).removesuffix("/v1/")
    assert httpx.get(f"{root}/healthz").json() == {"status": "ok"}  # no token, no name


@pytest.mark.parametrize(
    ("body", "status", "param", "told"),
    [
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role", "robot"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content", "required"),
        ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, 400, "temperature", "number"),
        ({"n": 0}, 400, "n", "greater than or equal to 1"),
        ({"n": True}, 400, "n", "integer"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 100_000}, 400, "messages", "maximum context length is 2048 tokens"),
        ({"min_tokens": 50}, 400, None, "min_tokens"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
        ({"temprature": 1}, 400, "temprature", "Did you mean 'temperature'"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, None,
         "does not write tools"),
        ({"tools": [{"type": "function"}]}, 400, "tools.0.function.name", "not empty"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, 400, "tools.0.type",
         "only tools of the type 'function'"),
        ({"tool_choice": "required"}, 400, "tool_choice", "no such tool"),
        ({"tool_choice": "always"}, 400, "tool_choice", "none of 'auto'"),
        ({"tool_choice": 3}, 400, "tool_choice", "valid"),
        (
            {
                "messages": [
                    *USER,
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": "{}"}}],
                    },
                    {"role": "tool", "tool_call_id": "1", "content": "3"},
                ]
            },
            400,
            "messages",
            "does not write tool calls",
        ),
        (
            {"logprobs": True, "top_logprobs": 2, "repetition_penalty": 1.2},
            400,
            "logprobs",
            "repetition_penalty changes them",
        ),
        ({"stop": ["%i"] * 17}, 400, "stop", "at most 16"),
        ({"response_format": {"type": "grammar"}}, 400, "response_format", "not supported"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema.schema",
         "must be an object"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "not supported"),
        ({"model": "gpt"}, 404, "model", "only 'tiny'"),
        ({"stop": [""]}, 400, "stop.0", "at least 1"),
        ({"seed": 2**70}, 400, "seed", "less than"),
    ],
)  # fmt: skip
def test_refusals_are_error_objects(
    http: httpx.Client, body: dict[str, Any], status: int, param: str | None, told: str
) -> None:
    plain = {"model": "tiny", "messages": USER, "max_tokens": 4}
    for stream in ({}, {"stream": True}):
        reply = http.post("/chat/completions", json=plain | body | stream)
        error = reply.json()["error"]
        assert reply.status_code == status
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert told in error["message"]
        assert (error["param"] or "").startswith(param or "")


def test_a_context_that_is_exceeded_is_known_by_its_code(http: httpx.Client) -> None:
    """Clients of long dialogues look for it, and go on with less of them."""
    long = "a" * 3000
    for path, asked, param in (
        ("/chat/completions", {"messages": [{"role": "user", "content": long}]}, "messages"),
        ("/completions", {"prompt": long}, "prompt"),
    ):
        reply = http.post(path, json={"model": "tiny"} | asked)
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (400, "context_length_exceeded")
        assert error["param"] == param and "the prompt has 30" in error["message"]


def test_unused_settings_are_let_pass(http: httpx.Client, tiny: Model) -> None:
    cached = {"cache_control": {"type": "ephemeral"}, "prompt_cache_breakpoint": {"mode": "x"}}
    parts = [{"role": "developer", "content": [{"type": "text", "text": "Be ", **cached},
             {"type": "text", "text": "brief."}]}, *USER]  # fmt: skip
    reply = _chat(
        http, messages=parts, user="me", tools=[], response_format={"type": "text"},
        presence_penalty=0, stop=None, seed=None, store=False, max_tokens=None,
        max_completion_tokens=16, prompt_cache_retention="24h", prompt_cache_options={},
        prediction={"type": "content", "content": "x"},
    )  # fmt: skip
    asked = [{"role": "system", "content": "Be brief."}, *USER]
    expected = generate(tiny, [asked], greedy=True, max_tokens=16)[0][0].text
    assert reply["choices"][0]["message"]["content"] == expected


def test_settings_of_dialogues_are_let_pass_beside_plain_text() -> None:
    body = {"model": "tiny", "prompt": "one", "response_format": {"type": "text"}}
    for choice in ("auto", "none"):
        assert openai_wire.read(
            body | {"tool_choice": choice}, chat=False, name="tiny", default=8
        ).prompts == ["one"]
    with pytest.raises(openai_wire.Refused) as caught:
        openai_wire.read(body | {"tool_choice": "required"}, chat=False, name="tiny", default=8)
    assert (caught.value.param, caught.value.code) == ("tool_choice", "unsupported")


def test_tools_are_told_to_the_model() -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    body = {"model": "tiny", "messages": USER, "tools": [tool]}
    for more, tools in (
        ({}, [tool]),
        ({"tool_choice": "auto"}, [tool]),
        ({"tool_choice": "none"}, []),
    ):
        ask = openai_wire.read(body | more, chat=True, name="tiny", default=8)
        assert split_tools(ask.prompts[0]) == (USER, tools)  # type: ignore[arg-type]


def test_bodies_that_are_no_requests(http: httpx.Client) -> None:
    for raw in (b"", b"{", b"[1]", b"\xff", b"[" * 200_000):
        reply = http.post("/chat/completions", content=raw)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, None)
    large = http.post("/chat/completions", content=b" " * (openai_app.LARGEST + 1))
    assert large.status_code == 413
    assert "4 MiB" in large.json()["error"]["message"]
    assert http.get("/chat/completions").json()["error"]["type"] == "invalid_request_error"
    assert http.get("/nowhere").status_code == 404
    assert "/v1/chat/completions" in http.post("/responses").json()["error"]["message"]
    for prompt in ("", [], ["a", ""], [[]], [[999_999]], [3.5]):
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 2}
        assert http.post("/completions", json=body).status_code == 400


def test_the_token_is_needed(http: httpx.Client) -> None:
    for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic x"},
                  {"Authorization": "Bearer \xe9"}):  # fmt: skip
        for method, path in (("GET", "models"), ("POST", "chat/completions")):
            headers = {k: v.encode("latin-1") for k, v in given.items()}
            reply = httpx.request(method, f"{http.base_url}{path}", headers=headers)
            assert reply.status_code == 401
            assert reply.json()["error"]["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"


def test_requests_are_answered_in_batches(
    http: httpx.Client, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    run = openai_batch.Batch.run

    def noted(self: openai_batch.Batch) -> None:
        sizes.append(len(self.jobs))
        run(self)

    monkeypatch.setattr(openai_batch.Batch, "run", noted)

    def ask(i: int) -> str:
        messages = [{"role": "user", "content": f"Hello {i % 4}"}]
        body = {"temperature": 0.0 if i < 4 else 1.0, "seed": i, "max_tokens": 32}
        return _chat(http, messages=messages, **body)["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(8) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_worker, "GATHER", 0.3)
        together = list(pool.map(ask, range(8)))
    assert sum(sizes) == 8
    assert max(sizes) >= 3  # seeds differ, settings agree
    assert [ask(i) for i in range(8)] == together
    expected = generate(
        tiny, [[{"role": "user", "content": f"Hello {i}"}] for i in range(4)],
        greedy=True, max_tokens=32,
    )  # fmt: skip
    assert together[:4] == [c[0].text for c in expected]


def test_too_many_waiting_requests_are_told_to_come_back(tiny: Model) -> None:
    worker = openai_worker.Worker(tiny, waiting=1)  # not started: nothing leaves the queue
    ask = openai_app.read({"model": "tiny", "messages": USER}, chat=True, name="tiny", default=8)
    worker.put(openai_batch.Job(ask, print))
    with pytest.raises(openai_app.Refused) as caught:
        worker.put(openai_batch.Job(ask, print))
    assert (caught.value.status, caught.value.code) == (503, "overloaded")


def test_a_batch_without_readers_is_given_up(tiny: Model) -> None:
    worker = openai_worker.Worker(tiny, waiting=4)
    events: list[Any] = []
    data = {"model": "tiny", "messages": USER, "max_tokens": 1500, "stream": True}
    ask = openai_app.read(data, chat=True, name="tiny", default=8)
    came = threading.Event()

    def send(event: Any) -> None:
        events.append(event)
        came.set()

    job, after = openai_batch.Job(ask, send), threading.Event()
    worker.start()
    worker.put(job)
    assert came.wait(60)
    job.gone.set()
    short = openai_app.read(data | {"max_tokens": 1}, chat=True, name="tiny", default=8)
    worker.put(openai_batch.Job(short, lambda _: after.set()))
    assert after.wait(60)  # it need not wait for the other's end
    worker.stop()
    assert not any(isinstance(e, openai_batch.Done) for e in events)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many answers were being written before each token; several wait for the client's end."""
    made: list[int] = []
    hook = openai_batch.Batch._hook

    def counted(self: openai_batch.Batch, rows: Any, logits_BV: torch.Tensor) -> torch.Tensor:
        made.append(len(rows))
        if len(rows) == 16 and made.count(16) == 8:
            self.jobs[0].gone.wait(60)
        return hook(self, rows, logits_BV)

    monkeypatch.setattr(openai_batch.Batch, "_hook", counted)
    return made


def test_lost_clients_hold_up_nobody(http: httpx.Client, steps: list[int]) -> None:
    body = {"model": "tiny", "messages": USER, "max_tokens": 1500, "n": 16, "temperature": 0}
    with http.stream("POST", "/chat/completions", json=body | {"stream": True}) as reply:
        assert "chunk" in next(reply.iter_lines())
    _chat(http, max_tokens=4)
    assert steps.count(16) <= 8
    steps.clear()
    with pytest.raises(httpx.ReadTimeout):
        http.post("/chat/completions", json=body, timeout=0.5)
    _chat(http, max_tokens=4)
    assert steps.count(16) <= 8


def test_a_body_that_is_broken_off_is_no_fault_of_the_server(
    http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    place = (http.base_url.host, http.base_url.port)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
    with socket.create_connection(place) as client:
        token = http.headers["authorization"]
        client.sendall(f"{head}Authorization: {token}\r\n\r\n{{".encode())
        client.shutdown(socket.SHUT_WR)
        while client.recv(1024):
            pass  # until the server has closed it too
    _chat(http, max_tokens=1)  # behind whatever was still to be done for it
    assert not [r for r in caplog.records if r.name.startswith("uvicorn")]


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_done_in_time_at_the_end_is_refused(
    tiny: Model, stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(openai, "GRACE", 3)
    body = {"model": "tiny", "messages": USER, "max_tokens": 1500, "n": 64, "temperature": 0}
    with ThreadPoolExecutor(1) as pool, serving(tiny, token="t") as made:
        reply = pool.submit(
            httpx.post, f"{made.url}/chat/completions", json=body | {"stream": stream},
            headers={"Authorization": "Bearer t"}, timeout=60,
        )  # fmt: skip
        time.sleep(0.5)
    got = reply.result(60)
    if stream:
        *_, error, done = [line for line in got.text.splitlines() if line]
        assert (got.status_code, done) == (200, "data: [DONE]")
        error = json.loads(error.removeprefix("data: "))
    else:
        assert (got.status_code, got.headers["retry-after"]) == (503, "1")
        error = got.json()
    assert error["error"]["code"] == "shutdown"
    assert not [r for r in caplog.records if r.name.startswith("uvicorn")]


def test_run_time_changes_are_in_force(tiny: Model) -> None:
    changed = tiny.adding(Prefix([SYSTEM]))
    with serving(changed, token="t", name="pirate") as made:
        headers = {"Authorization": "Bearer t"}
        assert made.token == ""  # the caller knows it
        with httpx.Client(base_url=made.url, headers=headers, timeout=120) as client:
            reply = _chat(client, model="pirate")["choices"][0]["message"]["content"]
            assert reply == _local(changed) != _local(tiny)
            body = {"model": "pirate", "prompt": "ab"}
            refused = client.post("/completions", json=body)
            assert refused.status_code == 400
            assert "go past the model's changes (prefix)" in refused.json()["error"]["message"]


def test_edits_of_activations_are_in_force(tiny: Model, tmp_path: Path) -> None:
    edit = hooks.Edit("layers.2.residual", torch.linspace(-4, 4, 128))
    steered = tiny.adding(Edits(hooks.save(tmp_path / "edit.safetensors", [edit])))
    with serving(steered, token="t") as made:
        headers = {"Authorization": "Bearer t"}
        with httpx.Client(base_url=made.url, headers=headers, timeout=120) as client:
            text = _chat(client, model=made.model)["choices"][0]["message"]["content"]
    assert text == _local(steered) != _local(tiny)


def test_a_decoder_draws_the_answers_and_its_streams_are_whole(tiny: Model) -> None:
    rewards = {"short": {"use": "max_words", "n": 1}}
    decoded = tiny.adding(Decoder("best_of_n", {"n": 3, "rewards": rewards}))
    with serving(decoded, token="t") as made:
        headers = {"Authorization": "Bearer t"}
        with httpx.Client(base_url=made.url, headers=headers, timeout=120) as client:
            body: dict[str, Any] = {"temperature": 1.0, "seed": 11, "n": 2}
            found = [c["message"]["content"] for c in _chat(client, **body)["choices"]]
            drawn = generate(decoded, [USER], n=2, seed=11, max_tokens=16)[0]
            assert found == [c.text for c in drawn]
            plain = generate(tiny, [USER], n=2, seed=11, max_tokens=16)[0]
            assert found != [c.text for c in plain]
            refused = client.post("/chat/completions", json={
                "model": "tiny", "messages": USER, "logprobs": True, "top_logprobs": 1
            })  # fmt: skip
            assert "decoder draws several answers" in refused.json()["error"]["message"]
            body |= {"model": "tiny", "messages": USER, "max_tokens": 16}
            texts = ["", ""]
            for chunk in _chunks(client, "/chat/completions", body):
                choice = chunk["choices"][0]
                texts[choice["index"]] += choice["delta"].get("content", "")
            assert texts == found


def test_tokens_are_what_a_header_can_hold(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUING_SERVE_TOKEN", "from-a-file\n")
    with serving(tiny, token=" ") as made:
        headers = {"Authorization": "Bearer from-a-file"}
        assert httpx.get(f"{made.url}/models", headers=headers).status_code == 200
    monkeypatch.setenv("TRUING_SERVE_TOKEN", " ")
    with pytest.raises(InputError, match="needs a token of your own"):
        openai.openai(tiny, host="0.0.0.0", port=0)
    for token in ("caf\u00e9", "two\nlines"):
        with pytest.raises(InputError, match="no request can send") as caught:
            openai.openai(tiny, token=token, port=0)
        assert token not in str(caught.value)


def test_addresses(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRUING_SERVE_TOKEN", raising=False)
    with pytest.raises(InputError, match=r"needs a token of your own.*0\.0\.0\.0"):
        openai.openai(tiny, host="0.0.0.0", port=0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port}: cannot listen"):
            openai.openai(tiny, port=port)
    with pytest.raises(InputError, match="--host must be an address of this machine"):
        openai.openai(tiny, host="192.0.2.1", port=0, token="t")
    with pytest.raises(InputError, match="from 0 to 65535"):
        openai.openai(tiny, port=99_999)
    monkeypatch.setenv("TRUING_SERVE_TOKEN", "of-the-environment")
    with serving(tiny, host="0.0.0.0") as made:
        assert made.token == ""


def test_the_catalogue_lists_it() -> None:
    entry = catalogue.methods()["serve/openai"]
    assert entry.summary.startswith("An OpenAI-compatible server")
    assert methods["serve/openai"].settings["host"].default == "127.0.0.1"
    assert cli.main(["serve", "openai", "--prot", "1"]) == 2


@pytest.mark.parametrize("words", [["serve", "--help"], ["serve", "openai", "-h"], ["serve"]])
def test_help_tells_what_the_server_takes(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    said = capsys.readouterr().out
    assert ended.value.code == 0
    for option, about in (
        ("--model MODEL", "Model: what is served"),
        ("--host V", "address to listen at"),
        ("--port V", "0 takes a free one. (int, default 8000)"),
        ("--token V", "bearer token that requests must carry"),
        ("--name V", "of the model in requests"),
        ("--max-tokens V", "length limit of a chat's answer"),
        ("--waiting V", "requests that may wait"),
        ("--quarantined [V]", "serve a model in quarantine"),
    ):
        assert f"{option} {about}" in " ".join(said.split())
    assert "--out" not in said and "--seed" not in said
    assert ("truing serve MODEL" in said) == ("openai" not in words)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_the_command_says_when_ready_and_ends_cleanly(tiny_path: Path, stop: int) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "truing.cli", "serve", "--model", str(tiny_path),
         "--port", "0", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ),
    )  # fmt: skip
    assert child.stdout is not None
    try:
        assert select.select([child.stdout], [], [], 200)[0], "not ready in time"
        ready = json.loads(child.stdout.readline())
        assert set(ready) == {"url", "token", "model"}
        body = {"model": ready["model"], "messages": USER, "max_tokens": 8, "temperature": 0}
        headers = {"Authorization": f"Bearer {ready['token']}"}
        reply = httpx.post(
            ready["url"] + "/chat/completions", json=body, headers=headers, timeout=120
        )
        assert reply.status_code == 200
        start = time.monotonic()
        child.send_signal(stop)
        out, err = child.communicate(timeout=90)
    finally:
        child.kill()
    assert child.returncode == 0, err
    assert out == ""  # JSON alone on stdout
    assert "Traceback" not in err
    assert ready["token"] not in err
    assert time.monotonic() - start < 60
