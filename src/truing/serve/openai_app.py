"""The HTTP side of the OpenAI-compatible server: routes, the token, limits, errors, streams."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from truing.serve.openai_batch import Done, Event, Job, Piece
from truing.serve.openai_reply import Reply
from truing.serve.openai_wire import Json, Refused, read
from truing.serve.openai_worker import Worker

LARGEST = 4 << 20  # bytes of a request
PATIENCE = 30.0  # seconds in which a request's body must have come
Handler = Callable[[Request], Awaitable[Response]]


class App:
    """The handlers of one served model."""

    def __init__(self, worker: Worker, name: str, token: str, max_tokens: int) -> None:
        self.worker, self.name, self.max_tokens = worker, name, max_tokens
        self._token = hashlib.sha256(token.encode()).digest()

    def routes(self) -> Starlette:
        """The application."""
        made = [
            Route("/healthz", self.healthz),
            Route("/v1/models", self._guarded(self.models)),
            Route("/v1/models/{name:path}", self._guarded(self.models)),
            Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
            Route("/v1/completions", self._guarded(self.text), methods=["POST"]),
        ]
        return Starlette(
            routes=made,
            exception_handlers={HTTPException: _http_error, Refused: _refusal},
            lifespan=self._life,
        )

    @contextlib.asynccontextmanager
    async def _life(self, _: Starlette) -> AsyncGenerator[None]:
        self.worker.start()
        yield
        await asyncio.to_thread(self.worker.stop)

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            kind, _, given = request.headers.get("authorization", "").partition(" ")
            digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
            if kind.lower() != "bearer" or not secrets.compare_digest(digest, self._token):
                raise Refused(401, "a valid bearer token is needed", code="invalid_api_key")
            return await handler(request)

        return guarded

    async def healthz(self, _: Request) -> Response:
        """Says that the server runs."""
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """The one model."""
        facts: Json = {"id": self.name, "object": "model", "created": 0, "owned_by": "truing"}
        wanted = request.path_params.get("name")
        if wanted is None:
            return JSONResponse({"object": "list", "data": [facts]})
        if wanted != self.name:
            raise Refused(404, f"there is no model {wanted!r} here", code="model_not_found")
        return JSONResponse(facts)

    async def chat(self, request: Request) -> Response:
        """Answers to messages."""
        return await self._answer(request, chat=True)

    async def text(self, request: Request) -> Response:
        """Plain text that goes on, or (with echo) its log-probabilities."""
        return await self._answer(request, chat=False)

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        ask = read(await _body(request), chat=chat, name=self.name, default=self.max_tokens)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def send(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(ask, send)
        self.worker.put(job)
        reply = Reply(ask, self.name, secrets.token_hex(12), self.worker.served.form)
        try:
            event = await _first(events, request)
        except BaseException:
            job.gone.set()
            raise
        if event is None:
            job.gone.set()
            return Response(status_code=499)  # nobody is there to read it
        if isinstance(event, Refused):
            raise event
        if not ask.stream and isinstance(event, Done):
            return JSONResponse(reply.whole(event.answers, event.prompt_tokens))
        return StreamingResponse(
            _stream(job, reply, event, events),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )


async def _body(request: Request) -> object:
    """The request's JSON; Refused when it is too large, too slow or none."""
    raw = bytearray()
    try:
        async with asyncio.timeout(PATIENCE):
            async for chunk in request.stream():
                raw += chunk
                if len(raw) > LARGEST:
                    raise Refused(413, f"the request is larger than {LARGEST >> 20} MiB")
    except ClientDisconnect:
        raise Refused(499, "the client has left") from None
    except TimeoutError:
        raise Refused(408, f"the request did not come within {PATIENCE:g} s") from None
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not valid JSON: {error}") from None


async def _first(events: asyncio.Queue[Event], request: Request) -> Event | None:
    """The first event, or None when the client leaves before it."""
    while True:
        try:
            return await asyncio.wait_for(events.get(), 0.5)
        except TimeoutError:
            if await request.is_disconnected():
                return None


async def _stream(
    job: Job, reply: Reply, event: Event, events: asyncio.Queue[Event]
) -> AsyncGenerator[bytes]:
    """Server-sent events of one request."""
    many = len(job.ask.prompts) * job.ask.sampling.n
    try:
        if job.ask.chat:
            for i in range(many):
                yield _data(reply.begin(i))
        while isinstance(event, Piece):
            for chunk in reply.said(event.index, event.text):
                yield _data(chunk)
            event = await events.get()
        if isinstance(event, Done):
            for i, answer in enumerate(event.answers):
                for chunk in reply.end(i, answer):
                    yield _data(chunk)
            if job.ask.usage_at_end and event.prompt_tokens is not None:
                yield _data(reply.last(event.answers, event.prompt_tokens))
        else:
            yield _data(event.body())
        yield b"data: [DONE]\n\n"
    finally:
        job.gone.set()


def _data(chunk: Json) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


async def _refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}
    return JSONResponse(error.body(), error.status, headers.get(error.status))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail.lower()}"
    if error.status_code == 404:
        message += "; there are /v1/chat/completions, /v1/completions and /v1/models"
    return JSONResponse(Refused(error.status_code, message).body(), error.status_code)
