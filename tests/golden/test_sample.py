"""Random samples: sizes, the two parts, and what they depend on."""

from __future__ import annotations

import pytest

from truing.context import Context, use
from truing.errors import InputError
from truing.select.sample import sample
from truing.tables import Table

ROWS = [{"prompt": f"p{i % 20}", "chosen": f"a{i}", "rejected": "b"} for i in range(40)]


def drawn(rows: list[dict[str, object]], n: int, part: str, seed: int = 0) -> set[str]:
    with use(Context(seed)):
        return {str(r["id"]) for r in sample(Table("pair", rows), n=n, part=part)}  # type: ignore


def test_the_two_parts_make_the_whole_and_share_no_prompt() -> None:
    one, rest = drawn(ROWS, 10, "sample"), drawn(ROWS, 10, "rest")
    assert (len(one), len(rest)) == (10, 30)
    assert not one & rest
    by_id = {str(r["id"]): r["prompt"] for r in Table("pair", ROWS)}
    assert not {by_id[i] for i in one} & {by_id[i] for i in rest}


def test_a_sample_depends_on_seed_and_content_only() -> None:
    assert drawn(ROWS, 10, "sample") == drawn(ROWS[::-1], 10, "sample")
    assert drawn(ROWS, 10, "sample", seed=1) != drawn(ROWS, 10, "sample")


def test_rows_whose_prompts_differ_by_capitals_alone_are_never_parted() -> None:
    rows = ROWS + [{"prompt": f" P{i} ", "chosen": "c", "rejected": "b"} for i in range(20)]
    one = drawn(rows, 15, "sample")
    by_id = {str(r["id"]): str(r["prompt"]).strip().lower() for r in Table("pair", rows)}
    asked = [{by_id[i] for i in ids} for ids in (one, by_id.keys() - one)]
    assert len(one) == 15 and len(asked[0]) == 5 and not asked[0] & asked[1]


def test_more_than_there_is() -> None:
    with pytest.raises(InputError, match="41 of 40"):
        drawn(ROWS, 41, "sample")
    with pytest.raises(InputError, match="no row is left"):
        drawn(ROWS, 40, "rest")


def test_rows_of_one_prompt_are_drawn_together_or_not_at_all() -> None:
    rows = [{"prompt": "p", "chosen": f"a{i}", "rejected": "b"} for i in range(3)]
    with pytest.raises(InputError) as error:
        drawn(rows, 1, "sample")
    assert error.value.fix == "Rows of one prompt go together: set n to 3 or more"
    assert len(drawn(rows, 3, "sample")) == 3
    with pytest.raises(InputError, match="Set n below 3"):
        drawn(rows, 3, "rest")
    with pytest.raises(InputError, match="Set n to 3 or less"):
        drawn(rows, 4, "rest")
