"""Held-out prompts of an online method: the reward of the policy's answers to them meanwhile.

Prompts, or tasks of the environment, that are not trained on are answered by the policy as it is
then: once each, by the sampling settings of training, its temperature among them. The answers are
rewarded by the run's own reward, and named as in training is what is recorded of them: reward and
its terms, length, how many came to their end, and where the run has a reference the divergence
from it. Neither an opponent nor an answer that rows bring along has a part in that.

Random numbers are of a stream of their own, the same at every measurement: prompt by prompt two
measurements differ by the policy alone, and training draws what it would without them. Each has a
journal of its own beside those of the rollouts, and one that was cut off goes on from there.

What a pool cannot reward is left out of the mean and counted. Where nothing was rewarded at all,
the measurement is as bad as any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from truing.core.held_out import INPUT, PREFIX, REWARD, HeldOutMeasure, Watch
from truing.core.rl.answers import Asked
from truing.core.rl.collect import Collector
from truing.core.rl.online_record import observed
from truing.core.rl.online_task import OnlineTask
from truing.core.trainer import distributed
from truing.core.trainer.held_out_rows import told_apart


@dataclass(frozen=True)
class HeldOutPrompts:
    """Held-out prompts as the loop measures them.

    Args:
        task: whose policy answers.
        collector: draws and rewards the answers.
        watch: when, and what follows.
        measure: what decides.
    """

    task: OnlineTask
    collector: Collector
    watch: Watch
    measure: HeldOutMeasure = REWARD

    @staticmethod
    def of(task: OnlineTask, asked: Sequence[Asked], watch: Watch) -> HeldOutPrompts:
        """Prompts that the task's policy answers alone, rewarded as those that it trains on."""
        own = task.collector
        alone = [replace(one, given=()) for one in asked]
        collector = replace(
            own, prompts=alone, draw=own.draw[:1], folder=own.folder / INPUT, greedy=False
        )
        return HeldOutPrompts(task, collector, watch)

    def measured(self, step: int) -> dict[str, float]:
        """Reward of the answers after update `step`, and what else is recorded of them."""
        every = range(len(self.collector.prompts))
        self.task.module.eval()
        with told_apart():
            how = self.task.sampling(1)
            groups = self.collector.collect_as(INPUT, f"{step:06d}", every, how)
        sums = observed(self.task.seen(groups)) if groups else {}
        found = {name: float(total) / of for name, (total, of) in sums.items() if of}
        found.setdefault(self.measure.name, math.nan)
        if len(groups) < len(every):
            found["left_out"] = 1 - len(groups) / len(every)
        # One word for all processes, which decide by it whether to go on.
        return distributed.agree({f"{PREFIX}{name}": value for name, value in found.items()})
