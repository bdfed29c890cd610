"""Answers of several turns: an environment replies between the turns of the policy.

All answers of a group begin from one state of one environment (`Episode.branch`), and so with one
prompt. What the policy draws, its ids as they were drawn, and what is replied make one row: replies
carry no loss, every turn of the policy does, and rows of a group share what they begin with alike.

Between two turns the journal takes all replies with the environments' states, so that a run that
was killed goes on in the middle of its episodes; each turn begins from what stands there, so that
it makes no difference whether it was read back. Of several processes each plays its own episodes
(`core.play.turns`) with environments of its own; all of them know what came of all.

An episode is cut, and counts as not finished, after `turns` turns and where the next one has no
room. A task whose first prompt leaves no room, or which ends before the policy acts, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from truing.context import Journal, Json
from truing.core.chat import prompt_ids, reply_ids
from truing.core.generation import dialogue_cache
from truing.core.play.agents import SHOWN, Acted, Agent
from truing.core.play.apart import apart
from truing.core.play.turns import Turns
from truing.core.rl.answers import Answer, Asked
from truing.core.rl.collect import Collector, Draw, Drawn, kept
from truing.core.rl.online_reward import GIVEN
from truing.core.rollout import POLICY, Episode, Make, advance
from truing.core.sampling import SamplingSettings
from truing.core.trainer import distributed
from truing.errors import InputError
from truing.tables import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from truing.tables import Message

ROUNDS = 32  # of other roles, between two turns of the policy
TRIED = 16  # tasks that are begun before anything is trained


@dataclass(frozen=True)
class World:
    """Where episodes take place.

    Args:
        make: makes environments.
        partner: who acts in all roles but the policy's.
        turns: of the policy in one episode, at most.
        limit: tokens of a whole episode, its prompt included.
        where: what errors name.
    """

    make: Make
    partner: Agent | None
    turns: int
    limit: int
    where: str

    def begin(self, tasks: Sequence[tuple[Row, int]]) -> list[Episode]:
        """An episode of each task and seed, not yet at the policy's turn."""
        return [Episode(self.make, row, seed) for row, seed in tasks]

    def to_policy(self, episodes: Sequence[Episode]) -> None:
        """Let the other roles act until the policy is to, in each that is not done."""
        for _ in range(ROUNDS):
            waiting = [e for e in episodes if not e.done and e.waiting.role != POLICY]
            if not waiting:
                break
            if self.partner is None:
                raise InputError(
                    "the environment asks another role, in which nobody acts",
                    where=self.where,
                    seen=waiting[0].waiting.role,
                    fix="Give the input 'partner', a model that acts in it",
                )
            advance(waiting, {e.waiting.role: self.partner for e in waiting})
        else:
            raise InputError(
                f"the environment does not come back to the policy within {ROUNDS} actions of"
                " other roles",
                where=self.where,
                fix="Let it ask the policy sooner, or end the episode",
            )
        for episode in episodes:
            if not episode.done and not isinstance(episode.waiting.content, str):
                raise InputError(
                    "a language model can only be shown texts",
                    where=self.where,
                    seen=episode.waiting.content,
                    fix=SHOWN,
                )

    def prompt(self, tokenizer: PreTrainedTokenizerBase, episode: Episode, room: int) -> list[int]:
        """Ids of what the policy is asked first; [] for an episode that is to be left out."""
        if episode.done:
            return []
        ids = prompt_ids(tokenizer, episode.messages(POLICY))
        return ids if len(ids) + room <= self.limit else []

    def tried(
        self, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[tuple[Row, int]], room: int
    ) -> list[list[int]]:
        """First prompts of some tasks, to see before anything is trained that they can be played.

        Raises:
            InputError: what the environment or `to_policy` raise; no prompt leaves any room.
        """
        some = tasks[:TRIED]
        here = distributed.share([1] * len(some))
        own: list[list[int]] = []
        with apart():
            episodes = self.begin(some[here])
            self.to_policy(episodes)
            own = [self.prompt(tokenizer, e, room) for e in episodes]
        found = distributed.gathered(own)
        if not any(found):
            raise InputError(
                f"no task begins with a prompt that leaves room for {room} tokens in {self.limit}",
                where=self.where,
                seen=f"{len(found)} tasks tried",
                fix="Raise max_length or lower max_tokens",
            )
        return [ids for ids in found if ids]


