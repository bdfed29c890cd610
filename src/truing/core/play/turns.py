"""The policy's turns in episodes, drawn where each episode is played.

An episode stays in the process that began it: its environment is there, and what is known of its
row from one turn to the next (`core.generation.dialogue_cache`). After each block the answers of
all processes go to the journal with the numbers of their rows, so that any number of processes
reads them back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

from truing.context import Journal, Json
from truing.core.generation.dialogue_cache import Memory, Past
from truing.core.rl import collect
from truing.core.rl.collect import Draw, Drawn, kept
from truing.core.sampling import SamplingSettings, first_draws
from truing.core.trainer import distributed

if TYPE_CHECKING:
    from truing.core.drawing import Completion

Request = Callable[[Past | None], "list[list[Completion]]"]


class Turns:
    """Draws for the episodes of one rollout.

    Args:
        owner: the process of each episode.
        limit: bytes of what is kept between turns.
    """

    def __init__(
        self, journal: Journal | None, draw: Draw, owner: Sequence[int], limit: int
    ) -> None:
        self.journal, self.draw, self.owner = journal, draw, owner
        self.memory = Memory(limit)

    def __call__(
        self,
        name: str,
        prompts: Sequence[Sequence[int]],
        episodes: Sequence[Sequence[int]],
        sampling: SamplingSettings,
    ) -> list[list[Drawn]]:
        """`sampling.n` answers to each prompt.

        Args:
            name: of the request in the journal.
            episodes: that go on from each prompt, all of one process; of others nothing is kept
                any longer.
        """
        firsts = first_draws([repr(tuple(ids)) for ids in prompts], sampling.n)
        rank, size = distributed.now().rank, max(1, collect.BLOCK // sampling.n)
        mine = [i for i, some in enumerate(episodes) if self.owner[some[0]] == rank]
        self.memory.only(e for some in episodes for e in some)

        def request(at: Sequence[int]) -> tuple[Request, list[Sequence[int]]]:
            asked, first = [prompts[i] for i in at], [firsts[i] for i in at]
            return lambda past: self.draw(asked, sampling, first, past), [episodes[i] for i in at]

        def answers(at: Sequence[int]) -> Json:
            drawn = self.memory.ask(*request(at)) if at else []
            return distributed.gathered([_written(i, c) for i, c in zip(at, drawn, strict=True)])

        made: dict[int, list[Drawn]] = {}
        number = 0
        while len(made) < len(prompts):
            key, number = f"{name}/{number}", number + 1
            there = distributed.agree(self.journal is not None and key in self.journal)
            found = kept(
                self.journal, key, partial(answers, [i for i in mine if i not in made][:size])
            )
            block = cast("list[tuple[int, list[tuple[list[int], list[float], str, bool]]]]", found)
            made |= {i: [(tuple(d), tuple(p), w, e) for d, p, w, e in items] for i, items in block}
            if there and (read := [i for i, _ in block if i in mine]):
                self.memory.again(*request(read))
        return [made[i] for i in range(len(prompts))]


def _written(number: int, items: Sequence[Completion]) -> Json:
    """A row's number and its answers; see `Drawn`."""
    return [
        number,
        [[list(c.ids), list(c.logprobs), c.text.strip(), c.finish == "stop"] for c in items],
    ]
