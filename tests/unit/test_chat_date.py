"""Prompts have the same tokens tomorrow, whatever date a template writes."""

from __future__ import annotations

import datetime

import pytest
from transformers.utils import chat_template_utils

from truing.core.chat import DAY, chat_text, completion_ids, prompt_ids
from truing.core.tiny import tiny_tokenizer
from truing.synthesize.magpie import pre_query

LLAMA = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}"
    "{{ 'Today Date: ' + date_string + '\n' }}"
)
CLOCK = "\n{{ strftime_now('%Y-%m-%d, %A %B %-d, %H:%M:%S, 100%') }}\n"


class Tomorrow(datetime.datetime):
    """A clock that runs ahead."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Tomorrow:
        """Some day after the template's."""
        return cls(2031, 1, 2, 3, 4, 5, tzinfo=tz)


@pytest.mark.parametrize("before", [LLAMA, CLOCK])
def test_prompts_do_not_know_the_day(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = before + str(tokenizer.chat_template)
    ids = prompt_ids(tokenizer, "Hello")
    text = str(tokenizer.decode(ids))
    assert "2024" in text and str(datetime.date.today()) not in text
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert prompt_ids(tokenizer, "Hello") == ids
    assert completion_ids(tokenizer, "Hi") == completion_ids(tiny_tokenizer(), "Hi")


def test_every_format_is_written() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CLOCK + str(tokenizer.chat_template)
    text = chat_text(tokenizer, [{"role": "user", "content": "Hello"}], answer=True)
    wanted = f"{DAY:%Y-%m-%d, %A %B %-d, %H:%M:%S, 100%}"
    plain = tiny_tokenizer()
    rest = plain.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert text == f"\n{wanted}\n{rest}"


def test_macros_see_the_same_day() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% macro head() %}{{ strftime_now('%d.%m.%y') }}{% endmacro %}{{ head() }}"
    )
    assert chat_text(tokenizer, [{"role": "user", "content": "a"}], answer=False) == "26.07.24"


def test_where_instructions_begin_does_not_know_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    plain = pre_query(tokenizer)
    tokenizer.chat_template = LLAMA + str(tokenizer.chat_template)
    head = pre_query(tokenizer)
    assert head == f"Today Date: {DAY:%d %b %Y}\n{plain}"
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert pre_query(tokenizer) == head
