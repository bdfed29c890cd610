"""Answers and dialogues as steps, and answers carried on from there: what step labels rest on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from truing.core.chat import Message, Prompt, prompt_ids, step_ids
from truing.core.drawing import base_of, drawer
from truing.core.generate import generate, rewritten
from truing.core.sampling import SamplingSettings, check_lengths
from truing.errors import InputError
from truing.models import Model
from truing.tables import Row
from truing.train.reward.process_reward import steps_of


@dataclass(frozen=True)
class Drawing:
    """How answers and roll-outs are drawn.

    Args:
        max_tokens: most tokens of each, what it goes on from not counted.
        seed: of all random numbers.
    """

    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Trajectory:
    """One answer as steps, or one dialogue, whose steps are the assistant's turns.

    Args:
        row: of the data.
        prompts: what stands before each step; of an answer the prompt alone, each time.
        steps: texts.
        finished: whether it came to its end.
        separator: closes a step of an answer; "" for a dialogue.
    """

    row: Row
    prompts: tuple[Prompt, ...]
    steps: tuple[str, ...]
    finished: bool
    separator: str

    @property
    def is_dialogue(self) -> bool:
        """True where each step is a turn."""
        return not self.separator

    def longer(self, more: str) -> int:
        """How many steps a continuation adds."""
        return len(steps_of(more, self.separator))

    def outcome_row(self, done: int, more: str = "", finished: bool = True) -> Row:
        """The first `done` steps and what follows, as a reward is asked: prompt and completion."""
        if self.is_dialogue:
            asked = {"prompt": self.prompts[-1], "completion": self.steps[-1]}
            return self.row | asked | {"finished": self.finished}
        text = self.separator.join(self.steps[:done])
        text += self.separator + more if more else ""
        return self.row | {"prompt": self.prompts[0], "completion": text, "finished": finished}

    def labelled(self, labels: Sequence[float], lineage: Row) -> list[Row]:
        """Rows of kind "steps" for the first steps, as many as there are labels.

        One row, or one for each turn of a dialogue; none without a label.
        """
        told: Row = {"lineage": lineage}
        if self.is_dialogue:
            each = zip(self.prompts, self.steps, labels, strict=False)
            return [{"prompt": p, "steps": [s], "labels": [v], **told} for p, s, v in each]
        if not labels:
            return []
        steps = list(self.steps[: len(labels)])
        made: Row = {"prompt": self.prompts[0], "steps": steps, "labels": list(labels)}
        return [{**made, "separator": self.separator, **told}]


def _as_steps(row: Row, steps: Sequence[str], separator: str) -> Trajectory:
    whole = row.get("finished") is not False
    prompt = cast(Prompt, row["prompt"])
    return Trajectory(row, (prompt,) * len(steps), tuple(steps), whole, separator)


def as_trajectory(row: Row, separator: str, where: str) -> Trajectory | None:
    """What a row says was answered; None for one that is a prompt alone.

    Raises:
        InputError: column `steps` holds something else than texts.
    """
    if "steps" in row:
        steps = cast("list[object]", row["steps"])
        if not all(isinstance(s, str) and s.strip() for s in steps):
            raise InputError("a step must be a text that is not empty", where=where, seen=steps)
        own = str(row.get("separator", separator))
        return _as_steps(row, cast("list[str]", steps), own)
    if "completion" in row:
        return _as_steps(row, steps_of(str(row["completion"]), separator), separator)
    if "messages" not in row:
        return None
    messages = cast("list[Message]", row["messages"])
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns or turns[-1] != len(messages) - 1:
        return None
    prompts = tuple(messages[:i] for i in turns if i)
    steps = tuple(str(messages[i]["content"]) for i in turns if i)
    return Trajectory(row, prompts, steps, True, "")


def answered(
    model: Model, rows: Sequence[Row], n: int, how: Drawing, separator: str
) -> list[list[Trajectory]]:
    """n answers to each row's prompt."""
    drawn = generate(
        model, [r["prompt"] for r in rows], n=n, max_tokens=how.max_tokens,
        temperature=how.temperature, seed=how.seed,
    )  # fmt: skip
    return [
        [
            _as_steps(
                row | {"finished": c.finish == "stop"}, steps_of(c.text, separator), separator
            )
            for c in items
        ]
        for row, items in zip(rows, drawn, strict=True)
    ]


def continued(
    model: Model, places: Sequence[tuple[Trajectory, int]], n: int, how: Drawing
) -> list[list[tuple[str, bool]]]:
    """n continuations after the first steps of each answer, and whether each came to its end.

    They depend on prompt, prefix and seed alone: equal prefixes are carried on in the same way.

    Raises:
        InputError: a served model, which cannot go on from a prefix; one that leaves no room.
    """
    if model.is_served:
        raise InputError(
            "a served model cannot go on from the first steps of an answer",
            where=model.name,
            fix="Use a local model, or set rollouts to 0",
        )
    loaded = model.load_module()
    asked = rewritten(model, [t.prompts[0] for t, _ in places])
    begun = [
        [i for piece in step_ids(loaded.tokenizer, t.steps[:k], t.separator) for i in piece]
        for t, k in places
    ]
    sampling = SamplingSettings(
        n=n, max_tokens=how.max_tokens, temperature=how.temperature, seed=how.seed
    )
    whole = [[*prompt_ids(loaded.tokenizer, p), *b] for p, b in zip(asked, begun, strict=True)]
    check_lengths(loaded.module, whole, how.max_tokens)
    draw = drawer(base_of(model, None), model)
    made = draw(asked, sampling, begun=begun, first=[0] * len(asked))
    return [[(c.text, c.finish == "stop") for c in items] for items in made]
