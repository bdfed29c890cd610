"""Infer a reward from demonstrations alone: what they have that the model's own answers have not.

    -1/K sum_i logsigmoid(s(y*) - s(y_i)),   y* a demonstration, y_1 .. y_K the model's own answers

At its optimum s is, up to a constant of the prompt, the log-ratio of the two distributions: the
discriminator's logit of adversarial imitation learning, learnt as a Bradley-Terry model, so that it
scores held-out answers too. Own answers that are cut at `max_tokens`, and rows whose demonstration
is cut or not finished, are left out and counted: a score at the end would learn from them what has
an end, and no more. Alternate it with a few steps of reinforcement learning against the reward to
close the loop of inverse reinforcement learning, and ask `evaluate/reward_diagnostics` before a
policy follows it.
The survey that it is taken from gives no algorithm: "Inverse Reinforcement Learning Meets Large
Language Model Post-Training", arXiv 2507.13158.

Shapes: U rows, K + 1 branches: the demonstration, then the model's own answers.
"""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from truing.core.objective import Loss, Measurements, objective, reward_metrics


@objective(
    paper="irl-survey", unit="group", needs=("scores",), rows="example", hook="finished_samples"
)
def reward_from_demos(m: Measurements) -> Loss:
    """Infer a reward from demonstrations alone, against the model's own answers."""
    s_UK, there_UK = m.last("scores"), m.there_UK[:, 1:]
    count_U = there_UK.sum(1).clamp(min=1)
    per_own = -logsigmoid(s_UK[:, :1] - s_UK[:, 1:]) * there_UK
    own_U = (s_UK[:, 1:] * there_UK).sum(1) / count_U
    return Loss(per_own.sum(1) / count_U, metrics=reward_metrics(s_UK[:, 0], own_U))
