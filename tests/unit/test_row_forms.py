"""Rows in the forms that TRL and the Hugging Face hub have: what they become, token by token."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from truing.core.batch.reading import read_units
from truing.core.batch.row_kinds import CONVERSIONS, as_kind, is_taken, takes_texts
from truing.core.batch.training_rows import Reader, Unit
from truing.core.chat import chat_text, example_ids, prompt_ids, writes_tools
from truing.core.drawing import Local
from truing.core.objective import Objective, objective_of
from truing.core.passes.scoring import answer_logps
from truing.core.rl.online_prompts import read_prompts
from truing.core.tiny import TEMPLATE, tiny_tokenizer
from truing.core.trainer.preflight import check_rows
from truing.core.training import Hook
from truing.errors import InputError
from truing.evaluate.preference import preference
from truing.kinds import as_prompt, check_texts, prompt_of, told
from truing.method import methods
from truing.models import Model
from truing.plan import Plan
from truing.readings import single_answer
from truing.select.scorers import column
from truing.tables import Row, Table
from truing.train.preference.dpo import dpo
from truing.train.preference.kto import kto
from truing.train.preference.tpo import tpo
from truing.train.reward.process_reward import process_reward
from truing.train.supervised.sft import neftune, sft

TOKENIZER = tiny_tokenizer()
HEAD, END = "<|im_start|>{}\n", "<|im_end|>"


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(function: object, *rows: Row) -> list[Unit]:
    """Units of rows, converted as training does."""
    spec = objective_of(function)
    table, _ = as_kind(Table("", rows), spec.rows, spec.name, texts=takes_texts(spec))
    return Reader(TOKENIZER, spec, 512).read(table)


def pieces(unit: Unit) -> list[tuple[list[int], list[bool]]]:
    return [(list(i), list(m)) for i, m in unit.tree().rows()]


def marked(*parts: tuple[str, bool]) -> tuple[list[int], list[bool]]:
    """Ids and marks of texts by hand."""
    return (
        [i for text, _ in parts for i in ids(text)],
        [mark for text, mark in parts for _ in ids(text)],
    )


ASKED = f"{HEAD.format('user')}Why?{END}\n{HEAD.format('assistant')}"


# Completions that are messages


def test_a_completion_of_one_message_is_its_text() -> None:
    rows: list[Row] = [
        {"prompt": [user("Why?")], "completion": [said("So.")]},
        {"prompt": "Why?", "completion": [said("So.")], "weight": 2.0},
    ]
    table = Table("", rows)
    assert table.kind == "dialogue_example"
    made, notes = as_kind(table, "example", "sft")
    assert notes == {"conversion": "single answers of dialogues as texts"}
    assert [r["completion"] for r in made] == ["So.", "So."] and made[1]["weight"] == 2.0
    want = marked((ASKED, False), (f"So.{END}", True))
    assert [pieces(u) for u in read(sft, *rows)] == [[want], [want]]


def test_of_a_completion_of_several_messages_its_answers_carry_loss() -> None:
    row: Row = {
        "prompt": [user("Why?"), said("So."), user("And?")],
        "completion": [said("Thus."), user("Hm."), said("Yes.")],
    }
    head = f"{ASKED}So.{END}\n{HEAD.format('user')}And?{END}\n{HEAD.format('assistant')}"
    more = f"\n{HEAD.format('user')}Hm.{END}\n{HEAD.format('assistant')}"
    want = marked((head, False), (f"Thus.{END}", True), (more, False), (f"Yes.{END}", True))
    assert pieces(read(sft, row)[0]) == [want]
    empty = {**row, "completion": [said(" ")]}
    with pytest.raises(InputError, match="left_out_empty"):
        read(sft, {**empty, "completion": [*empty["completion"], user("x"), said(" ")]})


def test_judged_answers_of_one_message_teach_kto() -> None:
    rows: list[Row] = [
        {"prompt": [user("Why?")], "completion": [said(t)], "label": t == "So."}
        for t in ("So.", "No.")
    ]
    assert Table("", rows).kind == "dialogue_unpaired"
    good, bad = read(kto, *rows)
    assert good.answers == (tuple(ids(f"So.{END}")),) and good.prompt == tuple(ids(ASKED))
    assert (good.numbers["label"], bad.numbers["label"]) == (1.0, 0.0)
    kept, notes = as_kind(Table("", rows), "example", "sft")
    assert [r["completion"] for r in kept] == ["So."] and notes["left_out_bad"] == 1
    with pytest.raises(InputError, match=r"kto table row 1: needs single answers.*turns before"):
        as_kind(Table("", [{**rows[0], "completion": [said("a"), user("b"), said("c")]}]),
                "unpaired", "kto")  # fmt: skip


def test_a_call_of_a_tool_is_not_only_its_text() -> None:
    call = {**said(""), "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    row: Row = {"prompt": "Why?", "completion": [call], "label": True}
    with pytest.raises(InputError, match="single answers"):
        Table("", [row]).expect("unpaired")


def test_steps_that_are_called_completions() -> None:
    row: Row = {"prompt": "2+3?", "completions": ["Add.", "5"], "labels": [True, False]}
    assert Table("", [row]).kind == "stepwise"
    spec = objective_of(process_reward)
    table, notes = as_kind(Table("", [row]), "steps", "prm")
    assert notes == {"conversion": "completions as steps"} and "completions" not in table[0]
    (unit,) = Reader(TOKENIZER, spec, 512).read(table)
    assert unit.numbers["labels"] == [1.0, 0.0] and sum(pieces(unit)[0][1]) == 2


# Whole texts


def test_all_of_a_text_carries_loss_but_its_first_token(tiny_path: Path) -> None:
    (unit,) = read(sft, {"text": "One two."})
    want = ids(f"One two.{END}")
    assert pieces(unit) == [(want, [False] + [True] * (len(want) - 1))]
    (again,) = read(neftune, {"text": f"One two.{END}"})  # has its end already
    assert pieces(again) == pieces(unit)
    loaded = Model.open(tiny_path).load_module()
    units, notes = read_units(
        objective_of(sft), loaded, Table("", [{"text": "One two."}]), 6, Hook()
    )
    assert notes == {
        "rows": 1, "cut": 1, "conversion": "whole texts: every token carries loss",
    }  # fmt: skip
    assert units[0].tree().ids == tuple(want[:6])
    with pytest.raises(InputError, match="left_out_empty"):
        read(sft, {"text": " \n"})


def test_texts_are_refused_where_prompts_are_needed() -> None:
    texts = Table("", [{"text": "One."}])
    takes = {
        name
        for name, method in methods.items()
        if method.entry.kind == "objective" and takes_texts(objective_of(method.declared))
    }
    assert {"train/sft", "train/dft", "train/neftune", "train/forward_kl"} <= takes
    assert not {"train/dpo", "train/gkd_on_policy", "train/mixture_of_instructions"} & takes
    check_rows(texts, "example", "sft", texts=True)
    for kind in ("example", "pair"):
        with pytest.raises(InputError, match=f"needs rows of kind {kind}, got 'text'"):
            as_kind(texts, kind, "x")
        assert not is_taken("text", kind)
        with pytest.raises(InputError):
            check_rows(texts, kind, "x")


# Pairs without a prompt


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: why?\nA: so it is", "Q: why?\nA: not it", "Q: why?\nA:"),
        ("The sky is blue", "The sky is black", "The sky is"),  # never within a word
        ("a b", "a b c", "a"),  # an answer is never empty
        ("Why?\nyes", "Why?\nno", "Why?\n"),
        (
            "\n\nHuman: hi\n\nAssistant: I am well",
            "\n\nHuman: hi\n\nAssistant: I am not",
            "\n\nHuman: hi\n\nAssistant:",
        ),
    ],
)
def test_what_both_texts_begin_with_is_the_prompt(chosen: str, rejected: str, prompt: str) -> None:
    table = Table("", [{"chosen": chosen, "rejected": rejected, "task": "t"}])
    assert table.kind == "implicit_pair"
    made, notes = as_kind(table, "pair", "dpo")
    assert notes == {"conversion": "what both answers begin with as the prompt"}
    row = made[0]
    assert row["prompt"] == prompt and row["task"] == "t"
    assert (f"{prompt}{row['chosen']}", f"{prompt}{row['rejected']}") == (chosen, rejected)
    assert table.expect("pair")[0]["chosen"] == row["chosen"]
    both, notes = as_kind(table, "unpaired", "kto")
    assert [(r["completion"], r["label"]) for r in both] == [
        (row["chosen"], True), (row["rejected"], False),
    ]  # fmt: skip
    assert str(notes["conversion"]).startswith("what both answers begin with as the prompt; chosen")


def test_rows_that_ask_under_another_name_are_no_pairs_without_a_prompt() -> None:
    pair: Row = {"chosen": "I think so", "rejected": "I think not"}
    assert Table("", [{"question": "Why?", **pair}]).kind == "record"
    assert Table("", [{"messages": [user("Why?")], **pair}]).kind == "example"
    assert Table("", [{"source": "x", **pair}]).kind == "implicit_pair"


def test_rows_that_do_not_read_so_are_told_before_a_model_is_opened() -> None:
    several = [*SHARED, said("Thus."), user("Hm."), said("Yes.")]
    dialogues = Table("", [DIALOGUES, {**DIALOGUES, "chosen": several}])
    for kind in ("unpaired", "group"):
        with pytest.raises(InputError, match=r"kto table row 2: needs single answers"):
            check_rows(dialogues, kind, "kto")
    check_rows(dialogues, "pair", "dpo")
    check_rows(dialogues, "example", "sft")
    with pytest.raises(InputError, match=r"dpo table row 1: chosen and rejected begin"):
        check_rows(Table("", [{"chosen": "Yes", "rejected": "No"}]), "pair", "dpo")


def test_texts_that_tell_no_prompt() -> None:
    with pytest.raises(InputError, match=r"row 2: .*nothing alike.*column 'prompt'"):
        as_kind(
            Table("", [{"chosen": "a b", "rejected": "a c"}, {"chosen": "Yes", "rejected": "No"}]),
            "pair", "dpo",
        )  # fmt: skip
    same = {"chosen": "Yes", "rejected": "Yes"}
    rows = [{"chosen": "a b", "rejected": "a c"}, same]
    for kind in ("unpaired", "example", "group"):
        assert as_kind(Table("", rows), kind, "x")[1]["left_out_same"] == 1
    assert len(read(dpo, *rows)) == 1


# Pairs of dialogues


SHARED = [user("Why?"), said("So."), user("And?")]
DIALOGUES: Row = {
    "chosen": [*SHARED, said("Thus.")], "rejected": [*SHARED, said("No.")], "weight": 0.5,
}  # fmt: skip


# As examples all turns of a dialogue are learnt, not the last alone.
LAST = [kind for given, kind in CONVERSIONS if given == "dialogue_pair" and kind != "example"]


@pytest.mark.parametrize("to", LAST)
def test_pairs_of_dialogues_become_what_pairs_of_texts_do(to: str) -> None:
    texts: Row = {"prompt": SHARED, "chosen": "Thus.", "rejected": "No.", "weight": 0.5}
    made, notes = as_kind(Table("", [DIALOGUES]), to, "x")
    want, said_of = as_kind(Table("", [texts]), to, "x")
    assert [{k: v for k, v in r.items() if k != "id"} for r in made] == [
        {k: v for k, v in r.items() if k != "id"} for r in want
    ]
    assert notes["conversion"] == f"single answers of dialogues as texts; {said_of['conversion']}"


def test_a_prompt_is_told_once() -> None:
    """UltraFeedback's sides begin with the prompt that stands beside them."""
    row: Row = {
        "prompt": "Why?", "chosen": [user("Why?"), said("So.")],
        "rejected": [user("Why?"), said("No.")],
    }  # fmt: skip
    (unit,) = read(dpo, row)
    want = [marked((ASKED, False), (f"{t}{END}", True)) for t in ("So.", "No.")]
    assert pieces(unit) == want
    assert Table("", [row]).expect("pair")[0]["prompt"] == [user("Why?")]
    learnt, _ = as_kind(Table("", [row]), "example", "sft")
    assert learnt[0]["messages"] == row["chosen"]
    led = {n: [{"role": "system", "content": "s"}, *row[n]] for n in ("chosen", "rejected")}  # type: ignore[misc]
    assert pieces(read(dpo, {**row, **led})[0])[0][0].count(ids("W")[0]) == 1
    # Beside a prompt that they do not begin with, sides follow it.
    other = read(dpo, {**row, "prompt": "Who?"})[0]
    assert TOKENIZER.decode(other.tree().ids).count("<|im_start|>") >= 2


