"""Rollouts: a policy answers prompts, the answers are rewarded, all of it kept in a journal.

Each rollout has a file of its own in the step's folder, to which answers are added in blocks as
they are drawn, then their rewards. A run that was killed reads what is there and draws the rest:
what is drawn depends on seed, prompt and weights alone, so the same bits come out. Where an
environment answers between several turns of the policy (`core.play.episodes`), its replies and its
state are written after each turn. What no kept checkpoint goes on with is deleted; the last files
stay until the step ends, and in a folder of one's own. Of several processes each draws for a share
of the prompts; the first one rewards all answers, and it alone has journals.

What cannot be learnt from is left out by rule and counted: prompts without room for an answer.
Answers cut off at their length limit are kept and marked `finished` False; an answer that is
nothing but its stop token is kept too, as the empty text that it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from truing.context import Context, Journal, Json
from truing.core.chat import Prompt, prompt_ids
from truing.core.placed import PaidAt
from truing.core.rl.answers import Answer, Asked, Group, seen_by_rewards
from truing.core.rl.gold import of_prompt
from truing.core.rl.online_reward import Reward, Scores, one_each
from truing.core.sampling import SamplingSettings, first_draws
from truing.core.trainer import distributed
from truing.tables import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from truing.core.drawing import Completion
    from truing.core.generation.dialogue_cache import Past
    from truing.core.play.episodes import World

BLOCK = 64  # answers of each process, written to the journal together: what a kill can cost
Say = Callable[[Sequence[Prompt], int], list[list[str]]]
Drawn = tuple[tuple[int, ...], tuple[float, ...], str, bool]
# Rewards of a group, None where it is left out; their terms; what of each falls inside its answer.
Scored = tuple[list[float] | None, Scores, list[list[PaidAt]]]


class Draw(Protocol):
    """Who answers: `sampling.n` answers to each prompt, the first of them numbered `first`."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingSettings,
        first: Sequence[int],
        past: Past | None = None,
        /,
    ) -> list[list[Completion]]:
        """`past` is that of `sampling.sample`."""
        ...


class Pool(Protocol):
    """How rows of several sorts are asked and rewarded, where rewards alone cannot say.

    A registered component of kind "pool" makes one from its settings.
    """

    def check(self, row: Row) -> str:
        """Why a row is left out, as it is counted, or ""; an InputError for a wrong one."""
        ...

    def facts(self, row: Row) -> dict[str, float]:
        """What is known of an answered row besides its reward: columns of the rollout, by name."""
        ...

    def prompt(self, row: Row, seed: int) -> tuple[Prompt, Row]:
        """What the policy is asked for this row, and columns to remember for its reward."""
        ...

    def score(
        self, groups: Sequence[Sequence[Row]], seed: int, say: Say
    ) -> list[list[float] | None]:
        """Reward of each answer; None for a group that is to be left out.

        `say(prompts, n)` gives the policy's own words, with the weights that it has now; "" to a
        prompt that leaves no room for them.
        """
        ...


