"""Requests of the OpenAI protocol: what is read, and what is refused.

A setting that cannot be honoured is refused by name, never ignored; those that change nothing in an
answer, such as `user`, are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from truing.core.batch.template import Message
from truing.core.chat import Prompt
from truing.core.sampling import SamplingSettings
from truing.errors import InputError, shorten, unknown
from truing.kinds import with_tools
from truing.serve.openai_errors import Json, Refused, unsupported
from truing.serve.openai_shape import Shape, shape_of

MOST = 128  # answers to one prompt
PROMPTS = 1024  # answers of one request
# Settings of the protocol that this server has not; what they may be, meaning "not used".
NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "functions": ([],),
    "modalities": (["text"],),
    "suffix": ("",),
    "best_of": (1,),
}
# Those of dialogues, which plain text has not.
NEUTRAL_IN_TEXT = NEUTRAL | {
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
}
TYPE = re.compile(r"(str|constrained|list|dict)\b")  # pydantic's names of alternatives in a place
WITHOUT_EFFECT = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "prediction",
    }
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)  # further fields, such as cache_control, are let pass
    type: Literal["text"]
    text: str


class _Function(BaseModel):
    model_config = ConfigDict(strict=True)
    name: str = Field(min_length=1)
    arguments: str  # JSON text


class _Called(BaseModel):
    model_config = ConfigDict(strict=True)
    id: str
    type: Literal["function"] = "function"
    function: _Function


class _Message(BaseModel):
    model_config = ConfigDict(strict=True)  # further fields, such as a name, are let pass
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    tool_calls: list[_Called] | None = None
    tool_call_id: str | None = None


class _StreamOptions(BaseModel):
    include_usage: bool = False


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


_Stops = Annotated[
    list[Annotated[str, Field(min_length=1)]], Field(max_length=16), BeforeValidator(_listed)
]


class _Common(_Strict):
    model: str
    n: int = Field(1, ge=1, le=MOST)
    temperature: float = Field(1.0, ge=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    min_tokens: int = Field(0, ge=0)
    stop: _Stops = Field(default_factory=list)
    stop_token_ids: list[int] | None = Field(None, max_length=64)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: _StreamOptions = Field(default_factory=_StreamOptions)


class _Chat(_Common):
    messages: list[_Message] = Field(min_length=1)
    tools: list[Json] = Field(default_factory=list, max_length=128)
    tool_choice: str | Json = "auto"
    response_format: Json = Field(default_factory=lambda: {"type": "text"})
    parallel_tool_calls: bool = True
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)


class _Text(_Common):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False


@dataclass(frozen=True)
class Ask:
    """A request that was understood.

    Args:
        chat: True for messages, False for plain text to go on with.
        prompts: messages (one), texts, or lists of token ids.
        sampling: without the seed.
        tools: functions that the answer may call, several at once where `parallel`, each with the
            schemas of its parameters.
        shape: what the answer must be; None for anything.
        recalls: whether earlier turns called any.
        seed: None when the request has none.
        limited: False when the request leaves the length to the server.
        logprobs: whether they are wanted, and `top` of the likeliest tokens beside.
        echo: the prompt is part of the answer.
        write: False where nothing is to be written, only the prompt scored.
    """

    chat: bool
    prompts: list[Prompt | list[int]]
    sampling: SamplingSettings
    seed: int | None = None
    tools: Mapping[str, Json] = field(default_factory=dict[str, Json])
    parallel: bool = True
    shape: Shape | None = None
    recalls: bool = False
    limited: bool = True
    logprobs: bool = False
    top: int = 0
    echo: bool = False
    write: bool = True
    stream: bool = False
    usage_at_end: bool = False


@dataclass
class Token:
    """A token with its log-probability and the likeliest ones in its place."""

    text: str
    logprob: float | None
    top: list[tuple[str, float]] = field(default_factory=list)
    offset: int = 0


@dataclass
class Answer:
    """One choice of a reply."""

    text: str
    finish: str
    count: int
    tokens: list[Token] | None = None


def read(data: object, *, chat: bool, name: str, default: int) -> Ask:
    """The request in `data`, or Refused.

    Args:
        data: parsed JSON.
        chat: which of the two endpoints it came to.
        name: of the model that is served.
        default: length limit where the request has none.
    """
    if not isinstance(data, dict):
        raise Refused(400, "the body must be a JSON object")
    given = {k: v for k, v in cast("Json", data).items() if v is not None}
    neutral = NEUTRAL if chat else NEUTRAL_IN_TEXT
    for key in list(given):
        if key in neutral:
            if given.pop(key) not in neutral[key]:
                raise unsupported(key, "it can only be left out")
        elif key in WITHOUT_EFFECT:
            del given[key]
    _check_calls(given.get("messages"))
    try:
        made = _Chat.model_validate(given) if chat else _Text.model_validate(given)
    except ValidationError as error:
        raise _invalid(error, _Chat if chat else _Text) from None
    if made.model != name:
        raise Refused(
            404,
            f"there is no model {made.model!r} here, only {name!r}",
            param="model",
            code="model_not_found",
        )
    return _chat_ask(made, default) if isinstance(made, _Chat) else _text_ask(made)


def _check_calls(messages: object) -> None:
    """Refuse the protocol's older form of calls by name: it would be let pass, and so be lost."""
    for message in cast("list[object]", messages if isinstance(messages, list) else []):
        if isinstance(message, dict) and cast("Json", message).get("function_call"):
            raise Refused(
                400,
                "function_call in a message is not supported; write it as tool_calls",
                param="messages",
                code="unsupported",
            )