def test_objectives_with_further_texts_take_single_answers() -> None:
    (unit,) = read(tpo, {**DIALOGUES, "gold": "Best."})
    (want,) = read(tpo, {"prompt": SHARED, "chosen": "Thus.", "rejected": "No.", "gold": "Best."})
    assert unit.tree() == want.tree()


def test_preference_measures_single_answers_of_dialogues(tiny_path: Path) -> None:
    model = Model.open(tiny_path)
    texts = {"prompt": SHARED, "chosen": "Thus.", "rejected": "No."}
    one, two = (preference(model, Table("", [row])) for row in (DIALOGUES, texts))
    assert one.get("margin").value == two.get("margin").value != 0
    assert one.samples is not None and one.samples[0]["chosen"] == "Thus."
    implicit = preference(model, Table("", [{"chosen": "a b", "rejected": "a c"}]))
    alone = {"prompt": "a", "chosen": " b", "rejected": " c"}
    assert implicit.get("margin").value == preference(model, Table("", [alone])).get("margin").value


# Tools


TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}},
}
WITH_TOOLS = (
    "{% if tools %}[{% for t in tools %}{{ t | tojson }}{% endfor %}]\n{% endif %}" + TEMPLATE
)
TOLD = f"[{json.dumps(TOOL)}]\n"


