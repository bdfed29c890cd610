"""Who answers while a policy is trained on its own answers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from truing.core.drawing import Completion, continued
from truing.core.generation.model_mixture import Alongside
from truing.core.modelfiles.reach import vocab_of
from truing.core.online import GREEDY, Online

if TYPE_CHECKING:
    from torch import nn

    from truing.core.generation.dialogue_cache import Past
    from truing.core.modelfiles.loaded import Loaded
    from truing.core.modelfiles.lora import Lora
    from truing.core.rl.collect import Draw
    from truing.core.sampling import SamplingSettings


class Players:
    """Who draws answers: the policy as it is now, the frozen reference, their mixture.

    Embeddings may be padded to different sizes: what pads the larger is never drawn, since the
    others could not read it.

    Args:
        critic: that reads the answers by a trunk of its own, if any.
    """

    def __init__(
        self,
        policy: Loaded,
        lora: Lora | None,
        other: Loaded | None,
        critic: nn.Module | None = None,
    ) -> None:
        self.own, self.lora, self.other = policy, lora, other
        modules = [policy.module, other.module if other is not None else None, critic]
        self.vocab = min(vocab_of(m) for m in modules if m is not None)

    def _drawn(
        self,
        who: Loaded,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingSettings,
        first: Sequence[int],
        past: Past | None,
        hook: Alongside | None = None,
    ) -> list[list[Completion]]:
        """Answers of `who`, without what pads its embedding."""
        padding = range(self.vocab, vocab_of(who.module))
        own = replace(sampling, banned=(*sampling.banned, *padding)) if padding else sampling
        return continued(who, prompts, own, first=first, logits=hook, past=past)

    def policy(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingSettings,
        first: Sequence[int],
        past: Past | None = None,
    ) -> list[list[Completion]]:
        """The policy's answers."""
        return self._drawn(self.own, prompts, sampling, first, past)

    def reference(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingSettings,
        first: Sequence[int],
        past: Past | None = None,
    ) -> list[list[Completion]]:
        """The reference's answers."""
        if self.other is not None:
            return self._drawn(self.other, prompts, sampling, first, past)
        with cast("Lora", self.lora).off():
            return self.policy(prompts, sampling, first, past)

    def mixture(self, mix: float) -> Draw:
        """Answers of the geometric mixture that gives the reference the share `mix`."""
        off = self.lora.off if self.other is None and self.lora else contextlib.nullcontext
        module = self.other.module if self.other is not None else self.own.module

        def draw(
            prompts: Sequence[Sequence[int]],
            sampling: SamplingSettings,
            first: Sequence[int],
            past: Past | None = None,
        ) -> list[list[Completion]]:
            hook = Alongside(module, off, mix, sampling.max_tokens)
            return self._drawn(self.own, prompts, sampling, first, past, hook)

        return draw


def draws_of(spec: Online, players: Players, told: Mapping[str, object]) -> list[Draw]:
    """Who answers each prompt, the policy first."""
    if spec.opponent == "mixture":
        return [players.policy, players.mixture(cast(float, told["mixture_coef"]))]
    if spec.opponent == GREEDY:
        return [players.policy, players.policy]
    return [players.policy, *([players.reference] if spec.opponent else [])]
