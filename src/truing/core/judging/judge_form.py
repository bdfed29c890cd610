"""The form of judging: what a judge is asked, in which words, and how its reply is read.

The last line that a judge was asked for is read strictly: a reply that lacks it, or holds two that
differ, has no verdict. It is never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from truing.errors import InputError
from truing.tables import Message, Row

Score = float | None  # None: no verdict could be read
SCALE = 5  # ratings of a served judge: 1 to 5 where nothing else is said

_REQUEST = """\
{% if criteria %}
A good answer keeps these rules:
{{ criteria }}
{% endif %}
<request>
{{ prompt }}
</request>

"""
ONE = f"""\
You judge an answer to a request.
{_REQUEST}<answer>
{{{{ completion }}}}
</answer>
"""
TWO = f"""\
You compare two answers to the same request.
{_REQUEST}<answer_A>
{{{{ first }}}}
</answer_A>

<answer_B>
{{{{ second }}}}
</answer_B>
"""
ASK_ONE = "Is this a good answer? Reply with Yes or No."
ASK_TWO = "Which answer is better, A or B? Reply with A or B."
GRADE_ONE = "How good is this answer, from 1 (worst) to {scale} (best)? "
ASK_GRADE = GRADE_ONE + "Reply with the number alone."
RATE_ONE = GRADE_ONE + (
    "Think first if that helps, then end with a line of its own that reads 'Rating: ' and the "
    "number."
)
RATE_TWO = (
    "Which answer is better? Think first if that helps, then end with a line of its own that reads "
    "'Verdict: A', 'Verdict: B' or 'Verdict: tie'."
)

_environment = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
)


def render(template: str, **values: object) -> str:
    """A request from a template; an InputError when it cannot be made."""
    try:
        return _environment.from_string(template).render(**values)
    except (TemplateError, TypeError) as error:
        fix = f"It may hold {', '.join('{{ ' + name + ' }}' for name in values)}"
        said = f"the judge's template fails: {error}"
        raise InputError(said, seen=template, fix=fix) from None


def checked(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows; an InputError unless each has a prompt and a completion."""
    for i, row in enumerate(rows, 1):
        if not isinstance(row.get("completion"), str) or "prompt" not in row:
            raise InputError(
                "a judge needs rows with 'prompt' and 'completion'",
                where=f"row {i}",
                seen=sorted(row),
                fix="Rename the columns",
            )
    return rows


def shown(row: Row) -> str:
    """A prompt as a judge reads it: the words, or the dialogue with its speakers."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt
    messages = cast("list[Message]", prompt)
    if len(messages) == 1:
        return str(messages[0].get("content", ""))
    return "\n\n".join(f"{m.get('role')}: {m.get('content')}" for m in messages)


def parse_rating(text: str, top: int = SCALE) -> Score:
    """The rating that a reply ends on, of 1 to `top`, as a number from 0 to 1, or None."""
    found = _line(text, "rating", rf"[1-{top}]")
    return None if found is None else (int(found) - 1) / (top - 1)


def parse_verdict(text: str) -> Score:
    """1 for A, 0 for B, 0.5 for a tie, or None."""
    found = _line(text, "verdict", r"A|B|tie")
    return None if found is None else {"a": 1.0, "b": 0.0, "tie": 0.5}[found.lower()]


def _line(text: str, name: str, values: str) -> str | None:
    """What stands after `name:` in a line of its own; None without one, or when two differ.

    Marks of emphasis around the words are let pass, nothing else is.
    """
    marks = r"[\s*_'\"`]*"
    line = re.compile(rf"^{marks}{name}{marks}:{marks}({values}){marks}\.?{marks}$", re.I | re.M)
    found = {m[1].lower(): m[1] for m in line.finditer(text)}
    return next(iter(found.values())) if len(found) == 1 else None
