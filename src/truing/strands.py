"""Strands of a plan: steps that stand or fall together, as all of one method of a comparison."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Mapping

from truing.errors import Diverged


class Strands:
    """Which steps belong together, and which strands are lost.

    Args:
        of: a strand's name by the name of each of its steps.
    """

    def __init__(self, of: Mapping[str, str]) -> None:
        self.of = dict(of)
        self.lost: dict[str, str] = {}  # why, by the strand's name

    def why_not(self, step: str) -> str:
        """Why a step is left out; "" where it runs."""
        return self.lost.get(self.of.get(step, ""), "")

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
            self.lost[strand] = f"step {step}: {error.message}"
            print(f"left out: {strand}: {self.lost[strand]}", file=sys.stderr)
            if self.lost.keys() >= set(self.of.values()):
                raise
