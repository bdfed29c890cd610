"""Answers and log-probabilities from any OpenAI-compatible server, each reply kept on the disk.

The same calls as for a model in memory: `core.generate.generate` draws from an endpoint through
`generate` here, `score` gives the log-probabilities of given words. A reply is kept by endpoint,
model, prompt, settings and draw number (`core.endpoints.replies`), so that a second run asks
nothing and a killed one goes on. Each draw is a request of its own with a seed of its own, so that
more draws of a prompt reuse the earlier ones.

How much may be asked, and how many requests run together: what the model's address says, for all
together `limited(Limits(...))` or environment variables; see `core.endpoints.limits`.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

from truing.core.chat import Prompt, messages_of
from truing.core.drawing import Completion
from truing.core.endpoints.endpoint import Endpoint, together
from truing.core.endpoints.limits import Limits, Meter, limited, meter, warn_of_cut
from truing.core.endpoints.replies import Replies, Reply, passing
from truing.core.endpoints.reply import CALLS, answer_of, warn_of_filtered
from truing.core.endpoints.spending import book_of
from truing.core.sampling import SamplingSettings, first_draws
from truing.errors import InputError, Stopped, TruingError
from truing.kinds import split_tools
from truing.models import LOCAL, Model, Served
from truing.surrogates import mended
from truing.tables import content_hash

__all__ = ["Limits", "Meter", "Replies", "generate", "limited", "meter", "replies_to", "score"]

Told = Callable[[int], None]
Read = Callable[[Reply, Endpoint], Reply]


@dataclass
class _Request:
    """A request and the places that its reply fills."""

    key: str
    body: Reply
    places: list[tuple[int, int]] = field(default_factory=list)


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    sampling: SamplingSettings,
    *,
    first: Sequence[int] | None = None,
    told: Told | None = None,
) -> list[list[Completion]]:
    """Draw `sampling.n` answers to each prompt; prefix and rewriter are applied already.

    Args:
        model: a served one.
        prompts: user's words or messages.
        sampling: settings that the protocol has no word for are an InputError; top_k, min_p,
            repetition_penalty, min_tokens and stop_ids go by the names that vLLM gave them.
        first: number of each prompt's first draw.
        told: called with the number of answers that have just come.

    Returns [prompt][draw]; `logprobs` where the server gives them, `ids` never. Calls of tools are
    text, see `core.endpoints.reply`.
    Raises:
        InputError: refused, not an OpenAI-compatible server, or nothing listens.
        Stopped: the budget is spent or the server keeps failing; what came is kept.
    """
    served = _served(model)
    settings = _settings(sampling, model.name)
    settings["max_tokens"] = sampling.max_tokens + served.reasoning_tokens
    firsts = first_draws([repr(p) for p in prompts], sampling.n) if first is None else first
    requests: dict[str, _Request] = {}
    for i, prompt in enumerate(prompts):
        messages = messages_of(prompt)
        said, tools = split_tools(messages)
        offered = {"tools": tools} if tools else {}
        asked = [messages, CALLS] if tools else [messages]
        for k in range(sampling.n):
            draw = 0 if sampling.greedy else firsts[i] + k  # greedy answers are all the same
            body: Reply = {"model": served.model, "messages": said, **offered, **settings}
            if not sampling.greedy:
                body["seed"] = _seed(sampling.seed, draw)
            key = content_hash(
                ["chat", served.url, served.model, *asked, settings, sampling.seed, draw]
                if not sampling.greedy
                else ["chat", served.url, served.model, *asked, settings]
            )
            requests.setdefault(key, _Request(key, body)).places.append((i, k))
    made: dict[tuple[int, int], Completion] = {}
    filtered: list[bool] = []

    def take(request: _Request, reply: Reply) -> None:
        made.update(dict.fromkeys(request.places, _completion(reply)))
        filtered.extend([bool(reply.get("filtered"))] * len(request.places))
        if told is not None:
            told(len(request.places))

    _fetch(served, "/chat/completions", requests.values(), _read_chat, take)
    cut = sum(c.finish == "length" and not c.text for c in made.values())
    warn_of_cut(f"{served.url}#{served.model}", cut, len(made))
    warn_of_filtered(f"{served.url}#{served.model}", filtered)
    return [[made[i, k] for k in range(sampling.n)] for i in range(len(prompts))]


def score(model: Model, rows: Sequence[tuple[str, str]]) -> list[list[float]]:
    """Log-probability of each token of a text after another, both plain text.

    Args:
        model: a served one whose server tells them (`echo` of /v1/completions: vLLM, ours).
        rows: (what stands before, what is scored).

    A token belongs to the text in which it begins; the very first of a row has no log-probability
    and is left out. No chat template is applied, as none is known: methods, which measure answers
    behind one, do not ask it; scripts and plug-ins that measure plain text can.
    """
    served = _served(model)
    requests: dict[str, _Request] = {}
    for i, (before, text) in enumerate(rows):
        body: Reply = {
            "model": served.model,
            "prompt": before + text,
            "max_tokens": 0,
            "echo": True,
            "logprobs": 1,
        }
        key = content_hash(["score", served.url, served.model, before + text])
        requests.setdefault(key, _Request(key, body)).places.append((i, 0))
    made: dict[int, list[float]] = {}

    def take(request: _Request, reply: Reply) -> None:
        offsets = cast("list[int]", reply["offsets"])
        logprobs = cast("list[float | None]", reply["logprobs"])
        for i, _ in request.places:
            start = len(rows[i][0])
            pairs = zip(offsets, logprobs, strict=True)
            made[i] = [v for at, v in pairs if at >= start and v is not None]

    _fetch(served, "/completions", requests.values(), _read_echo, take)
    return [made[i] for i in range(len(rows))]


def replies_to(
    url: str,
    path: str,
    bodies: Sequence[Reply],
    read: Read,
    *,
    note: object = None,
    model: str = "",
) -> list[Reply]:
    """What a server says to each request, kept replies first; for routes that are not OpenAI's.

    Args:
        url: of the server, before `path`.
        bodies: the requests; equal ones are sent once.
        read: what is kept of a reply; it raises for one that is none.
        note: what else decides what is kept.
        model: that the address names, for the limits that it says.
    """
    served = Served(url, model)
    requests: dict[str, _Request] = {}
    for i, body in enumerate(bodies):
        key = content_hash(["ask", served.url, path, body, note])
        requests.setdefault(key, _Request(key, body)).places.append((i, 0))
    made: dict[int, Reply] = {}

    def take(request: _Request, reply: Reply) -> None:
        made.update({i: reply for i, _ in request.places})

    _fetch(served, path, requests.values(), read, take)
    return [made[i] for i in range(len(bodies))]


def _served(model: Model) -> Served:
    if not isinstance(model.base, Served):
        raise InputError("not a served model", where=model.name, fix="Use core.generate")
    return model.base


def _settings(s: SamplingSettings, where: str) -> Reply:
    """Sampling settings in the protocol's words."""
    plain = SamplingSettings()
    for name in ("banned", "first_temperature"):
        if getattr(s, name) != getattr(plain, name):
            said = f"a served model takes no setting {name!r}"
            raise InputError(said, where=where, seen=getattr(s, name), fix=LOCAL)
    made: Reply = {"max_tokens": s.max_tokens, "logprobs": True}
    if s.stop:
        made["stop"] = list(s.stop)
    if s.stop_ids is not None:
        made["stop_token_ids"] = list(s.stop_ids)
    if s.greedy:
        made["temperature"] = 0
    else:
        made["temperature"] = s.temperature
    for name in ("repetition_penalty", "min_tokens", *(() if s.greedy else DRAWN)):
        if getattr(s, name) != getattr(plain, name):
            made[name] = getattr(s, name)
    return made


