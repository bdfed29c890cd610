"""Search over answers, token by token: what decoding methods that look for the best answer rest on.

A path is the beginning of an answer. `Writer` extends paths by the model's likeliest next tokens
and turns them to text; `search` keeps the `width` best at each step under any score, finished ones
in competition. With the log-probability as score it is ordinary beam search without length penalty,
and with width 1 the greedy answer. Which paths are kept does not depend on the order in which
candidates are made: equal scores go by token ids.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from truing.core.chat import Prompt
from truing.core.drawing import Base, Completion
from truing.core.generation.stops import before_stop, ends_of, stop_place
from truing.core.sampling import SamplingSettings
from truing.errors import InputError
from truing.models import Model


@dataclass(frozen=True)
class Path:
    """The beginning of an answer.

    Args:
        ids: its tokens, the one that ended it included.
        logps: of each, under the model's own distribution.
        ended: whether it ended by itself.
    """

    ids: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()
    ended: bool = False

    @property
    def logp(self) -> float:
        """log P(path | prompt), the plain sum."""
        return math.fsum(self.logps)


@dataclass(frozen=True)
class Scored:
    """A path and the score by which it is kept."""

    score: float
    path: Path


# Scores of paths; each comes with the number of its prompt.
Score = Callable[[Sequence[tuple[int, Path]]], list[float]]


def top(found: Sequence[Scored], width: int) -> list[Scored]:
    """The `width` best, best first; equal scores by token ids, equal paths once."""
    unique = {s.path.ids: s for s in found}
    return sorted(unique.values(), key=lambda s: (-s.score, s.path.ids))[:width]


class Writer:
    """Extends paths under a `Base` and reads them as text.

    `cost` counts what was computed: "next" paths that were extended, "ahead" tokens of
    continuations that are not part of the answer.
    """

    def __init__(self, base: Base, model: Model, sampling: SamplingSettings) -> None:
        if not base.local:
            raise InputError(
                "this decoder works on tokens, which a served model does not show",
                where=model.name,
                fix="Use a local model, or a decoder such as best_of_n",
            )
        ends = sampling.stop_ids
        if ends is None:
            loaded = model.load_module()
            ends = ends_of(loaded.tokenizer, loaded.module)
        self.base, self.sampling, self.ends = base, sampling, frozenset(ends)
        self.cost: Counter[str] = Counter()

    def text(self, ids: Sequence[int], done: int = 0) -> str:
        """Words of an answer's tokens, behind `done` others, without what ended it."""
        words = ids[:-1] if ids and ids[-1] in self.ends else ids
        return before_stop(self.base.text(words), ids, self.sampling, self.base.text, done)

    def ended(self, ids: tuple[int, ...]) -> bool:
        """Whether an answer of these tokens has come to its end."""
        if ids[-1] in self.ends:
            return True
        if not self.sampling.stop or len(ids) < self.sampling.min_tokens:
            return False
        return stop_place(self.base.text(ids), ids, self.sampling, self.base.text) >= 0

    def expand(self, prompts: Sequence[Prompt], paths: Sequence[Path], k: int) -> list[list[Path]]:
        """Each path extended by its k likeliest next tokens, likeliest first."""
        if not paths:
            return []
        length = len(paths[0].ids)
        closed = {
            *self.sampling.banned,
            *(self.ends if length < self.sampling.min_tokens else ()),
        }
        self.cost["next"] += len(paths)
        made: list[list[Path]] = []
        found = self.base.next_tokens(prompts, [p.ids for p in paths], k + len(closed))
        for path, tokens in zip(paths, found, strict=True):
            grown: list[Path] = []
            for token, logp in [t for t in tokens if t[0] not in closed][:k]:
                ids = (*path.ids, token)
                grown.append(Path(ids, (*path.logps, logp), self.ended(ids)))
            made.append(grown)
        return made

    def ahead(
        self, prompts: Sequence[Prompt], paths: Sequence[Path], tokens: int
    ) -> list[tuple[str, bool]]:
        """(text, whether it ended) of each path carried on greedily by up to `tokens` tokens.

        Paths that have not ended are of one length.
        """
        open_ = [i for i, p in enumerate(paths) if not p.ended] if tokens > 0 else []
        more: dict[int, Completion] = {}
        if open_:
            least = max(0, min(tokens, self.sampling.min_tokens - len(paths[open_[0]].ids)))
            short = replace(
                self.sampling,
                n=1,
                greedy=True,
                max_tokens=tokens,
                min_tokens=least,
                stop_ids=tuple(self.ends),
            )
            begun = [paths[i].ids for i in open_]
            drawn = self.base([prompts[i] for i in open_], short, begun=begun)
            more = {i: items[0] for i, items in zip(open_, drawn, strict=True)}
            self.cost["ahead"] += sum(c.tokens for c in more.values())
        made: list[tuple[str, bool]] = []
        for i, path in enumerate(paths):
            on = more.get(i)
            ids = path.ids if on is None else (*path.ids, *on.ids)
            made.append((self.text(ids), path.ended or (on is not None and on.finish == "stop")))
        return made

    def completion(self, path: Path) -> Completion:
        """The path as an answer."""
        finish = "stop" if path.ended else "length"
        return Completion(self.text(path.ids), path.ids, path.logps, finish, len(path.ids))


def search(
    writer: Writer,
    prompts: Sequence[Prompt],
    starts: Sequence[Path],
    score: Score,
    *,
    width: int,
    k: int,
    tokens: int,
    told: Callable[[int], None] | None = None,
) -> list[list[Scored]]:
    """The `width` best paths that begin with each start, best first.

    Args:
        writer: extends paths.
        prompts: one for each start.
        starts: where each search begins.
        score: of candidates, the higher the better.
        width: paths kept at each step (B).
        k: next tokens looked at for each path.
        tokens: most tokens that are added.
        told: called with the number of the step.
    """
    kept = [[Scored(0.0, start)] for start in starts]
    for step in range(tokens):
        live = [(i, s.path) for i, items in enumerate(kept) for s in items if not s.path.ended]
        if not live:
            break
        grown = writer.expand([prompts[i] for i, _ in live], [p for _, p in live], k)
        found = [(i, p) for (i, _), paths in zip(live, grown, strict=True) for p in paths]
        rivals = [[s for s in items if s.path.ended] for items in kept]
        for (i, path), value in zip(found, score(found), strict=True):
            rivals[i].append(Scored(value, path))
        kept = [top(items, width) for items in rivals]
        if told is not None:
            told(step + 1)
    return kept


def likelihood(found: Sequence[tuple[int, Path]]) -> list[float]:
    """Scores of ordinary beam search."""
    return [path.logp for _, path in found]


def by_own_chances(sampling: SamplingSettings, where: str, fix: str) -> None:
    """Raise InputError for a penalty, which would act on what is drawn and not on the search."""
    if sampling.repetition_penalty != 1:
        raise InputError(
            "a search goes by the model's own chances, which no repetition_penalty changes",
            where=where,
            seen=sampling.repetition_penalty,
            fix=fix,
        )


def enough(kept: int, n: int, setting: str, where: str) -> None:
    """Raise InputError when a search keeps fewer answers than are asked for."""
    if kept < n:
        raise InputError(
            f"{n} answers to a prompt are asked for and the search keeps {kept}",
            where=f"{where} setting {setting!r}",
            fix=f"Set {setting} to {n} or more",
        )


def fill(items: Sequence[Completion], n: int) -> list[Completion]:
    """`n` answers of a search that found at least one; the last one again where it found fewer."""
    return [items[min(i, len(items) - 1)] for i in range(n)]
