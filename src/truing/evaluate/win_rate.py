"""Win rate of a model over a baseline on the same prompts, by a judge, a reward or the principles.

w = (1/n) sum_i [score_i(model) > score_i(baseline)] + 1/2 [equal], with Wilson's interval of its
sum, in which the answers to one prompt go together; 0.5 means no difference. Without a judge, a
reward component or the principles' checks score each answer. A judge model sees each pair in both
orders, because judges favour a position, and decides by the mean p = (p_1 + p_2) / 2 of the chances
that it gives the model's answer, shown first and shown second. Equal answers are a tie of which it
is not asked. How far it can be believed, by the pairs that it was asked of, is reported beside:

    position bias   mean of (p_1 + 1 - p_2) / 2 - 1/2: what being shown first is worth, 0 for none
    consistency     share of pairs with the same decision in both orders
    unparsed        share of pairs of which no verdict could be read; they count in nothing else
    agreement       of a panel's judges: share of pairs of judges that decide alike, mean over pairs
    kappa           the same beyond chance (`core.judging.agreement`), without an interval

More than a fifth unparsed is an error: the numbers would be about the parser. The mean difference
in words is reported, too, since many judges favour length (length bias: AlpacaEval 2, arXiv
2404.04475). Our own measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from truing.context import Json, current
from truing.core.judging.scores import check_reward, total_scores
from truing.core.stats import mean_of
from truing.errors import InputError
from truing.evaluate.adherence import answer_all
from truing.method import method
from truing.models import Model
from truing.principles import Principles
from truing.reports import Measure, Report
from truing.specify.satisfaction import measured, satisfaction
from truing.specify.texts import words
from truing.tables import Row, Table, as_prompt, content_hash

if TYPE_CHECKING:
    from truing.core.judge import Comparison, Score

WHERE = "evaluate/win_rate"
TIE = 1e-9


def verdicts(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """1 where our score is higher, 0 where theirs is, 0.5 where they differ by at most `TIE`."""
    return [0.5 if abs(a - b) <= TIE else float(a > b) for a, b in zip(ours, theirs, strict=True)]


def _check(
    judge: Model | None, reward: dict[str, object] | None, principles: Principles | None
) -> None:
    """Raise an InputError unless something can decide, before any answer is drawn."""
    if reward is not None:
        check_reward(reward, where=f"{WHERE} setting 'reward'")
    if judge is not None or reward is not None:
        return
    if principles is None:
        raise InputError(
            "nothing to decide by",
            where=WHERE,
            fix="Give a judge model, principles with checks, or reward: {use: name}",
        )
    measured(principles, where=WHERE)


def _answers(
    name: str, model: Model, rows: list[Row], *, max_tokens: int, temperature: float
) -> list[Row]:
    """A side's answers to the prompts, as what decides takes them; `name` is that of its input."""
    drawn = answer_all(
        model, rows, max_tokens=max_tokens, temperature=temperature, journal=f"answers-{name}"
    )
    return [
        {"prompt": r["prompt"], "completion": text, "finished": finished}
        for r, (text, finished) in zip(rows, drawn, strict=True)
    ]


def _scores(
    rows: list[Row], reward: dict[str, object] | None, principles: Principles | None
) -> list[float]:
    if reward is not None:
        return total_scores(reward, rows, where=WHERE)
    rules = cast(Principles, principles)  # which `_check` saw
    return [k.value(rules) for k in satisfaction(rules, rows, where=WHERE)]


def _judged(
    judge: Model, ours: list[Row], theirs: list[Row], principles: Principles | None
) -> Comparison:
    """The judge's view of all pairs; an InputError where too many verdicts cannot be read."""
    from truing.core.judge import check_compared, compare

    criteria = principles.as_text() if principles is not None else ""
    made = compare(judge, ours, theirs, criteria=criteria)
    check_compared(made, f"{WHERE} judge {judge.name}")
    return made