class Line:
    """An episode as one row of tokens."""

    def __init__(self, drawn: Drawn) -> None:
        self.ids: list[int] = []
        self.loss: list[bool] = []
        self.logprobs: list[float] = []
        self.paid: list[float] = []
        self.rewards: list[float] = []
        self.prompt: Json = []  # what the last turn answered, as messages
        self.last: tuple[int, ...] = ()
        self.text, self.over = "", False
        self.cut = ""  # the setting that cut it off first
        self.say(drawn)

    def say(self, drawn: Drawn) -> None:
        """Take a turn of the policy."""
        self.last, logprobs, self.text, ended = drawn
        self.ids += self.last
        self.loss += [True] * len(self.last)
        self.logprobs += logprobs
        self.paid += [0.0] * len(logprobs)
        if not ended:
            self.cut = self.cut or "max_tokens"

    def hear(self, reply: Mapping[str, Json], *, last: bool) -> None:
        """Take what was replied to it; `last` where no more turns were allowed."""
        self.rewards.append(cast(float, reply["reward"]))
        self.paid[-1] = self.rewards[-1]
        more = cast("list[int]", reply["ids"])
        self.over, self.prompt = not more, reply["prompt"]
        if self.over and not reply["done"]:
            self.cut = self.cut or ("turns" if last else "max_length")
        self.ids += more
        self.loss += [False] * len(more)

    def answer(self, weight: float) -> Answer:
        """The finished row; what was paid is weighed as the reward's term is."""
        return Answer(
            tuple(self.ids),
            tuple(self.logprobs),
            self.text,
            not self.cut,
            loss=tuple(self.loss),
            turns=len(self.rewards),
            paid=tuple(weight * p for p in self.paid),
            more={"prompt": self.prompt, GIVEN: self.rewards},
            limit=self.cut,
        )