def tooled() -> object:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = WITH_TOOLS
    return tokenizer


@pytest.mark.parametrize("given", [[TOOL], json.dumps([TOOL]), [{**TOOL, "strict": None}]])
def test_tools_are_told_in_every_form_of_row(given: object) -> None:
    tokenizer = tooled()
    spec = objective_of(sft)
    answer = ids(f"So.{END}")
    forms: list[Row] = [
        {"prompt": "Why?", "completion": "So."},
        {"prompt": "Why?", "completion": [said("So.")]},
        {"messages": [user("Why?"), said("So.")]},
    ]
    for row in forms:
        table, _ = as_kind(Table("", [{**row, "tools": given}]), "example", "sft")
        (unit,) = Reader(tokenizer, spec, 512).read(table)  # type: ignore[arg-type]
        ((found, loss),) = pieces(unit)
        assert TOKENIZER.decode(found) == f"{TOLD}{ASKED}So.{END}"
        assert [i for i, mark in zip(found, loss, strict=True) if mark] == answer
    pair: Row = {"prompt": "Why?", "chosen": [said("So.")], "rejected": [said("No.")]}
    spec = objective_of(dpo)
    for row in (pair, {**pair, "chosen": "So.", "rejected": "No."}):
        (unit,) = Reader(tokenizer, spec, 512).read(Table("", [{**row, "tools": given}]))  # type: ignore[arg-type]
        assert [TOKENIZER.decode(i) for i, _ in pieces(unit)] == [
            f"{TOLD}{ASKED}{t}{END}" for t in ("So.", "No.")
        ]


