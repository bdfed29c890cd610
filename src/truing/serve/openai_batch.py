"""One batch of a server: answers written together, their words sent while they are written.

The logits hook of `core.sampling` shows all rows before every token. So an answer that has ended
need not wait for the others, and a batch whose readers have all gone, or that a shutdown meets, is
given up at once. Under a decoder, rows are not the answers themselves, which are then sent whole.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from truing.changes import Decoder
from truing.core.chat import Prompt, answer_text
from truing.core.drawing import Completion, base_of, continued, drawer
from truing.core.generation.stops import before_stop, ends_of, stop_place
from truing.core.logprob import chunk_of, states
from truing.core.modelfiles.reach import context_of, text_config
from truing.core.sampling import LogitsHook, Row, SamplingSettings
from truing.core.trainer.teacher import head_of, log_probs
from truing.core.tree import example_tree, pack
from truing.errors import InputError
from truing.models import Loaded, Model
from truing.serve.openai_calls import Form, form_of
from truing.serve.openai_errors import Refused, unsupported
from truing.serve.openai_shape import Guide, Guides
from truing.serve.openai_text import Growing, TextOf, decoded, joins, starts
from truing.serve.openai_wire import Answer, Ask, Token
from truing.surrogates import UNFINISHED


@dataclass(frozen=True)
class Piece:
    """New words of one answer."""

    index: int
    text: str


@dataclass(frozen=True)
class Done:
    """All answers of a request; None where the tokens of its prompts are not known."""

    answers: list[Answer]
    prompt_tokens: int | None


Event = Piece | Done | Refused


@dataclass(eq=False)
class Job:
    """A request on its way.

    `send` takes its events in the worker's thread; `gone` is set when nobody waits any more.
    """

    ask: Ask
    send: Callable[[Event], None]
    gone: threading.Event = field(default_factory=threading.Event)
    prompts: list[Prompt] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    guide: Guide | None = None
    key: object = None


class Abandoned(Exception):
    """Nobody waits for the batch."""


class Served:
    """The model that is served, and what is known of it once and for all."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.loaded: Loaded | None = None if model.is_served else model.load_module()
        self.decoded = any(isinstance(c, Decoder) for c in model.changes)
        self.ends: tuple[int, ...] = ()
        self.context: int | None = None
        self.vocab = 0
        self.piecewise = False  # whether text can be decoded token by token
        # A client writes the calls that a server tells it in the form of `Form()`.
        self.form = Form(earlier=True)
        self.guides: Guides | None = None
        if self.loaded is not None:
            module = self.loaded.module
            self.ends = ends_of(self.loaded.tokenizer, module)
            self.context = context_of(module)
            self.vocab = cast(int, text_config(module).vocab_size)
            self.piecewise = joins(self.loaded.tokenizer)
            self.form = form_of(self.loaded.tokenizer)
            self.guides = Guides(self.loaded.tokenizer, self.vocab, self.ends, self.form)


class _Watched:
    """One row of a batch as it is written."""

    def __init__(self, job: Job, prompt: int, draw: int) -> None:
        self.job, self.index = job, prompt * job.sampling.n + draw
        self.row: Row | None = None
        self.growing: Growing | None = None
        self.sent = ""
        self.guide = None if job.guide is None else job.guide.another()
        self.tops: list[list[tuple[int, float]]] = []
        self.answer: Answer | None = None

    def send(self, text: str) -> None:
        """Send what is new in `text`; words once sent are never taken back."""
        if self.job.ask.stream and len(text) > len(self.sent) and text.startswith(self.sent):
            self.job.send(Piece(self.index, text[len(self.sent) :]))
            self.sent = text


