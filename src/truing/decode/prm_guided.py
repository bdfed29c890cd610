"""Write step by step: candidates for each next step, the one kept that process rewards like best.

    step_t = argmax_i v(x, steps before t, c_i),   c_1 .. c_K ~ pi(. | x, steps before t)
    v = sum_j w_j v_j / sum_j w_j,   v_j = what objective j expects at the end of c_i

A step ends at one of `stops`. Only the new step's value counts: with sums over steps, answers that
end early would win. Every objective is asked in one way, whether it can be verified or not, and has
a model of the sort that it was learnt by: `process_models` are classifiers of steps (sigmoid of the
score, train/process_reward) and value models (as they are, train/step_value), `outcome_models` were
trained on pairs of answers and judge the text so far (sigmoid, train/bradley_terry); `rewards` of
the text so far can stand beside them. Weights are what the user wants now: nothing is trained for
them. Terms on other scales than [0, 1] would count for more than their weight; `standardise` takes
of each its distance from the mean of the candidates for a step, in standard deviations. With a
model whose heads were blended (steer/blend_heads) this is both halves of MAH-DPO's control.

Candidates without a word are drawn again, at most 3 K in all; an answer ends where none of them has
words and one has ended, and after `steps`. Equal values keep the first. Temperature and nucleus are
the request's; a greedy request has nothing to choose from and is passed on.

Source: "Simultaneous Multi-objective Alignment Across Verifiable and Non-verifiable Rewards", arXiv
2510.01167. Difference: the kept beginning is read once for the K candidates of a step together, not
carried on in a cache from step to step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

from truing.changes import Decoder
from truing.context import current
from truing.core.chat import Prompt
from truing.core.drawing import Base, Completion
from truing.core.generation.search import Path, Writer
from truing.core.judging.prm_values import WHERE, Answer, Candidate, Guide
from truing.core.judging.rewards import check_reward_model, licences_at, rewards_of
from truing.core.passes.scoring import check_steps
from truing.core.sampling import SamplingSettings
from truing.errors import InputError, unknown
from truing.method import component, method
from truing.models import Model, held_by, hold
from truing.references import referred

ATTEMPTS = 3  # times K candidates that are drawn at most
STRIDE = 7919  # between the seeds of two attempts


def _draw(
    writer: Writer,
    answers: Sequence[Answer],
    k: int,
    tokens: int,
    top_k: int,
    separator: str,
    stops: Sequence[str],
) -> list[list[Candidate]]:
    """Candidates with words for each answer; one for which there is none is over."""
    own = writer.sampling
    made: list[list[Candidate]] = [[] for _ in answers]
    ended: list[Path | None] = [None] * len(answers)
    for attempt in range(ATTEMPTS):
        by_length: dict[int, list[int]] = {}
        for i, answer in enumerate(answers):
            if len(made[i]) < k:
                by_length.setdefault(len(answer.path.ids), []).append(i)
        for done, members in by_length.items():
            length = min(tokens, own.max_tokens - done)
            short = replace(
                own,
                n=k,
                max_tokens=length,
                top_k=own.top_k or top_k,
                stop=(*own.stop, *stops),
                stop_ids=tuple(writer.ends),
                seed=own.seed + attempt * STRIDE,
                min_tokens=min(length, max(0, own.min_tokens - done)),
            )
            begun = [answers[i].path.ids for i in members]
            found = writer.base([answers[i].prompt for i in members], short, begun=begun)
            for i, items in zip(members, found, strict=True):
                for c in items:
                    candidate = _candidate(writer, answers[i].path, c, separator, stops)
                    if candidate.step.strip() and len(made[i]) < k:
                        made[i].append(candidate)
                    elif not candidate.step.strip() and candidate.path.ended:
                        ended[i] = ended[i] or candidate.path
    for answer, items, end in zip(answers, made, ended, strict=True):
        if not items:
            answer.over, answer.path = True, end or answer.path
    return made


def _candidate(
    writer: Writer, path: Path, more: Completion, separator: str, stops: Sequence[str]
) -> Candidate:
    ids = (*path.ids, *more.ids)
    over = writer.ended(ids)
    words = writer.text(more.ids, len(path.ids))
    closed = next((s for s in (separator, *stops) if words.endswith(s)), "")
    # Spaces at its beginning stay, as in the steps that process reward models were trained on.
    step = words.removesuffix(closed)
    if closed != separator and step.strip():  # which a model of steps does not put back
        step += closed.rstrip()
    return Candidate(Path(ids, (*path.logps, *more.logprobs), over), step)


@component("decoder", name="prm_guided")
def draw(
    base: Base,
    model: Model,
    prompts: list[Prompt],
    sampling: SamplingSettings,
    *,
    candidates: int = 5,
    steps: int = 20,
    step_tokens: int = 512,
    top_k: int = 50,
    separator: str = "\n\n",
    stops: list[str] | None = None,
    rewards: dict[str, dict[str, object]] | None = None,
    weights: dict[str, float] | None = None,
    outcomes: list[str] | None = None,
    standardise: bool = False,
) -> list[list[Completion]]:
    """Answers written step by step, each the candidate that process rewards like best."""
    if sampling.greedy or candidates == 1:
        return base(prompts, sampling)
    models = {n: m for n, m in base.held.items() if isinstance(m, Model)}
    outcome_models = {n: models.pop(n) for n in outcomes or []}
    asked = rewards_of({}, rewards, None, WHERE)
    guide = Guide(models, outcome_models, asked, weights or {}, separator, standardise)
    writer = Writer(base, model, sampling)
    answers = [[Answer(p) for _ in range(sampling.n)] for p in prompts]
    every = [a for items in answers for a in items]
    for number in range(steps):
        live = [a for a in every if not a.over and len(a.path.ids) < sampling.max_tokens]
        if not live:
            break
        found = _draw(writer, live, candidates, step_tokens, top_k, separator, stops or [separator])
        flat = [(a, c) for a, items in zip(live, found, strict=True) for c in items]
        values = iter(guide.values(writer, flat) if flat else [])
        for answer, items in zip(live, found, strict=True):
            if items:
                scores = [next(values) for _ in items]
                chosen = items[max(range(len(items)), key=lambda i: (scores[i], -i))]
                answer.path, answer.over = chosen.path, chosen.path.ended
                answer.steps.append(chosen.step)
        current().progress(number + 1, steps, "steps")
    count = sum(len(a.steps) for a in every) / len(every)
    current().metric(decoder="prm_guided", prompts=len(prompts), steps=count)
    return [[writer.completion(a.path) for a in items] for items in answers]


def _check(
    process_models: Mapping[str, Model],
    outcome_models: Mapping[str, Model],
    rewards: Sequence[str],
    weights: Mapping[str, float],
) -> None:
    """Raise InputError for models that score nothing, names taken twice and wrong weights."""
    names = [*process_models, *outcome_models, *rewards]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise InputError(
            "two terms have one name", where=WHERE, seen=twice, fix="Rename one of them"
        )
    for name, weight in weights.items():
        if name not in names and name.partition("/")[0] not in rewards:
            raise unknown("term", name, names, where=f"{WHERE} setting 'weights'")
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError("a weight is not negative", where=f"{WHERE} {name!r}", seen=weight)
    if names and not any(weights.get(n, 1.0) for n in [*names, *weights]):
        raise InputError(
            "all weights are 0", where=f"{WHERE} setting 'weights'", seen=dict(weights)
        )
    for name, one in process_models.items():
        check_steps(one, f"{WHERE} input {name!r}")
    for one in outcome_models.values():
        check_reward_model(one, WHERE)


@method(
    paper="mah-dpo",
    needs=("generate", "logprob"),
    within={
        "candidates": (1, None),
        "steps": (1, None),
        "step_tokens": (1, None),
        "top_k": (0, None),
    },
)
def prm_guided(
    model: Model,
    process_models: dict[str, Model] | None = None,
    outcome_models: dict[str, Model] | None = None,
    *,
    candidates: int = 5,
    steps: int = 20,
    step_tokens: int = 512,
    top_k: int = 50,
    separator: str = "\n\n",
    stops: list[str] | None = None,
    rewards: dict[str, dict[str, object]] | None = None,
    weights: dict[str, float] | None = None,
    standardise: bool = False,
) -> Model:
    """Write step by step: of several next steps the one that process rewards like best.

    Args:
        candidates: K, drawn for each step; 1 is plain sampling.
        steps: most steps of an answer.
        step_tokens: most tokens of a step.
        top_k: tokens that steps are drawn from, unless the request says.
        separator: what closes a step for the process reward models, as they were trained.
        stops: texts that end a step, such as [". ", "? "] in dialogues; None takes `separator`.
        rewards: rewards or checks of the text so far by name, such as {short: {use: max_words}}; in
            a plain call functions of rows too.
        weights: by the names of models and rewards; 1 where none is given.
        standardise: bring terms to one scale among the candidates for a step.
    """
    models, judges = process_models or {}, outcome_models or {}
    rewards = cast("dict[str, dict[str, object]]", referred(rewards or {}))
    guide = rewards_of({}, rewards, None, WHERE)
    guide.check()
    _check(models, judges, guide.names, weights or {})
    if candidates > 1 and not (models or judges or guide.names):
        raise InputError(
            "there is nothing to tell steps apart by",
            where=WHERE,
            fix="Give process_models, outcome_models or rewards",
        )
    chosen: dict[str, object] = {
        "candidates": candidates,
        "steps": steps,
        "step_tokens": step_tokens,
        "top_k": top_k,
        "separator": separator,
        "stops": stops,
        "rewards": rewards,
        "weights": dict(weights or {}),
        "outcomes": list(judges),
        "standardise": standardise,
    }
    holds = {n: hold(m) for n, m in {**models, **judges}.items()}
    change = Decoder("prm_guided", chosen, holds)
    made = model.adding(change).with_licences(licences_at(held_by(change)))
    return made.called(f"{model.name}+prm_guided")
