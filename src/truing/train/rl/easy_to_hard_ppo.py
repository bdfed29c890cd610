"""PPO on problems without answers: a process reward model of easy ones rewards each solution.

    R_t = -beta max(log pi_old - log pi_ref, 0) + r_k / 2 where t is one of the two newlines that
          close step k + [t is the last] (easy_outcome + penalty format_penalty),
          whitened over the batch, the mean kept: (R - mean) / deviation + mean
    r_k             min(0, p_k - m_{k-1}) + 0.25/n,  m_0 = u, m_k = min(m_{k-1}, p_k), of n steps
                    (or decrements of the product); sum_k r_k = min(min_k p_k, u) - u + 0.25
    easy_outcome    1 or 0 where a row has its answer, 0.25 where it has none
    format_penalty  0 to -1, by how the final answer is laid out
    A_t = sum_{s>=t} R_s - V_t, whitened;  clipped policy and value losses as in `salmon_ppo`

p_k is what `process_model` says of step k (see the reward `process_shaping`).

Rows are problems; give easy ones with the column `answer` and hard ones without. The critic begins
as the process reward model unless `critic` is given, and learns alone over `critic_rollouts`.

Source: "Easy-to-Hard Generalization: Scalable Alignment Beyond Human Supervision", arXiv
2403.09472. Where a tokenizer has one token for both newlines it is paid all of r_k; so is the token
that ends the text, for a last step that no blank line closes. p_k is read at the last token of what
closes step k, the paper's is the smaller one of both newlines.
"""

from __future__ import annotations

from collections.abc import Mapping

from truing.core.held_out import Watch, watching
from truing.core.online import online_of
from truing.core.passes.scoring import check_logits, check_steps
from truing.core.rl.train_online import Given, train_online
from truing.core.trainer.preflight import online_training
from truing.errors import InputError
from truing.method import method
from truing.models import Model, hold
from truing.own_checks import checks
from truing.tables import Table
from truing.train.reward.easy_to_hard import Scheme, easy_outcome, process_shaping
from truing.train.reward.rules import format_penalty
from truing.train.rl.salmon_ppo import salmon_ppo

WHERE = "train/easy_to_hard_ppo"
# What the two papers' common code does and salmon_ppo has as settings.
FIXED: dict[str, object] = {
    "kl": "k1",
    "reward_scale": 0.0,
    "bonus": 0.0,
    "missing_end": 0.0,
    "passes": 1,
    "temperature": 0.7,
    "clip_ratio": 0.2,
    "clip_value": 0.2,
    "vf": 0.1,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-5,
}
OWN = ("scheme", "bound", "penalty")  # settings that make up the reward
# By their functions, so that their code is part of a step's key.
SHAPING, OUTCOME, LAYOUT = (f.__name__ for f in (process_shaping, easy_outcome, format_penalty))


def _values(settings: Mapping[str, object], process_model: str = "") -> dict[str, object]:
    """Settings of `salmon_ppo` that this method's are, with its reward; checked.

    Args:
        process_model: its key, as `hold` gives it; "" where it is not at hand.
    Raises:
        InputError: the first setting that training would refuse.
    """
    shaping = {
        "use": SHAPING,
        "model": process_model,
        "scheme": settings["scheme"],
        "bound": settings["bound"],
    }
    rewards = {"process": shaping, "outcome": {"use": OUTCOME}, "format": {"use": LAYOUT}}
    made = FIXED | {n: v for n, v in settings.items() if n not in (*OWN, *vars(Watch()))}
    made |= {"rewards": rewards, "weights": {"format": settings["penalty"]}}
    try:
        online_training(online_of(salmon_ppo), made)
    except InputError as error:
        error.where = WHERE
        raise
    return made


def _check(settings: Mapping[str, object], _: Mapping[str, Table]) -> None:
    """What `Method.check` asks before anything runs."""
    _values(settings)


@method(
    paper="easy-to-hard",
    needs=("weights", "logprob", "generate"),
    rows={"data": ("prompt",), "held_out": ("prompt",)},
    within={
        "bound": (0.0, 1.0),
        "penalty": (0.0, None),
        "beta": (0.0, None),
        "steps": (1, None),
        "batch": (1, None),
        "minibatches": (1, None),
        "critic_rollouts": (0, None),
        "answers": (1, None),
        "max_tokens": (1, None),
        "lr": "[0, inf)",
        "rank": (0, None),
        "layers": (0, None),
        "eval_every": (0, None),
        "patience": (0, None),
    },
)
@checks(_check)
def easy_to_hard_ppo(
    model: Model,
    data: Table,
    process_model: Model,
    critic: Model | None = None,
    held_out: Table | None = None,
    *,
    scheme: Scheme = "min",
    bound: float = 0.5,
    penalty: float = 1.0,
    beta: float = 0.01,
    steps: int = 20,
    batch: int = 512,
    minibatches: int = 8,
    critic_rollouts: int = 5,
    answers: int = 1,
    max_tokens: int = 256,
    lr: float = 0.0,
    rank: int = 16,
    layers: int = 0,
    eval_every: int = 0,
    keep_best: bool = False,
    patience: int = 0,
) -> Model:
    """PPO on problems without answers: a process reward model of easy ones rewards solutions.

    Args:
        held_out: problems that are not trained on: the model's solutions of them are rewarded
            meanwhile, as those of `data` are.
        scheme: whether the worst step counts or the product of all.
        bound: u, above which steps cannot gain anything.
        penalty: weight of the format penalty.
        beta: strength of the pull towards the model as it is.
        steps: rollouts.
        batch: problems of one rollout.
        minibatches: updates that a rollout is split into.
        critic_rollouts: rollouts at first from which the critic alone learns.
        answers: solutions drawn of each problem.
        max_tokens: longest solution.
        lr: peak learning rate; 0 takes 2e-4 for adapters and 1e-5 for a full fine-tune.
        rank: of the adapter; 0 trains all weights.
        layers: train the top blocks alone, so many, by an adapter on them or in full; 0 trains all.
        eval_every: updates between two measurements of the held-out reward; 0 makes five in a run.
        keep_best: make the result the model after the update with the highest held-out reward.
        patience: end the training after so many measurements without a new highest held-out reward.
    """
    watch = watching(held_out, WHERE, eval_every=eval_every, keep_best=keep_best, patience=patience)
    check_steps(process_model, f"{WHERE} input 'process_model'")
    check_logits(process_model, f"{WHERE} input 'process_model'")
    settings: dict[str, object] = {
        "scheme": scheme,
        "bound": bound,
        "penalty": penalty,
        "beta": beta,
        "steps": steps,
        "batch": batch,
        "minibatches": minibatches,
        "critic_rollouts": critic_rollouts,
        "answers": answers,
        "max_tokens": max_tokens,
        "lr": lr,
        "rank": rank,
        "layers": layers,
    }
    values = _values(settings, hold(process_model)) | vars(watch)
    given = Given(critic=process_model if critic is None else critic, held_out=held_out)
    rows = data.expect("prompt", where=WHERE)
    made = train_online(online_of(salmon_ppo), model, rows, given, values)
    return made.with_licences([m.licence for m in (process_model,) if m.licence]).called(
        f"{model.name}+easy_to_hard_ppo"
    )
