"""Splits and filters: no overlap, no dependence on order, faults named."""

from __future__ import annotations

import numpy as np
import pytest

from truing.context import Context, use
from truing.errors import InputError
from truing.select import near_duplicates as duplicates
from truing.select import split as module
from truing.select.checked import checked
from truing.select.near_duplicates import near_duplicates
from truing.select.sample import sample
from truing.select.split import split
from truing.tables import Table

DATA = Table("prompt", [{"prompt": f"Prompt number {i}?"} for i in range(30)])


def prompts(table: Table) -> list[str]:
    return [str(r["prompt"]) for r in table]


def test_parts_are_disjoint_and_ignore_row_order() -> None:
    parts = [split(DATA, part=p, held_out=10, threshold=0) for p in ("train", "held_out")]
    assert len(parts[1]) == 10 and len(parts[0]) == 20
    assert not set(prompts(parts[0])) & set(prompts(parts[1]))
    turned = Table("prompt", list(reversed(DATA.rows)))
    assert prompts(split(turned, part="held_out", held_out=10, threshold=0)) == prompts(parts[1])
    other = split(DATA, part="held_out", held_out=10, threshold=0, salt=1)
    assert prompts(other) != prompts(parts[1])


def test_training_rows_near_a_held_out_one_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # Vectors by the prompt's number: neighbours differ by 10 degrees, cosine 0.985.
    def vectors(texts: list[str]) -> np.ndarray:
        angles = np.radians([10 * int(t.split()[-1][:-1]) for t in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    monkeypatch.setattr(module, "embedded", vectors)
    train = split(DATA, part="train", held_out=4, threshold=0.05)  # cosine 0.975
    held = {int(p.split()[-1][:-1]) for p in prompts(split(DATA, part="held_out", held_out=4))}
    left = {int(p.split()[-1][:-1]) for p in prompts(train)}
    assert left and not left & held
    assert not any(abs(a - b) <= 1 for a in left for b in held)


def test_rows_without_texts_are_told_apart_by_what_they_hold() -> None:
    images = Table("record", [{"pixels": [i, i + 1], "label": i % 2} for i in range(12)])
    parts = [split(images, part=p, held_out=4, threshold=t)
             for p, t in (("train", 0.3), ("train", 0.0), ("held_out", 0.3))]  # fmt: skip
    assert [len(p) for p in parts] == [8, 8, 4]
    assert not {r["id"] for r in parts[0]} & {r["id"] for r in parts[2]}
    turned = Table("record", list(reversed(images.rows)))
    again = split(turned, part="held_out", held_out=4)
    assert {r["id"] for r in again} == {r["id"] for r in parts[2]}
    assert [len(near_duplicates(images, exact=e)) for e in (False, True)] == [12, 12]
    with use(Context(0)):
        assert len(sample(images, n=5)) == 5


def test_exact_texts_are_compared_without_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "embedded", lambda texts: pytest.fail("needs no vectors"))
    twice = Table("prompt", [{"prompt": f" {w} {i % 9}"} for w in ("Say", "say") for i in range(9)])
    train = split(twice, part="train", held_out=3, threshold=0)
    held = split(twice, part="held_out", held_out=3, threshold=0)
    assert not {p.lower() for p in prompts(train)} & {p.lower() for p in prompts(held)}
    assert prompts(near_duplicates(twice, exact=True)) == [f" Say {i}" for i in range(9)]


def by_first_letter(texts: list[str]) -> np.ndarray:
    """Texts that begin alike have one meaning."""
    return np.eye(128, dtype=np.float32)[[ord(t[:1] or "-") for t in texts]]


THANKS = {"role": "user", "content": "Thanks!"}


def dialogue(*said: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": s} for i, s in enumerate(said)]


@pytest.mark.parametrize("exact", [True, False])
def test_duplicates_are_alike_in_all_that_is_asked_and_answered(
    exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "embedded", by_first_letter)
    talks = [
        [{"role": "system", "content": s}, *dialogue(first, "It is.", "Thanks!")]
        for s, first in (("x", "Oak?"), ("y", "Ash?"), ("z", "Oak?"))
    ]

    def kept(rows: list[dict[str, object]], by: str = "row") -> list[int]:
        table = Table("", [{**r, "n": i} for i, r in enumerate(rows)])
        with use(Context(0)) as context:
            made = near_duplicates(table, exact=exact, by=by)  # type: ignore[arg-type]
            left_out = sum(int(str(m.get("left_out", 0))) for m in context.metrics)
        assert left_out == len(rows) - len(made)
        return [int(str(r["n"])) for r in made]

    assert kept([{"prompt": t} for t in talks]) == [0, 1]
    assert kept([{"messages": [*t, {"role": "assistant", "content": "Bye."}]} for t in talks]) == [
        0, 1,
    ]  # fmt: skip
    ends = ("Bye.", "Welcome.", "Bye.")
    learnt = [{"messages": [*talks[0], {"role": "assistant", "content": e}]} for e in ends]
    assert kept(learnt) == [0, 1] and kept(learnt, "prompt") == [0]
    sides = [("a", "b"), ("a", "c"), ("d", "b"), ("a", "b")]
    pairs = [{"prompt": "Why?", "chosen": c, "rejected": r} for c, r in sides]
    assert kept(pairs) == [0, 1, 2] and kept(pairs, "prompt") == [0]
    spoken = [{"chosen": dialogue("Why?", c), "rejected": dialogue("Why?", r)} for c, r in sides]
    assert kept(spoken) == [0, 1, 2] and kept(spoken, "prompt") == [0]
    assert kept([{"chosen": c, "rejected": r} for c, r in sides]) == [0, 1, 2]
    both = [{"prompt": "Why?", "messages": dialogue("Oak?", a), "completion": "x"} for a in "ab"]
    assert kept(both) == [0]
    groups = [{"prompt": "Why?", "completions": [*t], "scores": [1, 0]} for t in ("ab", "ba", "ab")]
    assert kept(groups) == [0, 1]


def test_equal_rows_are_one_before_pairs_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    compare, sizes = duplicates.near_earlier, []

    def counted(places: list[np.ndarray], threshold: float) -> object:
        sizes.append(len(places[0]))
        return compare(places, threshold)

    monkeypatch.setattr(duplicates, "embedded", by_first_letter)
    monkeypatch.setattr(duplicates, "near_earlier", counted)
    words = ["Ash?", *["Oak?"] * 500, "Elm?", "Only oaks?", *["Elm?"] * 500]
    data = Table("prompt", [{"prompt": w} for w in words])
    assert prompts(near_duplicates(data)) == ["Ash?", "Oak?", "Elm?"]
    assert sizes == [4]
    assert len(near_duplicates(data, threshold=0.0)) == len(data)  # nothing is nearer than 0


def test_dialogues_that_end_alike_are_apart() -> None:
    talks: list[dict[str, object]] = [
        {"prompt": dialogue(f"Tree {i}?", "It is.", "Thanks!")} for i in range(12)
    ]
    data = Table("", talks)
    parts = [split(data, part=p, held_out=4, threshold=0) for p in ("train", "held_out")]
    assert [len(p) for p in parts] == [8, 4]
    with use(Context(0)):
        assert len(sample(data, n=5)) == 5
    asked = [("Why?", "a"), ("Why?", "b"), ("Who?", "a")]
    names = [
        duplicates.row_name({"chosen": dialogue(q, c), "rejected": dialogue(q, "no")})
        for q, c in asked
    ]
    assert names == ["Why?", "Why?", "Who?"]  # rows of one prompt go together


def test_split_needs_enough_rows() -> None:
    with pytest.raises(InputError, match="30 of 30 rows"):
        split(DATA, part="train", held_out=30)


def test_checked() -> None:
    data = Table("prompt", [{"prompt": p} for p in ("Why is it so?", "hey all,", "Go.")])
    rules = [{"use": "ends_with_sentence"}, {"use": "min_words", "n": 2}]
    assert prompts(checked(data, checks=rules)) == ["Why is it so?"]
    assert checked(data, checks=rules)[0]["id"] == data[0]["id"]
    with pytest.raises(InputError, match="none of 3 rows"):
        checked(data, checks=[{"use": "min_words", "n": 9}])
    with pytest.raises(InputError, match="at least one check"):
        checked(data, checks=[])
    with pytest.raises(InputError, match="unknown column 'chosen'"):
        checked(data, checks=rules, of="chosen")
