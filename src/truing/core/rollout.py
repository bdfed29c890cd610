"""Models acting in environments: one loop for RL, simulated users, tree search and evaluation.

An environment is a registered component of kind "environment", a function of settings that returns
an object with four methods:

    reset(seed, task) -> observation
    step(action) -> observation, reward, done, info
    snapshot() -> plain data        restore(plain data)

Whatever is random in it follows from the seed of `reset`; `restore(snapshot())` brings back every
later observation. An observation is addressed to a role ("policy" unless it says otherwise), and
the agent of that role acts next: so a simulated user is one more role, not another loop. Each role
sees a dialogue of its own, in which what was addressed to it is the user's and what it did is the
assistant's.

All live episodes that wait for a role are asked in one call. The step's journal keeps every round
of turns with the environments' snapshots, so that a run that was killed goes on in the middle of
its episodes. Random numbers are an episode's own: what else is live changes no draw.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple, Protocol, cast

from truing.components import number_of
from truing.context import Json, current
from truing.core.play import user_environment
from truing.core.play.agents import Acted as Acted
from truing.core.play.agents import Agent as Agent
from truing.core.play.agents import Asked as Asked
from truing.core.play.agents import Scripted as Scripted
from truing.core.play.agents import Speaker as Speaker
from truing.core.play.agents import remembering
from truing.core.play.user_environment import plain
from truing.core.sampling import SamplingSettings
from truing.errors import InputError, unknown
from truing.method import get_component
from truing.models import Model
from truing.references import Ref, referred
from truing.tables import Message, Row, Table, content_hash

POLICY = "policy"
AT_ONCE = 512  # episodes that are live together


@dataclass(frozen=True)
class Observation:
    """What a role is shown.

    Args:
        content: text for language models, any plain data for other agents.
        role: who acts next.
        system: instructions to that role; those of its first observation count.
    """

    content: Json
    role: str = POLICY
    system: str = ""


class Step(NamedTuple):
    """What an action led to; a reward is the acting role's, or several by role."""

    observation: Observation
    reward: float | Mapping[str, float]
    done: bool
    info: Mapping[str, Json] = {}


class Environment(Protocol):
    """See the module's docstring."""

    def reset(self, seed: int, task: Row) -> Observation:
        """Begin the task anew."""
        ...

    def step(self, action: Json) -> Step:
        """Take the action of the role that was last addressed."""
        ...

    def snapshot(self) -> Json:
        """The whole state as plain data."""
        ...

    def restore(self, snapshot: Json) -> None:
        """Go back to a state that `snapshot` gave, in this or another instance."""
        ...


Make = Callable[[], Environment]
Turn = Mapping[str, Json]


def maker(environment: Ref) -> Make:
    """What makes fresh instances of an environment; its reference is checked here.

    A bare function works in a plain call. In a stored step it is an InputError: nothing would tell
    its next version from this one.
    """
    return cast(Make, get_component("environment", environment, where="rollout"))


