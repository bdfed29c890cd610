"""How much may be asked of endpoints: requests, tokens, money, how many together, for how long.

A budget is never passed: tokens are reserved before a request is sent (by its length and the limit
of its answer), and the reservation is replaced by what the server counts. So is what they cost,
where the model's price is said; a price cut for what the server has cached is not known here.

An address may say what holds for its model, `http://host:port/v1#name?requests=500,timeout=60`; a
recipe may write it as `{endpoint: http://host:port/v1, model: name, requests: 500, timeout: 60}`,
and the price as `price: {input: 0.15, output: 0.6}`.
It is kept in this process's memory alone, by the address without it, which is what models, keys and
the store have: no limit changes a result. What no address says holds for all of them together and
comes from the environment (`Limits.of_environment`) or from `limited`.

`reasoning_tokens` is said in the same place and is no limit: with more room a model that thinks out
of sight answers otherwise, so it belongs to the model and its key (`truing.models.Served`).
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import re
import threading
import warnings
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, cast

from truing.core import private
from truing.errors import InputError, Stopped, unknown

PRICES = ("input_price", "output_price")
MILLION = 1_000_000
UNPRICED = "a budget of money holds where the price of the tokens is said"
PRICE = (
    "Say {price: {input: 0.15, output: 0.6}} of the model, or input_price=0.15,output_price=0.6 "
    "behind its name: of a million tokens, 0 where they cost nothing"
)


@dataclass(frozen=True)
class Limits:
    """What may be asked of endpoints; 0 means no limit.

    Args:
        requests: HTTP requests in all, retries included.
        tokens: tokens in all, of prompts and answers, as the servers count them.
        cost: of them in all, by the price of each model.
        input_price: of a million tokens of prompts, in whatever currency `cost` is.
        output_price: of a million tokens of answers.
        concurrency: requests under way at the same time.
        timeout: seconds that one request may take, from sending it to its last byte.
        retries: further attempts at one request.
    """

    requests: int = 0
    tokens: int = 0
    cost: float = 0.0
    input_price: float = 0.0
    output_price: float = 0.0
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 6

    def __post_init__(self) -> None:
        for name in ("requests", "tokens", "retries", "cost", *PRICES):
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
        """From TRUING_MAX_REQUESTS, _TOKENS and _COST, TRUING_CONCURRENCY and TRUING_TIMEOUT."""
        plain = Limits()
        return Limits(
            requests=int(_number("TRUING_MAX_REQUESTS", plain.requests)),
            tokens=int(_number("TRUING_MAX_TOKENS", plain.tokens)),
            cost=_number("TRUING_MAX_COST", plain.cost),
            concurrency=int(_number("TRUING_CONCURRENCY", plain.concurrency)),
            timeout=_number("TRUING_TIMEOUT", plain.timeout),
        )


def _number(name: str, default: float) -> float:
    text = os.environ.get(name, "").strip()
    try:
        return float(text) if text else default
    except ValueError:
        raise InputError("not a number", where=f"environment variable {name}", seen=text) from None


NAMES = tuple(f.name for f in fields(Limits))
ROOM = "reasoning_tokens"
SAYS = (*NAMES, ROOM)  # what may stand behind a name
WHOLE = ("requests", "tokens", "concurrency", "retries", ROOM)
# "?requests=5,timeout=60" behind the name of an address's model.
SAID = re.compile(
    rf"(https?://[^\s#'\"]*#[^\s?'\"]*)\?((?:{'|'.join(SAYS)})=[\w.+-]+,?)+(?=$|[\s'\"])"
)
_said: dict[tuple[str, str], dict[str, float]] = {}  # by address and model


def keep(url: str, name: str, *, anew: bool = False) -> str:
    """The model's name without the limits behind it, which `meter` then knows.

    Args:
        url: of the server, before "#".
        name: "model" or "model?requests=500,timeout=60".
        anew: a name without limits takes back those that were said of this model before. A setting
            that names a model takes none back: the command may have said them elsewhere.
    Raises:
        InputError: there is no such limit, its value is none, or a budget of money has no price.
    """
    bare, mark, tail = name.rpartition("?")
    pairs = [item.partition("=") for item in tail.split(",")]
    url = private.without_login(url.rstrip("/"))
    if not mark or not all(eq for _, eq, _ in pairs):
        if anew:
            _said.pop((url, name), None)
        meter(url, name)  # a budget of money for all needs a price, told before anything runs
        return name
    said = {key: _value(key, text, f"{url}#{bare}", NAMES) for key, _, text in pairs}
    replace(Limits(), **said)  # checks what they say
    if said.get("cost") and not _priced(said):
        raise InputError(UNPRICED, where=f"{url}#{bare}", fix=PRICE)
    _said[url, bare] = said
    meter(url, bare)
    return bare


def _priced(said: Mapping[str, float]) -> bool:
    return all(name in said for name in PRICES)


def with_room(name: str) -> tuple[str, int]:
    """A model's name without the `reasoning_tokens` behind it, and those; 0 where none are said.

    Raises:
        InputError: they are no whole number of 0 or more.
    """
    bare, mark, tail = name.rpartition("?")
    said = tail.split(",") if mark else []
    rooms = [item.removeprefix(f"{ROOM}=") for item in said if item.startswith(f"{ROOM}=")]
    if not rooms:
        return name, 0
    room = _value(ROOM, rooms[-1], bare)
    if room < 0:
        raise InputError(f"{ROOM} must be 0 or more", where=bare, seen=rooms[-1])
    rest = ",".join(item for item in said if not item.startswith(f"{ROOM}="))
    return f"{bare}?{rest}" if rest else bare, int(room)


def warn_of_cut(place: str, cut: int, asked: int) -> None:
    """Warn of answers that ended before their first word: their tokens went into reasoning."""
    if cut:
        said = f"{cut} of {asked} answers reached their limit before the first word"
        fix = f"A model that reasons out of sight needs more room: {place}?{ROOM}=8000"
        warnings.warn(f"{said}. {fix}", stacklevel=3)


def _value(name: str, text: object, where: str, names: Sequence[str] = SAYS) -> float:
    if name not in names:
        raise unknown("limit", name, names, where=where)
    try:
        value = float(str(text))
        whole = int(value)
    except (ValueError, OverflowError):
        raise InputError(f"{name} must be a number", where=where, seen=text) from None
    if name in WHOLE and value != whole:
        raise InputError(f"{name} must be a whole number", where=where, seen=text)
    return whole if name in WHOLE else value


def address(given: Mapping[str, object], *, where: str = "") -> str:
    """The text of {endpoint: URL, model: NAME, requests: N, ...}, as it stands for a model.

    Raises:
        InputError: endpoint or model is missing, or something else is no limit.
    """
    fix = f"Write {{endpoint: http://host:port/v1, model: NAME}}, and of {', '.join(SAYS)} any"
    rest = dict(given)
    url, name = rest.pop("endpoint", None), rest.pop("model", None)
    if not isinstance(url, str) or not isinstance(name, str) or "#" in url:
        raise InputError("a model behind an endpoint has address and name", where=where, fix=fix)
    if secret := next(filter(private.is_secret, rest), ""):
        said = f"{secret!r} does not stand in a recipe, which others may read"
        raise InputError(said, where=where, fix="Put it into the environment: TRUING_API_KEY")
    price = rest.pop("price", {})
    sides = cast("Mapping[str, object]", price) if isinstance(price, Mapping) else {"": price}
    if not set(sides) <= {"input", "output"}:
        raise InputError("price is {input: NUMBER, output: NUMBER}", where=where, seen=price)
    rest |= {f"{side}_price": value for side, value in sides.items()}
    said = ",".join(f"{key}={_value(key, value, where)}" for key, value in rest.items())
    return f"{url}#{name}?{said}" if said else f"{url}#{name}"


def without(text: str) -> str:
    """A text whose addresses say no limits: what counts of it for keys."""

    def bare(found: re.Match[str]) -> str:
        room = re.search(rf"[?,]({ROOM}=[^,]*)", found[0].removeprefix(found[1]))
        return f"{found[1]}?{room[1]}" if room else found[1]

    return SAID.sub(bare, text)


class Amount(NamedTuple):
    """What a request takes, or may take."""

    tokens: int = 0
    cost: float = 0.0


class Meter:
    """What has been spent under `limits`; shared by all threads.

    Args:
        above: the meter of all endpoints together, whose budget holds as well.
    """

    def __init__(self, limits: Limits, above: Meter | None = None) -> None:
        self.limits, self.above = limits, above
        self.requests, self.tokens, self.cost = 0, 0, 0.0
        self._reserved, self._reserved_cost, self._under_way = 0, 0.0, 0
        self._lock = threading.Lock()
        self._within: dict[tuple[str, str], Meter] = {}

    def within(self, place: tuple[str, str], said: Mapping[str, float]) -> Meter:
        """The meter of one model, with what its address says; one for as long as that stands."""
        own = {"requests": 0, "tokens": 0, "cost": 0.0, **said}  # a budget of all counts above
        with self._lock:
            limits = replace(self.limits, **own)
            found = self._within.get(place)
            if found is None or found.limits != limits:
                found = self._within[place] = Meter(limits, self)
            return found

    def amount(self, asked: int, answered: int) -> Amount:
        """That of so many tokens of a prompt and of its answer, at the model's price."""
        most = self.limits
        cost = (asked * most.input_price + answered * most.output_price) / MILLION
        return Amount(asked + answered, cost)

    def reserve(self, some: Amount, where: str) -> bool:
        """Take one request of about `some`; False while others under way hold what is left."""
        most = self.limits
        with self._lock:
            if most.requests and self.requests >= most.requests:
                raise self._spent("requests", where)
            for name, spent, more in (
                ("tokens", self.tokens + self._reserved, some.tokens),
                ("cost", self.cost + self._reserved_cost, some.cost),
            ):
                budget: float = getattr(most, name)
                if budget and more and spent + more > budget:
                    if self._under_way:
                        return False
                    raise self._spent(name, where)
            if self.above is not None and not self.above.reserve(some, where):
                return False
            self.requests += 1
            self._reserved += some.tokens
            self._reserved_cost += some.cost
            self._under_way += 1
            return True

    def settle(self, reserved: Amount, spent: Amount) -> None:
        """Give back a reservation and note what was really spent."""
        with self._lock:
            self._reserved -= reserved.tokens
            self._reserved_cost -= reserved.cost
            self._under_way -= 1
            self.tokens += spent.tokens
            self.cost += spent.cost
        if self.above is not None:
            self.above.settle(reserved, spent)

    def carry(self, requests: int, spent: Amount) -> None:
        """Count what was spent before this process began, here alone."""
        with self._lock:
            self.requests += requests
            self.tokens += spent.tokens
            self.cost += spent.cost

    def _spent(self, name: str, where: str) -> Stopped:
        most = f"{getattr(self.limits, name):g}" if name == "cost" else getattr(self.limits, name)
        paid = f", a cost of {self.cost:.4g}" if self.cost else ""
        return Stopped(
            f"the budget of {most} {'in cost' if name == 'cost' else name} does not allow another "
            "request",
            where=where,
            seen=f"{self.requests} requests, {self.tokens} tokens{paid} so far",
            fix="Replies so far are kept, and the same command goes on with this budget anew, or "
            f"with a larger one: {f'TRUING_MAX_{name.upper()}' if self.above is None else name}",
        )


_meter: contextvars.ContextVar[Meter | None] = contextvars.ContextVar("meter", default=None)
_whole: list[Meter] = []


def meter(url: str = "", model: str = "") -> Meter:
    """The meter in force for a model: its own where its address says limits, else that of all."""
    said = _said.get((url, model), {})
    shared = _shared()
    if url and shared.limits.cost and not _priced(said):
        raise InputError(UNPRICED, where=f"{url}#{model}", fix=PRICE)
    return shared.within((url, model), said) if said else shared


def _shared() -> Meter:
    """That of the enclosing `limited`, else the process's own."""
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
