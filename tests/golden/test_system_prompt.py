"""A system prompt: its words by hand, its tokens by the tokenizer's own template."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from truing.core.generate import generate
from truing.core.tiny import tiny_model
from truing.decode.system_prompt import system_text
from truing.errors import InputError
from truing.method import methods
from truing.models import Model, Prefix
from truing.principles import Principle, Principles

RULES = Principles(
    [
        Principle(id="late", text="Say please.", priority=1),
        Principle(id="first", text="Be brief.", priority=3),
    ]
)
WHOLE = "Follow these rules in every answer.\n1. Be brief.\n2. Say please."


def test_the_text_by_hand() -> None:
    assert system_text(RULES, "", 0) == WHOLE
    assert system_text(RULES, " You sell tea. ", 1) == (
        "You sell tea.\n\nFollow these rules in every answer.\n1. Be brief."
    )
    assert system_text(None, "You sell tea.", 0) == "You sell tea."


@pytest.mark.parametrize("own", ["", "You sell tea."])
def test_answers_are_those_to_the_whole_conversation(own: str, tiny_path: Path) -> None:
    """Against greedy decoding by transformers of what its template makes of the messages."""
    made = methods["decode/system_prompt"](Model.open(tiny_path), RULES)
    assert isinstance(made, Model) and isinstance(made.changes[-1], Prefix)
    user = [{"role": "user", "content": "What is red?"}]
    asked = [*([{"role": "system", "content": own}] if own else []), *user]
    [[answer]] = generate(made, [asked if own else "What is red?"], max_tokens=6, greedy=True)
    module, tokenizer = tiny_model()
    told = f"{WHOLE}\n\n{own}" if own else WHOLE
    ids = tokenizer.apply_chat_template(
        [{"role": "system", "content": told}, *user], add_generation_prompt=True, return_dict=False
    )
    drawn: list[int] = []
    with torch.no_grad():
        for _ in range(len(answer.ids)):
            drawn.append(int(module(torch.tensor([[*ids, *drawn]])).logits[0, -1].argmax()))
    assert list(answer.ids) == drawn


def test_nothing_to_say_is_refused(tiny_path: Path) -> None:
    with pytest.raises(InputError, match="Give principles"):
        methods["decode/system_prompt"](Model.open(tiny_path))
