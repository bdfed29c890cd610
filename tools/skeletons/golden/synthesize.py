"""My method: what the model is asked, word for word."""

from __future__ import annotations

from truing.method import methods

EXPECTED = ""  # the whole question, as the paper has it


def test_by_hand() -> None:
    assert EXPECTED, "write down what the model must be asked"
    question = methods["synthesize/my_method"].question
    assert question("Write a poem.", "Make it precise:") == EXPECTED
