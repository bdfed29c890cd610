"""Answers of a `Model`, whatever changes are laid over it, local or served.

`generate` applies all of a model's run-time changes, in their order: prefix messages are put before
the prompt, a rewriter changes the whole, a decoder controls how answers are drawn, and edits act on
the activations of every token. A served model's answers come from its endpoint (`core.client`).

A decoder is a registered component that draws in its own way. It is called with four arguments, its
settings bound by name, and returns `sampling.n` completions for each prompt:

    @component("decoder")
    def best_of_n(base: Base, model: Model, prompts: list[Prompt], sampling: SamplingSettings,
                  *, n: int = 8) -> list[list[Completion]]: ...

`base(prompts, sampling)` draws under everything but this decoder: several decoders nest, the first
added innermost. `base(prompts, sampling, begun=...)` goes on from tokens that the answers begin
with, and `base.next_tokens` gives the likeliest next tokens; both need a local model
(`base.local`). `base.held["reward"]` is an artefact that the change holds. The prompts have prefix
and rewriter applied.

A rewriter is a component too: `(prompts, model, held, *, settings) -> prompts`, one for one, where
`model` is the model without its prefixes, rewriters and decoders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

from truing.changes import Decoder, Prefix, Rewriter
from truing.context import Json, current
from truing.core.chat import Prompt, messages_of
from truing.core.drawing import Completion, Local, ServedDraws, base_of, drawer
from truing.core.sampling import LogitsHook, SamplingSettings, first_draws
from truing.errors import InputError
from truing.method import get_component
from truing.models import Model, held
from truing.surrogates import mended
from truing.tables import content_hash

Rewrite = Callable[[list[Prompt], Model, Mapping[str, object]], list[Prompt]]
BLOCK = 512  # rows that are written to the journal together: what a kill can cost


def generate(
    model: Model | str | Path,
    prompts: Sequence[object],
    *,
    n: int = 1,
    max_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    greedy: bool = False,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    min_tokens: int = 0,
    repetition_penalty: float = 1.0,
    logits: LogitsHook | None = None,
) -> list[list[Completion]]:
    """Draw `n` answers to each prompt, with all changes of the model in force.

    Returns [prompt][draw]. The answers to a prompt depend on seed, prompt and draw number, not on
    what else is asked; the same prompt asked twice gets further draws. In a stored step, finished
    blocks of rows are kept in its journal.

    Args:
        model: local or served; or the name, path or address of one.
        prompts: a list, of the user's words or of messages with "role" and "content" each.
        n: answers to each prompt.
        max_tokens: an answer's length limit, in tokens, its end included.
        temperature: divides the logits; above 0.
        top_p: keep the fewest most likely tokens that have this probability together.
        top_k: keep so many most likely tokens; 0 keeps all.
        min_p: keep tokens at least so likely relative to the most likely one.
        greedy: take the most likely token.
        seed: of all random numbers.
        stop: texts (or one) that end an answer and are cut off, besides the template's end of turn.
        min_tokens: an answer does not end before it has so many tokens.
        repetition_penalty: above 1 makes tokens of the prompt and the answer so far less likely.
        logits: hook `(rows, logits_BV) -> logits_BV` before every draw (local models only), B rows
            by V tokens of the vocabulary; see `core.sampling.sample`.
    Raises:
        InputError: a setting out of range, a prompt in place of a list of them, or a model that
            cannot generate.
    """
    asked = _as_prompts(prompts)
    sampling = SamplingSettings(
        n=n,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        greedy=greedy,
        seed=seed,
        stop=_stops(stop),
        min_tokens=min_tokens,
        repetition_penalty=repetition_penalty,
    )
    model = _as_model(model)
    asked = rewritten(model, asked)
    base = base_of(model, logits)
    base.check(asked, sampling)
    return _drawn(model, base, asked, sampling, keeps=logits is None)


def _drawn(
    model: Model,
    base: Local | ServedDraws,
    asked: Sequence[Prompt],
    sampling: SamplingSettings,
    keeps: bool,
) -> list[list[Completion]]:
    """Answers block by block; what is finished stays in the step's journal.

    Args:
        keeps: whether it may: a logits hook is code, whose effect no key could hold.
    """
    draw, context, n = drawer(base, model), current(), sampling.n
    journal = context.journal("generated") if context.stored and keeps else None
    firsts = first_draws([repr(messages_of(p)) for p in asked], n)
    drawn: list[list[Completion]] = []
    size = max(1, BLOCK // n)
    for start in range(0, len(asked), size):
        block, first = asked[start : start + size], firsts[start : start + size]
        name = "" if journal is None else content_hash([model.key, asdict(sampling), block, first])
        if journal is not None and name in journal:
            kept = cast("list[list[list[object]]]", journal.get(name))
            drawn += [[_read(c) for c in items] for items in kept]
            continue
        base.done, base.total = start * n, len(asked) * n
        made = draw(block, sampling, first=first)
        if journal is not None:
            journal.put(name, cast(Json, [[_written(c) for c in items] for items in made]))
        drawn += made
        context.progress(len(drawn) * n, len(asked) * n, "answers")
    return drawn


def rewritten(model: Model, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts with the model's prefix put before them and its rewriters applied, in order."""
    asked: list[Prompt] = list(prompts)
    prefix = [m for c in model.changes if isinstance(c, Prefix) for m in c.messages]
    if prefix:
        asked = [messages_of(p, prefix) for p in asked]
    plain = model.with_changes(
        c for c in model.changes if not isinstance(c, (Prefix, Rewriter, Decoder))
    )
    for change in model.changes:
        if isinstance(change, Rewriter):
            rewrite = cast(
                Rewrite, get_component("rewriter", {"use": change.use, **change.settings})
            )
            made = rewrite(asked, plain, {n: held(k) for n, k in change.holds.items()})
            if len(made) != len(asked):
                raise InputError(
                    "a rewriter must return one prompt for each",
                    where=change.use,
                    seen=f"{len(made)} for {len(asked)}",
                )
            asked = list(made)
    return asked


