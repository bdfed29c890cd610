"""Magpie against its paper's rules, by hand: sanitiser, pre-query, duplicates, filter."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from truing.context import Context, use
from truing.core.embed import near_earlier
from truing.core.sampling import SamplingSettings
from truing.method import methods
from truing.models import Loaded, Model
from truing.select.magpie_filter import longest, magpie_filter, passes
from truing.select.near_duplicates import near_duplicates
from truing.synthesize import magpie, magpie_tags
from truing.synthesize.magpie_text import cut_role, early_stop, keep, sanitise, strip_prefix
from truing.tables import Row, Table

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


def test_duplicate_rule_by_hand() -> None:
    """A row goes where an earlier one is similar, whether that is kept or not."""
    angles = np.array([0, 90, 6, 12, 0], np.float32)
    v = np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], axis=1)
    # squared distance of 6 degrees: 2 - 2 cos(6) = 0.011, of 12 degrees 0.044
    assert near_earlier([v], 0.02).tolist() == [False, False, True, True, True]
    assert near_earlier([v[[0, 1, 3]]], 0.02).tolist() == [False] * 3


def test_duplicate_rule_keeps_one_of_each_exact_group_in_any_block() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(50, 16)).astype(np.float32)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    which = rng.integers(0, 50, size=3000)  # more than one block
    kept = np.flatnonzero(~near_earlier([base[which]], 1e-3)).tolist()
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
    assert not passes({"prompt": "Go", "input_quality": "poor"}, None, -10, True)
    assert not passes({"prompt": "Go"}, None, -10, True)
    assert passes({"prompt": "Go", "input_quality": "good"}, None, -10, True)
    assert passes({"prompt": "Go"}, None, -10, False)
    assert len(longest(rows, 0)) == 5


def test_unread_tags_do_not_pass(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table leaves out what is null: that a tag was asked for, its lineage tells."""
    mixed = Table("prompt", [{"prompt": "Go", "input_quality": q} for q in ("good", None)])
    assert [r.get("input_quality") for r in magpie_filter(mixed)] == ["good"]
    asked, ask = list[str](), magpie_tags.tag_prompt

    def told(query: str, tag: str) -> str:
        asked.append(query)
        return ask(query, tag)

    monkeypatch.setattr(magpie_tags, "tag_prompt", told)
    data = Table("example", [{"messages": said("Why?", "So.", "And then?", "No.")}])
    with use(Context(folder=tmp_path)):
        made = data
        for tags, left in ((("difficulty",), 1), (("quality",), 0), (("category",), 0)):
            # The tiny model writes nothing that could be read.
            made = methods["magpie_tags"](made, Model.open(tiny_path), tags=tags, max_tokens=2)
            assert isinstance(made, Table) and "input_quality" not in made.columns
            assert len(magpie_filter(made)) == left
    assert made[0]["lineage"]["tags"] == ["difficulty", "quality", "category"]  # type: ignore[index]
    assert asked == ["Why?"] * 3


def test_tags_are_drawn_many_at_a_time(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each query once for each tag, and what a stopped step had drawn is not drawn again."""
    sizes, draw = list[int](), magpie_tags.continued

    def drawn(loaded: Loaded, ids: list[list[int]], how: SamplingSettings) -> object:
        if len(sizes) == 1:
            sizes.append(0)
            raise KeyboardInterrupt
        sizes.append(len(ids))
        return draw(loaded, ids, how)

    monkeypatch.setattr(magpie_tags, "continued", drawn)
    data = Table("prompt", [{"prompt": f"Why {i % 50}?"} for i in range(60)])
    for stopped in (True, False):
        with use(Context(folder=tmp_path)), suppress(KeyboardInterrupt):
            methods["magpie_tags"](data, Model.open(tiny_path), max_tokens=1)
            assert not stopped
    assert sizes == [128, 0, 22]


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


def test_dialogues_are_filtered_by_first_instruction_and_last_answer() -> None:
    talks = [
        said("Why?", "x" * 9, "Like so:", "yes"),
        said("How?", "x", "Then?", "yes, yes"),
        said("Name them:", "x", "Go on.", "yes, yes, yes"),
        said("Who?", "yes", "Who else?", "nobody at all"),
    ]
    data = Table("example", [{"messages": t} for t in talks])

    def kept(**settings: object) -> list[int]:
        return sorted(talks.index(r["messages"]) for r in magpie_filter(data, **settings))  # type: ignore

    assert kept() == [0, 1, 3]
    assert kept(n=1) == [3] and kept(n=2) == [1, 3]  # by the length of the last answer
    assert kept(reward={"use": "must_include", "words": ["yes"]}, cut=0.5) == [0, 1]
    seen: list[object] = []

    def reward(rows: list[Row]) -> list[float]:
        seen.extend((r["prompt"], r["completion"]) for r in rows)
        return [0.0] * len(rows)

    methods["magpie_filter"](data, reward=reward)
    assert seen == [(t[:-1], t[-1]["content"]) for t in talks]


def test_dialogues_are_stored_as_their_answers_saw_them(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turns are answered without the line that steers questions."""
    seen: list[list[object]] = []

    def answers(model: Model, prompts: list[list[object]], max_tokens: int) -> list[str]:
        seen.extend(prompts)
        return ["It is."] * len(prompts)

    def asked(loaded: object, heads: list[str], n: int, *_: object) -> object:
        assert all(("Maths only." in head) == (len(seen) == 0) for head in heads)
        return [[("Is it so?", True)] * n for _ in heads]

    monkeypatch.setattr(magpie, "_answers", answers)
    monkeypatch.setattr(magpie, "_continue", asked)
    with use(Context(folder=tmp_path)):
        made = methods["magpie"](Model.open(tiny_path), n=1, system="Maths only.", turns=2)
    assert isinstance(made, Table)
    (row,) = made
    assert row["messages"] == [*seen[-1], {"role": "assistant", "content": "It is."}]
    assert row["messages"] == said("Is it so?", "It is.", "Is it so?", "It is.")


def test_how_instructions_are_drawn(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[SamplingSettings] = []
    text = "Write a loop.\nUse Python."

    def drawn(loaded: object, ids: list[object], how: SamplingSettings) -> object:
        asked.append(how)
        return [[SimpleNamespace(text=text, finish="stop")] for _ in ids]

    monkeypatch.setattr(magpie, "continued", drawn)
    for one_line, wanted in ((True, "Write a loop."), (False, text)):
        with use(Context(folder=tmp_path / str(one_line))):
            made = methods["magpie"](Model.open(tiny_path), n=1, flaming=1.2, one_line=one_line)
        assert isinstance(made, Table) and [r["prompt"] for r in made] == [wanted]
    assert [how.first_temperature for how in asked] == [1.2, 1.2]
    assert ["\n" in how.stop for how in asked] == [True, False]


def test_what_is_kept_has_words() -> None:
    assert keep("Go.", True, 0) and not keep("", True, 0) and not keep("Go.", False, 0)
    assert not keep("Name three:", True, 1) and not keep("Go.", True, 2)


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
    others = ['["Poetry", "math "]', '"Poetry, Math"', "null", '"Poetry"', "[]"]
    for written, wanted in zip(others, (["Math"], ["Math"], None, [], []), strict=True):
        read = parse_tag(f'"primary_tag": "Editing", "other_tags": {written}}}', "category")
        assert read == {"task_category": "Editing", "other_task_category": wanted}
    assert "```\nWhy?\n```" in tag_prompt("Why?", "difficulty")
