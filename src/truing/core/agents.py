"""Who acts in environments: language models under their sampling settings, and plain functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol, cast

from truing.changes import Decoder
from truing.context import Json
from truing.core.chat import Prompt
from truing.core.drawing import Completion, base_of, drawer
from truing.core.generate import rewritten
from truing.core.sampling import SamplingSettings
from truing.errors import InputError
from truing.models import Model
from truing.tables import Message, content_hash


@dataclass(frozen=True)
class Asked:
    """What an agent acts on: the observation, its own dialogue so far, a seed of this turn."""

    observation: Json
    messages: list[Message]
    draw: int


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
    """A language model, local or served, as an agent: its answer is the action."""

    def __init__(self, model: Model, sampling: SamplingSettings) -> None:
        self.model, self.sampling = model, replace(sampling, n=1)
        self.key = content_hash([model.key, asdict(self.sampling)])
        self.base = base_of(model, None)
        self.draw = drawer(self.base, model)
        self.decodes = any(isinstance(c, Decoder) for c in model.changes)

    def __call__(self, asked: Sequence[Asked]) -> list[Acted]:
        """One answer for each, drawn in one call."""
        for one in asked:
            if not isinstance(one.observation, str):
                raise InputError(
                    "a language model can only be shown texts",
                    where=self.model.name,
                    seen=one.observation,
                )
        prompts = rewritten(self.model, [cast(Prompt, a.messages) for a in asked])
        self.base.check(prompts, self.sampling)
        made: list[list[Completion]] = []
        if self.decodes:  # a decoder numbers its own draws: one episode must not shift another's
            for prompt, one in zip(prompts, asked, strict=True):
                seed = (self.sampling.seed + one.draw) % 2**31
                made += self.draw([prompt], replace(self.sampling, seed=seed))
        else:
            made = self.draw(prompts, self.sampling, first=[a.draw for a in asked])
        return [Acted(c[0].text, c[0].ids, c[0].logprobs, c[0].finish) for c in made]
