"""Several objectives at once: one output head for each on a shared trunk, blended at inference.

    L = 1/H sum_i mean over pairs of objective i of -logsigmoid(beta d_i)
    d_i = [lp_i(y_w) - lp_i(y_l)] - [lp_ref(y_w) - lp_ref(y_l)]

lp_i is under head i, which sees the pairs of objective i (column `objective`, 0 to H - 1) alone;
the trunk sees all, and with `rank=0` the model's own head, which all heads are changes of, is of
the trunk. Batches are balanced: each has as many places for every objective, give or take
one, and at least one; pairs of an objective that has fewer come round more often. A pair counts
once in a batch, so an objective with fewer pairs than places there has no more than those, and the
batch is as much smaller. The mean is over objectives, not over pairs. Before training all heads are
the model's own, and so is the reference's head. With H = 1 this is DPO. The trained model answers
with its own head over the changed trunk until `blend_heads` lays weights over it, as

    logits = sum_i w_i head_i(h)

Source: "Simultaneous Multi-objective Alignment Across Verifiable and Non-verifiable Rewards", arXiv
2510.01167. Difference: heads are low-rank changes of the model's own head in place of perturbed
copies (2 r D numbers each, and tied embeddings stay as they are). Pairs of all objectives come from
`objective_pairs`; process rewards that guide the decoding beside the heads from `step_labels`, and
from `step_value` or `process_reward`.

Shapes: U pairs, K = 2 branches.
"""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from truing.core.objective import Loss, Measurements, objective
from truing.errors import InputError
from truing.train.preference.dpo import difference, metrics


@objective(
    paper="mah-dpo",
    unit="pair",
    needs=("logp", "ref_logp"),
    rows="pair",
    columns={"objective": 0.0},
    heads="objective",
)
def mah_dpo(
    m: Measurements, *, beta: float = 0.1, objectives: int = 2, head_rank: int = 16
) -> Loss:
    """Several objectives at once: one output head for each, blended at inference.

    Args:
        objectives: H, how many there are.
        head_rank: rank of each head's change.
    """
    number_U = m["objective"]
    if bool(((number_U < 0) | (number_U >= objectives) | (number_U % 1 != 0)).any()):
        raise InputError(
            f"an objective is a whole number from 0 to {objectives - 1}",
            where="column 'objective'",
            seen=sorted(set(number_U.tolist()))[:8],
            fix="Set objectives to how many there are, or number them from 0",
        )
    per_pair = -logsigmoid(beta * difference(m))
    seen = metrics(m, beta)
    terms = [Loss(per_pair, (number_U == i).float(), seen) for i in range(objectives)]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return (1 / objectives) * total