def test_models_are_asked_with_their_tools(tiny_path: Path) -> None:
    row: Row = {"prompt": "Why?", "tools": [TOOL]}
    model = Model.open(tiny_path)
    loaded = model.load_module()
    plain = loaded.tokenizer.chat_template
    loaded.tokenizer.chat_template = WITH_TOOLS
    try:
        want = ids(f"{TOLD}{ASKED}")
        asked = as_prompt(row)
        assert as_prompt(asked)["prompt"] == asked["prompt"] == prompt_of(row)
        assert Local(model, None)._ids([asked["prompt"]], None) == [want]  # type: ignore[list-item]
        (one,), _ = read_prompts(Table("", [row]), loaded.tokenizer, 512, 8, "", "grpo")
        assert list(one.ids) == want
        answered = {**row, "completion": "So."}
        with_tools, bare = ([answered], [{"prompt": "Why?", "completion": "So."}])
        told = answer_logps(loaded, [*with_tools, *bare])
        loaded.tokenizer.chat_template = TOLD.replace("{", "{{ '{' }}") + TEMPLATE  # by hand
        assert answer_logps(loaded, bare)[0] == pytest.approx(told[0], abs=1e-5)
        assert abs(told[0] - told[1]) > 1e-3
        loaded.tokenizer.chat_template = WITH_TOOLS
        system = {"role": "system", "content": "Be kind."}
        led = prompt_of({**row, "prompt": [system, user("Why?")]})
        assert [m["role"] for m in led] == ["system", "tools", "user"]  # type: ignore[attr-defined]
        for messages in (led, [system, *asked["prompt"]]):  # type: ignore[misc]
            text = chat_text(loaded.tokenizer, messages, answer=True)  # type: ignore[arg-type]
            assert text == f"{TOLD}{HEAD.format('system')}Be kind.{END}\n{ASKED}"
    finally:
        loaded.tokenizer.chat_template = plain


def test_a_template_that_leaves_tools_out_is_refused() -> None:
    assert writes_tools(tooled()) and not writes_tools(TOKENIZER)  # type: ignore[arg-type]
    row: Row = {"prompt": "Why?", "completion": "So.", "tools": [TOOL]}
    with pytest.raises(InputError, match=r"does not write tools.*leave out the column 'tools'"):
        read(sft, row)
    assert read(sft, {**row, "tools": []})[0].prompt == tuple(ids(ASKED))
    for wrong in ("hammer", ["hammer"], {"a": 1}, 3):
        with pytest.raises(InputError, match="'tools' must be a list of JSON schemas"):
            read(sft, {**row, "tools": wrong})


def test_a_dialogue_of_several_turns_has_its_tools_once() -> None:
    turns = [user("Why?"), said("So."), user("And?"), said("Yes.")]
    asked = told(turns, {"tools": [TOOL]})
    found, loss = example_ids(tooled(), asked)  # type: ignore[arg-type]
    assert TOKENIZER.decode(found).count('"add"') == 1
    assert sum(loss) == len(ids(f"So.{END}")) + len(ids(f"Yes.{END}"))
    assert prompt_ids(tooled(), asked[:-1]) == found[: -len(ids(f"Yes.{END}"))]  # type: ignore


# CSV


