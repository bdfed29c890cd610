"""Rewards by a server: each form as vLLM answers it, cached, repeated, and refused where wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from misbehaving import Answer, server

from truing.core.client import Limits, limited
from truing.core.judging.scores import check_reward
from truing.errors import InputError, Stopped
from truing.kinds import as_prompt
from truing.method import score
from truing.tables import Row
from truing.train.reward.served_reward import CHUNK, served_reward

TALK = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
ROWS: list[Row] = [
    {"prompt": "say a", "completion": "a"},
    {"prompt": TALK, "completion": "bb"},
    {"prompt": "say a", "completion": "a"},
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies of one test are not another's."""
    monkeypatch.setenv("TRUING_HOME", str(tmp_path / "home"))


def root(url: str) -> str:
    return url.removesuffix("/v1")


def listed(**item: Any) -> Answer:
    data = [{"index": 0, **item}]
    return 200, {}, {"object": "list", "data": data, "usage": {"total_tokens": 3}}, 0.0


def size(body: dict[str, Any]) -> float:
    """What the stand-ins score: the answer's length."""
    return float(len(body["messages"][-1]["content"]))


def test_classify() -> None:
    def script(_: int, body: dict[str, Any]) -> Answer:
        p = size(body) / 10
        return listed(label="LABEL_0", probs=[p], num_classes=1)

    with server(script) as (url, log):
        found = served_reward(ROWS, url=f"{root(url)}/classify#rm")
        assert found == [0.1, 0.2, 0.1]
        assert len(log.asked) == 2  # what is asked twice is sent once
        sent = {body["messages"][-1]["content"]: (path, body) for path, _, body in log.asked}
        assert sent["bb"] == (
            "/classify",
            {"model": "rm", "messages": [*TALK, {"role": "assistant", "content": "bb"}],
             "add_generation_prompt": False},
        )  # fmt: skip
        assert sent["a"][1]["messages"][0] == {"role": "user", "content": "say a"}
        # Kept replies: nothing is asked again.
        ref = {"use": "served_reward", "url": f"{root(url)}/classify#rm"}
        assert score("reward", ref, ROWS) == found and len(log.asked) == 2


def test_which_of_several_labels() -> None:
    def script(_: int, body: dict[str, Any]) -> Answer:
        return listed(label="good", probs=[0.25, 0.75], num_classes=2)

    with server(script) as (url, _log):
        place = f"{root(url)}/classify"
        assert served_reward(ROWS, url=place, label=1) == [0.75] * 3
        assert served_reward(ROWS, url=place, label=0) == [0.25] * 3
        with pytest.raises(InputError, match=r"2 numbers for an answer.*label: 1"):
            served_reward(ROWS, url=place)
        with pytest.raises(InputError, match="one finite score for each of 1 answers"):
            served_reward(ROWS, url=place, label=2)


@pytest.mark.parametrize(
    ("data", "label", "want"),
    [([-1.5], None, -1.5), ([[0.1], [0.2], [2.5]], None, 2.5), ([[0.9, 0.1], [0.3, 0.7]], -1, 0.7)],
)
def test_pooling(data: list[Any], label: int | None, want: float) -> None:
    with server(lambda n, body: listed(object="pooling", data=data)) as (url, log):
        assert served_reward(ROWS[:1], url=f"{root(url)}/pooling#m", label=label) == [want]
        assert log.asked[0][0] == "/pooling"


def test_score() -> None:
    def script(_: int, body: dict[str, Any]) -> Answer:
        return listed(object="score", score=len(body["text_1"]) + len(body["text_2"]) / 10)

    with server(script) as (url, log):
        assert served_reward(ROWS, url=f"{url}/score#m") == [5.1, 12.2, 5.1]
        assert {b["text_1"] for _, _, b in log.asked} == {"say a", "be brief\n\nhi"}
        assert {path for path, _, _ in log.asked} == {"/v1/score"}


def test_a_server_of_one_s_own_scores_in_chunks() -> None:
    def script(_: int, body: dict[str, Any]) -> Answer:
        assert set(body) == {"prompts", "answers"}
        assert len(body["prompts"]) == len(body["answers"]) <= CHUNK
        return 200, {}, {"scores": [float(a) for a in body["answers"]]}, 0.0

    for count in (1, CHUNK, CHUNK + 1, 2 * CHUNK + 5):
        rows: list[Row] = [{"prompt": TALK, "completion": str(i)} for i in range(count)]
        with server(script) as (url, log):
            assert served_reward(rows, url=f"{root(url)}/my/reward") == [
                float(i) for i in range(count)
            ]
            assert len(log.asked) == math.ceil(count / CHUNK)
            assert log.asked[0][2]["prompts"][0] == TALK
            assert served_reward([], url=f"{root(url)}/my/reward") == []


