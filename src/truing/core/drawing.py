"""What completions are drawn from: a model in memory, an endpoint, or a decoder over either.

The protocol that decoders are written against is described in `core.generate`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, cast

from truing.changes import Decoder
from truing.context import current
from truing.core.chat import Prompt, answer_text, prompt_ids
from truing.core.generation.dialogue_cache import Kept, Past
from truing.core.generation.stops import before_stop, ends_of
from truing.core.generation.waves import room
from truing.core.sampling import (
    LogitsHook,
    Sampled,
    SamplingSettings,
    check_lengths,
    next_logps,
    sample,
)
from truing.errors import InputError
from truing.method import get_component
from truing.models import LOCAL, Loaded, Model, held
from truing.tables import content_hash


@dataclass(frozen=True)
class Completion:
    """One answer.

    Args:
        text: its words, without what ended it.
        ids: tokens drawn, the one that ended it included.
        logprobs: of each, under the model's own distribution, at temperature 1 unless `tempered`;
            empty where an endpoint gives none.
        finish: "stop" when it ended by itself, "length" at the limit.
        tokens: how many were drawn.
    """

    text: str
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish: str = "stop"
    tokens: int = 0


class Base(Protocol):
    """What a decoder draws from; see the module's docstring."""

    local: bool
    held: Mapping[str, object]

    def __call__(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSettings,
        *,
        begun: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Completion]]:
        """`sampling.n` completions for each prompt, of what follows `begun`."""
        ...

    def next_tokens(
        self, prompts: Sequence[Prompt], begun: Sequence[Sequence[int]], k: int
    ) -> list[list[tuple[int, float]]]:
        """The k likeliest next tokens with their log-probabilities, likeliest first."""
        ...

    def text(self, ids: Sequence[int]) -> str:
        """Words of token ids, without special tokens."""
        ...


Decode = Callable[[Base, Model, list[Prompt], SamplingSettings], list[list[Completion]]]


def continued(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSettings,
    *,
    first: Sequence[int] | None = None,
    logits: LogitsHook | None = None,
    told: Callable[[int], None] | None = None,
    past: Past | None = None,
) -> list[list[Completion]]:
    """Continue token ids, with the model's edits in force but neither prefix nor decoder.

    What `core.generate.generate` rests on, and what draws for prompts that no chat template writes,
    such as the head of a user's turn.

    Args:
        sampling: `stop_ids` None takes the template's end of turn and the model's own end tokens.
        first, logits, told, past: see `core.sampling.sample`.
    """
    tokenizer = loaded.tokenizer
    if sampling.stop_ids is None:
        sampling = replace(sampling, stop_ids=ends_of(tokenizer, loaded.module))

    def decode(ids: list[int]) -> str:
        return cast(str, tokenizer.decode(ids, skip_special_tokens=False))

    with loaded.run_time():
        drawn = sample(
            loaded.module,
            prompts,
            sampling,
            first=first,
            logits=logits,
            decode=decode,
            told=told,
            past=past,
        )
    return [[_completion(s, loaded, sampling) for s in items] for items in drawn]


def _completion(made: Sampled, loaded: Loaded, sampling: SamplingSettings) -> Completion:
    ended = made.finish == "stop" and made.ids[-1] in (sampling.stop_ids or ())
    words = made.ids[:-1] if ended else made.ids
    text = answer_text(loaded.tokenizer, words)
    if made.finish == "stop" and not ended:
        text = before_stop(text, words, sampling, partial(answer_text, loaded.tokenizer))
    return Completion(text, tuple(made.ids), tuple(made.logprobs), made.finish, len(made.ids))


