"""Dialogues that would train something else than they say, or end in another package's words.

What templates write is worked out by hand here.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from truing.core.batch.row_kinds import as_kind, takes_texts
from truing.core.batch.template import turn_of
from truing.core.batch.training_rows import Reader, Unit
from truing.core.chat import completion_ids, example_ids, opening, prompt_ids, reply_ids
from truing.core.objective import objective_of
from truing.core.rl.online_prompts import read_prompts
from truing.core.tiny import TEMPLATE, tiny_tokenizer
from truing.errors import InputError
from truing.method import methods
from truing.tables import Row, Table
from truing.train.distill.gkd import gkd
from truing.train.preference.dpo import dpo
from truing.train.reward.bradley_terry import bradley_terry
from truing.train.supervised.sft import dft, neftune, sft

END = "<|im_end|>"
STRICT = (  # as Llama 2's, Mistral's and Gemma's, which take no dialogue of the assistant's
    "{% if messages[0]['role'] == 'assistant' %}"
    "{{ raise_exception('roles must alternate user/assistant/...') }}{% endif %}"
)
TOOLED = "{% if tools %}{{ tools | tojson }}{% endif %}"
SAYS = "{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') }}"
ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
CALLS = (  # as Qwen2.5's; {} is how arguments are written
    "{% for m in messages %}" + SAYS + "{% for c in m.tool_calls or [] %}"
    "{% set f = c.function if c.function is defined else c %}"
    "{{ '<call>' + f.name + ' ' }}{{ {} }}{{ '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}" + ASKS
)
ENCODED = CALLS.replace("{{ {} }}", "{{ f.arguments | tojson }}")
AS_TEXT = CALLS.replace("{{ {} }}", "{{ f.arguments }}")
EITHER = CALLS.replace(
    "{{ {} }}",
    "{{ f.arguments if f.arguments is string else f.arguments | tojson }}",
)
LISTED = CALLS.replace(
    "{{ {} }}", "{% for k, v in f.arguments.items() %}{{ k ~ '=' ~ v }}{% endfor %}"
)
ALWAYS = TEMPLATE.replace("{% if add_generation_prompt %}", "{% if true %}")


def made(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def user(text: str) -> dict[str, object]:
    return {"role": "user", "content": text}


def said(text: str | None, *calls: object) -> dict[str, object]:
    made: dict[str, object] = {"role": "assistant", "content": text}
    return made | {"tool_calls": list(calls)} if calls else made


def call(arguments: object, name: str = "add") -> dict[str, object]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def reader(function: object, tokenizer: PreTrainedTokenizerFast) -> Reader:
    return Reader(tokenizer, objective_of(function), 512)


def units(function: object, tokenizer: PreTrainedTokenizerFast, *rows: Row) -> list[Unit]:
    """Units of rows, converted as training does."""
    read = reader(function, tokenizer)
    table, _ = as_kind(Table("", rows), read.spec.rows, "x", texts=takes_texts(read.spec))
    return read.read(table)


def counted(function: object, tokenizer: PreTrainedTokenizerFast, *rows: Row) -> dict[str, int]:
    read = reader(function, tokenizer)
    table, _ = as_kind(Table("", rows), read.spec.rows, "x", texts=takes_texts(read.spec))
    read.read(table)
    return {name: n for name, n in read.counts.items() if n}


def learnt(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, object]]) -> list[str]:
    """The runs of text that carry loss."""
    ids, loss = example_ids(tokenizer, messages)
    runs: list[list[int]] = []
    for i, (token, carries) in enumerate(zip(ids, loss, strict=True)):
        if carries and (not i or not loss[i - 1]):
            runs.append([])
        if carries:
            runs[-1].append(token)
    return [str(tokenizer.decode(run)) for run in runs]


# Templates that are not there, or refuse


@pytest.mark.parametrize("function", [sft, dft, neftune, gkd, dpo, bradley_terry])
def test_messages_need_a_template(function: Callable[..., object]) -> None:
    row: Row = {"messages": [user("Why?"), said("So.")]}
    if objective_of(function).rows == "pair":
        row = {"chosen": [user("Why?"), said("So.")], "rejected": [user("Why?"), said("No.")]}
    with pytest.raises(InputError, match="has no chat template") as caught:
        units(function, made(None), row)
    assert "plain text" in caught.value.fix and "row 1" in caught.value.where
    assert "NAME?template=FILE" in caught.value.fix


def test_a_refused_prompt_names_its_row() -> None:
    good: Row = {"prompt": "Why?"}
    bad: Row = {"prompt": [said("Hello."), user("Why?")]}
    tokenizer = made(STRICT + TEMPLATE)
    with pytest.raises(InputError, match="refuses these messages") as caught:
        read_prompts(Table("prompt", [good, bad]), tokenizer, 512, 8, "", "grpo data")
    assert caught.value.where == "grpo data table row 2"
    rows: list[Row] = [{**row, "completion": "So."} for row in (good, bad)]
    with pytest.raises(InputError, match="refuses these messages") as caught:
        units(sft, tokenizer, *rows)
    assert caught.value.where == "table row 2"


def test_wrong_tools_name_their_row() -> None:
    rows: list[Row] = [{"prompt": "Why?"}, {"prompt": "Why?", "tools": ["add"]}]
    with pytest.raises(InputError, match="list of JSON schemas") as caught:
        read_prompts(Table("prompt", rows), made(TEMPLATE), 512, 8, "", "grpo data")
    assert caught.value.where == "grpo data table row 2"
    told: list[Row] = [{**row, "completion": "So."} for row in rows]
    spoken: list[Row] = [{"messages": [user("Why?"), said("So.")], "tools": t} for t in ([], ["t"])]
    for given in (told, spoken):
        with pytest.raises(InputError, match="list of JSON schemas") as caught:
            units(sft, made(TEMPLATE), *given)
        assert caught.value.where == "table row 2"


# Dialogues that the assistant opens


def test_what_opens_a_dialogue_is_no_answer() -> None:
    talk = [said("Hello."), user("Why?"), said("So.")]
    tokenizer = made(TEMPLATE)
    assert learnt(tokenizer, talk) == [f"So.{END}"]
    ids, _ = example_ids(tokenizer, talk)
    assert tokenizer.decode(ids) == (
        f"<|im_start|>assistant\nHello.{END}\n<|im_start|>user\nWhy?{END}\n"
        f"<|im_start|>assistant\nSo.{END}"
    )
    assert learnt(tokenizer, [{"role": "system", "content": "Greet."}, said("Hello.")]) == [
        f"Hello.{END}"
    ]
    tools = {"role": "tools", "content": "[]"}
    assert [opening(m) for m in ([], talk, talk[1:], [tools, *talk], [tools, *talk[1:]])] == [
        0, 1, 0, 2, 1
    ]  # fmt: skip


def test_a_prompt_that_the_assistant_opens_is_known() -> None:
    """A reference behind a prefix or a rewriter reads another in its place."""
    talk = [said("Hello."), user("Why?"), said("So.")]
    told: list[object] = [{"type": "function", "function": {"name": "add"}}]
    rows: list[Row] = [{"messages": talk}, {"chosen": talk, "rejected": [*talk[:2], said("No.")]}]
    for row in rows:
        (unit,) = units(dpo if "chosen" in row else sft, made(TEMPLATE), row)
        assert unit.asked == talk[:2]
    (unit,) = units(sft, made(TOOLED + TEMPLATE), {"messages": talk, "tools": told})
    assert unit.asked == [{"role": "tools", "content": json.dumps(told)}, *talk[:2]]
    # Messages of the assistant's that are given as the prompt are one, and no opening.
    given: Row = {"prompt": talk[:1], "completion": [said("So."), user("Hm."), said("No.")]}
    (unit,) = units(sft, made(TEMPLATE), given)
    assert unit.asked is None


def test_sharegpt_that_begins_with_the_assistant_stays_usable() -> None:
    def turns(*who: str) -> Row:
        return {"conversations": [{"from": w, "value": f"{w}!"} for w in who]}

    rows = [turns("human", "gpt"), turns("gpt", "human", "gpt"), turns("gpt")]
    assert counted(sft, made(TEMPLATE), *rows) == {"left_out_unasked": 1}
    assert len(units(sft, made(TEMPLATE), *rows)) == 2
    assert counted(sft, made(STRICT + TEMPLATE), *rows) == {"left_out_unasked": 2}
    with pytest.raises(InputError, match="in 1 nothing is asked before the answer") as caught:
        units(sft, made(TEMPLATE), rows[2])
    assert "user's message" in caught.value.fix


def test_only_what_the_opening_makes_a_template_refuse_is_left_out_for_it() -> None:
    talk = [said("Hello."), user("Why?"), said("So.")]
    alone: Row = {"messages": talk}
    told: Row = {**alone, "tools": [{"name": "add"}]}
    # One that does not take the answer refuses it without the opening too.
    other = STRICT.replace("'assistant'", "'assistant' or messages[-1].content == 'So.'")
    for template, row, why in (
        (TEMPLATE, told, "does not write tools"),
        (STRICT + TEMPLATE, told, "does not write tools"),
        (other + TEMPLATE, alone, "refuses these messages"),
    ):
        with pytest.raises(InputError, match=why) as caught:
            units(sft, made(template), row)
        assert caught.value.where == "table row 1"
    good: Row = {"messages": talk[1:]}
    assert counted(sft, made(STRICT + TOOLED + TEMPLATE), told, good) == {"left_out_unasked": 1}


def test_pairs_of_answers_alone_are_left_out() -> None:
    good: Row = {"chosen": [user("Why?"), said("So.")], "rejected": [user("Why?"), said("No.")]}
    alone: Row = {"chosen": [said("So.")], "rejected": [said("No.")]}
    apart: Row = {"chosen": [said("Hi."), user("Why?"), said("So.")],
                  "rejected": [said("Ho."), user("Why?"), said("No.")]}  # fmt: skip
    greeted: Row = {n: [said("Hi."), *side] for n, side in good.items() if isinstance(side, list)}
    for function in (dpo, bradley_terry):
        found = counted(function, made(TEMPLATE), good, alone, apart, greeted)
        assert found == {"left_out_unasked": 2}
    (unit,) = units(dpo, made(TEMPLATE), greeted)
    rows = [(made(TEMPLATE).decode(list(i)), sum(m)) for i, m in unit.tree().rows()]
    assert [text.count("Hi.") for text, _ in rows] == [1, 1]
    assert [n for _, n in rows] == [len("So.") + 1, len("No.") + 1]


def test_a_prompt_of_nothing_is_told() -> None:
    with pytest.raises(InputError, match="nothing is asked before the answer"):
        prompt_ids(made(TEMPLATE), [])


# Answers that say nothing


@pytest.mark.parametrize("function", [sft, gkd])
def test_dialogues_of_empty_answers_are_left_out(function: Callable[..., object]) -> None:
    good: Row = {"messages": [user("Why?"), said("So.")]}
    empty: list[Row] = [
        {"messages": [user("Why?"), said("")]},
        {"messages": [user("Why?"), said(" \n")]},
        {"messages": [user("Why?"), said(""), user("Well?"), said("")]},
    ]
    assert counted(function, made(TEMPLATE), good, *empty) == {"left_out_empty": 3}
    thought: Row = {"messages": [user("Why?"), said("") | {"reasoning_content": "Hm."}]}
    assert counted(function, made(TEMPLATE), good, thought) == {"left_out_thought": 1}
    with pytest.raises(InputError, match="in 1 an answer is a thought alone"):
        units(function, made(TEMPLATE), thought)


def test_an_empty_turn_among_others_carries_no_loss() -> None:
    tokenizer = made(TEMPLATE)
    begun = [user("Why?"), said(""), user("Well?")]
    assert learnt(tokenizer, [*begun, said("So.")]) == [f"So.{END}"]
    ids, _ = example_ids(tokenizer, [*begun, said("So.")])
    assert f"assistant\n{END}\n<|im_start|>user\nWell?" in str(tokenizer.decode(ids))
    last = [user("Why?"), said("So."), user("Well?"), said("")]
    assert example_ids(tokenizer, last) == example_ids(tokenizer, last[:2])
    (unit,) = units(sft, tokenizer, {"messages": [*begun, said("So.")]})
    assert unit.asked == begun
    pair: Row = {"prompt": begun[:1], "chosen": [*begun[1:], said("So.")], "rejected": [said("")]}
    full: Row = {**pair, "rejected": [*begun[1:], said("No.")]}
    same: Row = {"chosen": last[:2], "rejected": last}
    found = counted(dpo, tokenizer, full, pair, same)
    assert found == {"left_out_empty": 1, "left_out_same": 1}
    assert [sum(m) for _, m in units(dpo, tokenizer, full)[0].tree().rows()] == [4, 4]


@pytest.mark.parametrize("content", ["", None, "Let me see."])
def test_calls_in_their_older_form_are_refused(content: str | None) -> None:
    older = said(content) | {"function_call": {"name": "add", "arguments": "{}"}}
    with pytest.raises(InputError, match="'function_call', the older form") as caught:
        Table("", [{"messages": [user("1+2?"), older]}])
    assert caught.value.where == "table row 1" and "as tool_calls" in caught.value.fix
    nulls = said("So.") | {"function_call": None}  # as Parquet fills it in
    Table("", [{"messages": [user("1+2?"), nulls]}])


# Calls of tools


@pytest.mark.parametrize("content", ["", None, "Let me see."])
def test_calls_that_the_template_drops_are_refused(content: str | None) -> None:
    talk = [user("1+2?"), said(content, call({"a": 1})), {"role": "tool", "content": "3"}]
    rows: list[Row] = [{"messages": talk[:2]}, {"messages": [*talk, said("3")]}]
    for row in rows:
        with pytest.raises(InputError, match="does not write calls of tools") as caught:
            units(sft, made(TEMPLATE), row)
        assert caught.value.where == "table row 1" and "content" in caught.value.fix
    with pytest.raises(InputError, match="does not write calls of tools"):
        prompt_ids(made(TEMPLATE), talk)
    # A template that reads calls of another form writes none of these.
    other = AS_TEXT.replace("c.function if c.function is defined else c", "c")
    with pytest.raises(InputError, match="does not write calls of tools"):
        units(sft, made(other.replace("f.name", "(f.name or '')")), rows[0])


@pytest.mark.parametrize(
    ("template", "given", "written"),
    [
        (ENCODED, '{"a": 1}', '{"a": 1}'),
        (ENCODED, {"a": 1}, '{"a": 1}'),
        (ENCODED, "", "{}"),
        (EITHER, '{"a":1}', '{"a":1}'),  # as it stands
        (EITHER, {"a": 1}, '{"a": 1}'),
        (AS_TEXT, '{"a":1}', '{"a":1}'),
        (LISTED, '{"a": 1}', "a=1"),
    ],
)
def test_arguments_are_encoded_once(template: str, given: object, written: str) -> None:
    tokenizer, answer = made(template), said("", call(given))
    for one in (answer, said("", {"name": "add", "arguments": given})):
        assert learnt(tokenizer, [user("1+2?"), one]) == [f"<call>add {written}</call>{END}"]
    assert answer == said("", call(given))  # the row stays as it is
    asked = [user("1+2?"), answer, {"role": "tool", "content": "3"}]
    assert f"<call>add {written}</call>" in str(tokenizer.decode(prompt_ids(tokenizer, asked)))


def test_arguments_that_are_no_object_are_refused() -> None:
    for text in ('{"a": 1', "[1]", json.dumps('{"a": 1}')):
        row: Row = {"messages": [user("1+2?"), said("", call(text))]}
        with pytest.raises(InputError, match="no JSON object") as caught:
            units(sft, made(ENCODED), row)
        assert caught.value.where == "table row 1"


# Texts in a template already


def test_texts_with_the_marks_of_a_turn_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    good: Row = {"prompt": "Why?", "completion": "So."}
    wrapped: Row = {"prompt": f"<|im_start|>user\nWhy?{END}\n", "completion": "So."}
    ended: Row = {"prompt": "Why?", "completion": f"So.{END}"}
    tokenizer = made(TEMPLATE)
    assert counted(sft, tokenizer, good) == {} and not capsys.readouterr().err
    assert counted(sft, tokenizer, good, wrapped, ended) == {"with_turn_marks": 2}
    told = capsys.readouterr().err
    assert "sft: warning: texts in 2 of 3 rows hold" in told and repr(END) in told
    talks: list[Row] = [{"messages": [user("Why?"), said(a)]} for a in ("So.", f"So.{END}")]
    assert counted(sft, tokenizer, *talks) == {"with_turn_marks": 1}
    pair: Row = {"prompt": "Why?", "chosen": "So.", "rejected": f"No.{END}"}
    assert counted(dpo, tokenizer, pair) == {"with_turn_marks": 1}
    # Whole texts bring the template along, and a model without one has its end token alone.
    assert counted(sft, tokenizer, {"text": f"<|im_start|>user\nWhy?{END}"}) == {}
    capsys.readouterr()
    assert counted(sft, made(None), good, wrapped, ended) == {"with_turn_marks": 2}
    told = capsys.readouterr().err
    assert f"hold {END!r}, which is put behind an answer anyway" in told and "templ" not in told
    prompts = Table("prompt", [{"prompt": r["prompt"]} for r in (good, wrapped)])
    capsys.readouterr()
    _, notes = read_prompts(prompts, tokenizer, 512, 8, "", "grpo")
    assert notes == {"rows": 2, "with_turn_marks": 1}
    assert "grpo: warning: texts in 1 of 2 rows hold" in capsys.readouterr().err


def test_a_template_that_always_asks_teaches_the_end_alone() -> None:
    tokenizer, plain = made(ALWAYS), made(TEMPLATE)
    assert (turn_of(tokenizer).tail, turn_of(tokenizer).behind) == (
        END, "\n<|im_start|>assistant\n"
    )  # fmt: skip
    assert turn_of(plain).behind == ""
    assert completion_ids(tokenizer, "So.") == completion_ids(plain, "So.")
    talk = [user("Why?"), said("So."), user("Well?"), said("No.")]
    assert example_ids(tokenizer, talk) == example_ids(plain, talk)
    assert learnt(tokenizer, talk) == [f"So.{END}", f"No.{END}"]
    answer = completion_ids(plain, "So.")
    assert reply_ids(tokenizer, talk[:3], answer) == reply_ids(plain, talk[:3], answer)


# Rows that are told to be wrong as they are read


@pytest.mark.parametrize(
    ("role", "meant"),
    [("human", "user"), ("User", "user"), ("gpt", "assistant"), ("model", "assistant"),
     ("Assistant", "assistant"), ("asistant", "assistant"), ("systm", "system"),
     ("Tool", "tool"), ("tools", "tool")],
)  # fmt: skip
def test_roles_that_templates_do_not_know(role: str, meant: str) -> None:
    for row in (
        {"prompt": [{"role": role, "content": "Why?"}]},
        {"messages": [user("Why?"), {"role": role, "content": "So."}]},
        {"chosen": [user("Why?"), said("So.")], "rejected": [{"role": role, "content": "No."}]},
    ):
        with pytest.raises(InputError, match=f"unknown role '{role}'") as caught:
            Table("", [{"prompt": "q", "messages": [user("a")]}, row] if "prompt" in row else [row])
        assert caught.value.fix == f"Did you mean {meant!r}?"


def test_roles_of_a_template_of_ones_own() -> None:
    """Mistral's reads "tool_results"; who else speaks is a template's matter."""
    for role in ("developer", "tool", "ipython", "tool_results", "document", "critic", "Holmes",
                 "user_2"):  # fmt: skip
        talk = [user("Why?"), {"role": role, "content": "Hm."}, said("So.")]
        for name in ("prompt", "messages"):
            Table("", [{name: talk}])
        ids, _ = example_ids(made(TEMPLATE), talk)
        assert f"<|im_start|>{role}\nHm.{END}" in str(made(TEMPLATE).decode(ids))


def test_messages_that_the_template_drops_are_refused() -> None:
    knows = "{% if m.role in ['system', 'user', 'assistant'] %}"
    drops = (
        "{% for m in messages %}" + knows + SAYS + "{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    )
    tokenizer = made(drops + ASKS)
    for role in ("developer", "critic"):
        talk = [{"role": role, "content": "Be brief."}, user("Why?"), said("So.")]
        with pytest.raises(InputError, match=f"does not write what '{role}' says") as caught:
            units(sft, tokenizer, {"messages": talk})
        assert caught.value.where == "table row 1"
        with pytest.raises(InputError, match=f"does not write what '{role}' says"):
            prompt_ids(tokenizer, talk[:2])
    # Words that are written in another form are there.
    coded = TEMPLATE.replace(
        "message['content']",
        "(message.content | tojson if message.role == 'tool' else message.content)",
    )
    talk = [user("Why?"), {"role": "tool", "content": 'a\n"b"'}, said("So.")]
    assert len(units(sft, made(coded), {"messages": talk})) == 1
    assert r'"a\n\"b\""' in str(made(coded).decode(prompt_ids(made(coded), talk[:2])))


def test_messages_of_tools_list_schemas() -> None:
    """A tool's answer under that role would be taken for functions that may be called."""
    told = json.dumps([{"type": "function", "function": {"name": "add"}}])
    Table("", [{"prompt": [{"role": "tools", "content": told}, user("1+2?")]}])
    for content in ("3", "[3]", '[{"sum": 3}]', "[]"):
        with pytest.raises(InputError, match="unknown role 'tools'") as caught:
            Table("", [{"prompt": [user("1+2?"), {"role": "tools", "content": content}]}])
        assert caught.value.fix == "Did you mean 'tool'?"


