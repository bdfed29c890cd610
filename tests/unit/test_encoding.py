"""Pieces of a text have the tokens of the whole, whatever a tokenizer puts before a text.

What is expected is what the tokenizer gives for the whole text at once. Nothing merges across the
places where it is cut, as with real vocabularies at a line break or a special token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from truing.core.batch.encoding import encode, space_added
from truing.core.chat import (
    answer_text,
    completion_ids,
    example_ids,
    prompt_ids,
    receipt,
    reply_ids,
    step_ids,
)
from truing.core.tiny import tiny_tokenizer
from truing.core.tree import Node, example_tree
from truing.evaluate import ability

SPACE = "\u2581"
MERGES = [(SPACE, "H"), (f"{SPACE}H", "i"), ("H", "i"), ("\n", "\n")]
# Zephyr's, whose roles are plain text, and Phi's, where a special token stands before the answer.
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI = ZEPHYR.replace("|>\n'", "|>'")
SCHEMES = ["first", "always", "prepend"]


def made(
    scheme: str, template: str = "", special: Sequence[str] = ("<s>", "</s>")
) -> PreTrainedTokenizerFast:
    letters = [*"abcdefghijklmnopqrstuvwxyz.:?<|>/HIWSA\n123", SPACE]
    vocab = ["<unk>", *special, *letters, *(a + b for a, b in MERGES)]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(vocab)}, MERGES, unk_token="<unk>"))
    if scheme == "prepend":
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)  # type: ignore
    core.decoder = decoders.Sequence(  # Llama's
        [decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = template or None
    return made


def whole(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


TALK = [
    {"role": "user", "content": "Who is it?"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Say more."},
    {"role": "assistant", "content": "It is I."},
]


def texts(template: str) -> list[str]:
    """The dialogue by hand, cut where answers begin and end."""
    line = "" if template == PHI else "\n"
    heads = [f"<|user|>{line}{TALK[i]['content']}</s>\n<|assistant|>{line}" for i in (0, 2)]
    return [heads[0], "Hi</s>", f"\n{heads[1]}", "It is I.</s>"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("template", [ZEPHYR, PHI], ids=["zephyr", "phi"])
def test_a_dialogue_in_pieces_is_the_whole(scheme: str, template: str) -> None:
    special = ("<s>", "</s>", *(("<|assistant|>",) if template == PHI else ()))
    tokenizer = made(scheme, template, special)
    cut = texts(template)
    text = "".join(cut)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, loss = example_ids(tokenizer, TALK)
    assert ids == encoded["input_ids"]
    places = [0]
    for piece in cut:
        places.append(places[-1] + len(piece))
    spans = list(pairwise(places))
    want = [any(a <= start < b for a, b in spans[1::2]) for start, _ in encoded["offset_mapping"]]
    assert loss == want
    head = prompt_ids(tokenizer, TALK[:1])
    assert head == whole(tokenizer, cut[0])
    answer = completion_ids(tokenizer, "Hi")
    assert head + answer == whole(tokenizer, cut[0] + cut[1])
    follow = reply_ids(tokenizer, TALK[:3], answer)
    assert head + answer + follow + completion_ids(tokenizer, "It is I.") == ids
    unended = reply_ids(tokenizer, TALK[:3], answer[:-1])
    assert head + answer[:-1] + unended == head + answer + follow
    opened = [*TALK[:1], {"role": "assistant", "content": "Hi"}]
    assert prompt_ids(tokenizer, opened) == [*head, *answer[:-1]]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_answer_has_no_space_that_generation_does_not_see(scheme: str) -> None:
    tokenizer = made(scheme, ZEPHYR)
    assert tokenizer.convert_ids_to_tokens(whole(tokenizer, "Hi"))[0] == f"{SPACE}Hi"  # the trap
    assert tokenizer.convert_ids_to_tokens(completion_ids(tokenizer, "Hi")) == ["Hi", "</s>"]
    ids, loss = example_ids(tokenizer, TALK[:2])
    shown = receipt(tokenizer, [example_tree(ids, loss)])
    assert f"{len(ids)} tokens, 2 with loss" in shown and ">>>Hi</s><<<" in shown


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_without_a_template_goes_on_as_the_whole(scheme: str) -> None:
    tokenizer = made(scheme)
    for prompt, answer in (("Who is it?\nA:", " Hi"), ("Who is it?\n", "Hi"), ("Sa", "y")):
        both = prompt_ids(tokenizer, prompt) + completion_ids(tokenizer, answer, end=False)
        assert both == whole(tokenizer, prompt + answer)
        drawn = completion_ids(tokenizer, answer, end=False)
        assert answer_text(tokenizer, drawn) == answer
        assert answer_text(tokenizer, completion_ids(tokenizer, answer)) == answer


@pytest.mark.parametrize("scheme", SCHEMES)
def test_steps_are_pieces_of_one_answer(scheme: str) -> None:
    tokenizer = made(scheme, ZEPHYR)
    steps = ["Hi 1.", "Hi 2.", "Hi 3."]
    pieces = step_ids(tokenizer, steps, "\n")
    head = prompt_ids(tokenizer, TALK[:1])
    text = texts(ZEPHYR)[0] + "".join(f"{s}\n" for s in steps)
    assert [*head, *(i for p in pieces for i in p)] == whole(tokenizer, text)


def test_what_merges_with_one_character_stands_behind_another() -> None:
    tokenizer = made("first", ZEPHYR)
    ids = completion_ids(tokenizer, "\nHi", end=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["\n", "Hi"]


def test_where_tokenizers_add_spaces() -> None:
    assert [space_added(made(s)) for s in (*SCHEMES, "never")] == ["first", "always", "always", ""]


def test_byte_level_tokenizers_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    assert space_added(tokenizer) == ""
    asked: list[str] = []
    plain = type(tokenizer).__call__

    def counted(self: object, text: str, **more: object) -> object:
        asked.append(text)
        return plain(self, text, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    for text in ("Hi", " Hi", "\nHi<|im_end|>"):
        for before in ("", ".", "<|im_end|>"):
            assert encode(tokenizer, text, before=before) == plain(
                tokenizer, text, add_special_tokens=False
            )["input_ids"]  # fmt: skip
    assert len(asked) == 9


@pytest.mark.parametrize("scheme", SCHEMES)
def test_choices_follow_their_question(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = made(scheme)
    seen: list[list[int]] = []

    def logps(loaded: object, trees: Sequence[Node], label: str) -> list[list[torch.Tensor]]:
        seen.extend(list(ids) for tree in trees for ids, _ in tree.rows())
        return [[torch.zeros(1) for _ in tree.rows()] for tree in trees]

    monkeypatch.setattr(ability, "branch_logps", logps)
    question, choices = "Who is it?", ["Hi", "a"]
    ability.answered(SimpleNamespace(tokenizer=tokenizer), [(question, choices)])  # type: ignore
    start = tokenizer.bos_token_id
    assert seen == [[start, *whole(tokenizer, f"{question} {c}")] for c in choices]


def test_equal_ids_are_one_number() -> None:
    """A table's tokens are held all at once to train on."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<rare>"])
    twice = encode(tokenizer, "<rare> <rare>")
    assert twice[0] == 259 and twice[0] is twice[-1] is encode(tokenizer, "<rare>")[0]
