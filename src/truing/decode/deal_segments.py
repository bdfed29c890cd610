"""DeAL by segments: propose, commit to a few tokens at once, keep what the rewards like.

From each kept beginning the model proposes m continuations of l tokens (by beam search, or drawn);
they become part of the answer. The h-best B of all are kept, and so on for at most `iterations`
rounds. The answer is the best-scoring beginning seen in any round, a later one only if it is
strictly better; equal scores keep the order of proposal; without any reward the last round decides.
A beginning that has ended, or that has all the tokens asked for, is carried on no further.
h = sum_j w_j r_j as in decode/deal; the log-probability decides through the proposals only. Those
found by beam search go by the model's own chances: a repetition penalty is refused with them, and a
hook on logits does nothing.

The segment variant of DeAL (arXiv 2402.06147) as the library AISteer360 has it. With l at least the
answer's limit, one round and drawn proposals it is best of m. Difference: beginnings that have
ended stay in competition, and equal beginnings are kept once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from truing.context import current
from truing.core.chat import Prompt
from truing.core.drawing import Base, Completion, remembering
from truing.core.generation.search import (
    Path,
    Scored,
    Writer,
    by_own_chances,
    enough,
    fill,
    likelihood,
    search,
)
from truing.core.judging.rewards import rewarded, rewards_of
from truing.core.sampling import SamplingSettings
from truing.method import component, method
from truing.models import Model
from truing.principles import Principles
from truing.tables import Row


def keep(found: Sequence[Scored], width: int) -> list[Scored]:
    """The `width` best, best first; equal scores in the order of proposal, equal paths once."""
    unique: dict[tuple[int, ...], Scored] = {}
    for item in found:
        unique.setdefault(item.path.ids, item)
    return sorted(unique.values(), key=lambda s: -s.score)[:width]


@dataclass
class State:
    """One prompt's search: what is kept, and the best seen in any round."""

    prompt: Prompt
    kept: list[Scored] = field(default_factory=lambda: [Scored(float("-inf"), Path())])
    best: list[Scored] = field(default_factory=list)


def _proposals(
    writer: Writer,
    prompts: Sequence[Prompt],
    paths: Sequence[Path],
    m: int,
    tokens: int,
    drawn: bool,
) -> list[list[Path]]:
    """m continuations of each path by up to `tokens` tokens."""
    if not drawn:
        found = search(writer, prompts, paths, likelihood, width=m, k=m, tokens=tokens)
        return [[s.path for s in items] for items in found]
    short = replace(
        writer.sampling,
        n=m,
        max_tokens=tokens,
        min_tokens=max(0, min(tokens, writer.sampling.min_tokens - len(paths[0].ids))),
    )
    made = writer.base(prompts, short, begun=[p.ids for p in paths])
    return [
        [
            Path((*path.ids, *c.ids), (*path.logps, *c.logprobs), c.finish == "stop")
            for c in completions
        ]
        for path, completions in zip(paths, made, strict=True)
    ]


@component("decoder", name="deal_segments")
def draw(
    base: Base,
    model: Model,
    prompts: list[Prompt],
    sampling: SamplingSettings,
    *,
    proposals: int = 5,
    keep_best: int = 3,
    lookahead: int = 10,
    iterations: int = 10,
    propose: Literal["beam", "draw"] = "beam",
    rewards: dict[str, dict[str, object]] | None = None,
    weights: dict[str, float] | None = None,
) -> list[list[Completion]]:
    """Answers grown by segments, of which the best by the rewards are kept."""
    where = "decode/deal_segments"
    enough(proposals, sampling.n, "proposals", where)
    if propose == "beam":
        by_own_chances(sampling, where, "Set propose to draw, or leave the penalty at 1")
    value = rewards_of(base.held, rewards, weights, where)
    writer = Writer(base, model, sampling)
    states = [State(p) for p in prompts]
    whole = lookahead >= sampling.max_tokens
    rounds = min(iterations, -(-sampling.max_tokens // lookahead))
    with remembering(base):
        for number in range(rounds):
            live = [(s, k.path) for s in states for k in s.kept if not k.path.ended]
            if not live:
                break
            tokens = min(lookahead, sampling.max_tokens - number * lookahead)
            asked, paths = [s.prompt for s, _ in live], [p for _, p in live]
            made = _proposals(writer, asked, paths, proposals, tokens, propose == "draw")
            rows: list[Row] = [
                {"prompt": s.prompt, "completion": writer.text(p.ids).strip(), "finished": p.ended}
                for (s, _), items in zip(live, made, strict=True)
                for p in items
            ]
            scores = iter(value(rows, whole=whole))
            rivals = {id(s): [k for k in s.kept if k.path.ended] for s in states}
            for (s, _), items in zip(live, made, strict=True):
                rivals[id(s)] += [Scored(next(scores), p) for p in items]
            for s in states:
                s.kept = keep(rivals[id(s)], keep_best)
                # The sort is stable: what was seen earlier stands before equal later ones. Without
                # any reward rounds cannot be compared, and the answer is what is kept at the end.
                seen = [*s.best, *rivals[id(s)]]
                s.best = keep(seen, sampling.n) if value.names else s.kept
            current().progress(number + 1, rounds, "segments")
    current().metric(
        decoder="deal_segments",
        prompts=len(prompts),
        extended=writer.cost["next"],
        h=sum(s.best[0].score for s in states) / len(states),
    )
    return [fill([writer.completion(k.path) for k in s.best], sampling.n) for s in states]


@method(
    paper="deal",
    needs=("generate", "logprob"),
    within={
        "proposals": (1, None),
        "keep_best": (1, None),
        "lookahead": (1, None),
        "iterations": (1, None),
    },
)
def deal_segments(
    model: Model,
    principles: Principles | None = None,
    reward_model: Model | None = None,
    *,
    proposals: int = 5,
    keep_best: int = 3,
    lookahead: int = 10,
    iterations: int = 10,
    propose: Literal["beam", "draw"] = "beam",
    rewards: dict[str, dict[str, object]] | None = None,
    weights: dict[str, float] | None = None,
) -> Model:
    """DeAL by segments: propose, commit to a few tokens at once, keep what the rewards like.

    Args:
        proposals: m, continuations of each kept beginning.
        keep_best: B, beginnings kept after each round.
        lookahead: l, tokens of a segment.
        iterations: most rounds.
        propose: by beam search over the likeliest, or drawn from the model.
        rewards: rewards or checks by name, such as {all: {use: keyword_coverage}}; in a
            plain call functions of rows too.
        weights: by those names, "principles" and "reward_model"; 1 where none is given.
    """
    settings = {
        "proposals": proposals,
        "keep_best": keep_best,
        "lookahead": lookahead,
        "iterations": iterations,
        "propose": propose,
    }
    return rewarded(
        model,
        "deal_segments",
        settings,
        rewards=rewards,
        weights=weights,
        principles=principles,
        reward_model=reward_model,
    )
