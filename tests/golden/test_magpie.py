"""Magpie against its paper's rules, by hand: sanitiser, pre-query, duplicates, filter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from truing.select.magpie_filter import longest, magpie_filter, passes
from truing.select.near_duplicates import near_duplicates, neighbours
from truing.synthesize.magpie_text import cut_role, early_stop, sanitise, strip_prefix
from truing.tables import Table

SANITISED = [
    ("**Question** What is *rust*? It is oxide.", "What is *rust*?", "99.1"),
    ("*What is **rust**? It is oxide.", "What is rust?", "1"),
    ("* Task: What is rust?", "What is rust?", "1"),
    ('"What is "rust"? It is.', "What is rust?", "2.1"),
    ('"Describe *rust*.\nRust is oxide.', "Describe rust.", "2.2"),
    ("<b>Bold</b> *task* here", "<b>Bold</b> task here", "3"),
    ("Name three metals. Answer: iron, tin, lead", "Name three metals.", "4"),
    ("Name three metals. Answer:: iron", "Name three metals.", "4"),
    ("Name three metals. answer: iron", "Name three metals. answer: iron", "99.2"),
    ("Solve it. Solution Approach: add", "Solve it.", "4"),
    ("Bake a cake. ## Step 1 mix", "Bake a cake.", "5"),
    ("Solve this:\nx = 2 # Hint", "Solve this:\nx = 2", "6.1"),
    ("Solve this:\nWhat is x? It is 2", "Solve this:\nWhat is x?", "6.2"),
    ("Solve **this**:\nx = 2", "Solve this:", "6.3"),
    ("What is x? What is y?", "What is x?", "99.1"),
    ("Explain *rust*.\nIt is oxide.", "Explain rust.", "99.2"),
    ("1. Task: Explain rust.", "Explain rust.", "99.2"),
    ("a) Question 3: Explain rust.", "Explain rust.", "99.2"),
    ("Q7. Explain rust.", "Explain rust.", "99.2"),
    ("## Scenario: You are lost.", "You are lost.", "99.2"),
    # `**L:**` is no label shape: rule 99.2 takes the stars, the closing strip-prefix the label.
    ("**Task:** Explain rust.", "Explain rust.", "99.2"),
]


@pytest.mark.parametrize("text,wanted,rule", SANITISED)
def test_sanitiser(text: str, wanted: str, rule: str) -> None:
    assert sanitise(text) == (wanted, rule)


def test_strip_prefix_takes_one_of_each() -> None:
    assert strip_prefix("1. 2. Go") == "2. Go"
    assert strip_prefix("task: prompt: Go") == "prompt: Go"


def test_stops() -> None:
    assert early_stop("\n  What?\nThat.") == "What?"
    assert cut_role("What is it?assistant\nIt is") == "What is it?"


def test_pre_query_is_the_template_itself(tiny_path: Path) -> None:
    from transformers import AutoTokenizer

    from truing.synthesize.magpie import pre_query

    tokenizer = AutoTokenizer.from_pretrained(str(tiny_path))
    for lead in ([], [{"role": "system", "content": "Maths only."}]):
        text = "What is 2 + 2?"
        whole = tokenizer.apply_chat_template(
            [*lead, {"role": "user", "content": text}], tokenize=False
        )
        head = pre_query(tokenizer, lead)
        assert whole.startswith(head + text)
        end = whole[len(head + text) :]
        pieces = [tokenizer.encode(t, add_special_tokens=False) for t in (head, text, end)]
        assert [i for piece in pieces for i in piece] == tokenizer.encode(
            whole, add_special_tokens=False
        )


def unit(*vectors: list[float]) -> np.ndarray:
    found = np.array(vectors, dtype=np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_duplicate_rule_by_hand() -> None:
    near = [1.0, 0.1]
    found = neighbours(unit([1, 0], [0, 1], near, [1, 0]), threshold=0.05)
    # squared distance of (1, 0) and (1, 0.1) normalised: 2 - 2 / sqrt(1.01)
    assert found.min_distance[2] == pytest.approx(2 - 2 / 1.01**0.5, abs=1e-6)
    assert found.repeat_count == [2, 0, 2, 2]
    assert found.min_similar == [0, None, 0, 0]
    assert found.keep() == [0, 1]


def test_duplicate_rule_keeps_one_of_each_exact_group_in_any_block() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(50, 16)).astype(np.float32)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    which = rng.integers(0, 50, size=3000)  # more than one block
    kept = neighbours(base[which], 1e-3).keep()
    first = {int(w): i for i, w in reversed(list(enumerate(which)))}
    assert sorted(first.values()) == kept


def test_exact_duplicates_of_a_table() -> None:
    data = Table("prompt", [{"prompt": p} for p in ("Go", "go ", "Stay", "Go")])
    assert [r["prompt"] for r in near_duplicates(data, exact=True)] == ["Go", "Stay"]


def test_filter() -> None:
    rows = [
        {"prompt": "Say one:", "completion": "x", "instruct_reward": 5.0},
        {"prompt": "Say one.", "completion": "x" * 3, "instruct_reward": -10.0},
        {"prompt": "Say two.", "completion": "x" * 4, "instruct_reward": -9.9},
        {"prompt": "Say three.", "completion": "x" * 9, "instruct_reward": 3.0},
        {"prompt": "Say four.", "completion": "x" * 5, "instruct_reward": 3.0},
    ]
    kept = magpie_filter(Table("example", rows), n=2)
    assert sorted(str(r["prompt"]) for r in kept) == ["Say four.", "Say three."]
    again = magpie_filter(kept, n=2)
    assert sorted(r["id"] for r in again) == sorted(r["id"] for r in kept)
    assert not passes({"prompt": "Go", "input_quality": "poor"}, None, -10)
    assert not passes({"prompt": "Go", "input_quality": None}, None, -10)
    assert passes({"prompt": "Go", "input_quality": "good"}, None, -10)
    assert len(longest(rows, 0)) == 5


def test_tags_are_parsed_or_null() -> None:
    from truing.synthesize.magpie_tags import parse_tag, tag_prompt

    assert parse_tag(' "input_quality": "Good", "explanation": "clear"} and more', "quality") == {
        "input_quality": "good",
        "quality_explanation": "clear",
    }
    null = {"input_quality": None, "quality_explanation": None}
    assert parse_tag(' "input_quality": "good"', "quality") == null
    assert parse_tag("not json}", "quality") == null
    outside = parse_tag('"primary_tag": "Poetry", "other_tags": ["Math"]}', "category")
    assert outside == {"task_category": None, "other_task_category": ["Math"]}
    assert "```\nWhy?\n```" in tag_prompt("Why?", "difficulty")