class Episode:
    """One run of one task: the environment, what was done in it, who is to act next.

    Args:
        make: makes environments of one sort.
        task: the row that `reset` is given.
        seed: of whatever is random in it.
    """

    def __init__(self, make: Make, task: Row, seed: int) -> None:
        self.make, self.task, self.seed = make, task, seed
        self.environment = user_environment.made(make, self._place(0))
        self.turns: list[dict[str, Json]] = []
        self.done, self.path = False, ""
        self.waiting = user_environment.began(
            make, self.environment, seed, copy.deepcopy(task), self._place(0)
        )

    def _place(self, turn: int) -> str:
        at = f" turn {turn}" if turn else ""
        return f"task {self.task.get('id')}{at}"

    @property
    def rewards(self) -> dict[str, float]:
        """Sum of what each role got."""
        total: dict[str, float] = {}
        for turn in self.turns:
            for role, value in cast("dict[str, float]", turn["rewards"]).items():
                total[role] = total.get(role, 0.0) + value
        return total

    def messages(self, role: str) -> list[Message]:
        """The dialogue as `role` has seen it, with what waits for its answer."""
        waiting = self.waiting if self.waiting.role == role and not self.done else None
        return _seen(role, self.turns, waiting)

    def ask(self) -> Asked:
        """What the role that is to act is given."""
        return self._asked(self.turns, self.waiting)

    def asked(self, turn: int) -> tuple[str, Asked]:
        """The role that acted in an earlier turn, and what it was given."""
        one = self.turns[turn]
        role, system = str(one["role"]), str(one.get("system", ""))
        return role, self._asked(self.turns[:turn], Observation(one["observation"], role, system))

    def _asked(self, turns: Sequence[Turn], waiting: Observation) -> Asked:
        draw = int(content_hash([self.seed, self.path, len(turns)], 4), 16) >> 1
        seen = _seen(waiting.role, turns, waiting)
        return Asked(waiting.content, seen, draw, self.name(waiting.role))

    def name(self, role: str) -> tuple[int, str, str]:
        """Of the dialogue that `role` has in it."""
        return self.seed, self.path, role

    def take(self, acted: Acted) -> None:
        """Let the environment take an action, and record the turn."""
        where = self._place(len(self.turns) + 1)
        made = user_environment.stepped(self.make, self.environment, acted.action, where)
        role = self.waiting.role
        rewards = dict(made.reward) if isinstance(made.reward, Mapping) else {role: made.reward}
        for name, value in rewards.items():
            if not math.isfinite(number_of(value)):
                raise InputError(
                    f"a reward of role {name!r} is not a finite number",
                    where=where,
                    seen=value,
                    fix="Give a number for each action, or several by role",
                )
        turn: dict[str, Json] = {
            "role": role,
            "observation": self.waiting.content,
            "action": acted.action,
            "rewards": {n: number_of(v) for n, v in rewards.items()},
            "info": dict(made.info),
        }
        if self.waiting.system:
            turn["system"] = self.waiting.system
        if acted.ids:
            turn |= {"ids": [*acted.ids], "logprobs": [*acted.logprobs], "finish": acted.finish}
        self.turns.append(cast("dict[str, Json]", plain(turn, "a turn")))
        self.waiting, self.done = made.observation, made.done

    def snapshot(self) -> Json:
        """Everything that `restore` needs, as plain data."""
        state = {"turns": self.turns, **self._now()}
        return copy.deepcopy(plain(state, "an episode"))

    def _now(self) -> dict[str, Json]:
        waiting = cast("dict[str, Json]", asdict(self.waiting))
        where = self._place(len(self.turns))
        state = user_environment.called(self.make, "snapshot", self.environment.snapshot, where)
        return {"waiting": waiting, "done": self.done, "environment": cast(Json, state)}

    def restore(self, snapshot: Json) -> None:
        """Go back to where `snapshot` was taken."""
        state = cast("dict[str, Json]", copy.deepcopy(snapshot))
        self.turns = cast("list[dict[str, Json]]", state["turns"])
        self._go_on(state)

    def _go_on(self, state: Mapping[str, Json]) -> None:
        self.waiting = Observation(**cast("dict[str, str]", state["waiting"]))
        self.done = bool(state["done"])
        restore, where = self.environment.restore, self._place(len(self.turns))
        user_environment.called(self.make, "restore", lambda: restore(state["environment"]), where)

    def branch(self, k: int) -> list[Episode]:
        """`k` copies that go on from here, each with its own random numbers: a tree's children."""
        state = self.snapshot()
        made: list[Episode] = []
        for i in range(k):
            child = Episode(self.make, self.task, self.seed)
            child.restore(state)
            child.path = f"{self.path}/{len(self.turns)}.{i}"
            made.append(child)
        return made

    # The journal holds each turn with the state after it.

    def record(self) -> Json:
        """The last turn and the state after it."""
        return plain({"turn": self.turns[-1], **self._now()}, "an environment's snapshot")

    def replay(self, records: Sequence[Json]) -> None:
        """Take back what `record` gave, turn by turn."""
        if records:
            facts = cast("list[dict[str, Json]]", list(records))
            self.turns = [cast("dict[str, Json]", f["turn"]) for f in facts]
            self._go_on(facts[-1])


def _text(value: Json) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _seen(role: str, turns: Sequence[Turn], waiting: Observation | None) -> list[Message]:
    """What `role` was told and did in these turns, and what waits for its answer."""
    own = [t for t in turns if t["role"] == role]
    waits = [waiting] if waiting is not None else []
    systems = [str(t.get("system", "")) for t in own] + [w.system for w in waits]
    seen: list[Message] = [{"role": "system", "content": s} for s in systems[:1] if s]
    for turn in own:
        seen.append({"role": "user", "content": _text(turn["observation"])})
        seen.append({"role": "assistant", "content": _text(turn["action"])})
    return seen + [{"role": "user", "content": _text(w.content)} for w in waits]


def advance(episodes: Sequence[Episode], agents: Mapping[str, Agent]) -> None:
    """One action in each episode that is not done; each role's agent is asked once."""
    waiting: dict[str, list[Episode]] = {}
    for episode in episodes:
        if not episode.done:
            waiting.setdefault(episode.waiting.role, []).append(episode)
    for role, those in waiting.items():
        if role not in agents:
            raise unknown("role", role, agents, where="rollout")
        acts = agents[role]([e.ask() for e in those])
        if len(acts) != len(those):
            raise InputError(
                f"the agent in role {role!r} must return one action for each episode",
                where="rollout",
                seen=f"{len(acts)} for {len(those)}",
            )
        for episode, acted in zip(those, acts, strict=True):
            episode.take(acted)


