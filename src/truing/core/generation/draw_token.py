"""One token for each row from logits and one random number, and its log-probability.

With weights w_v = exp(z_v / temperature) and u in [0, 1), the token is the first whose cumulative
weight exceeds u times the sum. Over the whole vocabulary the cumulative sum is made in two stages,
over blocks and within one block; with top_p or top_k only the candidates are ordered.

Shapes: B rows, V vocabulary, N blocks of K tokens, C candidates.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

ROWS = 32  # that are chosen for together on a CPU, where what is made between stays in its cache
CANDIDATES = 64  # tokens ordered at first; rows whose nucleus is larger take 16 times as many


class Cut(Protocol):
    """Which tokens may be drawn; see `SamplingSettings`."""

    @property
    def greedy(self) -> bool: ...  # noqa: D102
    @property
    def top_p(self) -> float: ...  # noqa: D102
    @property
    def top_k(self) -> int: ...  # noqa: D102
    @property
    def min_p(self) -> float: ...  # noqa: D102


def choose(
    logits_BV: Tensor,
    shaped_BV: Tensor,
    random_B: Tensor,
    cut: Cut,
    temperature: float,
    told: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Tokens [B] drawn from `shaped_BV`, and their log-probabilities [B] under `logits_BV`.

    Args:
        logits_BV: of the model; may be the same tensor as `shaped_BV`.
        shaped_BV: what is drawn from; -inf excludes a token.
        random_B: float64 in [0, 1).
        cut: greedy, top_p, top_k, min_p.
        temperature: divides `shaped_BV`.
        told: divides `logits_BV` in the log-probabilities.
    """
    if logits_BV.device.type == "cpu" and len(logits_BV) > ROWS:
        logits = logits_BV.split(ROWS)
        shaped = logits if shaped_BV is logits_BV else shaped_BV.split(ROWS)
        parts = zip(logits, shaped, random_B.split(ROWS), strict=True)
        made = [choose(z, s, u, cut, temperature, told) for z, s, u in parts]
        return torch.cat([token for token, _ in made]), torch.cat([logp for _, logp in made])
    top_B = shaped_BV.amax(1)
    if cut.greedy:
        token_B = shaped_BV.argmax(1)
    elif cut.top_p < 1 or cut.top_k:
        token_B = _nucleus(shaped_BV, random_B, cut, temperature)
    else:
        token_B, total_B = _whole(shaped_BV, top_B, random_B, cut.min_p, temperature)
        if shaped_BV is logits_BV and temperature == told and not cut.min_p:
            apart_B = logits_BV.gather(1, token_B[:, None])[:, 0].float() - top_B.float()
            return token_B, _over(apart_B, told) - total_B.log().float()
    told_BV = _over(logits_BV.float(), told)
    return token_B, told_BV.gather(1, token_B[:, None])[:, 0] - torch.logsumexp(told_BV, 1)


def _over(z: Tensor, temperature: float) -> Tensor:
    return z if temperature == 1 else z / temperature


def _whole(
    shaped_BV: Tensor, top_B: Tensor, random_B: Tensor, min_p: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Tokens over the whole vocabulary, and the sum of the weights relative to the largest."""
    weight_BV = torch.sub(shaped_BV.float(), top_B[:, None].float())
    if temperature != 1:
        weight_BV.div_(temperature)
    weight_BV.exp_()
    if min_p:
        weight_BV.masked_fill_(weight_BV < min_p, 0.0)
    size = next(k for k in (256, 128, 64, 32, 1) if weight_BV.shape[1] % k == 0)
    if size == 1:
        size = 128
        weight_BV = torch.nn.functional.pad(weight_BV, (0, -weight_BV.shape[1] % size))
    blocks_BNK = weight_BV.view(len(weight_BV), -1, size)
    cum_BN = blocks_BNK.sum(2).double().cumsum(1)
    total_B = cum_BN[:, -1]
    goal_B = random_B * total_B
    block_B = _first_above(cum_BN, goal_B)
    before_B = torch.where(
        block_B > 0, cum_BN.gather(1, (block_B - 1).clamp_min(0)[:, None])[:, 0], 0.0
    )
    rows_B = torch.arange(len(weight_BV), device=weight_BV.device)
    inner_BK = blocks_BNK[rows_B, block_B].double().cumsum(1)
    return block_B * size + _first_above(inner_BK, goal_B - before_B), total_B


def _first_above(cum_BK: Tensor, goal_B: Tensor) -> Tensor:
    """Index of the first cumulative weight above the goal: always one of positive weight."""
    # Rounding may carry the goal to the sum itself, beyond which there is nothing.
    goal_B = torch.minimum(goal_B, cum_BK[:, -1] * (1 - 2.0**-40))
    return torch.searchsorted(cum_BK, goal_B[:, None], right=True)[:, 0]


def _nucleus(shaped_BV: Tensor, random_B: Tensor, cut: Cut, temperature: float) -> Tensor:
    """Tokens from the most likely ones: top_k first, then top_p of what it left, then min_p."""
    z_BV = shaped_BV.float()
    vocab = z_BV.shape[1]
    size = min(cut.top_k or CANDIDATES, vocab)
    if cut.top_k:
        z_BC, id_BC = z_BV.topk(size, 1)
        p_BC = torch.softmax(z_BC.double() / temperature, 1)
        return _within(p_BC, id_BC, random_B, cut)
    norm_B = torch.logsumexp(_over(z_BV, temperature), 1).double()
    token_B = torch.empty(len(z_BV), dtype=torch.long, device=z_BV.device)
    left_B = torch.arange(len(z_BV), device=z_BV.device)
    while len(left_B):
        part_BV = z_BV if len(left_B) == len(z_BV) else z_BV[left_B]
        z_BC, id_BC = part_BV.topk(size, 1)
        p_BC = (z_BC.double() / temperature - norm_B[left_B, None]).exp()
        whole_B = (p_BC.sum(1) >= cut.top_p) | (size == vocab)
        token_B[left_B[whole_B]] = _within(
            p_BC[whole_B], id_BC[whole_B], random_B[left_B[whole_B]], cut
        )
        left_B, size = left_B[~whole_B], min(16 * size, vocab)
    return token_B


def _within(p_BC: Tensor, id_BC: Tensor, random_B: Tensor, cut: Cut) -> Tensor:
    """Tokens among candidates in falling order of probability."""
    if cut.top_p < 1:
        before_BC = p_BC.cumsum(1) - p_BC
        p_BC = p_BC.masked_fill(before_BC >= cut.top_p, 0.0)
    if cut.min_p:
        p_BC = p_BC.masked_fill(p_BC < cut.min_p * p_BC[:, :1], 0.0)
    cum_BC = p_BC.cumsum(1)
    place_B = _first_above(cum_BC, random_B * cum_BC[:, -1])
    return id_BC.gather(1, place_B[:, None])[:, 0]