def test_a_label_that_judges_nothing_is_a_class(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("text,label\nGood film.,positive\nBad film.,negative\n")
    assert [r["label"] for r in Table.read(path)] == ["positive", "negative"]
    path.write_text("text,label\nGood film.,2\nBad film.,0\n")
    assert [r["label"] for r in Table.read(path)] == [2, 0]
    path.write_text("prompt,completion,label\na,b,1\na,c,false\n")
    assert [r["label"] for r in Table.read(path)] == [True, False]
    path.write_text("prompt,completion,label\na,b,maybe\n")
    with pytest.raises(InputError, match=r"row 2.*'label' must be true or false"):
        Table.read(path)


def test_columns_of_numbers_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "prompt,completion,final,weight,zip,mixed,huge\n"
        "1,2,3,0.5,007,4,1e400\n3,4,-5,,010,four,1\n5,6,0,1e-2,111,,2\n"
    )
    table = Table.read(path)
    for row in table:
        assert isinstance(row["prompt"], str) and isinstance(row["completion"], str)
    assert column(list(table), name="final") == [3.0, -5.0, 0.0]
    assert [r.get("weight") for r in table] == [0.5, None, 0.01]
    assert [r["zip"] for r in table] == ["007", "010", "111"]
    assert [r["mixed"] for r in table] == ["4", "four", ""]
    assert [r["huge"] for r in table] == ["1e400", "1", "2"]
    # The same however much of it is taken.
    assert Table.read(path, limit=1)[0] == table[0]
    (unit, *_) = Reader(TOKENIZER, Objective("w", sft, "token", ("logp",), "example",
                                             {"weight": 1.0}), 64).read(table)  # fmt: skip
    assert unit.numbers == {"weight": 0.5}


def test_a_set_of_the_hub_is_told_how_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(InputError, match=r"no such file. .*written hub:owner/set$"):
        Table.read("owner/set")
    plan = Plan("p", folder=tmp_path)
    plan.step("some", "select/sample", data="owner/set", n=1)
    with pytest.raises(InputError, match=r"called 'owner/set'. .*written hub:owner/set$"):
        plan.check()
    for path in ("owner/set.jsonl", "/owner/set", "a/b/c", "here/set"):
        with pytest.raises(InputError) as error:
            Table.read(path)
        assert "hub:" not in str(error.value)


def test_arrays_of_several_shapes_come_back(tmp_path: Path) -> None:
    arrays = [np.arange(6, dtype=np.uint8).reshape(2, 3), None, np.zeros((0, 4)), np.float32([1.5])]
    table = Table("record", [{"n": i, "pixels": a} for i, a in enumerate(arrays)])
    back = Table.read(table.write(tmp_path / "t.parquet"))
    assert back.key == table.key and "pixels" not in back[1]
    for row, array in zip(back, arrays, strict=True):
        if array is not None:
            found = row["pixels"]
            assert isinstance(found, np.ndarray) and found.dtype == array.dtype
            assert found.shape == array.shape and (found == array).all()
            found += 0  # memory of its own
    assert back.to_arrow().schema.field("pixels").metadata == {b"truing": b"npy"}
    for wrong in ("x", np.array([{}])):
        with pytest.raises(InputError, match="column 'pixels' holds arrays of numbers and other"):
            Table("record", [{"pixels": arrays[0]}, {"pixels": wrong}]).to_arrow()


# The forms of LLaMA-Factory


def test_alpaca_rows_are_examples_and_pairs() -> None:
    rows: list[Row] = [
        {"instruction": "Why?", "input": "", "output": "So.", "text": "### Instruction: Why?"},
        {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief.",
         "history": [["Why?", "So."]]},
    ]  # fmt: skip
    table = Table("", rows)
    assert table.kind == "alpaca"
    made, notes = as_kind(table, "example", "sft")
    assert notes == {"conversion": "instruction and input as the prompt"}
    assert (made[0]["prompt"], made[0]["completion"]) == ("Why?", "So.")
    system = {"role": "system", "content": "Be brief."}
    assert made[1]["prompt"] == [system, user("Why?"), said("So."), user("Add.\n1 2")]
    want = marked((ASKED, False), (f"So.{END}", True))
    assert pieces(read(sft, rows[0])[0]) == [want]
    assert table.expect("prompt")[0]["prompt"] == "Why?"
    pair: Row = {"instruction": "Why?", "chosen": "So.", "rejected": "No."}
    assert Table("", [pair]).kind == "alpaca_pair"
    assert Table("", [pair]).expect("pair")[0]["prompt"] == "Why?"


def test_sharegpt_rows_are_dialogues() -> None:
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    table = Table("", [{"conversations": turns, "source": "x"}])
    assert table.kind == "sharegpt"
    assert pieces(read(sft, {"conversations": turns})[0]) == [
        marked((ASKED, False), (f"So.{END}", True))
    ]
    assert table.expect("prompt")[0]["messages"] == [user("Why?"), said("So.")]
    odd = Table("", [{"conversations": [*turns, {"from": "narrator", "value": "1"}]}])
    with pytest.raises(InputError, match=r"row 1.*turns of 'narrator'"):
        odd.expect("example")


