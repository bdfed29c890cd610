"""Sampling from a causal language model, on token ids: batched, reproducible row by row.

Each row has random numbers of its own, one for each token, made from (seed, prompt, draw number)
and nothing else: what else is in the batch, and which rows have ended, cannot change it. A number u
picks a token by the inverse of the cumulative distribution, so no noise over the vocabulary is
made. Log-probabilities are those of the model's own distribution, before hooks, bans and nuclei: at
temperature 1 or, where `tempered`, at the temperature that tokens are drawn at. They are formed in
float32; a model in half precision has its logits rounded to that before (20.06 to 20.0 in
bfloat16), and training measures its own anew.

Rows are computed in waves that depend on request and model alone (`core.generation.waves`), so that
a request gives the same bits however often it is made.

Shapes: B live rows, V vocabulary, K blocks or candidates.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from truing.core.generation.dialogue_cache import Kept, Past
from truing.core.generation.draw_token import choose
from truing.core.generation.row_cache import States, states_for
from truing.core.generation.stops import own_stops, stopped_at
from truing.core.generation.waves import in_memory, waves
from truing.core.modelfiles.reach import check_ids, context_of, vocab_of
from truing.errors import InputError
from truing.surrogates import mended

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingSettings:
    """How answers are drawn.

    Args:
        n: answers for each prompt.
        max_tokens: an answer's length limit, in tokens, its end included.
        temperature: divides the logits; must be positive (`greedy` for its limit 0).
        top_p: keep the fewest most likely tokens that have this probability together.
        top_k: keep so many most likely tokens; 0 keeps all.
        min_p: keep tokens at least so likely relative to the most likely one.
        greedy: take the most likely token.
        seed: of all random numbers.
        stop: texts that end an answer; they are cut off.
        stop_ids: tokens that end an answer; None takes the model's own.
        min_tokens: an answer does not end before it has so many tokens.
        first_temperature: divides the logits of the first token besides.
        repetition_penalty: above 1 makes tokens of the prompt and the answer so far less likely, as
            in CTRL (arXiv 1909.05858): positive logits are divided by it, negative multiplied.
        banned: tokens that are never drawn.
        tempered: give log-probabilities at `temperature` instead of 1.
    """

    n: int = 1
    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    greedy: bool = False
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    first_temperature: float = 1.0
    repetition_penalty: float = 1.0
    banned: tuple[int, ...] = ()
    tempered: bool = False

    def __post_init__(self) -> None:
        bounds: list[tuple[str, bool, str]] = [
            ("n", self.n >= 1, "at least 1"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature > 0, "above 0; greedy=True is its limit 0"),
            ("first_temperature", self.first_temperature > 0, "above 0"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "from 0 to max_tokens"),
        ]
        for name, good, wanted in bounds:
            if not good:
                raise InputError(
                    f"{name} must be {wanted}", where="sampling", seen=getattr(self, name)
                )
        if isinstance(self.stop, str) or not all(self.stop):
            raise InputError(
                "stop must be a list of texts, none empty", where="sampling", seen=self.stop
            )


@dataclass
class Sampled:
    """One answer as token ids.

    `ids` and `logprobs` hold every token drawn, the one that ended it included; `logprobs` are of
    the model's own distribution (float32, at temperature 1 unless `tempered`).
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish = "length"


@dataclass
class Row:
    """A row that is being written, as a logits hook sees it.

    `prompt` is its place in the request, `draw` its number among the answers to that prompt,
    `prompt_ids` what it continues, `ids` what it has so far.
    """

    prompt: int
    draw: int
    prompt_ids: Sequence[int]
    ids: list[int]


LogitsHook = Callable[[Sequence[Row], Tensor], Tensor]
Told = Callable[[int], None]


