"""My method: what it does for a user, in one sentence.

    score = mean_i s(x_i, y_i),   y_i ~ pi(. | x_i)

Say what every symbol means, which paper it is from (title, arXiv id), and where this differs from
the paper and why. The interval is a percentile bootstrap over prompts.
"""

from __future__ import annotations

from truing.context import current
from truing.core.generate import generate
from truing.core.stats import bootstrap
from truing.method import method
from truing.models import Model
from truing.reports import Measure, Report
from truing.tables import Row, Table, user_text


def score(prompt: str, answer: str) -> float:
    """The score of one answer: here, how many words it has."""
    return float(len(answer.split()))


@method(
    paper="my-method",
    needs=("generate",),
    rows={"prompts": ("prompt",)},
    within={"max_tokens": (1, None)},
)
def my_method(model: Model, prompts: Table, *, max_tokens: int = 64) -> Report:
    """My method: what it does for a user, in one sentence.

    Args:
        max_tokens: length limit of an answer.
    """
    prompts = prompts.expect("prompt", where="evaluate/my_method")
    asked = [row.get("prompt") or row.get("messages") for row in prompts]
    seed = current().stream("answers") % 2**31
    answers = [d[0].text for d in generate(model, asked, max_tokens=max_tokens, seed=seed)]
    values = [score(user_text(p), a) for p, a in zip(asked, answers, strict=True)]
    lo, hi = bootstrap(values)
    measure = Measure("words", sum(values) / len(values), lo, hi, len(values), "words")
    samples: list[Row] = [
        {"prompt": p, "completion": a, "score": v, "lineage": {"parents": [row["id"]]}}
        for p, a, v, row in zip(asked, answers, values, prompts, strict=True)
    ]
    facts = {"kind": "my_method", "model": model.name, "model_key": model.key}
    return Report("my_method", [measure], Table("judgement", samples), {**facts})
