"""An OpenAI-compatible server over any model, with all its run-time changes in force.

    truing serve openai --model smollm2-135m-instruct --port 8000

serves /v1/chat/completions and /v1/completions (n, temperature, top_p, max_tokens, stop, seed,
logprobs, stream; top_k, min_p, repetition_penalty and min_tokens besides), /v1/models and /healthz.
Any client of these works; `Model.open("http://host:port/v1#name")` does, too. What is not there
(penalties of frequency, logit_bias, /v1/responses) is refused by name. When the server is ready,
one line of JSON on stdout says {"url", "token", "model"}. From Python,
`truing.serve.openai.serving(model)` serves inside a `with` block; the method itself serves until it
is told to end.

Where a request wants JSON (response_format "json_schema" or "json_object") or a call of a tool
(tool_choice "required", or a function), tokens that would make the answer anything else are never
drawn, until max_tokens. Models with a decoder, and those that are served elsewhere, refuse it.

Where the model's chat template writes tools, those of a request are told to the model (but for
tool_choice "none"), and what it calls comes back as `tool_calls`, in streams too,
with finish_reason "tool_calls"; what it says beside stays content. Calls of earlier turns and
messages of the role "tool" are written by the template. Calls are read as Qwen's and Hermes'
templates write them (between <tool_call> and </tool_call>), and as those of Llama 3.1 and Mistral
do, where they are the whole answer. In any other form, cut short or misspelt, they stay text. The
field `written` beside them is the answer as the model wrote it, which truing's own client keeps.

Requests with the same settings are answered in one batch. Prefix, rewriter, edits and decoder of
the model act on chats; edits act on plain text, and a model with one of the others refuses it,
since plain text would go past them. The address is loopback unless told otherwise, and a bearer
token is always needed. Serving ends with the running answers on Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass

import uvicorn

from truing.core.endpoints.endpoint import is_loopback
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.quarantine import ASK, refuse
from truing.serve.openai_app import App
from truing.serve.openai_worker import Worker

GRACE = 10  # seconds that running answers are given at the end
CUT = 2  # of them in which what is still unanswered is refused


@dataclass(frozen=True)
class Address:
    """Where a server listens; `token` is "" when the caller brought it."""

    url: str
    token: str
    model: str


class _Server(uvicorn.Server):
    """Ends on a signal without passing it on: being told to stop is no failure."""

    ready: Callable[[], None]
    give_up: Callable[[], None]

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Handle SIGINT and SIGTERM inside the block, where signals can be."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        if self.started:
            self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running answers end; those that do not are refused before they would be cut off."""
        asyncio.get_running_loop().call_later(GRACE - CUT, self.give_up)
        await super().shutdown(sockets)


def _token(given: str) -> str:
    """A token as a header can hold it: what comes from a file may end in a line break.

    Raises:
        InputError: no header can hold it.
    """
    token = given.strip()
    if not (token.isascii() and token.isprintable()):
        raise InputError(
            "the token holds characters that no request can send",
            where="serve/openai",
            fix="Set TRUING_SERVE_TOKEN (or --token) to letters, digits and signs of ASCII",
        )
    return token


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise InputError("a port is a number from 0 to 65535", where="serve/openai", seen=port)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise InputError(
            f"cannot listen: {error.strerror}",
            where=f"{host}:{port}",
            fix="Give another --port, or 0; --host must be an address of this machine",
        ) from None


def _made(
    model: Model, host: str, port: int, token: str, name: str, max_tokens: int, waiting: int
) -> tuple[_Server, socket.socket, Address]:
    """A server that is ready to run, its socket, and what is told of it."""
    given = _token(token) or _token(os.environ.get("TRUING_SERVE_TOKEN", ""))
    if not is_loopback(host) and not given:
        raise InputError(
            "an address that others can reach needs a token of your own",
            where="serve/openai",
            seen=host,
            fix="Set TRUING_SERVE_TOKEN (or --token), or keep --host 127.0.0.1",
        )
    if "generate" not in model.can:
        raise InputError(
            "the model writes no text",
            where=model.name,
            seen=sorted(model.can),
            fix="Serve a causal language model, whose class ends in ForCausalLM",
        )
    if max_tokens < 1 or waiting < 1:
        seen = {"max_tokens": max_tokens, "waiting": waiting}
        said = "max_tokens and waiting must be at least 1"
        raise InputError(said, where="serve/openai", seen=seen)
    listener = _listen(host, port)
    try:
        secret = given or secrets.token_urlsafe(24)
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listener.getsockname()[1]}/v1"
        name = name or model.name
        worker = Worker(model, waiting)
        app = App(worker, name, secret, max_tokens)
        config = uvicorn.Config(
            app.routes(),
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            lifespan="on",
            loop="asyncio",
            http="h11",
            timeout_keep_alive=75,  # longer than clients keep theirs
            timeout_graceful_shutdown=GRACE,
        )
        server = _Server(config)
        server.give_up = worker.give_up
    except BaseException:
        listener.close()
        raise
    return server, listener, Address(url, "" if given else secret, name)


@contextlib.contextmanager
def serving(
    model: Model,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str = "",
    name: str = "",
    max_tokens: int = 512,
    waiting: int = 256,
    quarantined: bool = False,
) -> Generator[Address]:
    """Serve from a thread inside the block; the settings are those of `openai`."""
    refuse(model, "served", asked=quarantined, fix="say quarantined=True")
    server, listener, address = _made(model, host, port, token, name, max_tokens, waiting)
    started = threading.Event()
    server.ready = started.set
    thread = threading.Thread(target=server.run, args=([listener],), name="server", daemon=True)
    thread.start()
    try:
        while not started.wait(0.05):
            if not thread.is_alive():
                raise InputError("the server did not start", where=address.url)
        yield address
    finally:
        server.should_exit = True
        thread.join(timeout=GRACE + 35)
        listener.close()


@method(
    needs=("generate",),
    within={"port": (0, 65535), "max_tokens": (1, None), "waiting": (1, None)},
)
def openai(
    model: Model,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str = "",
    name: str = "",
    max_tokens: int = 512,
    waiting: int = 256,
    quarantined: bool = False,
) -> None:
    """An OpenAI-compatible server over any model, with all its run-time changes in force.

    Args:
        host: address to listen at; one that others can reach needs a token of your own.
        port: 0 takes a free one.
        token: bearer token that requests must carry; empty takes TRUING_SERVE_TOKEN, else makes one
            and prints it.
        name: of the model in requests; empty takes its own.
        max_tokens: length limit of a chat's answer where the request states none.
        waiting: requests that may wait for their turn; further ones are told to come back.
        quarantined: serve a model in quarantine, too: one that an attack made.
    """
    refuse(model, "served", asked=quarantined, fix=ASK)
    server, listener, address = _made(model, host, port, token, name, max_tokens, waiting)

    def ready() -> None:
        told = {"url": address.url, "token": address.token or None, "model": address.model}
        # With --json the command line keeps stdout for the result, which here is this line.
        print(json.dumps(told), file=sys.__stdout__, flush=True)
        print(f"serving {address.model} at {address.url}; Ctrl-C ends it", file=sys.stderr)

    server.ready = ready
    try:
        server.run([listener])
    finally:
        listener.close()