def _messages(given: Sequence[_Message]) -> list[Message]:
    """Messages as chat templates take them, calls of tools with JSON text as arguments."""
    names: dict[str, str] = {}  # of the calls so far, by id
    made: list[Message] = []
    for i, m in enumerate(given):
        if m.content is None and not m.tool_calls:
            raise Refused(
                400, f"messages.{i}.content: field required", param=f"messages.{i}.content"
            )
        if m.tool_calls and m.role != "assistant":
            place = f"messages.{i}.tool_calls"
            raise Refused(400, f"{place}: only the assistant calls tools", param=place)
        parts = m.content if isinstance(m.content, list) else []
        text = m.content if isinstance(m.content, str) else "".join(p.text for p in parts)
        more: Json = {}
        if m.tool_calls:
            names |= {c.id: c.function.name for c in m.tool_calls}
            more = {"tool_calls": [c.model_dump() for c in m.tool_calls]}
        elif m.role == "tool":
            if m.tool_call_id not in names:
                place = f"messages.{i}.tool_call_id"
                seen = f" (seen: {shorten(m.tool_call_id)})"
                raise Refused(400, f"{place}: must be the id of an earlier call{seen}", param=place)
            more = {"tool_call_id": m.tool_call_id, "name": names[m.tool_call_id]}
        role = "system" if m.role == "developer" else m.role
        made.append({"role": role, "content": text, **more})
    return made


def _offered(tools: Sequence[Json]) -> dict[str, Json]:
    """Functions by name, each with the schema of its parameters.

    Some clients give the schemas of functions without the frame around them.
    """
    made: dict[str, Json] = {}
    for i, tool in enumerate(tools):
        if tool.get("type", "function") != "function":
            why = f"only tools of the type 'function' are (seen: {shorten(tool['type'])})"
            raise unsupported(f"tools.{i}.type", why)
        function = _object(tool.get("function", tool))
        name = function.get("name")
        if not isinstance(name, str) or not name:
            place = f"tools.{i}.function.name"
            raise Refused(400, f"{place}: must be a text that is not empty", param=place)
        made[name] = _object(function.get("parameters"))
    return made


def _object(value: object) -> Json:
    return cast("Json", value) if isinstance(value, dict) else {}


def _invalid(error: ValidationError, model: type[BaseModel]) -> Refused:
    # Where several types are allowed, the one that got furthest tells most.
    first = max(error.errors(), key=lambda e: len(e["loc"]))
    place = ".".join(p for p in map(str, first["loc"]) if not TYPE.match(p))
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        return Refused(400, str(unknown("parameter", place, model.model_fields)), param=place)
    seen = "" if first["type"] == "missing" else f" (seen: {shorten(first['input'])})"
    return Refused(400, f"{place}: {first['msg'].lower()}{seen}", param=place or None)


def _sampling(made: _Common, max_tokens: int) -> SamplingSettings:
    try:
        return SamplingSettings(
            n=made.n,
            max_tokens=max(max_tokens, 1),
            temperature=made.temperature or 1.0,
            top_p=made.top_p,
            top_k=max(made.top_k, 0),
            min_p=made.min_p,
            greedy=made.temperature == 0,
            stop=tuple(made.stop),
            stop_ids=None if made.stop_token_ids is None else tuple(made.stop_token_ids),
            min_tokens=made.min_tokens,
            repetition_penalty=made.repetition_penalty,
        )
    except InputError as error:
        raise Refused(400, str(error)) from None


def _chat_ask(made: _Chat, default: int) -> Ask:
    messages = _messages(made.messages)
    if made.top_logprobs and not made.logprobs:
        raise Refused(400, "top_logprobs needs logprobs", param="top_logprobs")
    wanted = made.max_completion_tokens or made.max_tokens
    tools = [] if made.tool_choice == "none" else made.tools
    offered = _offered(tools)
    return Ask(
        True,
        [with_tools(messages, tools)],
        _sampling(made, wanted or max(default, made.min_tokens)),
        made.seed,
        {name: _object(p.get("properties")) for name, p in offered.items()},
        made.parallel_tool_calls,
        shape_of(made.tool_choice, made.response_format, offered),
        any("tool_calls" in m for m in messages),
        limited=wanted is not None,
        logprobs=made.logprobs,
        top=made.top_logprobs,
        stream=made.stream,
        usage_at_end=made.stream_options.include_usage,
    )


def _text_ask(made: _Text) -> Ask:
    given = made.prompt
    many = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
    prompts = cast("list[Prompt | list[int]]", given if many else [given])
    if not all(prompts) or not 1 <= len(prompts) * made.n <= PROMPTS:
        message = f"prompts, none empty, for 1 to {PROMPTS} answers in all"
        raise Refused(400, message, param="prompt")
    if made.max_tokens == 0 and not made.echo:
        raise Refused(400, "max_tokens 0 needs echo", param="max_tokens")
    if made.echo and made.stream:
        raise Refused(400, "echo is not streamed", param="echo")
    return Ask(
        False,
        prompts,
        _sampling(made, made.max_tokens),
        made.seed,
        logprobs=made.logprobs is not None,
        top=made.logprobs or 0,
        echo=made.echo,
        write=made.max_tokens > 0,
        stream=made.stream,
        usage_at_end=made.stream_options.include_usage,
    )
