"""Answers that must be JSON of a schema, or a call of a tool."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tokenizers import AddedToken

pytest.importorskip("llguidance")

from test_serve_tools import LLAMA, QWEN

from truing.core.tiny import tiny_tokenizer
from truing.models import Model
from truing.serve import openai_worker
from truing.serve.openai import serving
from truing.serve.openai_calls import Form
from truing.serve.openai_shape import Guides, Shape, _grammar

USER = [{"role": "user", "content": "Hello there"}]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 199},
        "likes": {"type": "array", "items": {"$ref": "#/$defs/thing"}, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
    "$defs": {"thing": {"enum": ["tea", "caf\u00e9", None]}},
}
BOOK = {"type": "function", "function": {"name": "book", "parameters": PERSON}}
END = {"type": "function", "function": {"name": "end"}}
CHOSEN = {"type": "function", "function": {"name": "book"}}


def _wants(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


def _is_person(value: Any) -> bool:
    assert list(value) == ["name", "age", "likes"]
    assert len(value["name"]) <= 8 and value["age"] in range(200) and len(value["likes"]) <= 3
    return set(value["likes"]) <= {"tea", "caf\u00e9", None}


@pytest.fixture(scope="module", params=[QWEN, LLAMA])
def http(
    request: pytest.FixtureRequest, tiny_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A model that by itself writes neither JSON nor calls."""
    folder = shutil.copytree(tiny_path, tmp_path_factory.mktemp("shape") / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = request.param
    tokenizer.save_pretrained(folder)
    with serving(Model.open(folder), name="tiny", token="t") as made:
        headers = {"Authorization": "Bearer t"}
        with httpx.Client(base_url=made.url, headers=headers, timeout=120) as client:
            yield client


def _body(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": USER, "max_tokens": 400, "seed": 3} | more


def _ask(http: httpx.Client, **more: Any) -> list[dict[str, Any]]:
    reply = http.post("/chat/completions", json=_body(**more))
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_answers_are_json_of_the_schema(http: httpx.Client, temperature: float) -> None:
    told = {"response_format": _wants(PERSON), "temperature": temperature, "n": 4}
    choices = _ask(http, **told)
    texts = [c["message"]["content"] for c in choices]
    assert all(_is_person(json.loads(text)) for text in texts)
    assert {c["finish_reason"] for c in choices} == {"stop"}
    assert ", " in texts[0] and ": " in texts[0] and "\n" not in texts[0]
    parts = ["", "", "", ""]
    with http.stream("POST", "/chat/completions", json=_body(stream=True, **told)) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                parts[choice["index"]] += choice["delta"].get("content", "")
    assert parts == texts


def test_others_of_a_batch_are_held_to_no_form(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies: list[dict[str, Any]] = [{}, {"response_format": _wants(PERSON)}, {"seed": 4}]
    alone = [_ask(http, **body)[0]["message"] for body in bodies]
    monkeypatch.setattr(openai_worker, "GATHER", 0.3)
    with ThreadPoolExecutor(3) as pool:
        assert [c[0]["message"] for c in pool.map(lambda b: _ask(http, **b), bodies)] == alone
    with pytest.raises(ValueError):
        json.loads(alone[0]["content"])


def test_any_object(http: httpx.Client) -> None:
    for choice in _ask(http, response_format={"type": "json_object"}, n=8):
        text = choice["message"]["content"]
        assert text.startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("choice", "names"), [("required", {"book", "end"}), (CHOSEN, {"book"})], ids=["any", "one"]
)
def test_a_tool_is_called(http: httpx.Client, choice: Any, names: set[str]) -> None:
    seen: set[str] = set()
    told = {"tools": [BOOK, END], "tool_choice": choice}
    for seed in range(6):
        (made,) = _ask(http, seed=seed, max_tokens=600, **told)
        (call,) = made["message"]["tool_calls"]
        assert made["message"]["content"] is None
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
        seen.add(name)
        if made["finish_reason"] == "tool_calls" and name == "book":
            assert _is_person(arguments)
    assert seen <= names


def test_json_or_a_call(http: httpx.Client) -> None:
    """Where tools are offered beside, a call of one is an answer, too."""
    small = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"],
             "additionalProperties": False}  # fmt: skip
    tool = {"type": "function", "function": {"name": "end", "parameters": small}}
    for choice in _ask(http, response_format=_wants(small), tools=[tool], n=8, temperature=2.0):
        calls = choice["message"].get("tool_calls")
        told = calls[0]["function"]["arguments"] if calls else choice["message"]["content"]
        assert set(json.loads(told)) == {"yes"}


@pytest.mark.parametrize(
    ("more", "param", "told"),
    [
        ({"response_format": _wants({"$ref": "#/nowhere"})}, "response_format", "followed"),
        ({"response_format": _wants({"type": "objekt"})}, "response_format", "followed"),
        ({"response_format": _wants(PERSON), "min_tokens": 3}, "response_format", "min_tokens"),
        ({"response_format": _wants(PERSON), "stop_token_ids": []}, "response_format", "ends"),
        (
            {"tools": [END], "tool_choice": CHOSEN},
            "tool_choice",
            "offers no such tool",
        ),
    ],
)
def test_shapes_that_are_none(
    http: httpx.Client, more: dict[str, Any], param: str, told: str
) -> None:
    reply = http.post("/chat/completions", json=_body(**more))
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == param and told in error["message"]


def test_without_the_package_it_is_named(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reply = http.post("/chat/completions", json=_body(response_format=_wants(PERSON)))
    assert reply.status_code == 400 and "truing[serve]" in reply.json()["error"]["message"]


def test_a_thought_that_the_prompt_began_is_ended_before_a_call() -> None:
    shape = Shape("tool_choice", None, {"a": {}})
    assert "</think>" in _grammar(shape, Form(thinking=True), {})
    assert "</think>" not in _grammar(shape, Form(), {})


def test_marks_of_calls_that_are_tokens_are_written_as_such() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    guides = Guides(tokenizer, len(tokenizer), [2], Form())
    guide = guides.guide(Shape("tool_choice", None, {"f": {"additionalProperties": False}}))
    ids: list[int] = []
    while 2 not in ids:
        logits_V = torch.zeros(len(tokenizer))
        guide.close(ids, logits_V)
        ids.append(int(logits_V.argmax()))
    assert ids[0] == tokenizer.get_added_vocab()["<tool_call>"]
    said = '\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert tokenizer.decode(ids[1:], skip_special_tokens=True) == said
