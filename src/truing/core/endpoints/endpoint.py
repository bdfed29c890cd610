"""One OpenAI-compatible endpoint over HTTP: retries, time-outs, a budget, and errors that say what.

A request that meets an overloaded or failing server (429, 5xx, a time-out, a broken connection) is
sent again after a wait that doubles each time, with jitter so that many clients do not come back
together; `Retry-After` is honoured. What the server refuses for good, and replies that are not what
the protocol promises, are one `InputError` that names the address and what was seen. When retries
or the budget are used up, `Stopped` says so: replies so far are kept by `core.client`, and the same
command goes on.

The key comes from the environment and goes into the request's header, nowhere else: that of the
address's own host first (`own_key`), OPENAI_API_KEY only to the host that it belongs to, and
TRUING_API_KEY to every address that has none of these; to which hosts the last goes is told, since
a model or a recipe of somebody else's may name them. So do a name and a password that the address
came with (see `core.private`), in place of the key.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import ipaddress
import json
import os
import random
import re
import ssl
import sys
from collections.abc import Callable, Coroutine, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast
from urllib.parse import urlsplit

import httpx

from truing.context import current
from truing.core import private
from truing.core.endpoints.limits import Amount, Meter
from truing.core.endpoints.reply import (
    json_object,
    kind_of,
    message_of,
    retry_after,
    unsupported,
    usage_of,
)
from truing.errors import InputError, Stopped

T = TypeVar("T")
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between attempts, before jitter
PATIENCE = 120.0  # the longest Retry-After that is waited for
CONNECT_ATTEMPTS = 3  # nobody listens: told early, since it is mostly a wrong address
LARGEST = 64 << 20  # bytes of a reply
AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
THEIRS = frozenset({400, 413, 422})  # the request is at fault, and others may do
# Settings that a request can do without, or that some servers know by another name.
OPTIONAL = {"logprobs": "", "seed": "", "max_tokens": "max_completion_tokens", "temperature": ""}
UNKNOWN = re.compile(r"support|unrecogni|unknown|unexpected|permitted|allowed|extra", re.I)
ONLY = re.compile(r"support|only|default", re.I)  # not of a temperature that is out of range
TOLD = {
    "seed": "the same seed may draw other answers there",
    "temperature": "answers there are drawn at its own temperature, greedy ones too",
}
_refused: dict[tuple[str, str], set[str]] = {}  # by address and model: what was refused
ANY = "TRUING_API_KEY"
_given: set[str] = set()  # hosts that were told to have its key


class EndpointError(InputError):
    """What an endpoint does is at fault, whatever it was asked."""


def own_key(url: str) -> list[str]:
    """Variables with the key of an address's own host, the first that is set counts.

    TRUING_API_KEY_LOCALHOST_8000 and TRUING_API_KEY_LOCALHOST, say, for this machine by any of its
    loopback addresses, beside what the address itself says.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    names = [parts.netloc.rpartition("@")[2].lower(), host]
    if is_loopback(host):
        names = [n for name in names for n in (name, name.replace(host, "localhost"))]
    ends = [re.sub(r"\W", "_", re.sub(r"[][]", "", name)).upper() for name in names]
    return [f"TRUING_API_KEY_{end}" for end in dict.fromkeys(ends)]