def trust(made: Comparison) -> list[Measure]:
    """Position bias, consistency and unparsed verdicts of a judge, agreement of a panel's.

    They are of the pairs that the judge was asked of; without any there are none.
    """
    from truing.core.judge import decision

    if not made.read:
        return []
    bias = mean_of([(a + 1 - b) / 2 - 0.5 for a, b in made.read], between=(-0.5, 0.5))
    alike = mean_of([float(decision(a) == decision(b)) for a, b in made.read])
    unread = mean_of([float(c is None) for c in made.asked(made.chances)])
    return [
        Measure("position bias", *bias, "difference of shares"),
        Measure("consistency", *alike, "share", "", "higher"),
        Measure("unparsed", *unread, "share", "", "lower"),
        *_agreement(made),
    ]


def _agreement(made: Comparison) -> list[Measure]:
    """How far the judges of a panel decide alike."""
    from truing.core.judging.agreement import shares_alike

    if made.agreement is None or not made.agreement.n:
        return []
    alike = shares_alike([m.asked(m.decisions) for m in made.members.values()])
    found = [Measure("agreement", *mean_of(alike), "share", "", "higher")]
    kappa, n = made.agreement.kappa, made.agreement.n
    if kappa is not None:
        found.append(Measure("kappa", kappa, kappa, kappa, n, "kappa", "", "higher"))
    return found


def _samples(
    rows: list[Row], ours: list[Row], theirs: list[Row], won: Sequence[Score]
) -> list[Row]:
    """Pairs with a verdict, as judgements of the model's answers."""
    return [
        {
            "prompt": a["prompt"],
            "completion": a["completion"],
            "finished": a["finished"],
            "baseline": b["completion"],
            "baseline_finished": b["finished"],
            "score": w,
            "lineage": {"prompt": r["id"], "parents": [r["id"]]},
        }
        for r, a, b, w in zip(rows, ours, theirs, won, strict=True)
        if w is not None
    ]


@method(
    needs=("generate",),
    rows={"prompts": ("prompt",)},
    within={"max_tokens": (1, None), "temperature": (0, None)},
)
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
        reward: reward or check that scores an answer, {use: name, ...}, by the sum where it names
            several values; used when no judge is given.
        max_tokens: length limit of an answer.
        temperature: of sampling; 0 is greedy.
    """
    rows = [as_prompt(r) for r in prompts.expect("prompt", where=WHERE)]
    _check(judge, reward, principles)
    ours, theirs = (
        _answers(name, one, rows, max_tokens=max_tokens, temperature=temperature)
        for name, one in (("model", model), ("baseline", baseline))
    )
    won: Sequence[Score]
    made = None if judge is None else _judged(judge, ours, theirs, principles)
    if made is not None:
        won = made.decisions
    else:
        won = verdicts(_scores(ours, reward, principles), _scores(theirs, reward, principles))
    extra = [
        float(len(words(str(a["completion"]))) - len(words(str(b["completion"]))))
        for a, b in zip(ours, theirs, strict=True)
    ]
    read = {i: w for i, w in enumerate(won) if w is not None}
    share = mean_of([*read.values()], [rows[i]["prompt"] for i in read])
    measures = [
        Measure("win rate", *share, "share", "", "higher"),
        Measure("extra words", *mean_of(extra, [r["prompt"] for r in rows], None), "words"),
        *([] if made is None else trust(made)),
    ]
    facts: dict[str, Json] = {
        "kind": "win_rate",
        "model": model.name,
        "baseline": baseline.name,
        "baseline_key": baseline.key,
        "judge": judge.key if judge is not None else "",
        "how": {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "reward": content_hash(reward, 8) if reward is not None else "",
            "principles": principles.key if principles is not None else "",
        },
        "unparsed": [str(r["id"]) for r, w in zip(rows, won, strict=True) if w is None],
    }
    table = Table("judgement", _samples(rows, ours, theirs, won))
    table = table.with_lineage(seed=current().seed, step=current().name)
    return Report("win rate", measures, table, facts)