def turn(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


def test_calls_of_tools_and_roles_in_conversations() -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    turns = [turn("human", "Add."), turn("function_call", json.dumps(call)),
             turn("observation", "3"), turn("gpt", "It is 3.")]  # fmt: skip
    called = {"role": "assistant", "content": None,
              "tool_calls": [{"type": "function", "function": call}]}  # fmt: skip
    table = Table("", [{"conversations": turns, "tools": json.dumps([call])}]).expect("example")
    result = {"role": "tool", "content": "3"}
    assert table[0]["messages"] == [user("Add."), called, result, said("It is 3.")]
    named = Table("", [{"conversations": [user("Why?"), said("So.")]}])
    assert named.kind == "sharegpt"
    assert named.expect("example")[0]["messages"] == [user("Why?"), said("So.")]
    turns[1] = turn("function_call", "add(1)")
    with pytest.raises(InputError, match=r"row 1.*no JSON"):
        Table("", [{"conversations": turns}]).expect("example")


def test_preferences_of_conversations_and_of_openai() -> None:
    spoken: Row = {"conversations": [turn("human", "Why?")], "chosen": turn("gpt", "So."),
                   "rejected": turn("gpt", "No.")}  # fmt: skip
    told: Row = {"messages": [user("Why?")], "chosen": said("So."), "rejected": said("No.")}
    outputs: Row = {"input": {"messages": [user("Why?")], "tools": [], "parallel_tool_calls": True},
                    "preferred_output": [said("So.")],
                    "non_preferred_output": [said("No.")]}  # fmt: skip
    (want,) = read(dpo, {"prompt": [user("Why?")], "chosen": "So.", "rejected": "No."})
    pairs = ((spoken, "sharegpt_pair"), (told, "sharegpt_pair"), (outputs, "openai_pair"))
    for row, kind in pairs:
        assert Table("", [row]).kind == kind
        (unit,) = read(dpo, row)
        assert (unit.prompt, unit.answers) == (want.prompt, want.answers)
        assert prompt_of(Table("", [row]).expect("prompt")[0]) == [user("Why?")]
    assert Table("", [{**outputs, "input": "Why?"}]).kind == "record"
    (kept,) = as_kind(Table("", [told]), "example", "sft")[0]
    assert kept["prompt"] == [user("Why?")] and kept["completion"] == "So."


TAGGED: list[Row] = [
    {"messages": [user("Why?"), said("{}")], "label": True},
    {"instruction": "Why?", "input": "", "output": "{}", "kto_tag": True},
    {"conversations": [turn("human", "Why?"), turn("gpt", "{}")], "kto_tag": True},
]


@pytest.mark.parametrize("row", TAGGED, ids=["messages", "alpaca", "sharegpt"])
def test_answers_that_are_marked_as_bad_are_not_imitated(row: Row) -> None:
    mark = "label" if "label" in row else "kto_tag"
    rows: list[Row] = [
        {**json.loads(json.dumps(row).replace("{}", text)), mark: text == "So."}
        for text in ("So.", "No.")
    ]
    good, bad = read(kto, *rows)
    assert good.answers == (tuple(ids(f"So.{END}")),) and good.prompt == tuple(ids(ASKED))
    assert (good.numbers["label"], bad.numbers["label"]) == (1.0, 0.0)
    kept, notes = as_kind(Table("", rows), "example", "sft")
    answers = [r["messages"][-1]["content"] if "messages" in r else r["completion"] for r in kept]
    assert answers == ["So."] and notes["left_out_bad"] == 1


def test_all_answers_of_a_good_dialogue_are_learnt() -> None:
    turns = [user("Why?"), said("So."), user("And?"), said("No.")]
    rows: list[Row] = [{"prompt": "Why?", "messages": turns, "label": True}]
    kept, _ = as_kind(Table("", rows), "example", "sft")
    assert kept[0]["messages"] == turns
    assert Table("", rows).expect("unpaired")[0]["completion"] == "No."
    asks: list[Row] = [{"messages": turns[:3], "label": True}]
    assert as_kind(Table("", asks), "example", "sft")[0][0]["messages"] == turns[:3]
    for nothing in (math.nan, False, []):
        check_texts({"prompt": "Why?", "images": nothing})


def test_a_label_of_another_sort_judges_no_dialogue() -> None:
    for label in ("toxic", 1):
        assert Table("", [{**TAGGED[0], "label": label}]).kind == "example"
    asks = {"messages": [said("So."), user("Why?")], "label": True}
    with pytest.raises(InputError, match=r"row 1.*end with an answer in words"):
        Table("", [asks]).expect("unpaired")


# What stands beside what is asked


@pytest.mark.parametrize(
    "row",
    [{"messages": [user("Why?"), said("So.")]},
     {"conversations": [turn("human", "Why?"), turn("gpt", "So.")]},
     {"messages": [user("Why?"), {**said(""), "tool_calls": [{"function": {"name": "f"}}]}]}],
)  # fmt: skip
def test_messages_are_asked_without_the_answer_that_they_end_with(row: Row) -> None:
    table = Table("", [row]).expect("prompt")
    assert prompt_of(table[0]) == as_prompt(table[0])["prompt"] == [user("Why?")]
    (asked,), _ = read_prompts(table, TOKENIZER, 512, 8, "", "grpo data")
    assert asked.ids == tuple(prompt_ids(TOKENIZER, [user("Why?")]))
    forced = [user("Why?"), said("So")]
    assert prompt_of({"prompt": forced}) == forced


def test_images_and_words_to_the_template_are_refused() -> None:
    example: Row = {"messages": [user("Why?"), said("So.")]}
    rows: list[tuple[object, Row]] = [
        (sft, example), (sft, {"text": "One."}), (sft, {"prompt": "Why?", "completion": "So."}),
        (dpo, {"prompt": "Why?", "chosen": "So.", "rejected": "No."}),
        (dpo, {"chosen": [user("a"), said("b")], "rejected": [user("a"), said("c")]}),
    ]  # fmt: skip
    unread: list[tuple[Row, str]] = [
        ({"images": ["a.png"]}, "row 1: column 'images' holds"),
        ({"image": np.zeros((2, 2))}, "row 1: column 'image' holds"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, r"with \?thinking=true"),
    ]
    for more, words in unread:
        for function, row in rows:
            with pytest.raises(InputError, match=words):
                read(function, row | more)
        with pytest.raises(InputError, match=words):
            asked = Table("", [{"prompt": "Why?", **more}])
            read_prompts(asked, TOKENIZER, 512, 8, "", "grpo data")
    nothing: Row = {"images": [], "chat_template_kwargs": {"enable_thinking": None}}
    assert [pieces(u) for u in read(sft, example | nothing)] == [pieces(read(sft, example)[0])]


def test_muted_turns_are_context() -> None:
    talk = [
        user("Why?"),
        {**said("So."), "weight": 0},
        user("And?"),
        {**said("Thus."), "weight": 1},
    ]
    spoken = [turn("human", "Why?"), {**turn("gpt", "So."), "train": False},
              turn("human", "And?"), {**turn("gpt", "Thus."), "train": True}]  # fmt: skip
    head = f"{ASKED}So.{END}\n{HEAD.format('user')}And?{END}\n{HEAD.format('assistant')}"
    want = marked((head, False), (f"Thus.{END}", True))
    rows: list[Row] = [
        {"messages": talk}, {"conversations": spoken}, {"prompt": "Why?", "completion": talk[1:]},
    ]  # fmt: skip
    for row in rows:
        assert pieces(read(sft, row)[0]) == [want]
    for row in ({"messages": talk[:2]}, {"prompt": "Why?", "completion": talk[1:2]}):
        with pytest.raises(InputError, match="left_out_muted"):
            read(sft, row)
    assert single_answer(talk[1:2]) is None and single_answer(talk[3:]) == "Thus."


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("function", "row", "column"),
    [(sft, {"messages": [user("Why?"), said("So.")]}, "messages"),
     (sft, {"prompt": "Why?", "completion": "So."}, "prompt"),
     (sft, {"prompt": "Why?", "completion": [said("So."), user("Hm."), said("Yes.")]}, "prompt"),
     (dpo, {"prompt": "Why?", "chosen": "So.", "rejected": "No."}, "prompt"),
     (dpo, {"prompt": "Why?", "chosen": [said("So.")], "rejected": [said("No.")]}, "prompt"),
     (kto, {"prompt": "Why?", "completion": "So.", "label": True}, "prompt")],
)  # fmt: skip
def test_a_column_system_is_the_first_message(function: object, row: Row, column: str) -> None:
    given = row[column]
    whole = [SYSTEM, *(given if isinstance(given, list) else [user(str(given))])]
    want = [pieces(u) for u in read(function, {**row, column: whole})]
    assert [pieces(u) for u in read(function, {**row, "system": "Be brief."})] == want
    assert [
        pieces(u) for u in read(function, {**row, column: whole, "system": "Be brief."})
    ] == want
    with pytest.raises(InputError, match="another text in column 'system'"):
        read(function, {**row, column: whole, "system": "Be long."})


