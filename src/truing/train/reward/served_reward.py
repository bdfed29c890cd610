"""Reward answers by a reward model behind an address, such as one that vLLM serves.

    r(x, y) = the number that the server gives for prompt x and answer y

How the server is asked follows from where the address ends, or from `form`:

    classify   {"model", "messages"} -> {"data": [{"probs": [p_0, ...]}]}     p of the class `label`
    pooling    {"model", "messages"} -> {"data": [{"data": ...}]}             of the last token
    score      {"model", "text_1": prompt, "text_2": answer} -> {"data": [{"score": s}]}
    plain      {"prompts": [...], "answers": [...]} -> {"scores": [...]}      any other address

The first three are vLLM's routes for models of sequence classification and of rewards; messages are
prompt and answer, for which the server has a template. A model of one output needs no `label`, one
of several does, such as 1 for the second of bad and good. "plain" is for a server of one's own; the
prompts are texts or messages, as the rows have them. `#name` at the end of an address says which
model is meant, `#name?requests=500,concurrency=4` also how much may be asked of it
(`core.endpoints.limits`).

Tools that a row offers go beside its messages, as "tools" and, since these routes of vLLM know no
such field, by "chat_template_kwargs" to the template. "plain" gets "tools" with a list for each
prompt where any offers some, "score" none.

Requests run together, are repeated, kept within a budget and answered from the disk where the same
was asked before (`core.client`). Another number of scores than answers, or one that is not finite,
is an InputError, and is not kept. A key for the address is that of its host in the environment,
else TRUING_API_KEY. Routes as in vLLM's documentation of pooling models (0.15); our own client.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, cast
from urllib.parse import urlsplit

from truing.core.chat import Prompt, messages_of
from truing.core.client import Reply, replies_to
from truing.core.endpoints.endpoint import Endpoint
from truing.core.endpoints.limits import keep
from truing.core.private import without_login
from truing.errors import InputError
from truing.kinds import split_tools
from truing.method import component
from truing.own_checks import checks
from truing.tables import Row

Form = Literal["", "classify", "pooling", "score", "plain"]
WHERE = "reward served_reward"
CHUNK = 32  # answers of one request of the plain form


def address(url: str, form: Form) -> tuple[str, str, str, str]:
    """(server, path, model, form) of an address; an InputError for what is none."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(
            "not an address",
            where=f"{WHERE} setting 'url'",
            seen=without_login(url),
            fix="Write http://host:port/classify#model",
        )
    if without_login(url) != url:
        raise InputError(
            "settings are recorded, so an address may hold no name and password",
            where=f"{WHERE} setting 'url'",
            seen=without_login(url),
            fix="Put the server's key into TRUING_API_KEY",
        )
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    last = parts.path.rstrip("/").rpartition("/")[2]
    own = form or (last if last in ("classify", "pooling", "score") else "plain")
    server = f"{parts.scheme}://{parts.netloc}"
    return server, path, keep(server, parts.fragment), own


def bodies(rows: Sequence[Row], model: str, form: str) -> list[tuple[list[Reply], int]]:
    """Requests in the order of the rows, and how many answers each of a group is about."""
    named: Reply = {"model": model} if model else {}
    texts = [str(row["completion"]) for row in rows]
    if form == "plain":
        made = [
            {**named, **_prompts(rows[i : i + CHUNK]), "answers": texts[i : i + CHUNK]}
            for i in range(0, len(rows), CHUNK)
        ]
        full = len(rows) // CHUNK
        groups = [(made[:full], CHUNK), (made[full:], len(rows) % CHUNK)]
        return [group for group in groups if group[0]]
    asked = [split_tools(messages_of(cast(Prompt, row["prompt"]))) for row in rows]
    if form == "score":
        before = ["\n\n".join(str(m["content"]) for m in messages) for messages, _ in asked]
        return [([{**named, "text_1": x, "text_2": y} for x, y in zip(before, texts)], 1)]
    talks: list[Reply] = []
    for (messages, tools), text in zip(asked, texts, strict=True):
        offered: Reply = {"tools": tools, "chat_template_kwargs": {"tools": tools}} if tools else {}
        said = [*messages, {"role": "assistant", "content": text}]
        talks.append({**named, "messages": said, **offered, "add_generation_prompt": False})
    return [(talks, 1)]


def _prompts(rows: Sequence[Row]) -> Reply:
    """Prompts of the plain form as the rows have them, and the tools of each where any has some."""
    prompts: list[object] = []
    offered: list[list[object]] = []
    for row in rows:
        given, tools = row["prompt"], list[object]()
        if isinstance(given, list):
            given, tools = split_tools(cast("list[Mapping[str, object]]", given))
        prompts.append(given)
        offered.append(tools)
    return {"prompts": prompts, **({"tools": offered} if any(offered) else {})}


def scores_in(reply: Reply, form: str, label: int | None) -> list[object]:
    """The numbers of one reply, whatever they are; [] where it is of another form."""
    if form == "plain":
        given = reply.get("scores")
        return cast("list[object]", given) if isinstance(given, list) else []
    data = reply.get("data")
    items = cast("list[object]", data) if isinstance(data, list) else []
    name = {"classify": "probs", "pooling": "data", "score": "score"}[form]
    found: list[object] = []
    for item in items:
        value = cast("Reply", item).get(name) if isinstance(item, dict) else None
        values = cast("list[object]", value) if isinstance(value, list) else [value]
        if values and isinstance(
            values[-1], list
        ):  # of every token, of which the last has seen all
            values = cast("list[object]", values[-1])
        found.append(_chosen(values, label))
    return found


def _chosen(values: Sequence[object], label: int | None) -> object:
    if label is None and len(values) > 1:
        raise InputError(
            f"the server gives {len(values)} numbers for an answer",
            where=f"{WHERE} setting 'label'",
            seen=list(values[:8]),
            fix="Say which of them is the reward: {use: served_reward, label: 1, ...}",
        )
    place = label or 0
    return values[place] if -len(values) <= place < len(values) else None


def _check(settings: Mapping[str, object]) -> None:
    """What `core.judging.scores` asks before anything is drawn; no server is asked."""
    address(str(settings["url"]), cast(Form, settings.get("form", "")))


@component("reward")
@checks(_check)
def served_reward(
    rows: list[Row], *, url: str, form: Form = "", label: int | None = None
) -> list[float]:
    """What a reward model behind an address says of each answer.

    Args:
        url: of the route that is asked, such as http://host:8000/classify#model.
        form: how it is asked; "" takes what the address ends in, else plain.
        label: which of several numbers for an answer counts, from 0; -1 for the last.
    """
    server, path, model, own = address(url, form)
    values: list[float] = []
    for asked, count in bodies(rows, model, own):
        read = functools.partial(_read, count=count, form=own, label=label, path=path)
        replies = replies_to(server, path, asked, read, note=[own, label], model=model)
        values += [v for r in replies for v in cast("list[float]", r["scores"])]
    return values


def _read(
    reply: Reply, endpoint: Endpoint, *, count: int, form: str, label: int | None, path: str
) -> Reply:
    """The scores of one reply, as they are kept; an InputError for any others."""
    found = scores_in(reply, form, label)
    fit = [float(v) for v in found if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(found) != count or len(fit) != count or not all(map(math.isfinite, fit)):
        raise InputError(
            f"the server must give one finite score for each of {count} answers, in the form "
            f"{form!r}",
            where=f"{WHERE} {endpoint.shown}{path}",
            seen=found or reply,
            fix="Look at its reply, and set form and label to suit",
        )
    return {"scores": fit}
