"""Rewards of several named values and checks as rewards, wherever rewards are asked; own errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from truing.cli import main
from truing.context import Context, use
from truing.core.judging.prm_values import weighed
from truing.core.judging.rewards import Rewards
from truing.core.judging.scores import total_scores
from truing.core.judging.step_rollouts import Ending
from truing.core.rollout import POLICY
from truing.errors import InputError
from truing.fields.agent.conversation import conversation
from truing.method import methods, one_a_row, score
from truing.models import Model
from truing.references import reference
from truing.reports import Report
from truing.tables import Row, Table

ROWS: list[Row] = [
    {"prompt": "p", "completion": c, "finished": True} for c in ("ab", "one two three", "b")
]
CHECK: dict[str, object] = {"use": "max_words", "n": 1}


def counts(rows: list[Row]) -> list[dict[str, float]]:
    """How often the letters a and b stand in each answer."""
    return [{n: float(str(r["completion"]).count(n)) for n in "ab"} for r in rows]


def ref(function: object = counts) -> dict[str, object]:
    return dict(reference(cast("str", function)))


def test_a_decoder_weighs_each_value_or_all_of_a_term() -> None:
    for weights, want in (
        ({}, [2.0, 0.0, 1.0]),
        ({"c": 3.0}, [6.0, 0.0, 3.0]),
        ({"c": 3.0, "c/b": -1.0}, [2.0, 0.0, -1.0]),
    ):
        made = Rewards({"c": ref()}, cast("dict[str, float]", weights), where="here")
        made.check()
        assert made(ROWS) == want
    both = Rewards({"c": ref(), "short": CHECK}, {"short": 10.0})
    broken = 0.49 / 3  # three words where one is allowed
    assert both.terms(ROWS) == {"c/a": [1, 0, 0], "c/b": [1, 0, 1], "short": [1, broken, 1]}
    assert both(ROWS) == pytest.approx([12, 10 * broken, 11])
    with pytest.raises(InputError, match="term"):
        Rewards({"c": ref()}, {"d/a": 1.0}).check()
    # The mean by weights of next steps, those of single values too.
    assert weighed({"c/a": [1.0], "c/b": [0.0], "s": [1.0]}, {"c": 2.0, "c/b": 1.0}, 1) == [0.75]


def test_best_of_n_keeps_the_best_by_several_values(tiny_path: Path) -> None:
    from truing.core.generate import generate

    model = Model.open(tiny_path)
    with use(Context()):
        drawn = generate(model, ["p"], n=4, max_tokens=12, seed=3)[0]
        values = total_scores(
            ref(letters), [{"prompt": "p", "completion": d.text.strip()} for d in drawn]
        )
        made = methods["best_of_n"](model, n=4, rewards={"l": letters})
        assert isinstance(made, Model)
        kept = generate(made, ["p"], n=1, max_tokens=12, seed=3)[0][0].text
    assert kept == drawn[values.index(max(values))].text and max(values) > min(values)


def letters(rows: list[Row]) -> list[dict[str, float]]:
    texts = [str(r["completion"]) for r in rows]
    return [{"first": float(sum(map(ord, t)) % 101), "size": float(len(t))} for t in texts]


def test_checks_and_several_values_decide_who_wins(tiny_path: Path) -> None:
    model, prompts = Model.open(tiny_path), Table("prompt", [{"prompt": "p"}, {"prompt": "q"}])
    for reward in (CHECK, ref()):
        with use(Context()):
            made = methods["win_rate"](
                model, model, prompts, reward=reward, max_tokens=4, temperature=0.0
            )
        assert isinstance(made, Report) and made.get("win rate").value == 0.5


def test_magpie_filters_by_either() -> None:
    data = Table("example", [{"prompt": "p", "completion": r["completion"]} for r in ROWS])
    for reward, cut, want in ((CHECK, 0.5, {"ab", "b"}), (ref(), 1.5, {"ab"})):
        made = methods["magpie_filter"](data, reward=reward, cut=cut)
        assert {r["completion"] for r in cast(Table, made)} == want


def test_a_conversation_is_rewarded_by_either() -> None:
    for reward, want in ((CHECK, 1.0), (ref(), 2.0)):
        made = conversation(turns=1, reward=reward)
        made.reset(0, {"prompt": "hello"})
        assert made.step("ab").reward == {POLICY: want}
    with pytest.raises(InputError, match="no_such"):
        conversation(turns=1, reward={"use": "no_such"})


def test_what_an_answer_comes_to_is_the_sum_of_named_values() -> None:
    def halves(rows: list[Row]) -> list[dict[str, float]]:
        return [{"a": 0.25, "b": 0.5} for _ in rows]

    ending = Ending(ref(halves), None, None, "")
    ending.check()
    assert ending(ROWS) == [0.75] * 3
    with pytest.raises(InputError, match=r"row 1.*\(seen: 2"):
        Ending(ref(), None, None, "")(ROWS)


# What a user's function returns or raises


def test_numbers_of_numpy_are_numbers() -> None:
    def made(rows: list[Row]) -> list[object]:
        return [np.float32(0.5), np.float64(2.0), np.int64(3)]

    assert score("reward", ref(made), ROWS) == [0.5, 2.0, 3.0]
    for wrong in ("0.5", None, np.float32("nan"), np.ones(2)):
        with pytest.raises(InputError, match=r"row 2.*not a finite number"):
            score("reward", ref(lambda rows, w=wrong: [1.0, w, 1.0]), ROWS)


def test_a_whole_number_that_no_float_holds_is_no_score() -> None:
    with pytest.raises(InputError, match=r"row 1.*not a finite number"):
        score("reward", ref(lambda rows: [10**400] * len(rows)), ROWS)


def test_no_reward_sees_what_another_writes_into_its_rows() -> None:
    rows: list[Row] = [{"prompt": [{"role": "user", "content": "p"}], "completion": "ab"}]

    def writes(rows: list[Row]) -> list[float]:
        rows[0]["prompt"][0]["content"] = "written"  # type: ignore[index]
        rows[0].clear()
        rows.append({})
        return [0.0]

    terms = Rewards({"first": ref(writes), "second": ref()}, {}).terms(rows)
    assert terms == {"first": [0.0], "second/a": [1.0], "second/b": [1.0]}
    assert rows == [{"prompt": [{"role": "user", "content": "p"}], "completion": "ab"}]


def test_what_a_reward_raises_is_told_with_its_row() -> None:
    def inverse(rows: list[Row]) -> list[float]:
        return [1 / (len(str(r["completion"])) - 1) for r in rows]

    with pytest.raises(InputError) as error:
        total_scores(ref(inverse), ROWS, where="train/x reward 'r'")
    told = str(error.value)
    assert told.startswith(
        "train/x reward 'r' row 3: reward 'inverse()' raised ZeroDivisionError: "
    )
    assert "(seen: 'b')" in told and f"See {__file__} line " in told
    assert isinstance(error.value.__cause__, ZeroDivisionError)

    def whole(rows: list[Row]) -> list[float]:
        raise KeyError("gold") if len(rows) > 1 else InputError("fine by itself")

    with pytest.raises(InputError, match="raised KeyError: 'gold'") as error:
        one_a_row("reward", ref(whole), ROWS, where="here")
    assert error.value.where == "here"  # no row alone is at fault


def test_faults_of_the_system_and_truing_s_own_are_not_called_a_reward_s() -> None:
    def full(rows: list[Row]) -> list[float]:
        raise OSError(28, "No space left on device")

    def told(rows: list[Row]) -> list[float]:
        raise InputError("as it is")

    def memory(rows: list[Row]) -> list[float]:
        raise RuntimeError("CUDA out of memory")

    for function, kind in ((full, OSError), (told, InputError), (memory, RuntimeError)):
        with pytest.raises(kind) as error:
            score("reward", ref(function), ROWS)
        assert "raised" not in str(error.value)


SCRIPT = """\
import truing

@truing.component("reward")
def own_reward(rows):
    return [float(row["gold"]) for row in rows]

plan = truing.Plan("own")
plan.model("base", {model!r})
plan.step("tuned", "train/grpo", model="base", data="prompts.jsonl", steps=1, batch=2, answers=2,
          max_tokens=4, rank=2, rewards={{"r": {{"use": "own_reward"}}}})
"""


def test_a_reward_that_raises_ends_a_command_as_a_user_s_mistake(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "p", "gold": "1"}, {"prompt": "q", "gold": "none"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "own.py").write_text(SCRIPT.format(model=str(tiny_path)))
    assert main(["run", str(tmp_path / "own.py"), "--runs", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert "reward 'r' raised ValueError: could not convert string to float: 'none'" in said
    assert "own.py line 5" in said and "Traceback" not in said and "defect" not in said