def sample(
    module: nn.Module,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    *,
    first: Sequence[int] | None = None,
    logits: LogitsHook | None = None,
    decode: Callable[[list[int]], str] | None = None,
    told: Told | None = None,
    past: Past | None = None,
) -> list[list[Sampled]]:
    """Draw `settings.n` answers to each prompt.

    Args:
        module: a causal language model of transformers.
        prompts: token ids, at least one each.
        first: number of each prompt's first draw; by default the same prompt given again goes on
            where it stopped, so that its answers differ from the earlier ones.
        logits: called before every draw with the live rows and their logits [B, V] in float32;
            returns logits of that shape (it may write into them).
        decode: token ids to text; needed for stop texts.
        told: called with the number of rows that have just ended.
        past: what is known of each prompt, and after the call what is known then.

    Returns [prompt][draw]. Raises InputError for prompts that leave no room in the context.
    """
    if settings.stop and decode is None:
        raise InputError("stop texts need the tokenizer's decode", where="sampling")
    check_lengths(module, prompts, settings.max_tokens)
    drawn = [[Sampled() for _ in range(settings.n)] for _ in prompts]
    if first is None:
        first = first_draws([_bytes(ids) for ids in prompts], settings.n)
    with prepared(module), in_memory():
        known = past.rows if past is not None else [None] * len(prompts)
        for wave in waves(module, prompts, settings):
            random = [uniforms(prompts[i], settings, first[i] + k) for i, k in wave]
            one = _Wave(
                module, prompts, wave, settings, np.stack(random), logits, decode, drawn, known
            )
            if past is None or past.draw:
                one.run(told)
            else:
                one.states.start()
            if past is not None:
                past.take(one.used, one.states.kept())
            del one  # what it holds besides, before the next wave takes as much
    return drawn


@contextlib.contextmanager
def prepared(module: nn.Module) -> Generator[None]:
    """Eval mode and no gradients inside the block."""
    training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        module.train(training)


def check_lengths(
    module: nn.Module, prompts: Sequence[Sequence[int]], room: int, first: int = 1
) -> None:
    """Raise InputError for prompts that are empty, no tokens of the model's, or leave no room."""
    limit, vocab = context_of(module), vocab_of(module)
    for i, ids in enumerate(prompts, first):
        if not ids:
            raise InputError("the prompt is empty", where=f"prompt {i}")
        check_ids(ids, vocab, f"prompt {i}")
        if limit is not None and len(ids) + room > limit:
            raise InputError(
                f"{len(ids)} tokens and {room} to write do not fit into the context of {limit}",
                where=f"prompt {i}",
                fix="Shorten the prompt or lower max_tokens",
            )


def first_draws(prompts: Sequence[str | bytes], n: int) -> list[int]:
    """Number of each prompt's first draw: n more for each time that it stood before."""
    times: Counter[str | bytes] = Counter()
    firsts: list[int] = []
    for prompt in prompts:
        firsts.append(times[prompt] * n)
        times[prompt] += 1
    return firsts


def _bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, dtype="<i8").tobytes()


def uniforms(prompt: Sequence[int], settings: SamplingSettings, draw: int) -> np.ndarray:
    """Random numbers [max_tokens] in [0, 1) from (seed, prompt, draw number) and nothing else."""
    name = f"{settings.seed}/{draw}/".encode() + _bytes(prompt)
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key)).random(settings.max_tokens)


def next_logps(
    module: nn.Module, prompts: Sequence[Sequence[int]], past: Past | None = None
) -> Tensor:
    """Log-probabilities [B, V] (float32) of the token that follows each prompt.

    Args:
        past: what is known of each prompt, and after the call what is known then.
    """
    check_lengths(module, prompts, 1)
    made: list[tuple[list[int], Tensor]] = []
    one = SamplingSettings(max_tokens=1)
    with prepared(module), in_memory():
        for wave in waves(module, prompts, one):
            order = [i for i, _ in wave]
            known = [past.rows[i] for i in order] if past is not None else ()
            states = states_for(module, [prompts[i] for i in order], range(len(order)), 1, known)
            made.append((order, torch.log_softmax(states.start().float(), 1)))
            if past is not None:
                past.take(order, states.kept())
        logp_BV = torch.cat([part for _, part in made])
        back = torch.empty(len(prompts), dtype=torch.long)
        back[[i for order, _ in made for i in order]] = torch.arange(len(prompts))
        return logp_BV[back.to(logp_BV.device)]


