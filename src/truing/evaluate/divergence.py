"""How far a tuned model has moved from its reference: the divergence of what it says, in nats.

    KL(pi || ref) = E_{x, y ~ pi(.|x)} sum_t sum_v pi(v | c_t) log [pi(v | c_t) / ref(v | c_t)]

with c_t the prompt x and the answer's tokens before t. Answers y are drawn from the model at
temperature 1; at each of their tokens the divergence is exact over the vocabulary, which is never
negative and far less noisy than log-ratios of what was drawn. Sums over an answer's tokens, end
included, are averaged over answers, then over prompts, with a bootstrap interval over prompts.
Methods that pull a model away from where it began are compared at equal divergence, not at equal
steps: plot what each has won against it. Each model sees the prompt as it was made to see it
(prefix and rewriters of its own); decoders are no part of the measure.

Source: the budget axis of "Understanding the performance gap between online and offline alignment
algorithms", arXiv 2405.08448.

Shapes: U prompts, K answers, T tokens, M loss tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from truing.changes import Decoder
from truing.context import Json, current
from truing.core.batch.same_tokenizer import same_tokens
from truing.core.chat import Prompt, prompt_ids
from truing.core.generate import generate, rewritten
from truing.core.logprob import measure, states
from truing.core.stats import bootstrap, ratio_bootstrap
from truing.core.trainer.teacher import head_of, log_probs
from truing.core.tree import Packed, group_tree, pack
from truing.errors import InputError
from truing.method import method
from truing.models import Loaded, Model
from truing.reports import Measure, Report
from truing.tables import Row, Table, prompt_of

Ids = Sequence[int]


def kl_tokens(
    model: Loaded, reference: Loaded, heads: tuple[Ids, Ids], answers: Sequence[Ids]
) -> Tensor:
    """KL at each token of the answers, [1, K, T], 0 behind their ends.

    Args:
        heads: tokens of the prompt as the model and as the reference sees it.
        answers: their tokens, which are the same for both.
    """
    sides: list[Packed] = []
    for loaded, head in zip((model, reference), heads, strict=True):
        tree = group_tree(head, answers)
        sides.append(pack([tree], tree.size)[0].to(loaded.device))
    with torch.no_grad(), reference.run_time():
        rows_MD = states(reference.module, sides[1])[sides[1].source_M]
    head, vocab = head_of(reference.module), len(head_of(model.module).weight)

    def other(part: slice) -> Tensor:
        return log_probs(head, rows_MD[part], vocab)

    with torch.no_grad(), model.run_time():
        made = measure(
            model.module, sides[0], ("kl_vocab",), grad=False, extras={"other_logp": other}
        )
    return made["kl_vocab"]


@method(
    paper="online-offline-gap",
    needs=("generate", "logprob", "weights"),
    rows={"data": ("prompt", "pair", "example", "unpaired")},
    within={"answers": (1, None), "max_tokens": (1, None)},
)
def divergence(
    model: Model, reference: Model, data: Table, *, answers: int = 4, max_tokens: int = 128
) -> Report:
    """How far a tuned model has moved from its reference: the divergence of what it says, in nats.

    Args:
        answers: drawn to each prompt.
        max_tokens: longest answer.
    """
    where = "evaluate/divergence"
    same_tokens({"model": model, "reference": reference}, where=where)
    rows = list(data.expect("prompt", "pair", "example", "unpaired", where=where))
    if not rows:
        raise InputError("no prompt to answer", where=where)
    if answers < 1:
        raise InputError("setting 'answers' must be at least 1", where=where, seen=answers)
    plain = model.with_changes(c for c in model.changes if not isinstance(c, Decoder))
    prompts = [cast("Prompt", prompt_of(r)) for r in rows]
    drawn = generate(
        plain, prompts, n=answers, max_tokens=max_tokens, seed=current().stream("answers") % 2**31
    )
    ours, theirs = plain.load_module(), reference.load_module()
    asked = zip(*(rewritten(m, prompts) for m in (plain, reference)), strict=True)
    samples: list[Row] = []
    for row, prompt, both, some in zip(rows, prompts, asked, drawn, strict=True):
        heads = prompt_ids(ours.tokenizer, both[0]), prompt_ids(theirs.tokenizer, both[1])
        kl_KT = kl_tokens(ours, theirs, heads, [c.ids for c in some])[0].double()
        sums = kl_KT.sum(1)
        samples.append(
            {
                "prompt": prompt,
                "completions": [c.text for c in some],
                "divergences": sums.tolist(),
                "tokens": sum(len(c.ids) for c in some),
                "lineage": {"parents": [row["id"]]},
            }
        )
        current().progress(len(samples), len(rows), "prompts")
    each = [sum(cast("list[float]", s["divergences"])) / answers for s in samples]
    per_token = [d * answers for d in each], [float(cast(int, s["tokens"])) for s in samples]
    n = len(each)
    measures = [
        Measure("divergence", sum(each) / n, *bootstrap(each), n, "nats", "", "lower"),
        Measure(
            "divergence per token",
            sum(per_token[0]) / sum(per_token[1]),
            *ratio_bootstrap(*per_token),
            n,
            "nats per token",
            "",
            "lower",
        ),
    ]
    meta: dict[str, Json] = {
        "model": model.name,
        "reference": reference.name,
        "answers": answers,
        "reference_key": reference.key,
    }
    return Report("divergence", measures, Table("record", samples), {"kind": "divergence", **meta})