def test_what_is_asked_has_its_system_text_once() -> None:
    row: Row = {"prompt": "Why?", "system": "Be brief.", "id": "7"}
    assert (
        as_prompt(row) == as_prompt(as_prompt(row)) == {"id": "7", "prompt": [SYSTEM, user("Why?")]}
    )
    (asked,), _ = read_prompts(Table("", [row]), TOKENIZER, 512, 8, "", "grpo data")
    assert asked.ids == tuple(prompt_ids(TOKENIZER, [SYSTEM, user("Why?")]))
    pair: Row = {"chosen": [user("Why?"), said("So.")], "rejected": [user("Why?"), said("No.")]}
    led = {name: [SYSTEM, *side] for name, side in pair.items()}  # type: ignore[misc]
    units = read(dpo, {**pair, "system": "Be brief."}, led)
    assert pieces(units[0]) == pieces(units[1])


@pytest.mark.parametrize(
    ("row", "told"),
    [({"instruction": "a", "output": "b", "history": ["abc"]}, "pairs of texts"),
     ({"instruction": "a", "output": "b", "history": [["q", None]]}, "pairs of texts"),
     ({"conversations": [{"from": "gpt", "value": None}]}, "no text")],
)  # fmt: skip
def test_turns_that_are_no_texts_are_never_words(row: Row, told: str) -> None:
    with pytest.raises(InputError, match=rf"row 1.*{told}"):
        Table("", [row]).expect("example")


