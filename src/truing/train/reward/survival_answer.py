"""Rewards for structured predictions: the right status and months, given with reasons and in form.

    R = 1 [status right] + exp(-|m - m*| / 12) + 0.5 [all three blocks, parsable]
        + 0.5 rouge_L(reasoning, trace) - leak [the reasoning names the outcome]

m are months, m* those of the row (its columns `status`, `months` and, where there is one, `trace`);
rouge_L is the F-measure of the longest common subsequence of words, the numbers of the reasoning's
list not among them. An answer has three blocks,
reasoning, comment and prediction, the last of two lines:

    Overall Survival Status: 1:DECEASED
    Estimated Overall Survival (months): 14

`tagged_answer` is the general form of the same idea, for an answer between <answer> tags after
<reasoning>: 1 for the right text, 0.5 for digits alone, 0.5 for strict form, 0.5 for loose form.

Source: OncoReason, arXiv 2510.17532. The weights of the clinical reward are not published; these
are ours, `tagged_answer` is the published template's. A research demonstration, not medical advice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from truing.errors import InputError
from truing.method import component
from truing.own_checks import checks
from truing.specify.texts import text_of, words
from truing.tables import Row

STATUS, MONTHS = "Overall Survival Status:", "Estimated Overall Survival (months):"
BLOCKS = ("reasoning", "comment", "prediction")
NAMES = {0: "LIVING", 1: "DECEASED"}
_STATUS = re.compile(
    r"overall survival status\s*:\s*[\"']?(?:([01])(?:\s*:\s*(?:living|deceased))?"
    r"|(living|deceased))\b",
    re.IGNORECASE,
)
_MONTHS = re.compile(
    r"estimated overall survival\s*\(months\)\s*:\s*[\"']?(\d+(?:\.\d+)?|\.\d+)", re.IGNORECASE
)
_OUTCOME = re.compile(
    r"\b(?:living|alive|deceased|dead|died|survived|overall survival)\b", re.IGNORECASE
)
_TAGGED = (
    re.compile(r"<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>", re.DOTALL),
    re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", re.DOTALL),
)


@dataclass(frozen=True)
class Prediction:
    """What an answer says; None where it cannot be read.

    Args:
        status: 0 living, 1 deceased.
        months: of survival.
        reasoning: text of that block.
        whole: all three blocks are there, and both values.
    """

    status: int | None
    months: float | None
    reasoning: str | None
    whole: bool


def block(text: str, name: str) -> str | None:
    """Text between <name> and </name>, or None."""
    found = re.search(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)
    return found[1].strip() if found else None


def parse(text: str) -> Prediction:
    """What an answer predicts; status and months are looked for in the whole text."""
    flat = " ".join(text.split())
    status, months = _STATUS.search(flat), _MONTHS.search(flat)
    said: int | None = None
    if status is not None:
        said = int(status[1]) if status[1] else int(status[2].lower() == "deceased")
    number = float(months[1]) if months is not None else None
    whole = said is not None and number is not None
    whole = whole and all(block(text, name) is not None for name in BLOCKS)
    return Prediction(said, number, block(text, "reasoning"), whole)


def reference_months(value: object) -> float | None:
    """Months of a reference, "<", ">" and "=" taken off; None for what is no number."""
    try:
        number = float(re.sub(r"[<>=\s]", "", str(value)))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def rouge_l(said: str, wanted: str) -> float:
    """F-measure of the longest common subsequence of lower-case words; 0 for an empty side."""
    a, b = (re.findall(r"[a-z0-9]+", t.lower()) for t in (said, wanted))
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b))


def reward(said: Prediction, status: int, months: float | None, trace: str, leak: float) -> float:
    """R of one answer; see the module's docstring. `months` None has no term."""
    value = float(said.status == status) + 0.5 * said.whole
    if months is not None and said.months is not None:
        value += math.exp(-abs(said.months - months) / 12)
    if said.reasoning is not None:
        steps = "\n".join(steps_of(said.reasoning))  # traces have no numbers
        value += 0.5 * rouge_l(steps, trace) if trace else 0.0
        value -= leak * bool(_OUTCOME.search(said.reasoning))
    return value


def truth(row: Row, where: str) -> tuple[int, float | None]:
    """(status, months) that a row's columns state."""
    status = row.get("status")
    if status not in (0, 1):
        raise InputError("column 'status' must be 0 (living) or 1", where=where, seen=status)
    return int(status), reference_months(row.get("months"))


def _check_truths(rows: list[Row]) -> None:
    """What `core.rl.gold` asks before anything is drawn."""
    for i, row in enumerate(rows, 1):
        truth(row, f"reward survival_answer row {i}")


@component("reward")
@checks(rows=_check_truths)
def survival_answer(rows: list[Row], *, leak: float = 0.5) -> list[float]:
    """Right status, months near the true ones, all blocks, reasoning near the row's trace.

    Args:
        leak: taken off where the reasoning already names the outcome.
    """
    made: list[float] = []
    for i, row in enumerate(rows, 1):
        status, months = truth(row, f"reward survival_answer row {i}")
        trace = row.get("trace")
        lines = trace if isinstance(trace, list) else [trace or ""]
        said = parse(text_of(row))
        made.append(reward(said, status, months, "\n".join(map(str, lines)), leak))
    return made


def extracted(text: str) -> str:
    """The answer: what follows the last <answer> up to the next closing tag, or the whole text."""
    return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()


def tagged_parts(text: str, gold: str) -> Sequence[float]:
    """Right answer 1, digits alone 0.5, strict form 0.5, loose form 0.5; each 0 where not so."""
    said = extracted(text)
    strict, loose = (bool(pattern.match(text)) for pattern in _TAGGED)
    return (float(said == gold), 0.5 * said.isdigit(), 0.5 * strict, 0.5 * loose)


def _check_golds(rows: list[Row], *, column: str = "answer") -> None:
    """What `core.rl.gold` asks before anything is drawn."""
    for i, row in enumerate(rows, 1):
        _gold(row, column, f"reward tagged_answer row {i}")


@component("reward")
@checks(rows=_check_golds)
def tagged_answer(rows: list[Row], *, column: str = "answer") -> list[float]:
    """The right text between answer tags, digits, and the form of reasoning before answer.

    Args:
        column: of the gold answers.
    """
    made: list[float] = []
    for i, row in enumerate(rows, 1):
        gold = _gold(row, column, f"reward tagged_answer row {i}")
        made.append(sum(tagged_parts(text_of(row), gold)))
    return made


def _gold(row: Row, column: str, where: str) -> str:
    if column not in row:
        raise InputError(
            f"column {column!r} is missing",
            where=where,
            seen=sorted(row),
            fix="Name the column of the gold answers: {use: tagged_answer, column: ...}",
        )
    return str(row[column])


def answer_text(status: int, months: float, steps: Sequence[str] = (), comment: str = "") -> str:
    """An answer in form: the prediction block, after reasoning and comment where there is any."""
    parts: list[tuple[str, str]] = []
    if steps:
        numbered = "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))
        parts = [("reasoning", numbered), ("comment", comment or "None.")]
    lines = f"{STATUS} {status}:{NAMES[status]}\n{MONTHS} {round(months)}"
    return "\n".join(f"<{n}>\n{t}\n</{n}>" for n, t in [*parts, ("prediction", lines)])


def steps_of(reasoning: str) -> list[str]:
    """The numbered or plain lines of a reasoning block."""
    lines = [re.sub(r"^\s*\d+[.)]\s*", "", line).strip() for line in reasoning.splitlines()]
    return [line for line in lines if words(line)]
