"""Models that think before they answer: what is learnt begins where an answer is asked for.

The templates do what Qwen3's, R1's distills' and those of models that always think do; what they
write is worked out by hand here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from truing.core.batch.template import tell
from truing.core.batch.training_rows import Reader
from truing.core.chat import check_receipt, completion_ids, example_ids, prompt_ids, reply_ids
from truing.core.modelfiles.loaded import load_tokenizer
from truing.core.objective import objective_of
from truing.core.tiny import tiny_tokenizer
from truing.core.tree import example_tree
from truing.errors import InputError
from truing.models import Model
from truing.tables import Row, Table
from truing.train.reward.process_reward import process_reward
from truing.train.supervised.sft import sft

SPLIT = (
    "{%- set c = m.content %}{%- set r = '' %}"
    "{%- if m.role == 'assistant' and '</think>' in c %}"
    r"{%- set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    r"{%- set c = c.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
)
QWEN3 = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}" + SPLIT + r"{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or r) %}"
    r"{{- '<think>\n' + r + '\n</think>\n\n' }}{%- endif %}"
    r"{{- c + '<|im_end|>\n' }}{%- endfor %}"
    r"{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    r"{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
ALWAYS = QWEN3.replace(
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    r"{{- '<think>\n\n</think>\n\n' }}{%- endif %}",
    r"{{- '<think>\n' }}",
)
R1 = (
    "{% for m in messages %}" + SPLIT + "{% if m.role == 'user' %}{{ '<user>' + c }}{% else %}"
    "{{ '<assistant>' + c + '<|im_end|>' }}{% endif %}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<assistant><think>\n' }}{% endif %}"
)
ASKED = [{"role": "user", "content": "Why?"}]
CHATML = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"
THOUGHT = "<think>\nr\n</think>\n\nSo."
END = "<|im_end|>"


def made(template: str, thinking: bool | None = None) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tell(tokenizer, thinking)
    return tokenizer


def said(text: str) -> list[dict[str, str]]:
    return [*ASKED, {"role": "assistant", "content": text}]


def learnt(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[str, str]:
    """What is asked and what is answered: the same of a prompt and an answer and of messages."""
    head, tail = prompt_ids(tokenizer, ASKED), completion_ids(tokenizer, text)
    ids, loss = example_ids(tokenizer, said(text))
    assert ids == head + tail and loss == [False] * len(head) + [True] * len(tail)
    check_receipt(tokenizer, [example_tree(ids, loss)])
    return str(tokenizer.decode(head)), str(tokenizer.decode(tail))


def test_an_empty_thought_is_asked_for_and_not_learnt() -> None:
    tokenizer = made(QWEN3)
    assert learnt(tokenizer, "So.") == (CHATML + EMPTY, f"So.{END}")
    theirs = tokenizer.apply_chat_template(
        ASKED, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert theirs == CHATML + EMPTY
    whole = tokenizer.apply_chat_template(said("So."), tokenize=False)
    assert whole == f"{CHATML}{EMPTY}So.{END}\n"


def test_what_is_drawn_behind_an_empty_thought_is_what_it_is() -> None:
    ids = completion_ids(made(QWEN3), THOUGHT)
    assert made(QWEN3).decode(ids) == THOUGHT + END


def test_thoughts_are_learnt_where_they_are_asked_for() -> None:
    tokenizer = made(QWEN3, True)
    assert learnt(tokenizer, THOUGHT) == (CHATML, THOUGHT + END)
    assert learnt(tokenizer, "So.") == (CHATML, f"{EMPTY}So.{END}")  # and so are their absences
    assert learnt(tokenizer, "<think>r</think>So.") == (CHATML, f"<think>r</think>So.{END}")


def test_a_template_is_told_not_to_think() -> None:
    tokenizer = made(QWEN3, False)
    assert learnt(tokenizer, "So.") == (CHATML + EMPTY, f"So.{END}")
    tell(tokenizer, True)
    assert learnt(tokenizer, THOUGHT) == (CHATML, THOUGHT + END)
    assert str(tokenizer.chat_template).count("set enable_thinking") == 1
    by_hand = made("{%- set enable_thinking = true %}\n" + QWEN3)
    assert learnt(by_hand, THOUGHT) == (CHATML, THOUGHT + END)


def test_an_opened_thought_is_left_to_the_model() -> None:
    tokenizer = made(R1)
    asked = "<user>Why?<assistant>"
    assert learnt(tokenizer, "So.") == (asked, f"So.{END}")
    assert learnt(tokenizer, THOUGHT) == (asked, THOUGHT + END)  # which the template leaves out
    turns = [*said("So."), {"role": "user", "content": "And?"}]
    more = reply_ids(tokenizer, turns, completion_ids(tokenizer, "So."))
    assert tokenizer.decode(more) == "<user>And?<assistant>"


@pytest.mark.parametrize(("template", "asked"), [(R1, "<user>Why?<assistant>"), (ALWAYS, CHATML)])
def test_a_thought_that_is_opened_for_the_model_is_not_opened_again(
    template: str, asked: str
) -> None:
    tokenizer = made(template, True)
    asked += "<think>\n"
    assert learnt(tokenizer, THOUGHT) == (asked, f"r\n</think>\n\nSo.{END}")
    drawn = "r\n</think>\n\nSo."  # behind what was opened
    assert tokenizer.decode(completion_ids(tokenizer, drawn)) == drawn + END
    assert tokenizer.decode(completion_ids(tokenizer, "<think>r</think>So.")) == (
        f"r</think>So.{END}"
    )


def test_who_always_thinks_may_do_without() -> None:
    assert learnt(made(ALWAYS), "So.") == (CHATML + EMPTY, f"So.{END}")
    assert learnt(made(ALWAYS, False), "So.") == (CHATML + EMPTY, f"So.{END}")


NATIVE = ALWAYS.replace(r"{{- '<think>\n' }}", r"{{- '<think>\n\n</think>\n\n' }}")


@pytest.mark.parametrize("thinking", [None, False])
@pytest.mark.parametrize("template", [QWEN3, ALWAYS, NATIVE])
def test_a_thought_behind_an_empty_one_is_refused(template: str, thinking: bool | None) -> None:
    rows: list[Row] = [
        {"prompt": "Why?", "completion": THOUGHT},
        {"messages": said(THOUGHT)},
    ]
    for row in rows:
        table = Table("", [{"prompt": "Why?", "completion": "So."}, row][row is rows[1] :])
        with pytest.raises(InputError, match=r"row \d: the answer brings a thought.*thinking=true"):
            Reader(made(template, thinking), objective_of(sft), 512).read(table)  # type: ignore[arg-type]
        reader = Reader(made(template, True), objective_of(sft), 512)
        if template != NATIVE:  # which always puts an empty one
            assert len(reader.read(Table("", [row]))) == 1
            continue
        with pytest.raises(InputError, match="always puts an empty one"):
            reader.read(Table("", [row]))


def read(tokenizer: PreTrainedTokenizerFast, answer: str, **more: object) -> list[str]:
    """What is learnt of one answer, as a row of words and as one of messages."""
    reader = Reader(tokenizer, objective_of(sft), 512)
    words, dialogue = (
        reader.read(Table("", [row]))[0].tree()
        for row in ({"prompt": "Why?", "completion": answer, **more}, {"messages": said(answer)})
    )
    return [
        str(tokenizer.decode([i for i, mark in zip(ids, loss, strict=True) if mark]))
        for tree in (words, dialogue)
        for ids, loss in tree.rows()
    ]


def test_an_answer_without_a_thought_closes_the_one_that_was_opened() -> None:
    closed = f"\n</think>\n\nSo.{END}"
    assert read(made(ALWAYS, True), "So.") == [closed, closed]
    with_one = f"r\n</think>\n\nSo.{END}"
    for template in (ALWAYS, R1):
        assert read(made(template, True), THOUGHT) == [with_one, with_one]
        assert read(made(template, True), "r\n</think>\n\nSo.") == [with_one, with_one]
    for row in ({"prompt": "Why?", "completion": "So."}, {"messages": said("So.")}):
        with pytest.raises(InputError, match="row 1: the answer brings no thought"):
            Reader(made(R1, True), objective_of(sft), 512).read(Table("", [row]))  # type: ignore[list-item]


def test_steps_are_asked_for_thoughts_as_answers_are() -> None:
    def steps(tokenizer: PreTrainedTokenizerFast, *texts: str, **more: object) -> str:
        row: Row = {"prompt": "Why?", "steps": list(texts), "labels": [1.0] * len(texts), **more}
        (unit,) = Reader(tokenizer, objective_of(process_reward), 512).read(Table("steps", [row]))
        assert unit.dialogue is not None
        return str(tokenizer.decode(list(unit.dialogue.ids)))

    for template in (QWEN3, ALWAYS):
        with pytest.raises(InputError, match=r"row 1: the answer brings a thought.*thinking=true"):
            steps(made(template), "<think>\nr", "</think>\n\nSo.")
    thinks = made(R1, True)
    asked = str(thinks.decode(prompt_ids(thinks, ASKED)))
    told = "r\n\n</think>\n\nSo.\n\n"
    assert steps(thinks, "<think>\nr", "</think>\n\nSo.") == asked + told
    assert steps(thinks, "r", "</think>\n\nSo.") == asked + told
    with pytest.raises(InputError, match="row 1: the answer brings no thought"):
        steps(thinks, "r", "So.")
    assert steps(thinks, "r", "r", finished=False) == asked + "r\n\nr\n\n"
    closed = "\n</think>\n\n"  # what the template writes of an empty thought
    always = made(ALWAYS, True)
    asked = str(always.decode(prompt_ids(always, ASKED)))
    assert steps(always, "One.", "So.") == f"{asked}{closed}One.\n\nSo.\n\n"


def test_an_answer_that_ended_in_its_thought_is_what_it_is() -> None:
    tokenizer = made(R1, True)
    row: Row = {"prompt": "Why?", "completion": "r r", "finished": False}
    unit = Reader(tokenizer, objective_of(sft), 512).read(Table("", [row]))[0]
    assert tokenizer.decode(list(unit.answers[0])) == "r r"


def test_a_template_that_closes_the_thought_before_each_answer() -> None:
    """As DeepSeek-V3.1 does: it asks behind "<think>" or "</think>", and gives behind the last."""
    closing = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<user>' + m.content }}{% else %}"
        "{{ '<assistant></think>' + m.content.split('</think>')[-1] + '<|im_end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}"
        "{% if thinking is defined and thinking %}{{ '<think>' }}{% else %}{{ '</think>' }}"
        "{% endif %}{% endif %}"
    )
    for told in (None, False):
        assert learnt(made(closing, told), "So.") == ("<user>Why?<assistant></think>", f"So.{END}")
        with pytest.raises(InputError, match="the answer brings a thought"):
            read(made(closing, told), "<think>r</think>So.")
    thinks = made(closing, True)
    assert learnt(thinks, "<think>r</think>So.") == (
        "<user>Why?<assistant><think>",
        f"r</think>So.{END}",
    )
    with pytest.raises(InputError, match="the answer brings no thought"):
        read(thinks, "So.")


def test_several_templates_cannot_be_told(tiny_path: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_path, tmp_path / "qwen")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match=r"no chat template, so it cannot.*\?thinking=true"):
        load_tokenizer(Model.open(f"{folder}?thinking=true"))
    bare = Model.open(f"{folder}?thinking=false")  # which is so without a template
    bare.export(tmp_path / "bare")  # nothing to tell, and nothing made of it
    assert not (tmp_path / "bare" / "chat_template.jinja").exists()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": n, "template": QWEN3} for n in ("default", "tool_use")]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Model.open(folder).load_module().tokenizer
    assert loaded.decode(prompt_ids(loaded, ASKED)) == CHATML + EMPTY
    with pytest.raises(InputError, match=r"several chat templates.*default"):
        load_tokenizer(Model.open(f"{folder}?thinking=true"))


@pytest.mark.parametrize("text", ["<reasoning>\n2+2\n</reasoning>\n4", "[Reasoning] first"])
def test_tags_of_other_families_are_words(text: str) -> None:
    assert read(made(QWEN3), text) == [text + END] * 2
    assert read(made(QWEN3, True), text) == [EMPTY + text + END] * 2
    with pytest.raises(InputError, match="brings no thought"):
        read(made(R1, True), text)


def test_several_turns_whose_thoughts_are_left_out_are_refused() -> None:
    turns = [*said("So."), {"role": "user", "content": "And?"}]
    whole = [*turns, {"role": "assistant", "content": "No."}]
    for template in (QWEN3, ALWAYS):
        with pytest.raises(InputError, match="rewrites earlier turns"):
            reply_ids(made(template), turns, [2])
        with pytest.raises(InputError, match="rewrites earlier turns"):
            example_ids(made(template), whole)
    ids, loss = example_ids(made(QWEN3), whole, asked=3)
    answer = [i for i, mark in zip(ids, loss, strict=True) if mark]
    assert made(QWEN3).decode(answer) == f"No.{END}"


def test_white_space_before_an_answer_stays_with_it() -> None:
    llama = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    assert learnt(made(llama), "So.") == ("[INST] Why? [/INST]", f" So.{END}")


def test_other_openings_are_still_refused() -> None:
    for other in (R1.replace("<think>", "<answer>"), R1.replace("'<assistant>' + c", "c")):
        with pytest.raises(InputError, match="does not put an answer where it asks for one"):
            completion_ids(made(other), "So.")


def test_a_prompt_that_ends_with_a_call_is_refused() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    with pytest.raises(InputError, match="ends with a call of a tool"):
        prompt_ids(made(QWEN3), [*ASKED, call])


def test_thinking_is_said_with_the_model(tiny_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "qwen"
    shutil.copytree(tiny_path, folder)
    (folder / "chat_template.jinja").write_text(QWEN3)
    plain, told = Model.open(folder), Model.open(f"{folder}?thinking=true")
    assert told.key == plain.thinking(True).key
    assert len({plain.key, told.key, plain.thinking(False).key}) == 3
    for model, asked in ((plain, CHATML + EMPTY), (told, CHATML)):
        saved, exported = tmp_path / f"s-{model.key}", tmp_path / f"e-{model.key}"
        model.save(saved)
        model.export(exported)
        for one in (model, Model.load(saved), Model.open(exported)):
            tokenizer = one.load_module().tokenizer
            assert tokenizer.decode(prompt_ids(tokenizer, ASKED)) == asked
        assert Model.load(saved).key == model.key
    with pytest.raises(InputError, match="served model has no weights here"):
        Model.open("http://127.0.0.1:1/v1#m").thinking(True)
