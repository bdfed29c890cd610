"""A system prompt: principles, or any text, told to a model before every conversation.

    y ~ pi(. | s, x)

with s the text and x the prompt; weights stay as they are. It costs nothing to make, so that it is
the baseline that a trained model has to beat (the "prompting" of A General Language Assistant as a
Laboratory for Alignment, arXiv 2112.00861), and what context distillation teaches a model to do
without: as the `teacher` of `train/distill/forward_kl` or `on_policy_kd`. A system message of the
conversation's own follows the text in the same message. What the text costs is its tokens, read
once for all answers of a request.
"""

from __future__ import annotations

from truing.changes import Prefix
from truing.errors import InputError
from truing.method import method
from truing.models import Model
from truing.principles import Principles
from truing.specify.in_context import as_rules


def system_text(principles: Principles | None, text: str, told: int) -> str:
    """The text, then the rules in order of their priority; either may be left out."""
    rules = as_rules(principles, told) if principles is not None else ""
    return "\n\n".join(part for part in (text.strip(), rules) if part)


@method(needs=("generate",), within={"told": (0, None)})
def system_prompt(
    model: Model, principles: Principles | None = None, *, text: str = "", told: int = 0
) -> Model:
    """Tell a model principles, or any text, as a system message before every conversation.

    Args:
        principles: what the model is told to follow, numbered, most important first.
        text: said before them, or instead.
        told: say only so many principles, those of highest priority; 0 for all.
    Raises:
        InputError: there is nothing to say.
    """
    said = system_text(principles, text, told)
    if not said:
        raise InputError(
            "there is nothing to tell the model",
            where="decode/system_prompt",
            seen={"principles": None, "text": text},
            fix="Give principles, or a setting 'text'",
        )
    return model.adding(Prefix([{"role": "system", "content": said}]))