DRAWN = ("top_p", "top_k", "min_p")


def _seed(seed: int, draw: int) -> int:
    """A seed of 31 bits, which every server takes, for one draw."""
    digest = hashlib.blake2b(f"{seed}/{draw}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def _fetch(
    served: Served,
    path: str,
    requests: Iterable[_Request],
    read: Read,
    take: Callable[[_Request, Reply], None],
) -> None:
    """Give `take` each request's reply, from the disk or from the server."""
    replies, asked = passing.get() or Replies(), list(requests)
    missing: list[_Request] = []
    for request in asked:
        kept = replies.get(request.key)
        if kept is None:
            missing.append(request)
        else:
            take(request, kept)
    book = book_of(served.url, served.model)
    if not missing:
        return
    replies.make_room()
    came: list[_Request] = []

    def arrived(request: _Request, reply: Reply) -> None:
        replies.put(request.key, reply)
        came.append(request)
        take(request, reply)

    async def work() -> list[TruingError]:
        async with Endpoint(served.url, meter(served.url, served.model), book.add) as endpoint:
            return await _ask_all(endpoint, path, missing, read, arrived)

    try:
        failed = together(work)
    finally:
        book.tell()
    if failed:
        if isinstance(failed[0], Stopped):
            left = len(missing) - len(came)
            failed[0].message += f"; {left} of {len(asked)} replies are still to come"
        raise failed[0]


