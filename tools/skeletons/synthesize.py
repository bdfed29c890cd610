"""My method: what it does for a user, in one sentence.

Say how rows are made, which paper it is from (title, arXiv id), and where this differs from the
paper and why.
"""

from __future__ import annotations

from truing.context import current
from truing.core.generate import generate
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.tables import Row, Table


def question(prompt: str, ask: str) -> str:
    """What the model is asked about one prompt."""
    return f"{ask}\n\n{prompt}"


@method(
    paper="my-method",
    needs=("generate",),
    rows={"prompts": ("prompt",)},
    within={"max_tokens": (1, None)},
    makes="example",
)
def my_method(
    model: Model,
    prompts: Table,
    *,
    ask: str = "Write this request more precisely:",
    max_tokens: int = 64,
) -> Table:
    """My method: what it does for a user, in one sentence.

    Args:
        ask: what is said before each prompt.
        max_tokens: length limit of an answer.
    """
    prompts = prompts.expect("prompt", where="synthesize/my_method")
    texts = [str(row.get("prompt", "")) for row in prompts]
    if not texts:
        raise InputError("no prompts", where="synthesize/my_method")
    # Finished blocks of answers are in the step's journal: a killed run goes on from there.
    asked = [question(text, ask) for text in texts]
    seed = current().stream("answers") % 2**31
    answers = generate(model, asked, max_tokens=max_tokens, seed=seed)
    rows: list[Row] = [
        {
            "prompt": text,
            "completion": drawn[0].text,
            "lineage": {"parents": [row["id"]], "generator": model.key},
        }
        for text, drawn, row in zip(texts, answers, prompts, strict=True)
    ]
    return Table("example", rows, where="my_method")
