"""Text of tokens that come one by one equals that of all of them, and costs no more than twice."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from truing.core.chat import answer_text
from truing.core.tiny import tiny_tokenizer
from truing.models import Model
from truing.serve.openai_batch import Batch, Done, Event, Job, Piece
from truing.serve.openai_text import Growing, decoded, joins, starts
from truing.serve.openai_wire import read
from truing.serve.openai_worker import Worker

TEXTS = [
    "",
    "Plain words, and  spaces .\n\n Then more.  ",
    "日本語と中文混排，没有空格。",
    "👩‍👩‍👧‍👦 and 🏳️‍🌈 in one line, é, ü, ż",
    " \n \t ",
    "a\ufffdb is a replacement character of its own",
]


def _fallback() -> PreTrainedTokenizerFast:
    """A tokenizer as SentencePiece makes them: words with a leading mark, bytes for the rest."""
    words = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁a", "b", "é", "▁."]
    core = Tokenizer(
        models.BPE(
            vocab={w: i for i, w in enumerate(words)}, merges=[],
            unk_token="<unk>", byte_fallback=True, fuse_unk=True,
        )
    )  # fmt: skip
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(content=" ", left=1, right=0)]
    )  # fmt: skip
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _pieces() -> PreTrainedTokenizerFast:
    """A tokenizer that takes the space before a full stop back."""
    words = ["[UNK]", "a", "##b", ".", ",", "'", "n"]
    core = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")


def _equal(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> None:
    piecewise = joins(tokenizer)
    for text_of in (decoded, answer_text):
        growing = Growing(tokenizer, piecewise, text_of)
        wanted = [text_of(tokenizer, ids[:i]) for i in range(len(ids) + 1)]
        assert [growing.text(ids[:i]) for i in range(len(ids) + 1)] == wanted
        skipping = Growing(tokenizer, piecewise, text_of)  # some are seen together
        for i in range(0, len(ids) + 1, 3):
            assert skipping.text(ids[:i]) == wanted[i]
        assert starts(tokenizer, ids, piecewise, text_of) == [len(t) for t in wanted[:-1]]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_characters_over_several_tokens(text: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert joins(tokenizer) and len(ids) == len(text.encode())
    _equal(tokenizer, ids)
    _equal(tokenizer, [2, *ids, 2, 0, *ids])  # special tokens in between


@pytest.mark.parametrize("make", [tiny_tokenizer, _fallback, _pieces])
def test_any_tokens_at_all(make: Any) -> None:
    tokenizer, source = make(), random.Random(0)
    size = len(tokenizer)
    for _ in range(30):
        _equal(tokenizer, [source.randrange(size) for _ in range(40)])
    for _ in range(30):  # the same few over and over: words, spaces, ends, bytes of one character
        few = [source.randrange(size) for _ in range(2)] + list(range(size - 5, size))
        _equal(tokenizer, [source.choice(few) for _ in range(40)])


def test_a_run_of_bytes_can_change_what_was_shown() -> None:
    tokenizer = _fallback()
    assert joins(tokenizer)
    ids = [2 + b for b in "é語".encode()] + [2 + 0xFF, 260]
    assert decoded(tokenizer, ids[:2]) == "é" and decoded(tokenizer, ids).startswith("\ufffd")
    _equal(tokenizer, ids)


def test_an_answer_keeps_the_space_that_a_text_would_lose_at_its_beginning() -> None:
    tokenizer = _fallback()
    ids = tokenizer.convert_tokens_to_ids(["▁a", "b"])
    growing = Growing(tokenizer, joins(tokenizer), answer_text)
    assert [growing.text(ids[:1]), growing.text(ids)] == [" a", " ab"]
    assert decoded(tokenizer, ids) == "ab"


def test_tidied_text_is_decoded_as_a_whole() -> None:
    assert not joins(_pieces())


class Counting:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self) -> None:
        self.inner, self.count = tiny_tokenizer(), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def decode(self, ids: list[int], **how: Any) -> Any:
        """As the tokenizer does."""
        self.count += len(ids)
        return self.inner.decode(ids, **how)


def test_the_cost_grows_with_the_length_alone() -> None:
    tokenizer: Any = Counting()
    ids = tokenizer.inner("Words and 語 and 👩‍👩‍👧‍👦. " * 40)["input_ids"]
    growing = Growing(tokenizer, True)
    for i in range(len(ids) + 1):
        growing.text(ids[:i])
    assert tokenizer.count < 12 * len(ids)


@pytest.mark.parametrize("more", [{"stream": True}, {"logprobs": 1}, {"echo": True, "logprobs": 0}])
def test_answers_cost_no_more(
    more: dict[str, object], tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, events = Model.open(tiny_path), list[Event]()
    worker = Worker(model, waiting=1)
    data = {"model": "tiny", "prompt": [[5, 9] * 40], "max_tokens": 200, "min_tokens": 200} | more
    job = Job(read(data, chat=False, name="tiny", default=8), events.append)
    worker._prepare(job)
    tokenizer, count = model.load_module().tokenizer, 0
    decode = tokenizer.decode

    def counted(ids: list[int], **how: Any) -> Any:
        nonlocal count
        count += len(ids)
        return decode(ids, **how)

    monkeypatch.setattr(tokenizer, "decode", counted)
    Batch(worker.served, [job]).run()
    done = events[-1]
    assert isinstance(done, Done)
    answer = done.answers[0]
    assert answer.count == 200 and count < 15 * (answer.count + 80)
    if job.ask.stream:
        assert "".join(e.text for e in events if isinstance(e, Piece)) == answer.text
    for i, token in enumerate(answer.tokens or ()):
        if "\ufffd" not in token.text and "\ufffd" not in answer.text[: token.offset + 1]:
            assert answer.text[token.offset :].startswith(token.text), i