class Local:
    """Draws from a model in memory under everything but its decoder."""

    local = True

    def __init__(self, model: Model, hook: LogitsHook | None) -> None:
        self.model, self.hook = model, hook
        self.loaded = model.load_module()
        self.held: Mapping[str, object] = {}
        self.done, self.total = 0, 0
        self.read: dict[tuple[int, ...], Kept] | None = None  # by the request before: `remembering`

    def _past(self, rows: Sequence[Sequence[int]]) -> Past | None:
        """What the request before has read of these rows; None where that is not kept."""
        if self.read is None:
            return None
        lengths, read = sorted({len(ids) for ids in self.read}, reverse=True), self.read
        found = [[read.get(tuple(ids[:n])) for n in lengths] for ids in rows]
        known = [next((one for one in some if one is not None), None) for some in found]
        self.read = {}  # from here on the request alone holds them, so that it can let go
        return Past(known, limit=room(self.loaded.module) // 4)

    def _noted(self, rows: Sequence[Sequence[int]], past: Past | None) -> None:
        """Keep what is known of these rows now, and nothing else."""
        if past is not None:
            known = zip(rows, past.rows, strict=True)
            self.read = {tuple(ids): one for ids, one in known if one is not None}

    def _ids(
        self, prompts: Sequence[Prompt], begun: Sequence[Sequence[int]] | None
    ) -> list[list[int]]:
        heads = [prompt_ids(self.loaded.tokenizer, p) for p in prompts]
        return heads if begun is None else [h + list(b) for h, b in zip(heads, begun, strict=True)]

    def check(self, prompts: Sequence[Prompt], sampling: SamplingSettings) -> None:
        """Raise for prompts that do not fit, before anything is drawn."""
        check_lengths(self.loaded.module, self._ids(prompts, None), sampling.max_tokens)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSettings,
        *,
        begun: Sequence[Sequence[int]] | None = None,
        first: Sequence[int] | None = None,
        past: Past | None = None,
    ) -> list[list[Completion]]:
        """See `Base`; `past` is that of `sample`."""
        ids = self._ids(prompts, begun)
        own = self._past(ids) if begun is not None else None
        made = continued(
            self.loaded,
            ids,
            sampling,
            first=first,
            logits=self.hook,
            told=self._told,
            past=past or own,
        )
        self._noted(ids, own)
        return made

    def _told(self, rows: int) -> None:
        self.done += rows
        if self.done < self.total:
            current().progress(self.done, self.total, "answers")

    def next_tokens(
        self, prompts: Sequence[Prompt], begun: Sequence[Sequence[int]], k: int
    ) -> list[list[tuple[int, float]]]:
        """See `Base`."""
        ids = self._ids(prompts, begun)
        past = self._past(ids)
        with self.loaded.run_time():
            logp_BV = next_logps(self.loaded.module, ids, past)
        self._noted(ids, past)
        value_BK, id_BK = logp_BV.topk(min(k, logp_BV.shape[1]), 1)
        return [
            list(zip(ids, values, strict=True))
            for ids, values in zip(id_BK.tolist(), value_BK.tolist(), strict=True)
        ]

    def text(self, ids: Sequence[int]) -> str:
        """See `Base`."""
        return cast(str, self.loaded.tokenizer.decode(list(ids), skip_special_tokens=True))


