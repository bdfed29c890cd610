"""Supervised fine-tuning: raise the likelihood of given answers.

    nll  = - sum_t m_t log p(y_t | x, y_<t) / sum_t m_t                   (over the whole step)
    dft  = the same with every token weighted by p(y_t | x, y_<t), held constant; which has the
           gradient of, and is written as, - sum_t m_t p(y_t | x, y_<t) / sum_t m_t

m is 1 on the tokens of the answers, their end token included. DFT (arXiv 2508.05629) takes out the
1/p that makes the gradient of unlikely tokens explode; the paper's own value, which does not fall
as training goes on, is recorded as `weighted_nll`. NEFTune (arXiv 2310.05914) adds uniform noise
to the input embeddings while training.

Shapes: U rows, K = 1 branch, T answer tokens.
"""

from __future__ import annotations

from truing.core.objective import Loss, Measurements, objective


def nll(m: Measurements, branch: int = 0) -> Loss:
    """Negative log-likelihood of one branch, every token of the step weighing the same."""
    logp_UT, mask_UT = m.logp_UKT[:, branch], m.mask_UKT[:, branch]
    return Loss(-logp_UT, mask_UT, {"logp": m.mean()[:, branch].detach()})


@objective(paper="preference-losses", unit="token", needs=("logp",), rows="example")
def sft(m: Measurements) -> Loss:
    """Supervised fine-tuning: raise the likelihood of given answers."""
    return nll(m)


@objective(paper="preference-losses", unit="token", needs=("logp",), rows="example")
def dft(m: Measurements) -> Loss:
    """Dynamic fine-tuning: SFT with every token weighted by its own probability."""
    p_UKT = m.logp_UKT.exp()
    weighted = m.having(weighted=-(p_UKT * m.logp_UKT).detach()).mean("weighted")[:, 0]
    seen = {"logp": m.mean()[:, 0].detach(), "weighted_nll": weighted}
    return Loss(-p_UKT, m.mask_UKT, seen)


@objective(
    paper="preference-losses",
    unit="token",
    needs=("logp",),
    rows="example",
    hook="noisy_embeddings",
)
def neftune(m: Measurements) -> Loss:
    """SFT with uniform noise on the input embeddings."""
    return nll(m)