class Stage:
    """The episodes of one rollout.

    Args:
        rows: numbers of the tasks; those that can be played stay.
        name: of the rollout.
        room: tokens that each turn may need.
    """

    def __init__(
        self,
        world: World,
        collector: Collector,
        journal: Journal | None,
        rows: Sequence[int],
        name: str,
        room: int,
    ) -> None:
        self.world, self.collector, self.journal, self.room = world, collector, journal, room
        tasks = [
            (collector.prompts[r].row, collector.context.stream(f"{name}/task/{r}")) for r in rows
        ]
        shares = distributed.shares([1] * len(tasks))
        owner = [rank for rank, run in enumerate(shares) for _ in tasks[run]]
        mine = range(len(tasks))[shares[distributed.now().rank]]
        roots: dict[int, Episode] = {}
        with apart():
            roots = dict(zip(mine, world.begin([tasks[i] for i in mine]), strict=True))

        def opened() -> Json:
            own: list[Json] = []
            with apart():
                world.to_policy(list(roots.values()))
                own = [
                    [cast(Json, world.prompt(collector.tokenizer, e, room)), e.snapshot()]
                    for e in roots.values()
                ]
            # The memory that is free decides once, so that a resumed run keeps as much.
            return [distributed.gathered(own), min(distributed.everyone(dialogue_cache.room()))]

        kept_open = kept(journal, f"{name}/open", opened)
        found, self.limit = cast("tuple[list[tuple[list[int], Json]], int]", kept_open)
        there = [i for i, (ids, _) in enumerate(found) if ids]
        self.rows = [rows[i] for i in there]
        self.asked = [Asked(tasks[i][0], tuple(found[i][0])) for i in there]
        self.owner = [owner[i] for i in there]
        self.roots = {at: roots[i] for at, i in enumerate(there) if i in roots}
        for at, root in self.roots.items():
            root.restore(found[there[at]][1])

    def play(self, name: str, draw: Draw, sampling: SamplingSettings) -> list[list[Answer]]:
        """`sampling.n` episodes from each beginning, to their ends."""
        n = sampling.n
        groups = [range(u * n, (u + 1) * n) for u in range(len(self.asked))]
        turns = Turns(self.journal, draw, [o for o in self.owner for _ in range(n)], self.limit)
        begun = [a.ids for a in self.asked]
        firsts = turns(name, begun, groups, self._seeded(name, sampling))
        prompts = [ids for ids in begun for _ in range(n)]
        lines = [Line(drawn) for items in firsts for drawn in items]
        episodes: dict[int, Episode] = {}
        with apart():
            for u, root in self.roots.items():
                episodes |= dict(zip(groups[u], root.branch(n), strict=True))
        states: dict[int, Json] = {}
        for turn in range(1, self.world.turns + 1):
            live = [i for i, line in enumerate(lines) if not line.over]
            own = {i: (episodes[i], lines[i], len(prompts[i])) for i in live if i in episodes}
            replies = self._replies(f"{name}/reply{turn}", own, states, live, turn)
            for i, reply in zip(live, replies, strict=True):
                states[i] = reply["state"]
                lines[i].hear(reply, last=turn == self.world.turns)
            live = [i for i in live if not lines[i].over]
            if not live:
                break
            asked, part = [(*prompts[i], *lines[i].ids) for i in live], f"{name}/turn{turn}"
            one = self._seeded(part, replace(sampling, n=1))
            more = turns(part, asked, [(i,) for i in live], one)
            for i, (drawn,) in zip(live, more, strict=True):
                lines[i].say(drawn)
        answers = iter([line.answer(self.weight) for line in lines])
        return [[next(answers) for _ in items] for items in firsts]

    @property
    def weight(self) -> float:
        """Of what the environment gives, in the reward."""
        return self.collector.reward.weight if self.collector.reward is not None else 1.0

    def _seeded(self, name: str, sampling: SamplingSettings) -> SamplingSettings:
        return replace(sampling, seed=self.collector.context.stream(name) % 2**31)

    def _replies(
        self,
        name: str,
        own: Mapping[int, tuple[Episode, Line, int]],
        states: Mapping[int, Json],
        live: Sequence[int],
        turn: int,
    ) -> list[dict[str, Json]]:
        """What is replied to each of the live episodes, by its process or from the journal."""

        def made() -> Json:
            told: list[tuple[int, Json]] = []
            with apart():
                before: list[tuple[list[Message], int]] = []
                for i, (episode, line, _) in own.items():
                    if i in states:
                        episode.restore(states[i])
                    before.append((episode.messages(POLICY), len(episode.turns)))
                    episode.take(Acted(line.text))
                self.world.to_policy([e for e, _, _ in own.values()])
                told = [
                    (i, self._reply(*one, *asked, turn))
                    for (i, one), asked in zip(own.items(), before, strict=True)
                ]
            found = dict(distributed.gathered(told))
            return [found[i] for i in live]

        return cast("list[dict[str, Json]]", kept(self.journal, name, made))

    def _reply(
        self,
        episode: Episode,
        line: Line,
        prompt: int,
        asked: list[Message],
        turns: int,
        turn: int,
    ) -> Json:
        """What became of one turn: its reward, the tokens replied, none where it was the last."""
        own = cast("list[dict[str, float]]", [t["rewards"] for t in episode.turns[turns:]])
        ids: list[int] = []
        if not episode.done and turn < self.world.turns:
            ids = reply_ids(self.collector.tokenizer, episode.messages(POLICY), line.last)
            if prompt + len(line.ids) + len(ids) + self.room > self.world.limit:
                ids = []
        return {
            "reward": sum(r.get(POLICY, 0.0) for r in own),
            "done": episode.done,
            "ids": cast(Json, ids),
            "prompt": cast(Json, asked) if not ids else [],
            "state": episode.snapshot() if ids else None,
        }