class ServedDraws:
    """Draws from an endpoint; it can neither go on with tokens nor tell the next ones."""

    local = False

    def __init__(self, model: Model) -> None:
        self.model = model
        self.held: Mapping[str, object] = {}
        self.done, self.total = 0, 0

    def check(self, prompts: Sequence[Prompt], sampling: SamplingSettings) -> None:
        """Nothing is known of an endpoint's limits."""

    def __call__(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSettings,
        *,
        begun: Sequence[Sequence[int]] | None = None,
        first: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """See `Base`."""
        if begun is not None:
            raise self._cannot()
        from truing.core import client

        return client.generate(self.model, list(prompts), sampling, first=first, told=self._told)

    def _told(self, rows: int) -> None:
        self.done += rows
        if self.done < self.total:
            current().progress(self.done, self.total, "answers")

    def next_tokens(
        self, prompts: Sequence[Prompt], begun: Sequence[Sequence[int]], k: int
    ) -> list[list[tuple[int, float]]]:
        """See `Base`."""
        raise self._cannot()

    def text(self, ids: Sequence[int]) -> str:
        """See `Base`."""
        raise self._cannot()

    def _cannot(self) -> InputError:
        return InputError(
            "this decoder works on tokens, which a served model does not show",
            where=self.model.name,
            fix="Use a local model, or a decoder such as best_of_n",
        )


def base_of(model: Model, hook: LogitsHook | None) -> Local | ServedDraws:
    """What draws for a model without its decoders."""
    if not model.is_served:
        return Local(model, hook)
    if hook is not None:
        raise InputError(
            "a server does not let the chances of its next tokens be changed",
            where=model.name,
            fix=LOCAL,
        )
    return ServedDraws(model)


class Decoded:
    """Draws by a decoder, which draws from what lies under it."""

    def __init__(self, under: Drawer, model: Model, change: Decoder) -> None:
        self.under, self.model, self.local = under, model, under.local
        self.name = change.use
        ref = {"use": change.use, **change.settings}
        self.decode = cast(Decode, get_component("decoder", ref, where=model.name))
        self.held: Mapping[str, object] = {}
        under.held = {name: held(key) for name, key in change.holds.items()}

    def __call__(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSettings,
        *,
        begun: Sequence[Sequence[int]] | None = None,
        first: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """See `Base`; what is begun already goes on under the innermost.

        A decoder numbers its draws by itself, from 0 on. So a prompt that was asked before, whose
        `first` is not 0, is decoded with another seed, which follows from this one and `first`.
        """
        if begun is not None:
            return self.under(prompts, sampling, begun=begun, first=first)
        places: dict[int, list[int]] = {}
        for i, draw in enumerate(first or [0] * len(prompts)):
            places.setdefault(draw, []).append(i)
        made: dict[int, list[Completion]] = {}
        for draw, some in places.items():
            again = {"seed": int(content_hash([sampling.seed, draw], 4), 16)} if draw else {}
            asked = [prompts[i] for i in some]
            made |= dict(zip(some, self._drawn(asked, replace(sampling, **again)), strict=True))
        return [made[i] for i in range(len(prompts))]

    def _drawn(self, prompts: list[Prompt], sampling: SamplingSettings) -> list[list[Completion]]:
        made = self.decode(self.under, self.model, prompts, sampling)
        if [len(items) for items in made] != [sampling.n] * len(prompts):
            raise InputError(
                f"a decoder must return {sampling.n} completions for each prompt",
                where=self.name,
                seen=[len(items) for items in made][:8],
            )
        return made

    def next_tokens(
        self, prompts: Sequence[Prompt], begun: Sequence[Sequence[int]], k: int
    ) -> list[list[tuple[int, float]]]:
        """See `Base`."""
        return self.under.next_tokens(prompts, begun, k)

    def text(self, ids: Sequence[int]) -> str:
        """See `Base`."""
        return self.under.text(ids)


Drawer = Local | ServedDraws | Decoded


@contextlib.contextmanager
def remembering(base: Base) -> Generator[None]:
    """Inside the block what a model in memory reads serves the next request that goes on from it.

    A search asks for what follows ever longer beginnings of the same answers. Kept is what the last
    request has read, in a quarter of what a wave may take: bits follow from the requests alone.
    """
    while isinstance(base, Decoded):
        base = base.under
    if not isinstance(base, Local):
        yield
        return
    base.read = {}
    try:
        yield
    finally:
        base.read = None


def drawer(base: Local | ServedDraws, model: Model) -> Drawer:
    """The model's decoders over `base`, the first added innermost."""
    made: Drawer = base
    for change in model.changes:
        if isinstance(change, Decoder):
            made = Decoded(made, model, change)
    return made