@pytest.mark.parametrize(
    ("answer", "told"),
    [(3, "Write every answer as a text"), (None, "an empty text"),
     ([said("So.")], "its last message"), ({"response": "So.", "model": "x"}, "'response' holds")],
)  # fmt: skip
def test_answers_of_groups_are_texts(answer: object, told: str) -> None:
    row: Row = {"prompt": "Why?", "completions": ["So.", answer], "scores": [1.0, 0.0]}
    with pytest.raises(InputError, match=r"the 2\. of them") as caught:
        Table("", [row])
    assert caught.value.where == "table row 1" and told in caught.value.fix
    assert Table("", [row | {"completions": ["So.", ""]}]).kind == "group"


def test_labels_of_ones_and_noughts() -> None:
    row: Row = {"prompt": "Why?", "completion": "So."}
    table = Table("", [{**row, "label": n} for n in (1, 0, True, False)])
    assert [r["label"] for r in table] == [True, False, True, False]
    assert [type(r["label"]) for r in table] == [bool] * 4
    assert table[0]["id"] == table[2]["id"]  # the same row
    for wrong in (2, -1, 0.5):
        with pytest.raises(InputError, match="'label' must be bool"):
            Table("", [{**row, "label": wrong}])


@pytest.mark.parametrize(
    ("name", "given", "said_", "example"),
    [
        ("grpo", {"rewards": "max_words"}, "'rewards': must be a mapping",
         "{short: {use: max_words, n: 40}}"),
        ("grpo", {"rewards": {"short": "max_words"}}, "'rewards', entry 'short': must be a mapping",
         "{short: {use: max_words, n: 40}}"),
        ("grpo", {"environment": "running_sum"}, "'environment': must be a mapping",
         "{use: running_sum}"),
        ("sft", {"mix": ["ipo"]}, "'mix': must be a mapping", "{sft: 0.5}"),
    ],
)  # fmt: skip
def test_wrongly_shaped_settings_show_an_example(
    name: str, given: dict[str, object], said_: str, example: str
) -> None:
    with pytest.raises(InputError) as caught:
        methods[name].validate(given)
    assert caught.value.message.startswith(f"setting {said_}")
    assert caught.value.fix.endswith(f"such as {example}")