def rollout(
    environment: Ref,
    tasks: Table | Sequence[Row],
    roles: Mapping[str, Model | Agent],
    *,
    n: int = 1,
    max_turns: int = 32,
    sampling: SamplingSettings | None = None,
) -> Table:
    """Run every task to its end, `n` times.

    Args:
        environment: `{use: name, **settings}`, a bare name, or in a plain call a function.
        tasks: rows that `reset` is given.
        roles: who acts, by role; models answer under `sampling`.
        n: episodes of each task, with seeds of their own.
        max_turns: an episode is cut after so many actions of all roles together.
        sampling: of the models; its seed is replaced by the step's.
    Returns:
        rows of kind "trajectory", by task and then by episode: `turns` (role, observation, action,
        rewards, info; ids, logprobs and finish where a model acted), `rewards` by role, `done`
        (False when cut), `task`, `episode`, `seed`.
    Raises:
        InputError: unknown environment, setting or role; a reward that is not finite.
    """
    context = current()
    make = maker(environment)
    sampling = replace(sampling or SamplingSettings(), seed=context.stream("sampling") % 2**31)
    agents: dict[str, Agent] = {
        role: Speaker(a, sampling) if isinstance(a, Model) else a for role, a in roles.items()
    }
    table = tasks if isinstance(tasks, Table) else Table("record", tasks, where="tasks")
    used = plain(referred(environment), "an environment")
    keys: dict[str, Json] = {role: agent.key for role, agent in agents.items()}
    facts: dict[str, Json] = {"environment": used, "models": keys}
    begun = list(_begin(make, table, n))
    names = [[str(e.task["id"]), i] for i, e in begun]
    run = content_hash([facts, max_turns, context.seed, names], 8)
    for start in range(0, len(begun), AT_ONCE):
        _play(
            [e for _, e in begun[start : start + AT_ONCE]],
            agents,
            max_turns,
            f"{run}/{start}",
            told=lambda ended, start=start: context.progress(start + ended, len(begun), "episodes"),
        )
    facts["step"] = context.name
    rows = [
        {
            "task": e.task["id"],
            "episode": i,
            "turns": e.turns,
            "rewards": e.rewards,
            "done": e.done,
            "seed": e.seed,
            "lineage": {"parents": [e.task["id"]], **facts},
        }
        for i, e in begun
    ]
    return Table("trajectory", rows, where="rollout")


def _begin(make: Make, tasks: Table, n: int) -> Iterator[tuple[int, Episode]]:
    """Number and start of each episode; a task that stands there twice has further ones."""
    times: Counter[str] = Counter()
    for task in tasks:
        name = str(task["id"])
        times[name] += n
        for i in range(times[name] - n, times[name]):
            yield i, Episode(make, task, current().stream(f"episode/{name}/{i}"))


def _play(
    episodes: Sequence[Episode],
    agents: Mapping[str, Agent],
    max_turns: int,
    name: str,
    told: Callable[[int], None],
) -> None:
    """Take the episodes to their ends, from the last round in the journal.

    A round is written as a whole: who is live together then does not depend on when a run was
    killed, and neither do the last bits of what models compute in batches.
    """
    journal = current().journal("turns") if current().stored else None
    kept: list[list[Json]] = [[] for _ in episodes]
    done = 0
    while journal is not None and f"{name}/{done}" in journal:
        for i, record in cast("list[tuple[int, Json]]", journal.get(f"{name}/{done}")):
            kept[i].append(record)
        done += 1
    for episode, records in zip(episodes, kept, strict=True):
        episode.replay(records)
    with remembering(agents, journal, name):
        for turn in range(done):
            _read_again([e for e in episodes if len(e.turns) > turn], agents, turn)
        for turn in range(done, max_turns):
            live = [i for i, e in enumerate(episodes) if not e.done]
            if not live:
                break
            _forget([episodes[i] for i in live], agents)
            advance([episodes[i] for i in live], agents)
            if journal is not None:
                journal.put(f"{name}/{turn}", [[i, episodes[i].record()] for i in live])
            told(len(episodes) - len(live))


def _forget(live: Sequence[Episode], agents: Mapping[str, Agent]) -> None:
    """Let models forget the dialogues of episodes that have ended."""
    names = [e.name(role) for e in live for role in agents]
    for agent in agents.values():
        if isinstance(agent, Speaker):
            agent.only(names)


def _read_again(live: Sequence[Episode], agents: Mapping[str, Agent], turn: int) -> None:
    """Tell models what they were asked in a round that is over, since they remember it."""
    _forget(live, agents)
    asked: dict[str, list[Asked]] = {}
    for episode in live:
        role, one = episode.asked(turn)
        asked.setdefault(role, []).append(one)
    for role, those in asked.items():
        if isinstance(agent := agents.get(role), Speaker):
            agent.again(those)
