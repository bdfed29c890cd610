"""Win rate of a model over a baseline on the same prompts, by a judge, a reward or the principles.

w = (1/n) sum_i [score_i(model) > score_i(baseline)] + 1/2 [equal], with a bootstrap interval over
prompts; 0.5 means no difference. A judge model sees each pair in both orders and the two verdicts
are averaged, because judges favour a position. Without a judge, a reward component or the
principles' checks score each answer. The mean difference in words is reported beside, since many
judges favour length (length bias: AlpacaEval 2, arXiv 2404.04475). Our own measurement.
"""

from __future__ import annotations

from collections.abc import Sequence

from truing.context import Json, current
from truing.core.stats import bootstrap
from truing.errors import InputError
from truing.evaluate.adherence import answer_all
from truing.method import method, score
from truing.models import Model
from truing.principles import Principles
from truing.reports import Measure, Report
from truing.specify.checks import words
from truing.specify.satisfaction import satisfaction
from truing.tables import Row, Table


def verdicts(ours: Sequence[float], theirs: Sequence[float], tie: float = 1e-9) -> list[float]:
    """1 where our score is higher, 0 where theirs is, 0.5 where they differ by at most `tie`."""
    return [0.5 if abs(a - b) <= tie else float(a > b) for a, b in zip(ours, theirs, strict=True)]


def _scores(
    rows: list[Row], reward: dict[str, object] | None, principles: Principles | None
) -> list[float]:
    if reward is not None:
        return score("reward", reward, rows, where="evaluate/win_rate")
    if principles is None:
        raise InputError(
            "nothing to decide by",
            where="evaluate/win_rate",
            fix="Give a judge model, principles with checks, or reward: {use: name}",
        )
    kept = satisfaction(principles, rows, where="evaluate/win_rate")
    return [k.value(principles) for k in kept]


@method(needs=("generate",))
def win_rate(
    model: Model,
    baseline: Model,
    prompts: Table,
    principles: Principles | None = None,
    judge: Model | None = None,
    *,
    reward: dict[str, object] | None = None,
    max_tokens: int = 192,
    temperature: float = 0.7,
) -> Report:
    """Win rate of a model over a baseline on the same prompts, by judge, reward or principles.

    Args:
        reward: component that scores an answer, {use: name, ...}; used when no judge is given.
        max_tokens: length limit of an answer.
        temperature: of sampling; 0 is greedy.
    """
    rows = [r if "prompt" in r else r | {"prompt": r["messages"]} for r in prompts]
    sides: list[list[Row]] = []
    for name, one in (("model", model), ("baseline", baseline)):
        answers = answer_all(
            one, rows, max_tokens=max_tokens, temperature=temperature, journal=f"answers-{name}"
        )
        sides.append([{"prompt": r["prompt"], "completion": a[0]} for r, a in zip(rows, answers)])
    ours, theirs = sides
    if judge is not None:
        from truing.core.judge import pairwise

        criteria = principles.as_text() if principles is not None else ""
        won = pairwise(judge, ours, theirs, criteria=criteria)
    else:
        won = verdicts(_scores(ours, reward, principles), _scores(theirs, reward, principles))
    lo, hi = bootstrap(won)
    n = len(won)
    measures = [Measure("win rate", sum(won) / n, lo, hi, n, "share", "", "higher")]
    longer = [
        float(len(words(str(a["completion"]))) - len(words(str(b["completion"]))))
        for a, b in zip(ours, theirs, strict=True)
    ]
    lo, hi = bootstrap(longer)
    measures.append(Measure("extra words", sum(longer) / n, lo, hi, n, "words"))
    samples: list[Row] = [
        {
            "prompt": a["prompt"],
            "completion": a["completion"],
            "baseline": b["completion"],
            "score": w,
            "lineage": {"prompt": r["id"], "parents": [r["id"]]},
        }
        for r, a, b, w in zip(rows, ours, theirs, won, strict=True)
    ]
    facts: dict[str, Json] = {
        "kind": "win_rate",
        "model": model.name,
        "baseline": baseline.name,
        "judge": judge.key if judge is not None else "",
    }
    table = Table("judgement", samples).with_lineage(seed=current().seed, step=current().name)
    return Report("win rate", measures, table, facts)
