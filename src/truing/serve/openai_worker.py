"""The thread that answers a server's requests: those with the same settings in one batch.

Requests queue up while a batch is written and are then taken together: the first in the queue, and
all behind it whose settings agree. Seeds need not: the random numbers of a row come from its
request's seed, prompt and draw number. A decoder draws in its own way, so that a model with one
answers a request at a time.
"""

from __future__ import annotations

import queue
import secrets
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import cast

from truing.changes import Decoder, Prefix, Rewriter
from truing.core.chat import Prompt, prompt_ids
from truing.core.endpoints.endpoint import EndpointError
from truing.core.endpoints.replies import unkept
from truing.core.generate import rewritten
from truing.core.sampling import check_lengths
from truing.errors import InputError, TruingError
from truing.models import Loaded, Model
from truing.serve.openai_batch import Abandoned, Batch, Job, Served
from truing.serve.openai_errors import Refused, unsupported
from truing.serve.openai_wire import MOST, Ask
from truing.surrogates import mended

ROWS = 64  # answers that one batch writes
GATHER = 0.004  # seconds in which requests that come together are gathered


class Worker:
    """Answers jobs in a thread of its own.

    Args:
        model: local or served; all its run-time changes are in force.
        waiting: how many jobs may wait, tokenised or not; further ones are refused.
    """

    def __init__(self, model: Model, waiting: int) -> None:
        self.served = Served(model)
        self._rewrites = any(isinstance(c, Rewriter) for c in model.changes)
        self._queue: queue.Queue[Job] = queue.Queue()
        self._places = threading.BoundedSemaphore(waiting)  # one for each job that waits
        self._waiting: list[Job] = []
        self._jobs: weakref.WeakSet[Job] = weakref.WeakSet()  # that were put, and not forgotten yet
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def give_up(self) -> None:
        """Refuse what waits and what is under way, at which the thread soon leaves off."""
        self._stopping.set()
        _tell(list(self._jobs), _shutdown())

    def stop(self) -> None:
        """Give up, and wait for the thread's end."""
        self.give_up()
        self._thread.join(timeout=30)

    def put(self, job: Job) -> None:
        """Queue a job; Refused when too many wait."""
        if self._stopping.is_set():
            raise _shutdown()
        if not self._places.acquire(blocking=False):
            raise Refused(503, "too many requests are waiting", code="overloaded")
        self._jobs.add(job)
        self._queue.put_nowait(job)

    def _run(self) -> None:
        while not self._stopping.is_set():
            with unkept():  # what users of the server ask is not left on the disk
                self._gather()
                if batch := self._next_batch():  # else nobody came, or all have left
                    self._answer(batch)

    def _answer(self, jobs: list[Job]) -> None:
        """Write and send the answers of a batch, or what is wrong with it."""
        batch, again = Batch(self.served, jobs, self._stopping.is_set), list[Job]()
        try:
            batch.run()
        except Abandoned:
            pass
        except Exception as error:
            again = batch.unheard() if len(jobs) > 1 and self._may_do_alone(error) else []
            _tell((j for j in jobs if j not in again), _refusal(error))
        for job in again:
            self._answer([job])

    def _may_do_alone(self, error: Exception) -> bool:
        """Whether a batch may have failed for one of its requests, or for their number."""
        if isinstance(error, EndpointError):
            return False
        own = InputError if self.served.loaded is None else TruingError
        return isinstance(error, (own, Refused))

    def _gather(self) -> None:
        """Move jobs that have come from the queue to the list of waiting ones."""
        until = time.monotonic() + GATHER
        while not self._stopping.is_set():
            left = until - time.monotonic()
            if left <= 0 and len(self._waiting) >= (1 if self._rewrites else ROWS):
                return
            try:
                job = self._queue.get(timeout=max(left, 0) if self._waiting else 0.2)
            except queue.Empty:
                return
            if self._ready(job):
                if not self._waiting:
                    until = time.monotonic() + GATHER
                self._waiting.append(job)
            else:
                self._places.release()

    def _ready(self, job: Job) -> bool:
        """Prepare a job; False where it needs no answer any more."""
        if job.gone.is_set():
            return False
        try:
            self._prepare(job)
        except Exception as error:
            job.send(_refusal(error))
            return False
        return True

    def _next_batch(self) -> list[Job]:
        """The first waiting job and those that can go with it; none where all clients have left."""
        before = len(self._waiting)
        self._waiting = [j for j in self._waiting if not j.gone.is_set()]
        batch: list[Job] = []
        rows = 0
        for job in self._waiting:
            more = len(job.ask.prompts) * job.ask.sampling.n
            if not batch or (job.key == batch[0].key and rows + more <= ROWS):
                batch.append(job)
                rows += more
        taken = {id(j) for j in batch}
        self._waiting = [j for j in self._waiting if id(j) not in taken]
        for _ in range(before - len(self._waiting)):
            self._places.release()
        return batch

    def _prepare(self, job: Job) -> None:
        """Tokenise and check a job, so that a bad one cannot spoil a batch."""
        ask = job.ask = replace(job.ask, prompts=mended(job.ask.prompts))
        seed = secrets.randbits(63) if ask.seed is None else ask.seed
        job.sampling = ask.sampling
        if ask.recalls and not self.served.form.earlier:
            raise Refused(
                400,
                "the chat template does not write tool calls and their results, so the model"
                " would not see those of earlier turns; write them as text",
                param="messages",
                code="unsupported",
            )
        if ask.chat:
            job.prompts = rewritten(self.served.model, [cast(Prompt, p) for p in ask.prompts])
        else:
            self._check_plain()
        self._check_logprobs(ask)
        if self.served.loaded is not None:
            job.ids = [self._ids(p, ask.chat) for p in (job.prompts or ask.prompts)]
            self._fit(job)
        self._guide(job)
        # Draws of a request are numbered from its seed on, so that one batch can hold many seeds.
        job.firsts = [(seed << 24) + MOST * i for i in range(len(ask.prompts))]
        job.key = (ask.chat, ask.write, ask.echo, job.sampling)
        if self.served.decoded and ask.chat:
            job.sampling, job.firsts = replace(job.sampling, seed=seed), [0] * len(ask.prompts)
            job.key = object()

    def _check_plain(self) -> None:
        kinds = [
            c.kind for c in self.served.model.changes if isinstance(c, Prefix | Rewriter | Decoder)
        ]
        if self.served.loaded is None:
            kinds = ["served"]
        if kinds:
            raise Refused(
                400,
                f"plain text would go past the model's changes ({', '.join(kinds)}); "
                "ask /v1/chat/completions",
                code="unsupported",
            )

    def _check_logprobs(self, ask: Ask) -> None:
        """Raise for log-probabilities that nothing tells, or only of changed logits."""
        if ask.logprobs and self.served.loaded is None:
            raise unsupported("logprobs", "the model is served elsewhere")
        if ask.top and self.served.decoded and ask.chat:
            raise unsupported("logprobs", "the model's decoder draws several answers")
        if ask.top and ask.sampling.repetition_penalty != 1:
            raise unsupported("logprobs", "repetition_penalty changes them")

    def _guide(self, job: Job) -> None:
        """Find what holds a job's answers to their shape, where they must have one."""
        shape, s = job.ask.shape, job.sampling
        if shape is None:
            return
        if self.served.guides is None or self.served.decoded:
            raise unsupported(shape.param, "the model is served elsewhere, or has a decoder")
        if s.min_tokens or s.stop_ids is not None or not self.served.ends:
            raise unsupported(
                shape.param,
                "an answer of a form ends where that ends, and must be "
                "free to: leave out min_tokens and stop_token_ids",
            )
        job.guide = self.served.guides.guide(shape)

    def _ids(self, prompt: Prompt | list[int], chat: bool) -> list[int]:
        loaded = cast(Loaded, self.served.loaded)
        if chat:
            return prompt_ids(loaded.tokenizer, cast(Prompt, prompt))
        if isinstance(prompt, str):
            return cast("list[int]", loaded.tokenizer(prompt)["input_ids"])
        ids = cast("list[int]", prompt)
        size = self.served.vocab
        if not all(0 <= i < size for i in ids):
            raise Refused(400, f"token ids must be from 0 to {size - 1}", param="prompt")
        return ids

    def _fit(self, job: Job) -> None:
        """Check lengths; a request that names none gets what room there is."""
        s, context = job.sampling, self.served.context
        if not job.ask.limited and context is not None:
            room = context - max(map(len, job.ids))
            job.sampling = s = replace(s, max_tokens=max(min(s.max_tokens, room), 1, s.min_tokens))
        room = s.max_tokens if job.ask.write else 0
        longest = max(map(len, job.ids))
        if context is not None and longest + room > context:
            raise Refused(
                400,
                f"This model's maximum context length is {context} tokens; the prompt has "
                f"{longest} and {room} are to be written. Shorten it or lower max_tokens",
                param="messages" if job.ask.chat else "prompt",
                code="context_length_exceeded",
            )
        check_lengths(cast(Loaded, self.served.loaded).module, job.ids, room)


def _shutdown() -> Refused:
    return Refused(503, "the server is shutting down", code="shutdown")


def _refusal(error: Exception) -> Refused:
    """What a client is told of an error; what it must not or need not know goes to stderr."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, EndpointError):
        print(f"truing: {error}", file=sys.stderr)
        return Refused(502, f"the model is served elsewhere: {error.message}", code="upstream")
    if isinstance(error, InputError):
        return Refused(400, str(error))
    if isinstance(error, TruingError):
        return Refused(503, str(error))
    traceback.print_exception(error)
    return Refused(500, "the server failed; its log says how")


def _tell(jobs: Iterable[Job], refused: Refused) -> None:
    for job in jobs:
        job.send(refused)