@pytest.mark.parametrize(
    "row",
    [{"instruction": "Why?", "output": 3}, {"conversations": "none"}, {"conversations": [["a"]]}],
)
def test_other_columns_of_these_names_are_records(row: Row) -> None:
    assert Table("", [row]).kind == "record"


# Rows as pandas and numpy have them


def test_nan_among_texts_is_nothing() -> None:
    nan = float("nan")
    row: Row = {"instruction": "Say hi", "input": nan, "output": "hi", "system": nan, "id": nan}
    table = Table("", [row | {"share": nan}, row | {"input": "now"}])
    assert [r["prompt"] for r in table.expect("example")] == ["Say hi", "Say hi\nnow"]
    assert table[0]["share"] != table[0]["share"] and "nan" not in (r["id"] for r in table)
    steps: Row = {
        "prompt": "a",
        "steps": ["b", "c"],
        "labels": [1, 0],
        "separator": np.float32(nan),
    }
    assert "separator" not in Table("steps", [steps])[0]


def test_values_of_numpy_are_plain_ones(tmp_path: Path) -> None:
    asked = {"prompt": "Why?"}
    rows: list[Row] = [
        asked | {"completion": "So.", "label": np.True_},
        asked | {"completion": "So.", "score": np.float32(0.5), "rank": np.int64(2)},
        asked | {"completions": np.array(["So.", "No."]), "scores": np.array([0.5, 1.0])},
        asked
        | {"completions": ["So.", np.str_("No.")], "scores": [np.float32(0.5), np.float32(1)]},
        {side: np.array([user("Why?"), said(side)]) for side in ("chosen", "rejected")},
    ]
    tables = [Table("", [row]) for row in rows]
    assert [t.kind for t in tables] == ["unpaired", "judgement", "group", "group", "dialogue_pair"]
    assert tables[0][0]["label"] is True and type(tables[1][0]["rank"]) is int
    assert tables[2].key == tables[3].key
    for table in tables:  # a row is the same before and after it has been written
        assert Table.read(table.write(tmp_path / "t.jsonl")).key == table.key
    image = Table("record", [{"image": np.eye(2)}])[0]["image"]
    assert isinstance(image, np.ndarray)


# Contents of messages


PARTS = [{"type": "text", "text": "Wh", "image": None}, {"type": "text", "text": "y?"}]


def test_text_parts_are_one_text() -> None:
    asked = {"role": "user", "content": PARTS}
    want = marked((ASKED, False), (f"So.{END}", True))
    told = {"role": "assistant", "content": [{"type": "text", "text": "So."}]}
    rows: list[Row] = [
        {"prompt": [asked], "completion": "So."},
        {"prompt": [asked], "completion": [told]},
        {"messages": [asked, told]},
    ]
    for row in rows:
        assert pieces(read(sft, row)[0]) == [want]
    pair: Row = {"chosen": [asked, told], "rejected": [asked, said("No.")]}
    table = Table("", [pair])
    assert table[0]["chosen"] == [user("Why?"), said("So.")] and asked["content"] is PARTS
    assert table[0]["id"] == Table("", [pair | {"chosen": [user("Why?"), said("So.")]}])[0]["id"]


def test_a_call_of_a_tool_needs_no_content(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    null = {**call, "content": None}
    for given in (call, null):
        table = Table("", [{"messages": [user("Why?"), given, said("So.")]}])
        assert table[0]["messages"] == [user("Why?"), null, said("So.")]
        table.write(tmp_path / "t.parquet")
        assert Table.read(tmp_path / "t.parquet").rows == table.rows


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


@pytest.mark.parametrize(
    ("row", "told"),
    [({"prompt": []}, "'prompt' is an empty list"),
     ({"messages": []}, "'messages' is an empty list"),
     ({"prompt": "Why?", "completion": []}, "'completion' is an empty list"),
     ({"prompt": [{"role": "user", "content": [*PARTS, IMAGE]}]}, "a part that is no text"),
     ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "a part that is no text"),
     ({"prompt": [{"role": "user", "content": []}]}, "content is no text"),
     ({"prompt": [{"role": "user", "content": None}]}, "content is no text"),
     ({"prompt": [{"role": "user", "content": 7}]}, "content is no text"),
     ({"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": None}]},
      "Null stands beside 'tool_calls' only"),
     ({"messages": [user("a"), {"role": "assistant"}]}, "list of {role, content} messages"),
     ({"messages": [user("a"), {"content": "b"}]}, "list of {role, content} messages"),
     ({"messages": ["a"]}, "list of {role, content} messages")],
)  # fmt: skip
def test_contents_that_are_no_texts_are_refused(row: Row, told: str) -> None:
    with pytest.raises(InputError, match=rf"row 1.*{told}"):
        Table("", [row])