class _Wave:
    """Rows computed together, from the prompt to the last one's end."""

    def __init__(
        self,
        module: nn.Module,
        prompts: Sequence[Sequence[int]],
        wave: Sequence[tuple[int, int]],
        settings: SamplingSettings,
        random_BT: np.ndarray,
        hook: LogitsHook | None,
        decode: Callable[[list[int]], str] | None,
        drawn: list[list[Sampled]],
        known: Sequence[Kept | None],
    ) -> None:
        self.settings, self.hook, self.decode = settings, hook, decode
        self.random_BT = random_BT
        self.made = [drawn[i][draw] for i, draw in wave]
        self.rows = [
            Row(i, draw, prompts[i], made.ids)
            for (i, draw), made in zip(wave, self.made, strict=True)
        ]
        stops = own_stops(module) if settings.stop_ids is None else settings.stop_ids
        self.stops = frozenset(stops)
        self.reach = max((len(mended(s).encode()) for s in settings.stop), default=0) + 1
        self.used = sorted({i for i, _ in wave})
        place = {i: k for k, i in enumerate(self.used)}
        self.states: States = states_for(
            module,
            [prompts[i] for i in self.used],
            [place[i] for i, _ in wave],
            settings.max_tokens,
            [known[i] for i in self.used],
        )

    def run(self, told: Told | None) -> None:
        """Write all rows."""
        live = list(range(len(self.rows)))
        logits_BV = self.states.start()
        for step in range(self.settings.max_tokens):
            ids, logps = self._draw(logits_BV, live, step)
            on: list[int] = []
            for k, (row, token, logp) in enumerate(zip(live, ids, logps, strict=True)):
                made = self.made[row]
                made.ids.append(token)
                made.logprobs.append(logp)
                if self._ends(made):
                    made.finish = "stop"
                else:
                    on.append(k)
            ended = len(live) - len(on)
            if step + 1 == self.settings.max_tokens:
                ended = len(live)
            if told is not None and ended:
                told(ended)
            if not on or step + 1 == self.settings.max_tokens:
                return
            if len(on) < len(live):
                on = self.states.keep(on)
                live, ids = [live[k] for k in on], [ids[k] for k in on]
            logits_BV = self.states.step(ids)

    def _draw(
        self, logits_BV: Tensor, live: Sequence[int], step: int
    ) -> tuple[list[int], list[float]]:
        s = self.settings
        shaped_BV = self._shaped(logits_BV, [self.rows[r] for r in live], step)
        heat = s.temperature * (s.first_temperature if step == 0 else 1.0)
        random_B = torch.from_numpy(self.random_BT[live, step]).to(logits_BV.device)
        told = s.temperature if s.tempered else 1.0
        token_B, logp_B = choose(logits_BV, shaped_BV, random_B, s, heat, told)
        return token_B.tolist(), logp_B.tolist()

    def _shaped(self, logits_BV: Tensor, rows: Sequence[Row], step: int) -> Tensor:
        """The logits that tokens are drawn from; the same tensor where nothing changes them."""
        s = self.settings
        closed = [*s.banned, *(self.stops if step < s.min_tokens else ())]
        if self.hook is None and not closed and s.repetition_penalty == 1.0:
            return logits_BV
        shaped_BV = logits_BV.float().clone()
        if s.repetition_penalty != 1.0:
            used = [list({*r.prompt_ids, *r.ids}) for r in rows]
            row_N = np.repeat(np.arange(len(used)), [len(ids) for ids in used])
            id_N = np.fromiter(chain.from_iterable(used), np.int64, len(row_N))
            row_N, id_N = (torch.from_numpy(n).to(shaped_BV.device) for n in (row_N, id_N))
            z_N = shaped_BV[row_N, id_N]
            less_N = torch.where(z_N > 0, z_N / s.repetition_penalty, z_N * s.repetition_penalty)
            shaped_BV[row_N, id_N] = less_N
        if self.hook is not None:
            shaped_BV = self.hook(rows, shaped_BV)
            if shaped_BV.shape != logits_BV.shape:
                raise InputError(
                    "a logits hook must return logits of the shape that it was given",
                    seen=tuple(shaped_BV.shape),
                )
        if closed:
            shaped_BV[:, closed] = -torch.inf
        return shaped_BV

    def _ends(self, made: Sampled) -> bool:
        if len(made.ids) < self.settings.min_tokens:
            return False
        if made.ids[-1] in self.stops:
            return True
        if not self.settings.stop or self.decode is None:
            return False
        tail = made.ids[-self.reach :]
        early = self.decode(tail[:-1]) if self.settings.min_tokens > 1 else ""
        return stopped_at(self.decode(tail), early, self.settings.stop) >= 0
