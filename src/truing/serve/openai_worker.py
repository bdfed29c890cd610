"""The thread that answers a server's requests: those with the same settings in one batch.

Requests queue up while a batch is written and are then taken together: the first in the queue, and
all behind it whose settings agree. Seeds need not: the random numbers of a row come from its
request's seed, prompt and draw number. A decoder draws in its own way, so that a model with one
answers a request at a time.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from truing.changes import Decoder, Prefix, Rewriter
from truing.core.chat import Prompt, prompt_ids
from truing.core.generate import rewritten
from truing.core.sampling import check_lengths
from truing.errors import InputError, TruingError
from truing.models import Loaded, Model
from truing.serve.openai_batch import Abandoned, Batch, Event, Job, Served
from truing.serve.openai_wire import MOST, Ask, Refused
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
        self._queue: queue.Queue[Job] = queue.Queue()
        self._places = threading.BoundedSemaphore(waiting)  # one for each job that waits
        self._waiting: list[Job] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Give up what is under way, refuse what waits, and end the thread."""
        self._stopping.set()
        self._thread.join(timeout=30)

    def put(self, job: Job) -> None:
        """Queue a job; Refused when too many wait."""
        if self._stopping.is_set():
            raise Refused(503, "the server is shutting down", code="shutdown")
        if not self._places.acquire(blocking=False):
            raise Refused(503, "too many requests are waiting", code="overloaded")
        self._queue.put_nowait(job)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._gather()
            batch = self._next_batch()
            if not batch:  # nobody came, or all have left
                continue
            try:
                Batch(self.served, batch, self._stopping.is_set).run()
            except Abandoned:
                _tell(batch, Refused(503, "the server is shutting down", code="shutdown"))
            except InputError as error:
                _tell(batch, Refused(400, str(error)))
            except TruingError as error:
                _tell(batch, Refused(503, str(error)))
            except Exception:
                traceback.print_exc()
                _tell(batch, Refused(500, "the server failed; its log says how"))
        while not self._queue.empty():
            self._waiting.append(self._queue.get_nowait())
        _tell(self._waiting, Refused(503, "the server is shutting down", code="shutdown"))

    def _gather(self) -> None:
        """Move jobs that have come from the queue to the list of waiting ones."""
        until = time.monotonic() + GATHER
        while not self._stopping.is_set():
            try:
                left = until - time.monotonic()
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
        except Refused as refused:
            job.send(refused)
        except InputError as error:
            job.send(Refused(400, str(error)))
        except Exception:
            traceback.print_exc()
            job.send(Refused(500, "the server failed; its log says how"))
        else:
            return True
        return False

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
                400, "the chat template does not write tool calls and their results, so the model"
                " would not see those of earlier turns; write them as text",
                param="messages", code="unsupported",
            )  # fmt: skip
        if ask.chat:
            job.prompts = rewritten(self.served.model, [cast(Prompt, p) for p in ask.prompts])
        else:
            self._check_plain()
        self._check_logprobs(ask)
        if self.served.loaded is not None:
            job.ids = [self._ids(p, ask.chat) for p in (job.prompts or ask.prompts)]
            self._fit(job)
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
        why = ""
        if ask.logprobs and self.served.loaded is None:
            why = "the model is served elsewhere"
        elif ask.top and self.served.decoded and ask.chat:
            why = "the model's decoder draws several answers"
        elif ask.top and ask.sampling.repetition_penalty != 1:
            why = "repetition_penalty changes them"
        if why:
            raise Refused(
                400, f"{'top ' if ask.top else ''}log-probabilities are not told here: {why}",
                param="logprobs", code="unsupported",
            )  # fmt: skip

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
        check_lengths(
            cast(Loaded, self.served.loaded).module, job.ids, s.max_tokens if job.ask.write else 0
        )


def _tell(jobs: Sequence[Job], event: Event) -> None:
    for job in jobs:
        job.send(event)
