"""How answers look: whole replies and the chunks of streams, in the OpenAI protocol's words."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import cast

from truing.core.endpoints.reply import WRITTEN
from truing.serve.openai_calls import Call, Form, Reading
from truing.serve.openai_wire import Answer, Ask, Json, Token
from truing.surrogates import UNFINISHED


class Reply:
    """Shapes the answers to one request."""

    def __init__(self, ask: Ask, name: str, number: str, form: Form) -> None:
        self.ask, self.name = ask, name
        self.id = ("chatcmpl-" if ask.chat else "cmpl-") + number
        self.created = int(time.time())
        many = len(ask.prompts) * ask.sampling.n if ask.tools else 0
        # Of answers that may call tools; the words of others come as they are.
        self._readings = [Reading(form, ask.tools, one=not ask.parallel) for _ in range(many)]

    def whole(self, answers: Sequence[Answer], prompt_tokens: int | None) -> Json:
        """The reply to a request that is not streamed."""
        choices: list[Json] = []
        for i, a in enumerate(answers):
            choice: Json = {"index": i, "logprobs": self._logprobs(a)}
            if self.ask.chat:
                choice["message"] = self._message(i, a.text)
            else:
                choice["text"] = a.text
            choices.append(choice | {"finish_reason": self._finish(i, a)})
        return self._frame(choices, "", usage(answers, prompt_tokens))

    def _message(self, index: int, text: str) -> Json:
        made: Json = {"role": "assistant", "content": text, "refusal": None}
        if not self._readings:
            return made
        reading = self._readings[index]
        parts = [*reading.feed(text), *reading.end()]
        if not reading.calls:
            return made
        words = "".join(p for p in parts if isinstance(p, str))
        calls = [_call(c) for c in reading.calls]
        return made | {"content": words or None, "tool_calls": calls, WRITTEN: text}

    def _finish(self, index: int, answer: Answer) -> str:
        called = bool(self._readings) and bool(self._readings[index].calls)
        return "tool_calls" if called and answer.finish == "stop" else answer.finish

    def begin(self, index: int) -> Json:
        """The first chunk of a streamed chat's answer: whose it is."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def said(self, index: int, text: str) -> list[Json]:
        """Chunks for new words of a streamed answer, of which some may be held back."""
        if not self._readings:
            return [self._words(index, text)]
        return self._parts(index, self._readings[index].feed(text))

    def end(self, index: int, answer: Answer) -> list[Json]:
        """The last chunks of one answer: what was held back, then how it ended.

        The very last has its log-probabilities, where they were asked for.
        """
        made: list[Json] = []
        if self._readings:
            made += self._parts(index, self._readings[index].end())
        chunk = self._chunk(index, {}) if self.ask.chat else self._words(index, "")
        told: Json = {"finish_reason": self._finish(index, answer)}
        cast("list[Json]", chunk["choices"])[0].update(told | {"logprobs": self._logprobs(answer)})
        return [*made, chunk]

    def _parts(self, index: int, parts: Iterable[str | Call]) -> list[Json]:
        """Words as they are; a call as one chunk with its name and one with its arguments."""
        made: list[Json] = []
        for part in parts:
            if isinstance(part, str):
                made.append(self._words(index, part))
                continue
            at = {"index": self._readings[index].calls.index(part)}
            opened = at | _call(Call(part.id, part.name, ""))
            more = at | {"function": {"arguments": part.arguments}}
            made += [self._chunk(index, {"tool_calls": [delta]}) for delta in (opened, more)]
        return made

    def _words(self, index: int, text: str) -> Json:
        if self.ask.chat:
            return self._chunk(index, {"content": text})
        return self._frame(
            [{"index": index, "finish_reason": None, "logprobs": None, "text": text}],
            ".chunk",
            None,
        )

    def _chunk(self, index: int, delta: Json) -> Json:
        choice: Json = {"index": index, "finish_reason": None, "logprobs": None, "delta": delta}
        return self._frame([choice], ".chunk", None)

    def last(self, answers: Sequence[Answer], prompt_tokens: int | None) -> Json:
        """The chunk that tells the usage, where it is known."""
        return self._frame([], ".chunk", usage(answers, prompt_tokens))

    def _frame(self, choices: list[Json], suffix: str, spent: Json | None) -> Json:
        kind = f"chat.completion{suffix}" if self.ask.chat else "text_completion"
        made: Json = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.name,
            "choices": choices,
        }
        return made | ({"usage": spent} if spent is not None else {})

    def _logprobs(self, answer: Answer) -> Json | None:
        if answer.tokens is None:
            return None
        if self.ask.chat:
            return {"content": [_chat_token(t) for t in answer.tokens], "refusal": None}
        return {
            "tokens": [t.text for t in answer.tokens],
            "token_logprobs": [t.logprob for t in answer.tokens],
            # Of those that look alike, such as parts of characters, the likeliest counts.
            "top_logprobs": [dict(reversed(t.top)) if t.top else None for t in answer.tokens],
            "text_offset": [t.offset for t in answer.tokens],
        }


def _call(call: Call) -> Json:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _chat_token(token: Token) -> Json:
    top = [{"token": t, "logprob": v, "bytes": _bytes(t)} for t, v in token.top]
    return {
        "token": token.text,
        "logprob": token.logprob,
        "bytes": _bytes(token.text),
        "top_logprobs": top,
    }


def _bytes(text: str) -> list[int] | None:
    """UTF-8 of a token; None for a part of a character, whose bytes its text does not show."""
    return None if UNFINISHED in text else list(text.encode())


def usage(answers: Sequence[Answer], prompt_tokens: int | None) -> Json | None:
    """Tokens of prompts and answers; None where those of prompts are not known."""
    if prompt_tokens is None:
        return None
    written = sum(a.count for a in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
    }
