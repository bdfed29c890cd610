"""How well a tuned model's log-ratios tell chosen from rejected answers, and where both have gone.

    r(y) = lp(y|x) - lp_ref(y|x), summed over tokens       d = r(y_w) - r(y_l)
    accuracy = mean_i [d_i > 0]  (ties count one half)     chosen = mean_i r(y_w), rejected likewise

The accuracy says how good a reward model the policy is of these pairs, which need not go with how
well it answers: offline training classifies better and speaks worse. Chosen answers that have
become less likely than under the reference (below 0) are the mark of contrastive losses that push
both down. At the reference itself every r is 0 and the accuracy one half. Intervals: Wilson for the
accuracy, bootstrap over pairs for the rest; the pairs of one prompt go together.
Source: hypothesis 3 and the monitors of "Understanding the performance gap between online and
offline alignment algorithms", arXiv 2405.08448.
"""

from __future__ import annotations

from truing.context import Json
from truing.core.batch.same_tokenizer import same_tokens
from truing.core.judging.rewards import implicit_rewards
from truing.core.stats import mean_of
from truing.errors import InputError
from truing.evaluate.preference import accuracy
from truing.method import method
from truing.models import Model
from truing.reports import Measure, Report
from truing.tables import Row, Table


@method(paper="online-offline-gap", needs=("logprob", "weights"), rows={"data": ("pair",)})
def implicit_preference(model: Model, reference: Model, data: Table) -> Report:
    """How well a tuned model's log-ratios tell chosen from rejected answers, and where both went.

    Args:
        reference: what the log-ratios are taken to, such as the model that training began with.
        data: pairs.
    """
    where = "evaluate/implicit_preference"
    same_tokens({"model": model, "reference": reference}, where=where)
    pairs = list(data.expect("pair", where=where))
    if not pairs:
        raise InputError("no pair to compare", where=where)
    n = len(pairs)
    rows: list[Row] = [
        {
            "prompt": r["prompt"],
            "completion": r[name],
            "finished": r.get(f"{name}_finished", True),
        }
        for name in ("chosen", "rejected")
        for r in pairs
    ]
    ratios = implicit_rewards(model, reference, rows)
    chosen, rejected = ratios[:n], ratios[n:]
    won = accuracy(chosen, rejected)
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    sides = {"chosen": chosen, "rejected": rejected, "margin": margins}
    asked = [r["prompt"] for r in pairs]
    measures = [
        Measure("accuracy", *mean_of(won, asked), "share", "", "higher"),
        *(Measure(name, *mean_of(v, asked, None), "nats") for name, v in sides.items()),
    ]
    samples: list[Row] = [
        {
            "prompt": r["prompt"],
            "chosen": r["chosen"],
            "rejected": r["rejected"],
            "ratio_chosen": a,
            "ratio_rejected": b,
            "lineage": {"parents": [r["id"]]},
        }
        for r, a, b in zip(pairs, chosen, rejected, strict=True)
    ]
    meta: dict[str, Json] = {
        "kind": "implicit_preference",
        "model": model.name,
        "reference": reference.name,
        "reference_key": reference.key,
    }
    return Report("implicit preference", measures, Table("pair", samples), meta)
