r"""Numbers that answers end with, read by hand: fractions, marks, units; golds that are none."""

from __future__ import annotations

from fractions import Fraction

import pytest

from truing.core.judging.numerals import final_number, numbers, only_number
from truing.errors import InputError
from truing.evaluate.easy_to_hard import normal
from truing.train.reward.rules import numeric_answer


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("1/2", Fraction(1, 2)),
        ("so it is 3/2.", Fraction(3, 2)),
        (r"\boxed{\frac{1}{2}}", Fraction(1, 2)),
        (r"\boxed{-\dfrac{ 3 }{ 4 }}", Fraction(-3, 4)),
        (r"half is \frac12", Fraction(1, 2)),
        (r"\frac{-1}{2}", Fraction(-1, 2)),
        ("1 1/2 cups", Fraction(3, 2)),
        (r"$1\frac{1}{2}$", Fraction(3, 2)),
        ("6 / 4", Fraction(3, 2)),
        ("1,234.50 dollars", Fraction(123450, 100)),
        ("-$1,200", -1200),
        (".5", Fraction(1, 2)),
        ("2.5e-3", Fraction(25, 10000)),
        ("\u22127 degrees", -7),
        ("from 3-5", 5),
        ("x=5-3", 3),
        (r"1{,}000 or 2\,500", 2500),
        ("on 1/2/2024", 2024),
        ("the area is 12 cm^2", 12),
        (r"it is 12 \text{cm}^2.", 12),
        ("#### 72", 72),
        ("16 - 3 = 13\n#### $18.00 a day\nwell, 5", 18),
        ("####\n 72", 72),
        ("#### 5 + 3 = 8", 8),
        ("#### The answer is 72.", 72),
        (r"#### $\boxed{\frac{3}{6}}$", Fraction(1, 2)),
        (r"\boxed{1} then \boxed{x = 2}", 2),
        (r"\boxed{50\%}", 50),
        (r"\boxed{30^\circ}", 30),
        (r"\boxed{3\text{ km/h}}", 3),
        (r"\fbox{5}, \fboxed{4} after 3", 4),
    ],
)
def test_what_is_read(text: str, want: Fraction | int) -> None:
    assert final_number(text) == want


@pytest.mark.parametrize(
    "text",
    [
        "none", "", r"\boxed{\sqrt{2}}", r"\boxed{2\pi}", r"\boxed{2x}", r"\boxed{2x + 3}",
        r"\boxed{(1, 2)}", r"\boxed{3 \text{ or } 4}", r"\boxed{x = 1, y = 2}", "#### 10^3",
        r"\boxed{5 + \sqrt{2}}", r"\boxed{\frac{\sqrt{3}}{2}}", r"\boxed{\frac{x}{2}}", "#### 1/0",
        "#### 2024-05-12", "#### 1/2/2024", "#### 1,5", r"cut \boxed{\frac{1}{2", "#### about",
        "it is 10^3", r"it is 5\sqrt{2}", r"it is 2\pi", "it is 1.5/2", "it is 1/0", "9" * 5000,
        "1e9999",
    ],
)  # fmt: skip
def test_what_is_no_number(text: str) -> None:
    assert final_number(text) is None


def test_places_are_those_of_the_text() -> None:
    text = "a 12, then -1/2 cm^2"
    found = numbers(text)
    assert [text[n.start : n.end] for n in found] == ["12", "-1/2"]
    assert only_number("18 dollars and 5") is None and only_number("$18") == 18


def test_a_wrong_fraction_is_not_paid() -> None:
    gold = r"#### \frac{1}{2}"
    said = ["3/2", r"\boxed{\frac{3}{2}}", "so 2", "1/2", "0.5", r"\boxed{\tfrac{2}{4}}", "#### 2"]
    made = numeric_answer([{"completion": t, "answer": gold} for t in said])
    assert made == [0, 0, 0, 1, 1, 1, 0]
    plain = [{"completion": t, "answer": "1/2"} for t in ("3/2", "2", "0.5", r"\frac{1}{2}")]
    assert numeric_answer(plain) == [0, 0, 1, 1]
    third = [{"completion": t, "answer": "1/3"} for t in ("0.3333", "0.33", "1/3")]
    assert numeric_answer(third) == [0, 0, 1]
    assert numeric_answer(third, tolerance=0.001) == [1, 0, 1]


def test_other_numbers_are_golds_as_they_are() -> None:
    rows = [{"completion": "it is 0.25", "answer": v} for v in (0.25, "0.25", 1, "1/4 of it")]
    assert numeric_answer(rows) == [1, 1, 0, 1]


def test_a_tolerance_below_zero_makes_nothing_right_and_is_refused() -> None:
    rows: list[dict[str, object]] = [{"completion": "99", "answer": 100}]
    assert numeric_answer(rows, tolerance=0.01) == [1] and numeric_answer(rows) == [0]
    for wrong in (-0.01, float("nan")):
        with pytest.raises(InputError, match="setting 'tolerance' must be at least 0"):
            numeric_answer(rows, tolerance=wrong)


@pytest.mark.parametrize(
    ("gold", "told"),
    [
        (r"\boxed{\sqrt{2}}", r"row 2: column 'answer' marks '\\sqrt\{2\}', which is not one num"),
        ("#### 3 or 4", "row 2: column 'answer' marks '3 or 4', which is not one number"),
        ("no idea", "row 2: column 'answer' holds no number"),
        ([1, 2], "row 2: column 'answer' holds no number"),
        (True, "row 2: column 'answer' holds no number"),
        (None, "row 2: column 'answer' holds no number"),
    ],
)
def test_a_gold_that_is_not_one_number_is_refused(gold: object, told: str) -> None:
    rows: list[dict[str, object]] = [
        {"completion": "1", "answer": "#### 1"}, {"completion": "1", "answer": gold},
    ]  # fmt: skip
    with pytest.raises(InputError, match=told):
        numeric_answer(rows)


def test_answers_of_one_form() -> None:
    assert normal(r"\frac{1}{2}") == normal("0.5") == normal("$1/2$.") != normal("3/2")
    assert normal(".5") != normal("5") and normal("12 cm") == "12 cm"