def _as_model(model: Model | str | Path) -> Model:
    """A model, or the one that is named, as methods take it."""
    if isinstance(model, Model):
        return model
    from truing.given import as_noun

    return cast(Model, as_noun("Model", model, "argument 'model'", where="generate"))


def _stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Texts that end an answer; one by itself would fall apart into letters."""
    return (stop,) if isinstance(stop, str) and stop else tuple(stop)


def _as_prompts(prompts: Iterable[object]) -> list[Prompt]:
    """All prompts, halves of characters mended; one by itself is refused, since lists come back."""
    items = [] if isinstance(prompts, str) else list(prompts)
    if isinstance(prompts, str) or (items and isinstance(items[0], dict)):
        raise InputError(
            "takes a list of prompts, and gives a list of answers for each",
            where="generate",
            seen=prompts,
            fix="Put square brackets around the prompt: generate(model, [prompt])[0]",
        )
    return [_as_prompt(mended(p), i) for i, p in enumerate(items, 1)]


def _as_prompt(prompt: object, number: int) -> Prompt:
    if isinstance(prompt, str):
        return prompt
    items = cast("list[object]", prompt if isinstance(prompt, list) else [])
    if items and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in items):
        return cast(Prompt, items)
    raise InputError(
        "a prompt is a text, or a list of messages with 'role' and 'content'",
        where=f"prompt {number}",
        seen=prompt,
        fix='Write "..." or [{"role": "user", "content": "..."}]',
    )


def _written(made: Completion) -> Json:
    return [made.text, list(made.ids), list(made.logprobs), made.finish, made.tokens]


def _read(data: list[object]) -> Completion:
    text, ids, logprobs, finish, tokens = cast("tuple[str, list[int], list[float], str, int]", data)
    return Completion(text, tuple(ids), tuple(logprobs), finish, tokens)
