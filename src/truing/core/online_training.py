"""Settings that all online training shares: how answers are drawn, rewarded and used."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from truing.core.bounds import Bounds, check_bounds
from truing.core.sampling import SamplingSettings
from truing.core.training import Schedule, TextTraining
from truing.errors import InputError

BOUNDS: Bounds = {
    "answers": (1, None),
    "max_tokens": (1, None),
    "passes": (1, None),
    "minibatches": (1, None),
    "refill": (0, None),
    "turns": (1, None),
    "critic_rate": "(0, inf)",
}
CRITICS = ("critic_rate", "critic_rollouts", "clip_value", "vf")  # of methods that have one


@dataclass(frozen=True, kw_only=True)
class OnlineTraining(TextTraining):
    """How a language model is trained on its own answers.

    Settings that are not told here mean what they do in `TextTraining`.

    Args:
        epochs: passes over the prompts; may be a fraction.
        steps: number of rollouts, instead of `epochs`; 0 takes `epochs`. Each rollout is followed
            by `passes` times `minibatches` updates.
        batch: prompts of one rollout.
        layers: train the top blocks alone, so many, by an adapter on them or in full. 0 trains all.
        max_length: of prompt and one answer together. Prompts that leave no room for `max_tokens`
            are left out and counted.
        dtype: that the model is computed in. auto takes bfloat16 under an adapter where a probe
            says that this machine is markedly quicker with it. Adapters, optimizer and losses are
            in float32 throughout, and so is a model whose own weights are trained.
        environment: replies between several turns of the model, and rewards them: a registered one,
            such as {use: running_sum}, or in a plain call a function that makes one. Rows are its
            tasks, of any kind; its rewards are the term "environment". None has single answers.
        turns: of the model in one episode at most. `max_length` holds for all of them together.
        rewards: rewards or checks by name, such as {short: {use: max_words, n: 40}}; in a plain
            call functions too, each of which takes the rows and returns a number for every one.
        weights: by those names, "principles", "reward_model" and "environment"; 1 where none is
            given.
        answers: drawn for each prompt.
        max_tokens: an answer's length limit, in tokens, its end included; of several turns each.
        temperature: of sampling. Log-probabilities are those of the logits divided by it, except
            in losses of pairs (online_dpo, xpo, bo2), and those of answers that rows bring along,
            which are at temperature 1.
        top_p: share of the probability that answers are drawn from.
        repetition_penalty: above 1 makes tokens less likely that stand there already.
        passes: times that a rollout is learnt from.
        minibatches: updates that one pass is split into.
        refill: rounds of further prompts that may take the place of groups which teach nothing.
        missing_end: subtracted from the reward of answers without a stop token.
        critic_rate: learning rate of the critic over the policy's.
        critic_rollouts: rollouts at first from which the critic alone learns.
        clip_value: how far values may move in the critic's loss; 0 for any distance.
        vf: weight of the critic's loss.
        watch: measure the divergence from the reference even where the method does not need it.
    """

    schedule: Schedule = "constant"
    warmup: float = 0.0
    environment: dict[str, object] | None = None
    turns: int = 8
    rewards: dict[str, dict[str, object]] | None = None
    weights: dict[str, float] | None = None
    answers: int = 8
    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    passes: int = 1
    minibatches: int = 1
    refill: int = 0
    missing_end: float = 0.0
    critic_rate: float = 1.0
    critic_rollouts: int = 0
    clip_value: float = 0.2
    vf: float = 0.1
    watch: bool = False

    @staticmethod
    def of(names: Collection[str], settings: Mapping[str, object]) -> OnlineTraining:
        """Those of `names` among all of a method's settings; not checked."""
        return OnlineTraining(**{n: v for n, v in settings.items() if n in names})  # type: ignore[arg-type]

    def check(self, where: str) -> None:
        """Raise an InputError that names the first setting out of range."""
        super().check(where)
        self.check_whole(where)
        check_bounds(vars(self), BOUNDS, where)
        if self.max_tokens >= self.max_length:
            raise InputError(
                "max_tokens leaves no room for prompts in max_length",
                where=where,
                seen=(self.max_tokens, self.max_length),
                fix="Raise max_length, or lower max_tokens",
            )
        if self.environment is None and self.turns != OnlineTraining.turns:
            raise InputError(
                "setting 'turns' counts for nothing: there is no environment",
                where=where,
                seen=self.turns,
                fix="Give an environment, such as {use: running_sum}, or leave out turns",
            )
        if self.minibatches > self.batch:
            raise InputError(
                "there are more minibatches than prompts in a rollout",
                where=where,
                seen=(self.minibatches, self.batch),
                fix="Raise batch or lower minibatches",
            )
        self.sampling(0)

    def sampling(self, seed: int, n: int = 0) -> SamplingSettings:
        """How `n` answers (None: `answers`) to each prompt are drawn."""
        return SamplingSettings(
            n=n or self.answers,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=seed,
        )

    @property
    def updates(self) -> int:
        """Updates that follow each rollout."""
        return self.passes * self.minibatches

    def rollouts(self, units: int) -> int:
        """Number of rollouts over `units` prompts."""
        return self.steps or math.ceil(self.drawn(units) / min(self.batch, units))

    def drawn(self, units: int) -> int:
        """Prompts answered in all."""
        return super().end(units)

    def total(self, units: int) -> int:
        """Number of updates."""
        return self.rollouts(units) * self.updates

    def end(self, units: int) -> int:
        """Places in the engine's own order of rows, which online training does not use."""
        return self.total(units) * min(self.batch, units)
