"""Who acts in environments: language models under their sampling settings, and plain functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol, cast

from truing.changes import Decoder, Rewriter
from truing.context import Journal, Json
from truing.core.chat import Prompt
from truing.core.drawing import Completion, Local, base_of, drawer
from truing.core.generate import rewritten
from truing.core.generation.dialogue_cache import Memory, Past, room
from truing.core.sampling import SamplingSettings
from truing.errors import InputError
from truing.models import Model
from truing.tables import Message, content_hash

SHOWN = "Let the environment ask with a text"


@dataclass(frozen=True)
class Asked:
    """What an agent acts on: the observation, its own dialogue so far, a seed of this turn.

    `name` tells dialogues that go on from turn to turn apart.
    """

    observation: Json
    messages: list[Message]
    draw: int
    name: Hashable = None


@dataclass(frozen=True)
class Acted:
    """An action; with the tokens and log-probabilities that made it, where a model did."""

    action: Json
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish: str = ""


class Agent(Protocol):
    """Whoever acts in a role; `key` says which, for resuming and lineage."""

    @property
    def key(self) -> str:
        """Hash of everything that decides what it does."""
        ...

    def __call__(self, asked: Sequence[Asked]) -> list[Acted]:
        """One action for each."""
        ...


class Scripted:
    """An agent that is a plain function of the observation: baselines, experts, robots' policies.

    Args:
        act: observation -> action.
        key: changes whenever the function does.
    """

    def __init__(self, act: Callable[[Json], Json], key: str) -> None:
        self.act, self.key = act, content_hash(["scripted", key])

    def __call__(self, asked: Sequence[Asked]) -> list[Acted]:
        """One action for each."""
        return [Acted(self.act(a.observation)) for a in asked]


class Speaker:
    """A language model, local or served, as an agent: its answer is the action.

    Inside a block of `remembering` a local one keeps what it has read of a dialogue for the next
    turn (`core.generation.dialogue_cache`), unless a decoder or a rewriter decides what it reads.
    """

    def __init__(self, model: Model, sampling: SamplingSettings) -> None:
        self.model, self.sampling = model, replace(sampling, n=1)
        self.key = content_hash([model.key, asdict(self.sampling)])
        self.base = base_of(model, None)
        self.draw = drawer(self.base, model)
        self.memory: Memory | None = None

    @property
    def remembers(self) -> bool:
        """True where something can be kept between calls."""
        changed = any(isinstance(c, (Decoder, Rewriter)) for c in self.model.changes)
        return not (changed or self.model.is_served)

    @contextlib.contextmanager
    def remembering(self, limit: int) -> Generator[None]:
        """Keep up to `limit` bytes between calls inside the block."""
        self.memory = Memory(limit) if self.remembers else None
        try:
            yield
        finally:
            self.memory = None

    def only(self, names: Iterable[Hashable]) -> None:
        """Forget all dialogues but these."""
        if self.memory is not None:
            self.memory.only(names)

    def again(self, asked: Sequence[Asked]) -> None:
        """Take note of a call whose answers are there already, from a run that was killed."""
        if self.memory is not None:
            self.memory.again(self._request(self._prompts(asked), asked), [[a.name] for a in asked])

    def __call__(self, asked: Sequence[Asked]) -> list[Acted]:
        """One answer for each, drawn in one call."""
        for one in asked:
            if not isinstance(one.observation, str):
                raise InputError(
                    "a language model can only be shown texts",
                    where=self.model.name,
                    seen=one.observation,
                    fix=SHOWN,
                )
        prompts = self._prompts(asked)
        self.base.check(prompts, self.sampling)
        if self.memory is not None:
            made = self.memory.ask(self._request(prompts, asked), [[a.name] for a in asked])
        else:
            made = self.draw(prompts, self.sampling, first=[a.draw for a in asked])
        return [Acted(c[0].text, c[0].ids, c[0].logprobs, c[0].finish) for c in made]

    def _prompts(self, asked: Sequence[Asked]) -> list[Prompt]:
        return rewritten(self.model, [cast(Prompt, a.messages) for a in asked])

    def _request(
        self, prompts: Sequence[Prompt], asked: Sequence[Asked]
    ) -> Callable[[Past | None], list[list[Completion]]]:
        base, first = cast(Local, self.base), [a.draw for a in asked]
        return lambda past: base(prompts, self.sampling, first=first, past=past)


@contextlib.contextmanager
def remembering(agents: Mapping[str, Agent], journal: Journal | None, name: str) -> Generator[None]:
    """Let models keep inside the block what they have read of dialogues that go on.

    The memory that is free decides once how much; the journal keeps that under `name`, so that a
    resumed run holds as much.
    """
    found = {id(a): a for a in agents.values() if isinstance(a, Speaker) and a.remembers}
    if not found:  # then a GPU, which `room` would wake, is perhaps not used at all
        yield
        return
    speakers = found.values()
    limit = room() // len(speakers)
    if journal is not None:
        if f"{name}/room" not in journal:
            journal.put(f"{name}/room", limit)
        limit = cast(int, journal.get(f"{name}/room"))
    with contextlib.ExitStack() as stack:
        for speaker in speakers:
            stack.enter_context(speaker.remembering(limit))
        yield
