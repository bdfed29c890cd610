"""A suggestion is made for a slip, and none where the names have little in common."""

import pytest

from truing.errors import nearest, unknown


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("base", ["seed", "models", "weights"]),
        ("pairs", ["prose", "digits", "helpful_pairs"]),
        ("rows", ["prose", "digits"]),
        ("nothing", ["hinge"]),
        ("max_tokens", ["beta", "steps"]),
    ],
)
def test_no_suggestion_is_better_than_a_wrong_one(name: str, known: list[str]) -> None:
    assert nearest(name, known) is None
    assert unknown("name", name, known).fix.startswith("Known: ")


@pytest.mark.parametrize(
    ("name", "known", "wanted"),
    [
        ("god", ["good", "bad"], "good"),
        ("dop", ["ipo", "d2o", "dpo", "dro"], "dpo"),
        ("tain", ["test", "train"], "train"),
        ("lamda", ["panda", "lambda"], "lambda"),
        ("bate", ["rate", "beta", "bite"], "bite"),  # as like as "rate"; begins alike
        ("step", ["steps", "stepwise"], "steps"),
        ("dpp", ["dpo", "ipo"], "dpo"),
        ("compl", ["completion", "prompt"], "completion"),
        ("max_tokens", ["max_length", "max_turns"], "max_length"),
        ("max-seq-length", ["max_length", "max_tokens"], "max_length"),
        ("cutoff_len", ["max_length", "current"], "max_length"),
        ("max_token", ["max_length", "max_tokens"], "max_tokens"),
    ],
)
def test_the_nearest_one(name: str, known: list[str], wanted: str) -> None:
    assert nearest(name, known) == wanted
    assert nearest(name, reversed(known)) == wanted