@dataclass(frozen=True)
class Collector:
    """Makes rollouts.

    Args:
        prompts: all that may be answered.
        draw: who answers, the policy first; each draws `sampling.n` answers to every prompt.
        reward: what answers are rewarded by; None where a pool does it.
        pool: see `Pool`.
        tokenizer: of the policy.
        folder: where the journals lie.
        world: what replies between turns; None where an answer is one turn.
        limit: tokens of a prompt and its answer together; 0 for no limit.
        greedy: who answers after the policy gives one answer, of the likeliest tokens; nothing is
            learnt from it, and its reward is all that stays.
        needed: number of the first rollout whose file is kept.
    """

    prompts: Sequence[Asked]
    draw: Sequence[Draw]
    reward: Reward | None
    pool: Pool | None
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    context: Context
    world: World | None = None
    limit: int = 0
    greedy: bool = False
    needed: Callable[[], int] = lambda: 0

    def collect(
        self, number: int, rows: Sequence[int], sampling: SamplingSettings, part: str = ""
    ) -> list[Group]:
        """Answers to the prompts `rows`, rewarded.

        Args:
            number: of the rollout; `part` tells several requests of one rollout apart.
            sampling: its seed is replaced by the rollout's own.
        """
        if distributed.leads():
            first = self.needed()
            for path in self.folder.glob("[0-9]*.jsonl"):
                if int(path.stem) < first:
                    path.unlink(missing_ok=True)
        return self.collect_as(f"rollout/{number}/{part}", f"{number:06d}", rows, sampling)

    def collect_as(
        self, name: str, journal_name: str, rows: Sequence[int], sampling: SamplingSettings
    ) -> list[Group]:
        """The same under any name, which all that is random follows, in a journal of its own."""
        path = self.folder / f"{journal_name}.jsonl"
        journal = Journal(path) if distributed.leads() else None
        try:
            return self._collect(journal, name, rows, sampling)
        finally:
            if journal is not None:
                journal.close()

    def _collect(
        self, journal: Journal | None, name: str, rows: Sequence[int], sampling: SamplingSettings
    ) -> list[Group]:
        from truing.core.play.episodes import Stage

        stage = None
        if self.world is not None:
            stage = Stage(self.world, self, journal, rows, name, sampling.max_tokens)
            rows, asked = stage.rows, stage.asked
        else:
            asked = [self._asked(r, name) for r in rows]
        if not asked:
            return []
        groups: list[list[Answer]] = [[] for _ in asked]
        for who, draw in enumerate(self.draw):
            own = f"{name}/{who}"
            how = replace(sampling, n=1, greedy=True) if who and self.greedy else sampling
            if stage is not None:
                answers = stage.play(own, draw, how)
            else:
                seed = self.context.stream(own) % 2**31
                drawn = self.drawn(journal, own, draw, asked, how, seed)
                answers = [[Answer(*a) for a in items] for items in drawn]
            for group, items in zip(groups, answers, strict=True):
                group += [replace(a, own=who == 0) for a in items]
        for group, one in zip(groups, asked, strict=True):
            if one.given:
                text = cast(str, self.tokenizer.decode(list(one.given), skip_special_tokens=True))
                group.append(Answer(one.given, (0.0,) * len(one.given), text, True, own=False))
        scored = self._scored(journal, name, asked, groups, sampling)
        made: list[Group] = []
        for row, one, answers, found in zip(rows, asked, groups, scored, strict=True):
            reward, terms, inside = found
            if reward is not None:
                both = zip(answers, inside, strict=True)
                answers = [a.paying(parts, self.tokenizer) for a, parts in both]
                made.append(self._group(row, one.ids, answers, reward, terms))
        return made

    def _group(
        self,
        row: int,
        prompt: tuple[int, ...],
        answers: Sequence[Answer],
        reward: Sequence[float],
        terms: Scores,
    ) -> Group:
        if not self.greedy:
            return Group(row, prompt, tuple(answers), tuple(reward), terms)
        at = sum(a.own for a in answers)  # the policy's own stand first, then the greedy one
        stay = [i for i in range(len(answers)) if i != at]
        own, paid = tuple(answers[i] for i in stay), tuple(reward[i] for i in stay)
        parts = {n: [values[i] for i in stay] for n, values in terms.items()}
        return Group(row, prompt, own, paid, parts, greedy=reward[at])

    def _asked(self, row: int, name: str) -> Asked:
        one = self.prompts[row]
        if self.pool is None:
            return one
        prompt, more = self.pool.prompt(one.row, self.context.stream(f"{name}/ask/{row}"))
        return Asked(one.row | more, tuple(prompt_ids(self.tokenizer, prompt)))

    def drawn(
        self,
        journal: Journal | None,
        name: str,
        draw: Draw,
        asked: Sequence[Asked],
        sampling: SamplingSettings,
        seed: int,
    ) -> list[list[Drawn]]:
        """(ids, log-probabilities, words, whether it ended by itself) of each answer."""
        sampling = replace(sampling, seed=seed)
        firsts = first_draws([repr(a.ids) for a in asked], sampling.n)
        size = max(1, BLOCK // sampling.n) * distributed.now().size
        made: list[list[Drawn]] = []
        while (start := len(made)) < len(asked):  # blocks of other sizes may be there
            block = [a.ids for a in asked[start : start + size]]
            first = firsts[start : start + size]
            here = distributed.share([len(ids) for ids in block])

            def answers(
                block: Sequence[tuple[int, ...]] = block[here], first: Sequence[int] = first[here]
            ) -> Json:
                own: list[Json] = [
                    [
                        [list(c.ids), list(c.logprobs), c.text.strip(), c.finish == "stop"]
                        for c in items
                    ]
                    for items in (draw(block, sampling, first) if block else [])
                ]
                return distributed.gathered(own)

            found = kept(journal, f"{name}/{start}", answers)
            groups = cast("list[list[tuple[list[int], list[float], str, bool]]]", found)
            made += [[(tuple(i), tuple(p), text, end) for i, p, text, end in g] for g in groups]
        return made

    def _scored(
        self,
        journal: Journal | None,
        name: str,
        asked: Sequence[Asked],
        groups: Sequence[Sequence[Answer]],
        sampling: SamplingSettings,
    ) -> list[Scored]:
        """What each group's answers are rewarded; from the journal where it is there."""
        rows = [
            [seen_by_rewards(one, a, name) for a in answers]
            for one, answers in zip(asked, groups, strict=True)
        ]

        def score() -> Json:
            if self.pool is not None:  # it may let the policy speak, which all do together
                return cast(Json, self._score(journal, name, rows, sampling))
            if not distributed.leads():
                return None
            with distributed.alone():
                return cast(Json, self._score(journal, name, rows, sampling))

        found = kept(journal, f"{name}/reward", score)
        return [(reward, terms, inside) for reward, terms, inside in cast("list[Scored]", found)]

    def _score(
        self,
        journal: Journal | None,
        name: str,
        groups: Sequence[Sequence[Row]],
        sampling: SamplingSettings,
    ) -> list[Scored]:
        if self.pool is not None:
            say = _Speaker(self, journal, name, sampling)
            seed = self.context.stream(f"{name}/score")
            found = one_each(self.pool.score(groups, seed, say), groups, name)
            facts = [[self.pool.facts(row) for row in rows] for rows in groups]
            columns = [{n: [f[n] for f in some] for n in some[0]} for some in facts]
            return [
                (values, facts, [[] for _ in rows])
                for values, facts, rows in zip(found, columns, groups, strict=True)
            ]
        reward = cast(Reward, self.reward)
        flat = [row for rows in groups for row in rows]
        with of_prompt(flat):
            terms = reward.terms(flat)
        total, inside = reward.weigh(terms, flat), reward.inside(terms, flat)
        plain = {n: [float(v) for v in values] for n, values in terms.items()}
        made: list[Scored] = []
        at = 0
        for rows in groups:
            here = slice(at, at + len(rows))
            made.append((total[here], {n: v[here] for n, v in plain.items()}, inside[here]))
            at += len(rows)
        return made


def kept(journal: Journal | None, key: str, make: Callable[[], Json]) -> Json:
    """What the first process's journal has under `key`; made by all where it is not there yet."""
    if distributed.agree(journal is not None and key not in journal):
        made = make()
        if journal is not None:
            journal.put(key, made)
    return distributed.agree(journal.get(key) if journal is not None else None)


class _Speaker:
    """The policy's own words for a pool; each request has its own random numbers."""

    def __init__(
        self, collector: Collector, journal: Journal | None, name: str, sampling: SamplingSettings
    ) -> None:
        self.collector, self.journal, self.name = collector, journal, name
        self.sampling, self.times = sampling, 0

    def __call__(self, prompts: Sequence[Prompt], n: int) -> list[list[str]]:
        self.times += 1
        name = f"{self.name}/say/{self.times}"
        own = self.collector
        asked = [Asked({}, tuple(prompt_ids(own.tokenizer, p))) for p in prompts]
        most = own.limit - self.sampling.max_tokens
        fits = [i for i, one in enumerate(asked) if not own.limit or len(one.ids) <= most]
        seed = own.context.stream(name) % 2**31
        sampling = replace(self.sampling, n=n)
        some = [asked[i] for i in fits]
        drawn = own.drawn(self.journal, name, own.draw[0], some, sampling, seed)
        said = [[""] * n for _ in asked]
        for i, items in zip(fits, drawn, strict=True):
            said[i] = [text for _, _, text, _ in items]
        return said
