"""DeAL: align while decoding, by a search that looks ahead and scores what it sees by rewards.

Beams hold the beginnings y_{1:t} of answers to x. At each step every beam is extended by its k
likeliest tokens; each candidate is carried on greedily by l tokens to y_{1:t+l}, and those B are
kept that have the highest

    c(y_{1:t}) = log P(y_{1:t} | x)  +  lambda h(x, y_{1:t+l}),    h = sum_j w_j r_j

with r_j the rewards of `core.judging.rewards`. The tokens ahead count for h only and are thrown
away; an end among them freezes h. A beam ends at the end token; ended ones stay in competition. The
alignment prompt is put before the conversation (the adapted start state). At lambda = 0 this is
beam search of width B, with B = 1 the greedy answer. DeAL: Decoding-time Alignment for Large
Language Models, arXiv 2402.06147.

The paper's k, l and B are not known for sure; ours suit a small machine. The cost is B k l tokens
ahead for every token of the answer; it is recorded, and so are log P and h of what was chosen. Of
prompts and beginnings each step reads the newest token alone, where the architecture lets keys and
values be kept. The search goes by the model's own chances: a request's temperature and nucleus have
no meaning here, a repetition penalty is refused, and a hook on logits acts on the look-ahead alone.
Of principles, whether an answer is on topic counts for whole answers: with l = -1, and where the
answer is selected by reward. By segments, which is cheaper: decode/deal_segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from truing.changes import Prefix
from truing.context import current
from truing.core.chat import Prompt
from truing.core.drawing import Base, Completion, remembering
from truing.core.generation.search import Path, Scored, Writer, by_own_chances, enough, fill, search
from truing.core.judging.rewards import Rewards, rewarded, rewards_of
from truing.core.sampling import SamplingSettings
from truing.method import component, method
from truing.models import Model
from truing.principles import Principles
from truing.tables import Row

FRESH = "Leave it at 1, and reward what does not repeat: rewards: {fresh: {use: no_repetition}}"


def score(logp: float, length: int, h: float, weight: float, per_token: bool) -> float:
    """c = log P (or log P / |y|) + lambda h."""
    return (logp / length if per_token else logp) + weight * h


class Heuristic:
    """h of paths, each text rewarded once."""

    def __init__(self, writer: Writer, prompts: Sequence[Prompt], value: Rewards) -> None:
        self.writer, self.prompts, self.value = writer, prompts, value
        self.known: dict[tuple[int, str, bool, bool], float] = {}

    def __call__(
        self, found: Sequence[tuple[int, Path]], ahead: int, *, whole: bool
    ) -> list[float]:
        """h of each (prompt number, path) after `ahead` further tokens; `whole` as in `Rewards`."""
        seen = self.writer.ahead([self.prompts[i] for i, _ in found], [p for _, p in found], ahead)
        keys = [(i, text, ended, whole) for (i, _), (text, ended) in zip(found, seen, strict=True)]
        new = [key for key in dict.fromkeys(keys) if key not in self.known]
        rows: list[Row] = [
            {"prompt": self.prompts[i], "completion": text.strip(), "finished": ended}
            for i, text, ended, _ in new
        ]
        self.known |= dict(zip(new, self.value(rows, whole=whole), strict=True))
        return [self.known[key] for key in keys]


@component("decoder", name="deal")
def draw(
    base: Base,
    model: Model,
    prompts: list[Prompt],
    sampling: SamplingSettings,
    *,
    weight: float = 1.0,
    beams: int = 3,
    candidates: int = 10,
    lookahead: int = 8,
    select: Literal["score", "reward"] = "score",
    per_token: bool = False,
    rewards: dict[str, dict[str, object]] | None = None,
    weights: dict[str, float] | None = None,
) -> list[list[Completion]]:
    """Beam search that looks ahead, guided by rewards of what it sees; see decode/deal."""
    enough(beams, sampling.n, "beams", "decode/deal")
    by_own_chances(sampling, "decode/deal", FRESH)
    value = rewards_of(base.held, rewards, weights, "decode/deal")
    writer = Writer(base, model, sampling)
    h = Heuristic(writer, prompts, value)
    guided, whole = weight != 0 and bool(value.names), lookahead < 0
    chosen_whole = whole or select == "reward"

    def c(found: Sequence[tuple[int, Path]]) -> list[float]:
        length = len(found[0][1].ids)
        left = sampling.max_tokens - length
        ahead = left if lookahead < 0 else min(lookahead, left)
        values = h(found, ahead, whole=whole) if guided else [0.0] * len(found)
        return [
            score(path.logp, length, v, weight, per_token)
            for (_, path), v in zip(found, values, strict=True)
        ]

    context = current()
    with remembering(base):
        kept = search(
            writer,
            prompts,
            [Path()] * len(prompts),
            c,
            width=beams,
            k=candidates,
            tokens=sampling.max_tokens,
            told=lambda step: context.progress(step, sampling.max_tokens, "tokens searched"),
        )
    if select == "reward" and value.names:
        kept = [_by_reward(i, items, h) for i, items in enumerate(kept)]
    chosen = [(i, items[0].path) for i, items in enumerate(kept)]
    context.metric(
        decoder="deal",
        prompts=len(prompts),
        extended=writer.cost["next"],
        tokens_ahead=writer.cost["ahead"],
        logp=sum(p.logp for _, p in chosen) / len(chosen),
        h=sum(h(chosen, 0, whole=chosen_whole)) / len(chosen) if value.names else 0.0,
    )
    return [fill([writer.completion(s.path) for s in items], sampling.n) for items in kept]


def _by_reward(number: int, items: Sequence[Scored], h: Heuristic) -> list[Scored]:
    """Kept paths by the reward of the whole answer; equal ones stay in order."""
    values = h([(number, s.path) for s in items], 0, whole=True)
    order = sorted(range(len(items)), key=lambda j: -values[j])
    return [items[j] for j in order]


@method(
    paper="deal",
    needs=("generate", "logprob"),
    within={
        "beams": (1, None),
        "candidates": (1, None),
        "lookahead": (-1, None),
        "weight": "(-inf, inf)",  # a negative one searches against the rewards
    },
)
def deal(
    model: Model,
    principles: Principles | None = None,
    reward_model: Model | None = None,
    *,
    weight: float = 1.0,
    beams: int = 3,
    candidates: int = 10,
    lookahead: int = 8,
    select: Literal["score", "reward"] = "score",
    per_token: bool = False,
    prompt: str = "",
    rewards: dict[str, dict[str, object]] | None = None,
    weights: dict[str, float] | None = None,
) -> Model:
    """DeAL: align while decoding, by a search that looks ahead and scores what it sees by rewards.

    Args:
        weight: lambda, of the rewards against the log-probability; 0 is beam search.
        beams: B, beginnings kept at each step.
        candidates: k, next tokens looked at for each of them.
        lookahead: l, tokens that a candidate is carried on by before it is rewarded; 0 rewards it
            as it is, -1 carries it on to its end.
        select: return the beam with the highest score, or with the highest reward.
        per_token: divide log P by the length.
        prompt: system message that states what is wanted; "" for none.
        rewards: rewards or checks by name, such as {all: {use: keyword_coverage}}; in a
            plain call functions of rows too.
        weights: by those names, "principles" and "reward_model"; 1 where none is given.
    """
    settings = {
        "weight": weight,
        "beams": beams,
        "candidates": candidates,
        "lookahead": lookahead,
        "select": select,
        "per_token": per_token,
    }
    start = model
    if prompt:
        start = model.adding(Prefix([{"role": "system", "content": prompt}]))
    return rewarded(
        start,
        "deal",
        settings,
        rewards=rewards,
        weights=weights,
        principles=principles,
        reward_model=reward_model,
    )