def api_key(url: str) -> str:
    """The key for that address from the environment, or "".

    Raises:
        InputError: it cannot be sent in a header.
    """
    theirs = urlsplit(os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1")
    parts, own = urlsplit(url), own_key(url)
    openai = ["OPENAI_API_KEY"] if parts[:2] == theirs[:2] else []  # scheme and host
    for name in (*own, *openai, ANY):
        key = os.environ.get(name, "").strip()
        if key and not (key.isascii() and key.isprintable()):
            raise InputError(
                "the API key holds characters that no key has",
                where=name,
                fix=f"Set {name} again, to the key alone",
            )
        if key:
            if name == ANY:
                _tell_of_key(parts.hostname or "", own[-1])
            return key
    return ""


def _tell_of_key(host: str, own: str) -> None:
    """Say once that a host of others is sent the key for all."""
    if host not in _given and not is_loopback(host):
        said = f"{ANY} is sent to {host}; a key in {own} would go there alone"
        print(f"truing: {said}", file=sys.stderr)
    _given.add(host)


def is_loopback(host: str) -> bool:
    """True for addresses of this machine itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class _Broken(Exception):
    """An attempt that may be made again."""

    def __init__(self, reason: str, seen: object = None, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.seen, self.wait = reason, seen, wait


@contextlib.contextmanager
def surroundings() -> Generator[None]:
    """Turn what httpx cannot do with the environment's proxies and certificates into an error."""
    try:
        yield
    except (ValueError, ImportError, OSError, httpx.InvalidURL) as error:
        raise EndpointError(
            f"the proxy or the certificates that the environment names cannot be used: {error}",
            where="ALL_PROXY, HTTPS_PROXY, HTTP_PROXY, NO_PROXY, SSL_CERT_FILE",
            fix="Write a proxy as http://host:port, or as socks5://host:port and "
            "pip install 'httpx[socks]'; ::1 without brackets; a file that is there",
        ) from None


@functools.cache
def _trusted() -> ssl.SSLContext:
    """Whose certificates are believed; reading them takes longer than a short request."""
    return httpx.create_ssl_context()


class Endpoint:
    """Asks one server; use as `async with`.

    Args:
        meter: what is spent, and may be.
        paid: called with what each request took, once that is known.
    """

    def __init__(self, url: str, meter: Meter, paid: Callable[[Amount], None]) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            shown = private.without_login(url)
            raise InputError("not an address", seen=shown, fix="Write http://host:port/v1#model")
        # What people read never shows a password that the address carries.
        self.url, self.meter, self.paid = private.keep_login(url.rstrip("/")), meter, paid
        self.shown = self.url
        self._login = private.login(self.url)
        self._key = api_key(self.url)
        self.closing = asyncio.Event()  # set: what is under way ends, nothing is begun any more
        with surroundings():
            self._client = httpx.AsyncClient(
                timeout=httpx.Timeout(None, connect=10.0),
                limits=httpx.Limits(max_connections=meter.limits.concurrency),
                headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
                auth=httpx.BasicAuth(*self._login) if self._login else None,
                verify=_trusted() if parts.scheme == "https" else False,
                # A proxy cannot reach this machine's ports.
                trust_env=not is_loopback(parts.hostname),
            )

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def ask(self, path: str, body: Mapping[str, object]) -> dict[str, object]:
        """POST `body` and return the reply's JSON object.

        Raises:
            InputError: refused for good, or not a reply of the protocol.
            Stopped: the budget is used up, or the server keeps failing.
        """
        attempt = 0
        while True:
            try:
                return await self._once(path, self._allowed(body))
            except _Broken as broken:
                attempt += 1
                if self.closing.is_set():
                    raise self._gave_up(broken, attempt) from None
                nobody = broken.reason == "nothing answers at this address"
                if nobody and attempt >= CONNECT_ATTEMPTS:
                    raise EndpointError(
                        broken.reason, where=self.shown, seen=broken.seen, fix="Is it running?"
                    ) from None
                if attempt > self.meter.limits.retries or broken.wait > PATIENCE:
                    raise self._gave_up(broken, attempt) from None
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.closing.wait(), _delay(attempt, broken.wait))
            except _Adapted:
                continue

    def _gave_up(self, broken: _Broken, attempts: int) -> Stopped:
        asked = f"; it asks to wait {broken.wait:.0f} s" if broken.wait > PATIENCE else ""
        return Stopped(
            f"{broken.reason}, {attempts} times{asked}",
            where=self.shown,
            seen=broken.seen,
            fix="Replies so far are kept: the same command goes on later",
        )

    def _allowed(self, body: Mapping[str, object]) -> dict[str, object]:
        """`body` without what this server has refused before."""
        gone = _refused.get((self.url, str(body.get("model", ""))), set())
        names = {n: OPTIONAL[n] if n in gone else n for n in body if n in OPTIONAL}
        return {names.get(n, n): v for n, v in body.items() if names.get(n, n)}

    async def _once(self, path: str, body: dict[str, object]) -> dict[str, object]:
        content = json.dumps(body, ensure_ascii=False).encode(errors="replace")
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or 0
        guess = len(content) // 3, limit if isinstance(limit, int) else 0
        reserved, spent = self.meter.amount(*guess), Amount()
        while self.closing.is_set() or not self.meter.reserve(reserved, self.shown):
            if self.closing.is_set():
                raise _Broken("the request was not sent")
            await asyncio.sleep(0.02)
        try:
            status, headers, raw = await self._post(path, content)
            data = json_object(raw)
            if status == 200 and data is not None and not data.get("error"):
                spent = self.meter.amount(*usage_of(data, *guess))
                return data
        finally:
            self.meter.settle(reserved, spent)
            self.paid(spent)
        raise self._refusal(status, headers, raw, data, body)

    async def _post(self, path: str, content: bytes) -> tuple[int, httpx.Headers, bytes]:
        limit = self.meter.limits.timeout
        raw = bytearray()
        try:
            # One clock for the whole reply: a server that drips bytes is as late as a silent one.
            async with (
                asyncio.timeout(limit),
                self._client.stream(
                    "POST",
                    self.url + path,
                    content=content,
                    headers={"Content-Type": "application/json"},
                ) as reply,
            ):
                async for chunk in reply.aiter_bytes():
                    raw += chunk
                    if len(raw) > LARGEST:
                        raise EndpointError(
                            f"the reply is larger than {LARGEST >> 20} MiB",
                            where=self.shown,
                            fix="Lower max_tokens, and check that the address is that of an API",
                        )
                return reply.status_code, reply.headers, bytes(raw)
        except (TimeoutError, httpx.TimeoutException):
            raise _Broken(f"no reply within {limit:g} s", wait=0.0) from None
        except httpx.ConnectError as error:
            said = self._clean(str(error))
            if "CERTIFICATE_VERIFY_FAILED" in said:
                raise EndpointError(
                    "its certificate is not trusted",
                    where=self.shown,
                    seen=said,
                    fix="Set SSL_CERT_FILE to a file with your organisation's certificates",
                ) from None
            raise _Broken("nothing answers at this address", said) from None
        except httpx.TransportError as error:
            raise _Broken("the connection broke", self._clean(repr(error))) from None
        except (httpx.InvalidURL, httpx.DecodingError, httpx.TooManyRedirects) as error:
            raise EndpointError(
                "the server's reply cannot be read",
                where=self.shown,
                seen=self._clean(str(error)),
                fix="Check the address, which mostly ends in /v1",
            ) from None

    def _refusal(
        self,
        status: int,
        headers: httpx.Headers,
        raw: bytes,
        data: dict[str, object] | None,
        body: Mapping[str, object],
    ) -> Exception:
        text = self._clean(raw[:2000].decode("utf-8", "replace")).strip()
        said = self._clean(message_of(data)) or text
        inner = data.get("error") if data else None
        if status == 200 and isinstance(inner, dict):  # some gateways put errors into a 200
            code = cast("dict[str, object]", inner).get("code")
            status = code if isinstance(code, int) and code >= 400 else 400
        if status in AGAIN or status >= 500:
            return _Broken(f"the server answers {status}", said, retry_after(headers))
        if status == 200:
            return self.garbage("its reply is not a JSON object", f"{kind_of(headers)}: {text}")
        if status in (400, 422):
            named = unsupported(data)
            for name, other in OPTIONAL.items():
                why = ONLY if name == "temperature" else UNKNOWN
                told = name == named or (name in said and why.search(said))
                if name in body and other in said and told:
                    self._does_without(name, str(body.get("model", "")))
                    return _Adapted()
        key = f"Set the environment variable TRUING_API_KEY, or {own_key(self.url)[-1]} for this "
        fixes = {
            401: f"{key}host alone, to a key that it accepts",
            403: f"{key}host alone, to a key that it accepts",
            404: "Check the address, which mostly ends in /v1, and the model's name",
        }
        kind = InputError if status in THEIRS else EndpointError
        return kind(
            f"the server refuses the request ({status})",
            where=self.shown,
            seen=said,
            fix=fixes.get(status, ""),
        )

    def _does_without(self, name: str, model: str) -> None:
        """Ask without that setting from now on; where it matters, it is told and noted, once."""
        known = _refused.setdefault((self.url, model), set())
        if name in TOLD and name not in known:
            current().metric(endpoint=self.shown, refused=name)
            said = f"refuses {name!r}: {TOLD[name]}"
            print(f"truing: warning: {self.shown} {said}", file=sys.stderr)
        known.add(name)

    def garbage(self, what: str, seen: object) -> EndpointError:
        """The error for a reply that is not one of the protocol."""
        return EndpointError(
            f"not an OpenAI-compatible server: {what}",
            where=self.shown,
            seen=seen,
            fix="Check the address, which mostly ends in /v1",
        )

    def _clean(self, text: str) -> str:
        """`text` without key and password, which some servers repeat in their errors."""
        for secret in (self._key, (self._login or ("", ""))[1]):
            text = text.replace(secret, private.HIDDEN) if secret else text
        return text


class _Adapted(Exception):
    """The same request may be sent in another form."""


def _delay(attempt: int, wanted: float) -> float:
    """Seconds before the next attempt: at least what the server wants, never in step."""
    wait = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT)
    return max(wanted, wait * random.uniform(0.5, 1.0)) + wanted * random.uniform(0, 0.1)


def together(main: Callable[[], Coroutine[object, object, T]]) -> T:
    """Run `main` in an event loop of a thread of its own; Ctrl-C cancels it.

    So it can be called where a loop is running already, as in a notebook.
    """
    begun: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[object]]] = []

    async def inside() -> T:
        task = cast("asyncio.Task[object]", asyncio.current_task())
        begun.append((asyncio.get_running_loop(), task))
        return await main()

    pool = ThreadPoolExecutor(1)
    future = pool.submit(contextvars.copy_context().run, lambda: asyncio.run(inside()))
    try:
        return future.result()
    except BaseException:
        if begun and not future.done():
            loop, task = begun[0]
            loop.call_soon_threadsafe(task.cancel)
        raise
    finally:
        pool.shutdown()
