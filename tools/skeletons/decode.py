"""My method: what it does for a user, in one sentence.

    y = argmin_i words(y_i),   y_1 .. y_n ~ pi(. | x)

Say what every symbol means, which paper it is from (title, arXiv id), and where this differs from
the paper and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from truing.core.chat import Prompt
from truing.core.drawing import Base, Completion
from truing.core.sampling import SamplingSettings
from truing.errors import InputError
from truing.method import component, method
from truing.models import Decoder, Model


def choose(texts: Sequence[str]) -> int:
    """Index of the answer that is given, the first one on ties."""
    return min(range(len(texts)), key=lambda i: (len(texts[i].split()), i))


@component("decoder", name="my_method")
def draw(
    base: Base, model: Model, prompts: list[Prompt], sampling: SamplingSettings, *, n: int = 4
) -> list[list[Completion]]:
    """The chosen one of n drawn answers, for every draw that is asked for."""
    if n == 1 or sampling.greedy:  # nothing to choose from
        return base(prompts, sampling)
    drawn = base(prompts, replace(sampling, n=n * sampling.n))
    return [
        [
            items[start + choose([c.text for c in items[start : start + n]])]
            for start in range(0, len(items), n)
        ]
        for items in drawn
    ]


@method(paper="my-method", needs=("generate",), within={"n": (1, None)})
def my_method(model: Model, *, n: int = 4) -> Model:
    """My method: what it does for a user, in one sentence.

    Args:
        n: answers drawn for each that is asked for.
    """
    if n < 1:
        raise InputError("must be at least 1", where="decode/my_method setting 'n'", seen=n)
    return model.adding(Decoder("my_method", {"n": n})).called(f"{model.name}+my_method")
