"""Answers that the rows of an online method bring along: columns, dialogues, ShareGPT's form."""

from __future__ import annotations

from pathlib import Path

import pytest

from truing.context import Context, Json, use
from truing.errors import InputError
from truing.kinds import infer_kind
from truing.method import methods
from truing.models import Model
from truing.readings import last_answer
from truing.reports import Report
from truing.tables import Row, Table

WORDS = ("oak", "ash", "elm")
SPOKEN = {"user": "human", "assistant": "gpt"}


def said(word: str) -> list[dict[str, str]]:
    """A dialogue of two answers, the last of which is learnt."""
    turns = (("user", "name a tree"), ("assistant", "fir"), ("user", f"say {word}"),
             ("assistant", f"{word}!"))  # fmt: skip
    return [{"role": role, "content": text} for role, text in turns]


FORMS: dict[str, list[Row]] = {
    "columns": [{"prompt": said(w)[:-1], "completion": f"{w}!"} for w in WORDS],
    "messages": [{"messages": said(w)} for w in WORDS],
    "sharegpt": [
        {"conversations": [{"from": SPOKEN[m["role"]], "value": m["content"]} for m in said(w)]}
        for w in WORDS
    ],
}


def table(rows: list[Row]) -> Table:
    return Table(infer_kind(rows[0]), rows)


def steps(name: str, model: Model, rows: Table, folder: Path, **more: object) -> list[Json]:
    with use(Context(seed=3, folder=folder)) as context:
        methods[name](
            model, rows, steps=1, batch=2, max_tokens=4, minibatches=1, max_length=256,
            rewards={"l": {"use": "share_of", "letters": "aeiou !"}}, lr=1e-2, **more,
        )  # fmt: skip
    return [m["loss"] for m in context.metrics if "step" in m]


@pytest.mark.parametrize(
    ("name", "more"), [("grao", {"answers": 2}), ("ppo_max", {"ptx": 1.0, "critic_rollouts": 0})]
)
def test_the_last_answer_of_a_dialogue_is_the_given_one(
    name: str, more: dict[str, object], tiny_path: Path, tmp_path: Path
) -> None:
    model, method = Model.open(tiny_path), methods[name]
    found: dict[str, list[Json]] = {}
    for form, rows in FORMS.items():
        data = table(rows)
        method.check(method.validate({"rewards": {}, **more}), {"data": data})
        found[form] = steps(name, model, data, tmp_path / form, **more)
    assert found["columns"][0] != 0
    assert found["messages"] == found["columns"] == found["sharegpt"]


def test_what_has_none_is_refused(tiny_path: Path, tmp_path: Path) -> None:
    asked = table([{"messages": said("oak")}, {"messages": said("ash")[:-1]}])
    method, model = methods["grao"], Model.open(tiny_path)
    with pytest.raises(InputError, match="needs the column 'completion'"):
        method.check(method.validate({"rewards": {}}), {"data": asked})
    spoken = table([FORMS["sharegpt"][0], {"conversations": [{"from": "human", "value": "?"}]}])
    with pytest.raises(InputError, match=r"row 2.*messages that end with an answer in words"):
        steps("grao", model, spoken, tmp_path, answers=2)


def test_a_dialogue_as_prompt_and_completion() -> None:
    row: Row = {"messages": said("oak"), "tools": ["t"], "id": "1"}
    assert last_answer(row) == {
        "prompt": said("oak")[:-1], "completion": "oak!", "tools": ["t"], "id": "1"
    }  # fmt: skip
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    for messages in (said("oak")[:-1], [*said("oak")[:-1], call], [{"role": "assistant",
                                                                   "content": "oh"}]):  # fmt: skip
        assert last_answer({"messages": messages}) == {"messages": messages}
    assert last_answer({"prompt": "p", "messages": said("oak")})["prompt"] == "p"


def test_references_of_dialogues(tiny_path: Path, tmp_path: Path) -> None:
    model, told = Model.open(tiny_path), {"use": "share_of", "letters": "aeiou"}
    found: list[list[Row]] = []
    for form, rows in FORMS.items():
        with use(Context(seed=3, folder=tmp_path / form)):
            report = methods["alignment_gain"](
                model, table(rows), reward=told, max_tokens=4, temperature=0.0
            )
        assert isinstance(report, Report) and report.samples is not None
        found.append([{n: r[n] for n in ("completion", "given", "score")} for r in report.samples])
    assert found[0] == found[1] == found[2]
    assert [r["given"] for r in found[0]] == ["oak!", "ash!", "elm!"]