class Batch:
    """Jobs with the same settings."""

    def __init__(
        self, served: Served, jobs: list[Job], stopping: Callable[[], bool] = lambda: False
    ) -> None:
        self.served, self.jobs, self.loaded = served, jobs, served.loaded
        self.stopping = stopping
        self.sampling = jobs[0].sampling
        stops = self.sampling.stop_ids
        self.ends = served.ends if stops is None else stops
        self.live = not (served.decoded and jobs[0].ask.chat)  # rows are the answers themselves
        self.watched: list[list[_Watched]] = [
            [_Watched(j, p, k) for k in range(self.sampling.n)]
            for j in jobs
            for p in range(len(j.ask.prompts))
        ]
        self.told: set[Job] = set()

    def run(self) -> None:
        """Write and send all answers."""
        ask = self.jobs[0].ask
        drawn: list[list[Completion]] = [[] for _ in self.watched]
        if ask.write:
            drawn = self._draw()
        echoes = [self._echo(j, ids) for j in self.jobs for ids in j.ids] if ask.echo else []
        for i, (items, watched) in enumerate(zip(drawn, self.watched, strict=True)):
            if not ask.write:
                items = [Completion("", finish="length")] * len(watched)
            for made, one in zip(items, watched, strict=True):
                one.answer = one.answer or self._answer(one, made)
                if ask.echo:
                    text, tokens = echoes[i]
                    one.answer = _joined(text, tokens, one.answer)
        for job in self.jobs:
            self._finish(job)

    def unheard(self) -> list[Job]:
        """Jobs of which nothing was sent."""
        heard = self.told | {w.job for items in self.watched for w in items if w.sent}
        return [j for j in self.jobs if j not in heard]

    def _heed(self) -> None:
        """Raise Abandoned where nobody waits for what is still to be written."""
        if self.stopping() or all(j.gone.is_set() or j in self.told for j in self.jobs):
            raise Abandoned

    def _draw(self) -> list[list[Completion]]:
        firsts = [f for j in self.jobs for f in j.firsts]
        if not self.jobs[0].ask.chat:
            loaded = cast(Loaded, self.loaded)
            ids = [i for j in self.jobs for i in j.ids]
            return continued(loaded, ids, self.sampling, first=firsts, logits=self._hook)
        model = self.served.model
        hook: LogitsHook | None = None if self.loaded is None else self._hook
        draw = drawer(base_of(model, hook), model)
        return draw([p for j in self.jobs for p in j.prompts], self.sampling, first=firsts)

    def _hook(self, rows: Sequence[Row], logits_BV: Tensor) -> Tensor:
        """Look at the rows before each token; only answers of a shape have logits changed."""
        self._heed()
        if not self.live:
            return logits_BV
        now: set[int] = set()
        for row, logits_V in zip(rows, logits_BV, strict=True):
            one = self.watched[row.prompt][row.draw]
            one.row = row
            now.add(id(one))
            if one.job.ask.stream and row.ids:
                one.send(self._so_far(one, row.ids))
            if one.job.ask.top:
                logp_V = torch.log_softmax(logits_V.float(), 0)
                one.tops.append(_likeliest(logp_V, one.job.ask.top))
            if one.guide is not None:
                one.guide.close(row.ids, logits_V)
        for items in self.watched:
            for one in items:
                if one.row is not None and one.answer is None and id(one) not in now:
                    self._ended(one)
        return logits_BV

    def _ended(self, one: _Watched) -> None:
        """An answer that ended before the others, unless more is wanted than its tokens."""
        ask, row = one.job.ask, cast(Row, one.row)
        if ask.logprobs or ask.echo:
            return
        stopped = row.ids[-1] in self.ends or len(row.ids) < self.sampling.max_tokens
        words = self._words(row.ids)
        text = before_stop(self._written(words), words, self.sampling, self._written)
        if self.sampling.stop and not stopped:
            whole = self._decoded(row.ids)
            stopped = stop_place(whole, row.ids, self.sampling, self._decoded) >= 0
        one.answer = Answer(text, "stop" if stopped else "length", len(row.ids))
        one.send(text)
        self._finish(one.job)

    def _finish(self, job: Job) -> None:
        """Send a job's end when all of its answers are there, once."""
        mine = [w for items in self.watched for w in items if w.job is job]
        answers = [w.answer for w in mine if w.answer is not None]
        if len(answers) < len(mine) or job in self.told:
            return
        self.told.add(job)
        for one, answer in zip(mine, answers, strict=True):
            one.send(answer.text)
        job.send(Done(answers, None if self.loaded is None else sum(map(len, job.ids))))

    def _decoded(self, ids: Sequence[int]) -> str:
        return decoded(cast(Loaded, self.loaded).tokenizer, ids)

    def _written(self, ids: Sequence[int]) -> str:
        return answer_text(cast(Loaded, self.loaded).tokenizer, ids)

    def _named(self, top: Sequence[tuple[int, float]]) -> list[tuple[str, float]]:
        tokenizer = cast(Loaded, self.loaded).tokenizer
        return [(cast(str, tokenizer.decode([t])), v) for t, v in top]

    def _words(self, ids: Sequence[int]) -> Sequence[int]:
        """Tokens of an answer without the one that ended it."""
        return ids[:-1] if ids and ids[-1] in self.ends else ids

    def _so_far(self, one: _Watched, ids: Sequence[int]) -> str:
        """Words of an answer so far, without what may yet turn out to end it."""
        if one.growing is None:
            tokenizer = cast(Loaded, self.loaded).tokenizer
            one.growing = Growing(tokenizer, self.served.piecewise, answer_text)
        words = self._words(ids)
        whole = one.growing.text(words)
        text = before_stop(whole, words, self.sampling, self._written)
        if len(text) < len(whole):
            return text
        text = text.rstrip(UNFINISHED)
        held = (
            k
            for s in self.sampling.stop
            for k in range(1, min(len(s), len(text) + 1))
            if text.endswith(s[:k])
        )
        return text[: len(text) - max(held, default=0)]

    def _answer(self, one: _Watched, made: Completion) -> Answer:
        tokens = self._tokens(one, made) if one.job.ask.logprobs else None
        return Answer(made.text, made.finish, made.tokens, tokens)

    def _tokens(self, one: _Watched, made: Completion) -> list[Token]:
        """The answer's tokens, of a chat without the one that ended it.

        Plain text has it, as other servers' has: clients that score a text ask for one token more
        and leave the last one out.
        """
        ids = self._words(made.ids) if one.job.ask.chat else made.ids
        if len(made.logprobs) < len(ids):
            raise unsupported("logprobs", "the model's decoder tells none")
        tops = one.tops
        # Chats' replies have no offsets.
        offsets = [0] * len(ids) if one.job.ask.chat else self._starts(ids, answer_text)
        return [
            Token(
                self._decoded([token]),
                made.logprobs[i],
                self._named(tops[i]) if tops else [],
                offsets[i],
            )
            for i, token in enumerate(ids)
        ]

    def _starts(self, ids: Sequence[int], text_of: TextOf = decoded) -> list[int]:
        return starts(cast(Loaded, self.loaded).tokenizer, ids, self.served.piecewise, text_of)

    def _echo(self, job: Job, ids: list[int]) -> tuple[str, list[Token]]:
        """A prompt with the log-probability of each of its tokens."""
        loaded = cast(Loaded, self.loaded)
        place = next(i for i, one in enumerate(job.ids) if one is ids)
        given = job.ask.prompts[place]
        text = given if isinstance(given, str) else self._decoded(ids)
        if not job.ask.logprobs:
            return text, []
        if isinstance(given, str) and loaded.tokenizer.is_fast:
            pairs = loaded.tokenizer(given, return_offsets_mapping=True)["offset_mapping"]
            offsets = [a for a, _ in cast("list[tuple[int, int]]", pairs)]
        else:
            offsets = self._starts(ids)
        names = [self._decoded([i]) for i in ids]
        tokens = [Token(names[0], None, [], offsets[0])]
        with loaded.run_time(), torch.inference_mode():
            for logp_CV in self._behind(ids):
                for logp_V in logp_CV:
                    i = len(tokens)
                    top = self._named(_likeliest(logp_V, job.ask.top)) if job.ask.top else []
                    tokens.append(Token(names[i], float(logp_V[ids[i]]), top, offsets[i]))
        return text, tokens

    def _behind(self, ids: list[int]) -> Iterator[Tensor]:
        """Log-probabilities [C, V] of what follows each token but the last, some at a time."""
        loaded = cast(Loaded, self.loaded)
        seen = ids[:-1]
        if not seen:
            return
        try:
            packed = pack([example_tree(seen, [True] * len(seen))])[0].to(loaded.device)
            rows_TD, head = states(loaded.module, packed), head_of(loaded.module)
        except InputError:  # an architecture that only computes its logits itself
            ids_1T = torch.tensor([seen], device=loaded.device)
            logits_TV = cast(Tensor, loaded.module(ids_1T, use_cache=False).logits)[0]
            rows_TD, head = logits_TV, None
        size = max(1, chunk_of(rows_TD) // self.served.vocab)
        for i in range(0, len(seen), size):
            self._heed()
            rows_CD = rows_TD[i : i + size]
            if head is None:
                yield torch.log_softmax(rows_CD.float(), 1)
            else:
                yield log_probs(head, rows_CD, len(head.weight))


def _likeliest(logp_V: Tensor, k: int) -> list[tuple[int, float]]:
    """The k likeliest tokens with their log-probabilities, to the bit those of `logp_V`."""
    value_K, id_K = logp_V.topk(k)
    return list(zip(id_K.tolist(), value_K.tolist(), strict=True))


def _joined(text: str, tokens: list[Token], answer: Answer) -> Answer:
    """An answer with its prompt before it."""
    if answer.tokens is None:
        return replace(answer, text=text + answer.text)
    moved = [replace(t, offset=t.offset + len(text)) for t in answer.tokens]
    return Answer(text + answer.text, answer.finish, answer.count, [*tokens, *moved])
