"""Log-probabilities of a few options as answers, all of them and their prompts on packed trees.

    log P(option | prompt) = log sum over its spellings s of exp sum over the tokens t of s log p_t

The options branch from their prompt, and the prompts from what they begin with in common, so that
what judges are told each time is computed once for many rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from truing.context import current
from truing.core.chat import completion_ids, prompt_ids
from truing.core.generate import rewritten
from truing.core.generation.prefix_cache import common_start
from truing.core.logprob import measure
from truing.core.sampling import check_lengths
from truing.core.tree import Node, budget_for, pack, split
from truing.models import Model


def option_logps(
    judge: Model, prompts: Sequence[str], options: Sequence[str], first: int = 1
) -> torch.Tensor:
    """Log-probabilities [prompts, options] (float64) that a local model's answer begins so.

    An option counts as written and in lower case. Edits, prefix and rewriter are in force.

    Args:
        first: number of the first prompt, for errors.
    Raises:
        InputError: a prompt does not fit, or the architecture does not take packed trees.
    """
    loaded = judge.load_module()
    tokenizer = loaded.tokenizer
    before = "" if tokenizer.chat_template else " "
    tail = "" if tokenizer.chat_template else "\nAnswer:"
    heads = [prompt_ids(tokenizer, p) for p in rewritten(judge, [p + tail for p in prompts])]
    spelled = [
        dict.fromkeys(
            tuple(completion_ids(tokenizer, before + s, end=False)) for s in (o, o.lower())
        )
        for o in options
    ]
    leaves = tuple(_node(ids, loss=True) for spellings in spelled for ids in spellings)
    check_lengths(loaded.module, heads, max(len(leaf.ids) for leaf in leaves), first)
    shared = common_start(heads)
    rest = sum(len(leaf.ids) for leaf in leaves)
    rows: list[torch.Tensor] = []
    budget = budget_for(loaded.device)
    with loaded.run_time():
        for run in split([len(h) - shared + rest for h in heads], budget):
            tree = _tree([heads[i] for i in run], leaves)
            for packed in pack(tree, max(budget, sum(t.size for t in tree))):
                made = measure(loaded.module, packed.to(loaded.device), grad=False)
                rows.append(made["logp"].double().sum(2).reshape(-1, len(leaves)).cpu())
            current().progress(sum(map(len, rows)), len(prompts), "verdicts")
    logp_NS = torch.cat(rows)
    parts = logp_NS.split([len(s) for s in spelled], 1)
    return torch.stack([p.logsumexp(1) for p in parts], 1)


def _node(ids: Sequence[int], children: tuple[Node, ...] = (), *, loss: bool = False) -> Node:
    return Node(tuple(ids), (loss,) * len(ids), children)


def _tree(heads: Sequence[Sequence[int]], leaves: tuple[Node, ...]) -> list[Node]:
    """Prompts with the options after each, under what they begin with in common."""
    cut = common_start(heads)
    made = [_node(h[cut:], leaves) for h in heads]
    return [_node(heads[0][:cut], tuple(made))] if cut else made
