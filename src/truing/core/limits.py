"""How much may be asked of endpoints: requests, tokens, how many together, for how long.

A budget is never passed: tokens are reserved before a request is sent (by its length and the limit
of its answer), and the reservation is replaced by what the server counts.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
from collections.abc import Generator
from dataclasses import dataclass

from truing.errors import InputError, Stopped


@dataclass(frozen=True)
class Limits:
    """What may be asked of endpoints; 0 means no limit.

    Args:
        requests: HTTP requests in all, retries included.
        tokens: tokens in all, of prompts and answers, as the servers count them.
        concurrency: requests under way at the same time.
        timeout: seconds that one request may take, from sending it to its last byte.
        retries: further attempts at one request.
    """

    requests: int = 0
    tokens: int = 0
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 6

    def __post_init__(self) -> None:
        for name in ("requests", "tokens", "retries"):
            if getattr(self, name) < 0:
                raise InputError(
                    f"{name} must be 0 or more", where="limits", seen=getattr(self, name)
                )
        if self.concurrency < 1 or self.timeout <= 0:
            raise InputError(
                "concurrency must be at least 1 and timeout above 0",
                where="limits",
                seen=(self.concurrency, self.timeout),
            )

    @staticmethod
    def of_environment() -> Limits:
        """From TRUING_MAX_REQUESTS, TRUING_MAX_TOKENS, TRUING_CONCURRENCY and TRUING_TIMEOUT."""
        plain = Limits()
        return Limits(
            requests=int(_number("TRUING_MAX_REQUESTS", plain.requests)),
            tokens=int(_number("TRUING_MAX_TOKENS", plain.tokens)),
            concurrency=int(_number("TRUING_CONCURRENCY", plain.concurrency)),
            timeout=_number("TRUING_TIMEOUT", plain.timeout),
        )


def _number(name: str, default: float) -> float:
    text = os.environ.get(name, "").strip()
    try:
        return float(text) if text else default
    except ValueError:
        raise InputError("not a number", where=f"environment variable {name}", seen=text) from None


class Meter:
    """What has been spent under `limits`; shared by all threads."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.requests, self.tokens = 0, 0
        self._reserved, self._under_way = 0, 0
        self._lock = threading.Lock()

    def reserve(self, tokens: int, where: str) -> bool:
        """Take one request of about `tokens`; False while others under way hold what is left."""
        most = self.limits
        with self._lock:
            if most.requests and self.requests >= most.requests:
                raise self._spent(f"{most.requests} requests", where)
            if most.tokens and self.tokens + self._reserved + tokens > most.tokens:
                if self._under_way:
                    return False
                raise self._spent(f"{most.tokens} tokens", where)
            self.requests += 1
            self._reserved += tokens
            self._under_way += 1
            return True

    def settle(self, reserved: int, spent: int) -> None:
        """Give back a reservation and note what was really spent."""
        with self._lock:
            self._reserved -= reserved
            self._under_way -= 1
            self.tokens += spent

    def _spent(self, what: str, where: str) -> Stopped:
        return Stopped(
            f"the budget of {what} does not allow another request",
            where=where,
            seen=f"{self.requests} requests, {self.tokens} tokens so far",
            fix="Replies so far are kept: raise TRUING_MAX_REQUESTS or TRUING_MAX_TOKENS "
            "and run the same command again",
        )


_meter: contextvars.ContextVar[Meter | None] = contextvars.ContextVar("meter", default=None)
_whole: list[Meter] = []


def meter() -> Meter:
    """The meter in force: that of the enclosing `limited`, else the process's own."""
    found = _meter.get()
    if found is not None:
        return found
    limits = Limits.of_environment()
    if not _whole or _whole[0].limits != limits:
        _whole[:] = [Meter(limits)]
    return _whole[0]


@contextlib.contextmanager
def limited(limits: Limits) -> Generator[Meter]:
    """Put all requests made inside the block under `limits`; yields what they spend."""
    made = Meter(limits)
    token = _meter.set(made)
    try:
        yield made
    finally:
        _meter.reset(token)
