"""Strands of a plan: steps that stand or fall together, as all of one method of a comparison."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Mapping, Sequence
from copy import copy

from truing.errors import Diverged


class Strands:
    """Which steps belong together, and which strands are lost.

    A step that takes what a lost strand did not make is left out as well, and with it its own
    strand, or, if it is of none, it alone.

    Args:
        of: a strand's name by the name of each of its steps.
    """

    def __init__(self, of: Mapping[str, str]) -> None:
        self.of = dict(of)
        self.lost: dict[str, str] = {}  # why, by the strand's name
        self.alone: dict[str, str] = {}  # why, by the name of a step of none
        self._left: dict[str, str] = {}  # why, by the name of each step that was left out
        self._error: Diverged | None = None

    def why_not(self, step: str, takes: Sequence[str] = ()) -> str:
        """Why a step is left out; "" where it runs.

        Args:
            takes: names of the steps that it needs, which have all been asked about before it.
        Raises:
            Diverged: with it the last strand is lost.
        """
        strand = self.of.get(step, "")
        why = next((self._left[t] for t in takes if t in self._left), "")
        if strand in self.lost:
            why = self.lost[strand]
        elif why and strand:
            self._lose(strand, why)
        elif why:
            self.alone[step] = why
            print(f"left out: {step}: {why}", file=sys.stderr)
        if why:
            self._left[step] = why
        return why

    @contextlib.contextmanager
    def apart(self, step: str) -> Generator[None]:
        """Run a step inside: where its loss is not finite, its strand alone is lost, and told so.

        Raises:
            Diverged: the step is of no strand, or no other strand is left.
        """
        try:
            yield
        except Diverged as error:
            strand = self.of.get(step, "")
            if not strand:
                raise
            self._error = copy(error)  # without its frames, which hold a model and its moments
            self._left[step] = f"step {step}: {error.message}"
            self._lose(strand, self._left[step])

    def _lose(self, strand: str, why: str) -> None:
        self.lost[strand] = why
        print(f"left out: {strand}: {why}", file=sys.stderr)
        if self._error is not None and self.lost.keys() >= set(self.of.values()):
            raise self._error
