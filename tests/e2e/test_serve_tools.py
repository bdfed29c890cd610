"""Calls of tools at the server: read from answers, streamed, told back by the next turn."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from truing.core.chat import example_ids
from truing.core.generate import generate
from truing.core.tiny import TEMPLATE, tiny_tokenizer
from truing.kinds import with_tools
from truing.models import Model
from truing.serve.openai import serving
from truing.serve.openai_calls import Call, Form, Reading, calls_in, form_of

ADD: dict[str, Any] = {"type": "function", "function": {"name": "add"}}
# What Qwen2.5's template writes, but for its words about the tools.
QWEN = """\
{%- if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] %}{% endif %}
{%- if tools %}{{- '<|im_start|>system\\n' + (first or '') + '<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{% endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- elif first %}{{- '<|im_start|>system\\n' + first + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == "user" or (message.role == "assistant" and not message.tool_calls) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == "assistant" %}
{{- '<|im_start|>' + message.role }}
{%- if message.content %}{{- '\\n' + message.content }}{% endif %}
{%- for tool_call in message.tool_calls %}
{%- if tool_call.function is defined %}{% set tool_call = tool_call.function %}{% endif %}
{{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
{{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif message.role == "tool" %}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != "tool" %}
{{- '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\\n' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
# What Llama 3.1's and Mistral's templates make of calls and results.
LLAMA = """\
{%- for tool in tools or [] %}{{- tool | tojson }}{% endfor %}
{%- for message in messages %}
{%- if message.role == 'ipython' or message.role == 'tool' %}
{{- '<|im_start|>ipython\\n' }}{{- message.content | tojson }}{{- '<|im_end|>' }}
{%- elif 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}
{{- raise_exception('This model only supports single tool-calls at once!') }}{% endif %}
{%- set tool_call = message.tool_calls[0].function %}
{{- '<|im_start|>assistant\\n{"name": "' + tool_call.name + '", "parameters": ' }}
{{- tool_call.arguments | tojson }}{{- '}<|im_end|>' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
MISTRAL = """\
{%- if tools %}{{- '[AVAILABLE_TOOLS]' }}{{- tools | tojson }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '[INST] ' + message.content + '[/INST]' }}
{%- elif message.tool_calls is defined and message.tool_calls is not none %}
{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}
{%- if call.id is not defined or call.id | length != 9 %}
{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}
{%- set text = call.function | tojson %}
{{- text[:-1] }}{{- ', "id": "' + call.id + '"}' }}
{%- if not loop.last %}{{- ', ' }}{% endif %}
{%- endfor %}{{- ']' + eos_token }}
{%- elif message.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + message.content + '}[/TOOL_RESULTS]' }}
{%- elif message.role == 'assistant' %}{{- ' ' + message.content + eos_token }}
{%- endif %}
{%- endfor %}"""
BARE_TOOLS = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + TEMPLATE
WRITTEN = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
OTHER = '<tool_call>\n{"name":"add","arguments": {"b": 4.0}}\n</tool_call>'  # spaced otherwise
SUM = [{"role": "user", "content": "1+2?"}]
TWO = [{"role": "user", "content": "Two."}]


TOOLS = {"add": {"a": {"type": "integer"}, "b": {"type": ["number", "null"]},
                 "to": {"type": "string"}}}  # fmt: skip


def _read(text: str, form: Form = Form(), sizes: Iterator[int] | None = None, **more: Any) -> Any:
    """Words and calls of an answer that comes in pieces."""
    reading, parts, at = Reading(form, TOOLS, **more), [], 0
    for size in sizes or itertools.repeat(10_000):
        if at >= len(text):
            break
        parts += reading.feed(text[at : at + size])
        at += size
    parts += reading.end()
    assert [p for p in parts if isinstance(p, Call)] == reading.calls
    words = "".join(p for p in parts if isinstance(p, str))
    return words, [(c.name, json.loads(c.arguments)) for c in reading.calls]


ONE, MORE = ("add", {"a": 1, "b": 2}), ("add", {"b": 4.0})
BAD = '<tool_call>\n{"name": "add", \n</tool_call>'
MARKED = """\
<tool_call>
<function=add>
<parameter=a>
1
</parameter>
<parameter=b>
None
</parameter>
<parameter=to>
1 </tool_call>

</parameter>
<parameter=x>2</parameter>
</function>
</tool_call>"""
INSIDE = '<tool_call>{"name": "say", "arguments": {"x": "</tool_call> <tool_call>"}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "words", "calls"),
    [
        (WRITTEN, "", [ONE]),
        (f"\n {WRITTEN}\n{OTHER}\n", "", [ONE, MORE]),
        (f"Let me add.\n{WRITTEN}", "Let me add.", [ONE]),
        (f"A\n{WRITTEN}\n\nB \n{OTHER} C\n", "A\n\nB C", [ONE, MORE]),
        (WRITTEN.removesuffix("\n</tool_call>"), "", [ONE]),  # it ended without
        (f"{BAD}\n{OTHER}", BAD, [MORE]),
        (BAD, BAD, []),
        (WRITTEN[:40], WRITTEN[:40], []),  # cut short
        (f"<tool_call>\n{WRITTEN}", "<tool_call>", [ONE]),
        (INSIDE, "", [("say", {"x": "</tool_call> <tool_call>"})]),
        (f"<think>{WRITTEN}</think>\n\n{OTHER}", f"<think>{WRITTEN}</think>", [MORE]),
        (f"<think>{WRITTEN}", f"<think>{WRITTEN}", []),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", {})]),
        ('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', "", [("f", {})]),
        (
            f"{MARKED}\n<tool_call><function=f></function></tool_call>",
            "",
            [("add", {"a": 1, "b": None, "to": "1 </tool_call>\n", "x": "2"}), ("f", {})],
        ),
        (MARKED[:60], MARKED[:60], []),
        ("  a < b, <tool_ca\n ", "  a < b, <tool_ca\n ", []),
        ("", "", []),
        (" \n", " \n", []),
    ],
)
def test_calls_are_told_apart_from_words_however_they_come(
    text: str, words: str, calls: list[Any]
) -> None:
    source = random.Random(0)
    assert _read(text) == (words, calls)
    assert _read(text, sizes=itertools.repeat(1)) == (words, calls)
    for _ in range(20):
        assert _read(text, sizes=iter(lambda: source.randint(1, 30), 0)) == (words, calls)


def test_words_are_told_at_once_and_calls_when_they_end() -> None:
    reading = Reading(Form(), TOOLS)
    assert reading.feed("Let me add. <") == ["Let me add."]
    assert reading.feed("b> and\n\n<tool_c") == [" <b> and"]
    assert reading.feed(WRITTEN.removeprefix("<tool_c")) == reading.calls != []
    assert len(reading.calls[0].id) == 9 and reading.calls[0].id.isalnum()
    assert reading.feed("\nDone") == ["\nDone"]


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", "3", '{"name": ""}', '{"name": "f", "arguments": [1]}', "[" * 100_000,
     '{"name": "f", "arguments": {"x": NaN}}', '{"name": "f", "arguments": "x"}',
     '[{"name": "f"}, 1]', '{"name": "f"} x', "<function=f>x</function>", "<function=f>"],
)  # fmt: skip
def test_what_is_no_call(text: str) -> None:
    assert calls_in(text) is None


def test_arguments_are_what_json_can_say() -> None:
    text = '{"name": "f\\ud800", "arguments": {"x": "\\ud83d", "y": 1e999, "z": "\\u00e9"}}'
    (call,) = calls_in(text) or []
    assert (call.name, call.arguments) == ("f\ufffd", '{"x": "\ufffd", "y": null, "z": "\u00e9"}')
    assert calls_in('{"name": "f", "arguments": "' + "[" * 100_000 + '"}') is None
    either = {"anyOf": [{"type": "integer"}, {"type": "null"}]}
    for schema, value in ((either, 7), ({"type": 3}, 7), ({"anyOf": [{"type": "string"}]}, "7")):
        written = "<function=f><parameter=x>7</parameter></function>"
        (call,) = calls_in(written, {"f": {"x": schema}}) or []
        assert json.loads(call.arguments) == {"x": value}


def test_one_call_alone() -> None:
    text = f"A {WRITTEN} B {OTHER} C"
    assert _read(text, one=True) == ("A", [ONE])
    assert _read("A B", one=True) == ("A B", [])
    assert _read('[{"name": "add"}, {"name": "add"}]', Form("", ""), one=True)[1] == [("add", {})]


@pytest.mark.parametrize(
    ("text", "words", "calls"),
    [
        (' {"name": "add", "parameters": {"b": 4.0}}\n', "", [MORE]),
        ('[{"name": "add", "arguments": {"b": 4.0}, "id": "x"}, {"name": "add"}]', "",
         [MORE, ("add", {})]),
        ('{"name": "Ada", "age": 36}', '{"name": "Ada", "age": 36}', []),  # no tool of the request
        ('{"name": "add"}; {"name": "add"}', "", [("add", {}), ("add", {})]),
        ("{x}", "{x}", []),
        ('See {"name": "add"}', 'See {"name": "add"}', []),
        (' <think>{}</think>\n{"name": "add"}', " <think>{}</think>", [("add", {})]),
    ],
)  # fmt: skip
def test_where_nothing_marks_a_call_an_answer_is_one_or_words(
    text: str, words: str, calls: list[Any]
) -> None:
    for size in (1, 3, 1000):
        assert _read(text, Form("", ""), itertools.repeat(size)) == (words, calls)


def _form(template: str) -> Form:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    tokenizer.chat_template = template
    return form_of(tokenizer)


def test_the_template_says_how_calls_look() -> None:
    hermes = Form("<tool_call>", "</tool_call>", earlier=True)
    assert _form(QWEN) == hermes
    assert _form(LLAMA) == _form(MISTRAL) == Form("", "", earlier=True)
    assert _form(QWEN.replace("tool_call>", "invoke>")) == Form(
        "<invoke>", "</invoke>", earlier=True
    )
    thoughts = "{% set thinking = true %}" + QWEN  # an empty thought stands before what is given
    thoughts = thoughts.replace(
        "{{- '<|im_start|>' + message.role }}",
        """\
{{- '<|im_start|>' + message.role + '\\n<think>\\n\\n</think>\\n' }}""",
    )
    assert _form(thoughts) == hermes
    marked = QWEN.replace('{"name": "', "<function=").replace('", "arguments": ', ">\\n")
    marked = marked.replace("tool_call.arguments | tojson", "tool_call.arguments | items | list")
    assert _form(marked.replace("'}\\n</tool_call>", "'</function>\\n</tool_call>")) == hermes
    assert not _form(TEMPLATE).earlier
    assert _form(BARE_TOOLS) == Form()  # it writes tools, not calls
    assert not _form(QWEN.replace("<tool_response>\\n' + message.content", "'")).earlier


RESULTS = {"3": "So 3.", "The numbers are too large.": "It fails."}  # and what is then said


def _taught() -> list[tuple[list[dict[str, str]], str]]:
    """Dialogues with what the model is to answer."""
    made = [
        (with_tools(SUM, [ADD]), f"Let me add.\n{WRITTEN}"),
        (SUM, "No tool."),
        (with_tools(TWO, [ADD]), f"{OTHER}\n{WRITTEN}"),
    ]
    function = {"name": "add", "arguments": {"a": 1, "b": 2}}
    called = {"role": "assistant", "content": "Let me add.", "tool_calls": [{"function": function}]}
    for told, answer in RESULTS.items():
        result = {"role": "tool", "content": told}
        made.append((with_tools([*SUM, called, result], [ADD]), answer))
    return made


@pytest.fixture(scope="module")
def caller(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model that has learnt by heart when to call, and what a result says."""
    module = Model.open(tiny_path).load_module(fresh=True).module
    tokenizer = tiny_tokenizer()  # that of the folder is every test's
    tokenizer.chat_template = QWEN
    rows: list[Tensor] = []
    targets: list[Tensor] = []
    for asked, answer in _taught():
        whole = [*asked, {"role": "assistant", "content": answer}]
        ids, loss = example_ids(tokenizer, whole, asked=len(asked))
        rows.append(torch.tensor(ids))
        targets.append(torch.tensor([i if k else -100 for i, k in zip(ids, loss, strict=True)]))
    ids_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    target_BT = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(80):
        logits_BTV = module(ids_BT).logits
        loss = torch.nn.functional.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1), target_BT[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.01:
            break
    folder = tmp_path_factory.mktemp("caller")
    cast("PreTrainedModel", module).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Model.open(folder).called("tiny")


@pytest.fixture(scope="module")
def http(caller: Model) -> Iterator[httpx.Client]:
    with serving(caller, token="t") as made:
        headers = {"Authorization": "Bearer t"}
        with httpx.Client(base_url=made.url, headers=headers, timeout=120) as client:
            yield client


def _body(messages: Any = SUM, **more: Any) -> dict[str, Any]:
    given = {"model": "tiny", "messages": messages, "max_tokens": 160, "temperature": 0}
    return {**given, "tools": [ADD], **more}


def _ask(http: httpx.Client, *messages: Any, **more: Any) -> dict[str, Any]:
    reply = http.post("/chat/completions", json=_body(*messages, **more))
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]


def _streamed(http: httpx.Client, **more: Any) -> list[dict[str, Any]]:
    """Choices put together from their chunks, as clients do."""
    made: dict[int, dict[str, Any]] = {}
    with http.stream("POST", "/chat/completions", json=_body(stream=True, **more)) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    for choice in (json.loads(line)["choices"][0] for line in lines):
        one = made.setdefault(choice["index"], {"content": [], "calls": [], "finish": None})
        assert one["finish"] is None  # nothing comes behind the end
        one["finish"], delta = choice["finish_reason"], choice["delta"]
        one["content"] += [delta["content"]] if delta.get("content") else []
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(one["calls"]) and call["type"] == "function"
                one["calls"].append(call["function"] | {"id": call["id"]})
            else:
                one["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    return [made[i] for i in sorted(made)]


@pytest.mark.parametrize(("result", "answer"), RESULTS.items())
def test_an_agent_calls_a_tool_and_reads_its_result(
    http: httpx.Client, result: str, answer: str
) -> None:
    first = _ask(http)
    assert first["finish_reason"] == "tool_calls"
    (call,) = first["message"]["tool_calls"]
    assert first["message"]["content"] == "Let me add."
    assert (call["type"], call["function"]["name"]) == ("function", "add")
    assert json.loads(call["function"]["arguments"]) == {"a": 1, "b": 2}
    said = {"role": "tool", "tool_call_id": call["id"], "content": result}
    last = _ask(http, [*SUM, first["message"], said])
    assert (last["message"]["content"], last["finish_reason"]) == (answer, "stop")
    assert "tool_calls" not in last["message"]
    parts = [{"type": "text", "text": result}]  # what some clients make of it
    again = [*SUM, {**first["message"], "content": parts[:0]}, {**said, "content": parts}]
    assert _ask(http, again)["finish_reason"] == "stop"


def test_streams_bring_calls_as_deltas(http: httpx.Client) -> None:
    one, other = _streamed(http, n=2)
    assert one["finish"] == other["finish"] == "tool_calls"
    assert "".join(one["content"]) == "Let me add." and len(one["content"]) > 5
    (call,) = one["calls"]
    assert (call["name"], json.loads(call["arguments"])) == ONE
    assert call["id"] != other["calls"][0]["id"]
    (two,) = _streamed(http, messages=TWO, logprobs=True)
    assert [(c["name"], json.loads(c["arguments"])) for c in two["calls"]] == [MORE, ONE]
    assert two["content"] == [] and len({c["id"] for c in two["calls"]}) == 2
    (plain,) = _streamed(http, tool_choice="none")
    assert ("".join(plain["content"]), plain["finish"]) == ("No tool.", "stop")
    (cut,) = _streamed(http, max_tokens=30)
    assert ("".join(cut["content"]), cut["finish"]) == (f"Let me add.\n{WRITTEN}"[:30], "length")


def test_several_calls_or_one_at_most(http: httpx.Client) -> None:
    message = _ask(http, TWO)["message"]
    assert message["content"] is None
    assert [c["function"]["name"] for c in message["tool_calls"]] == ["add", "add"]
    assert message["written"] == f"{OTHER}\n{WRITTEN}"
    (only,) = _ask(http, TWO, parallel_tool_calls=False)["message"]["tool_calls"]
    assert json.loads(only["function"]["arguments"]) == {"b": 4.0}
    (one,) = _streamed(http, messages=TWO, parallel_tool_calls=False)
    assert [json.loads(c["arguments"]) for c in one["calls"]] == [{"b": 4.0}]


def test_calls_that_are_not_asked_for_are_none(http: httpx.Client) -> None:
    assert _ask(http, tool_choice="none")["message"]["content"] == "No tool."
    assert _ask(http, tools=[])["message"]["content"] == "No tool."
    cut = _ask(http, max_tokens=30)
    assert cut["message"]["content"] == f"Let me add.\n{WRITTEN}"[:30]
    assert cut["finish_reason"] == "length"


def _turn(**more: Any) -> dict[str, Any]:
    function = {"name": "add", "arguments": "{}"}
    return {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": function | more}
    ]}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "param", "told"),
    [
        ({"tool_choice": "always"}, "tool_choice", "none of 'auto', 'none', 'required'"),
        ({"tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice",
         "offers no such tool"),
        ({"messages": [*SUM, {"role": "tool", "content": "3"}]}, "messages.1.tool_call_id",
         "earlier call"),
        ({"messages": [_turn(), {"role": "tool", "tool_call_id": "2", "content": "3"}]},
         "messages.1.tool_call_id", "(seen: '2')"),
        ({"messages": [_turn(), {"role": "tool", "tool_call_id": "1"}]}, "messages.1.content",
         "required"),
        ({"messages": [*SUM, _turn(arguments={})]}, "messages.1.tool_calls.0.function.arguments",
         "string"),
        ({"messages": [*SUM, _turn(arguments="[1]"), *SUM]}, None, "no JSON object"),
        ({"messages": [{**_turn(), "role": "user"}]}, "messages.0.tool_calls",
         "only the assistant"),
        ({"messages": [{"role": "assistant", "content": "", "function_call": {"name": "add"}}]},
         "messages", "write it as tool_calls"),
    ],
)  # fmt: skip
def test_what_is_refused(
    http: httpx.Client, more: dict[str, Any], param: str | None, told: str
) -> None:
    reply = http.post("/chat/completions", json=_body(**more))
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param)
    assert told in error["message"]


def test_a_client_of_ours_keeps_what_the_model_wrote(
    caller: Model, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUING_API_KEY", "t")
    far = Model.open(f"{str(http.base_url).rstrip('/')}#tiny")
    asked = [with_tools(said, [ADD]) for said in (SUM, TWO)]
    (one, two) = generate(far, asked, greedy=True, max_tokens=160)
    assert one[0].text == f"Let me add.\n{WRITTEN}"
    assert two[0].text == f"{OTHER}\n{WRITTEN}"  # spaced as it was written
    assert (two[0].finish, len(two[0].logprobs)) == ("stop", len(two[0].text))
    with serving(far, token="t", name="tiny") as outer:  # served again
        headers = {"Authorization": "Bearer t"}
        with httpx.Client(base_url=outer.url, headers=headers, timeout=120) as client:
            first = _ask(client)["message"]
            (call,) = first["tool_calls"]
            assert first["content"] == "Let me add."
            said = {"role": "tool", "tool_call_id": call["id"], "content": "3"}
            assert _ask(client, [*SUM, first, said])["message"]["content"] == "So 3."