async def _ask_all(
    endpoint: Endpoint,
    path: str,
    requests: Sequence[_Request],
    read: Read,
    arrived: Callable[[_Request, Reply], None],
) -> list[TruingError]:
    """Send requests, several at a time; what has failed, after which none is begun any more."""
    failed: list[TruingError] = []
    todo = iter(requests)

    async def worker() -> None:
        for request in todo:
            try:
                arrived(request, read(await endpoint.ask(path, request.body), endpoint))
            except TruingError as error:
                # Replies under way are paid for: they are waited for and kept.
                failed.append(error)
                endpoint.closing.set()
            if endpoint.closing.is_set():
                return

    count = min(endpoint.meter.limits.concurrency, len(requests))
    tasks = [asyncio.create_task(worker()) for _ in range(count)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return failed


def _choice(data: Reply, endpoint: Endpoint) -> Reply:
    choices = data.get("choices")
    first: object = cast("list[object]", choices)[0] if isinstance(choices, list) and choices else 0
    if not isinstance(first, dict):
        raise endpoint.garbage("its reply has no choices", data)
    return cast("Reply", first)


def _read_chat(data: Reply, endpoint: Endpoint) -> Reply:
    """What is kept of a chat completion."""
    choice = _choice(data, endpoint)
    message = choice.get("message")
    if not isinstance(message, dict):
        raise endpoint.garbage("its reply has no message with content", choice)
    text, ended = answer_of(cast("Reply", message), endpoint.garbage), choice.get("finish_reason")
    given = choice.get("logprobs")
    items = cast("Reply", given).get("content") if isinstance(given, dict) else None
    logprobs = [_logprob(t, endpoint) for t in cast("list[object]", items or [])]
    usage = data.get("usage")
    count = cast("Reply", usage).get("completion_tokens") if isinstance(usage, dict) else None
    return {
        "text": text,
        "logprobs": logprobs,
        "finish": "length" if ended == "length" else "stop",
        "filtered": ended == "content_filter",
        "tokens": count if isinstance(count, int) else len(logprobs),
    }


def _logprob(item: object, endpoint: Endpoint) -> float:
    value = cast("Reply", item).get("logprob") if isinstance(item, dict) else None
    if not isinstance(value, int | float) or math.isnan(value):
        raise endpoint.garbage("a token without its log-probability", item)
    return round(float(value), 6)  # more digits take most of the room of a kept reply


def _read_echo(data: Reply, endpoint: Endpoint) -> Reply:
    """What is kept of an echoed prompt."""
    given = _choice(data, endpoint).get("logprobs")
    facts = cast("Reply", given) if isinstance(given, dict) else {}
    offsets, logprobs = facts.get("text_offset"), facts.get("token_logprobs")
    if not isinstance(offsets, list) or not isinstance(logprobs, list):
        raise endpoint.garbage("it tells no log-probabilities of a prompt", facts)
    at, values = cast("list[object]", offsets), cast("list[object]", logprobs)
    numbers = all(isinstance(v, int | float | None) for v in [*at, *values])
    if len(at) != len(values) or not numbers:
        raise endpoint.garbage("log-probabilities of a prompt that are no numbers", facts)
    return {"offsets": at, "logprobs": values}


def _completion(reply: Reply) -> Completion:
    return Completion(
        mended(str(reply["text"])),
        (),
        tuple(cast("list[float]", reply["logprobs"])),
        str(reply["finish"]),
        int(cast(int, reply["tokens"])),
    )