TOOLS: list[Any] = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
OFFERED: Row = as_prompt({"prompt": TALK, "tools": TOOLS, "completion": "cc"})


@pytest.mark.parametrize(("form", "item"), [("classify", "probs"), ("pooling", "data")])
def test_tools_go_beside_the_messages(form: str, item: str) -> None:
    with server(lambda n, body: listed(**{item: [1.0]})) as (url, log):
        assert served_reward([OFFERED, ROWS[0]], url=f"{root(url)}/{form}") == [1.0, 1.0]
        sent = {body["messages"][-1]["content"]: body for _, _, body in log.asked}
        assert sent["cc"] == {
            "messages": [*TALK, {"role": "assistant", "content": "cc"}], "tools": TOOLS,
            "chat_template_kwargs": {"tools": TOOLS}, "add_generation_prompt": False,
        }  # fmt: skip
        assert set(sent["a"]) == {"messages", "add_generation_prompt"}


def test_tools_in_the_other_forms() -> None:
    with server(lambda n, body: listed(score=1.0)) as (url, log):
        assert served_reward([OFFERED], url=f"{url}/score") == [1.0]
        assert log.asked[0][2] == {"text_1": "be brief\n\nhi", "text_2": "cc"}
    with server(lambda n, body: (200, {}, {"scores": [1.0, 2.0]}, 0.0)) as (url, log):
        assert served_reward([OFFERED, ROWS[0]], url=root(url)) == [1.0, 2.0]
        assert log.asked[0][2] == {
            "prompts": [TALK, "say a"], "tools": [TOOLS, []], "answers": ["cc", "a"],
        }  # fmt: skip


@pytest.mark.parametrize(
    ("form", "body"),
    [
        ("plain", {"scores": [1.0, 2.0]}),
        ("plain", {"scores": [1.0, 2.0, float("nan")]}),
        ("plain", {"scores": [1.0, 2.0, None]}),
        ("plain", {"scores": [1.0, 2.0, True]}),
        ("plain", {"rewards": [1.0, 2.0, 3.0]}),
        ("classify", {"data": []}),
        ("classify", {"data": [{"probs": [float("inf")]}]}),
        ("pooling", {"data": [{"data": "AAAA"}]}),
        ("score", {"data": [{"score": 1.0}, {"score": 2.0}]}),
        ("score", {"data": "no"}),
    ],
)
def test_replies_that_are_no_scores(form: str, body: dict[str, Any]) -> None:
    with server(lambda n, _: (200, {}, body, 0.0)) as (url, log):
        ref: dict[str, object] = {"use": "served_reward", "url": root(url), "form": form}
        for _ in range(2):  # nor are they kept
            with pytest.raises(InputError, match=f"one finite score for each of .*{form}") as error:
                score("reward", ref, ROWS)
            assert root(url) in error.value.where
        assert len(log.asked) >= 2


def test_it_is_asked_again_within_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("truing.core.endpoints.endpoint.FIRST_WAIT", 0.01)

    def script(number: int, body: dict[str, Any]) -> Answer:
        if not number:
            return 503, {}, {"error": "busy"}, 0.0
        return 200, {}, {"scores": [1.0] * len(body["answers"])}, 0.0

    with server(script) as (url, log):
        assert served_reward(ROWS, url=root(url)) == [1.0] * 3 and len(log.asked) == 2
    with server(script) as (url, _log), limited(Limits(requests=1)), pytest.raises(Stopped):
        served_reward(ROWS, url=root(url))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"url": "rm:8000"}, "not an address"),
        ({"url": "http://me:secret@host/classify"}, "no name and password"),
        ({"url": "http://host", "form": "chat"}, "form"),
        ({"url": "http://host", "label": "good"}, "label"),
        ({}, "setting 'url' is missing"),
    ],
)
def test_mistakes_before_anything_is_asked(settings: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told) as error:
        check_reward({"use": "served_reward", **settings})
    assert "secret" not in str(error.value)
