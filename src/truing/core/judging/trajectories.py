"""Answers and dialogues as steps, and answers carried on from there: what step labels rest on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from truing.changes import Rewriter
from truing.core.chat import Message, Prompt, prompt_ids, step_ids
from truing.core.drawing import base_of, drawer
from truing.core.generate import generate, rewritten
from truing.core.judging.answer_steps import steps_of
from truing.core.modelfiles.loaded import Loaded
from truing.core.modelfiles.reach import context_of
from truing.core.sampling import SamplingSettings
from truing.errors import InputError
from truing.models import Model
from truing.tables import Row

TURN = "\n\n"  # closes a turn: what rows of steps without a separator are read with


@dataclass(frozen=True)
class Drawing:
    """How answers and roll-outs are drawn.

    Args:
        max_tokens: most tokens of each, what it goes on from not counted; fewer where the context
            has no room for so many.
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
        separator: closes a step of an answer; "" where nothing stands between steps.
        place: what an error calls the row.
        is_dialogue: whether each step is a turn.
    """

    row: Row
    prompts: tuple[Prompt, ...]
    steps: tuple[str, ...]
    finished: bool
    separator: str
    place: str = ""
    is_dialogue: bool = False

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


def _as_steps(row: Row, steps: Sequence[str], separator: str, place: str) -> Trajectory:
    whole = row.get("finished") is not False
    prompt = cast(Prompt, row["prompt"])
    return Trajectory(row, (prompt,) * len(steps), tuple(steps), whole, separator, place)


def as_trajectory(row: Row, separator: str, where: str) -> Trajectory | None:
    """What a row says was answered; None for one that is a prompt alone.

    Raises:
        InputError: column `steps` holds something else than texts.
    """
    if "steps" in row:
        steps = cast("list[object]", row["steps"])
        if not all(isinstance(s, str) and s.strip() for s in steps):
            raise InputError("a step must be a text that is not empty", where=where, seen=steps)
        named = row.get("separator")
        own = separator if named is None else str(named)
        return _as_steps(row, cast("list[str]", steps), own, where)
    if "completion" in row:
        return _as_steps(row, steps_of(str(row["completion"]), separator), separator, where)
    if "messages" not in row:
        return None
    messages = cast("list[Message]", row["messages"])
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns or turns[-1] != len(messages) - 1:
        return None
    prompts = tuple(messages[:i] for i in turns if i)
    steps = tuple(str(messages[i]["content"]) for i in turns if i)
    return Trajectory(row, prompts, steps, True, TURN, where, is_dialogue=True)


def answered(
    model: Model, rows: Sequence[tuple[Row, str]], n: int, how: Drawing, separator: str
) -> list[list[Trajectory]]:
    """n answers to the prompt of each row, which come with their places."""
    drawn = generate(
        model, [r["prompt"] for r, _ in rows], n=n, max_tokens=how.max_tokens,
        temperature=how.temperature, seed=how.seed,
    )  # fmt: skip
    made: list[list[Trajectory]] = []
    for (row, place), items in zip(rows, drawn, strict=True):
        each = [(row | {"finished": c.finish == "stop"}, steps_of(c.text, separator))
                for c in items]  # fmt: skip
        made.append([_as_steps(one, steps, separator, place) for one, steps in each])
    return made


def check_local(model: Model) -> None:
    """Raise InputError for a served model, which cannot go on from a prefix."""
    if model.is_served:
        raise InputError(
            "a served model cannot go on from the first steps of an answer",
            where=model.name,
            fix="Use a local model, or set rollouts to 0",
        )


def check_rooms(model: Model, paths: Sequence[Trajectory]) -> None:
    """Raise InputError for answers that cannot be carried on from each step before their last.

    Rewriters are not asked for it, as they may be models; `continued` sees to what they write.
    """
    check_local(model)
    loaded = model.load_module()
    plain = model.with_changes(c for c in model.changes if not isinstance(c, Rewriter))
    some = [p for p in paths if len(p.steps) > 1]
    for path, prompt in zip(some, rewritten(plain, [p.prompts[0] for p in some]), strict=True):
        done = len(path.steps) - 1
        _room(loaded, prompt, _begun(loaded, path, done), 1, path, done)


def _begun(loaded: Loaded, path: Trajectory, done: int) -> list[int]:
    pieces = step_ids(loaded.tokenizer, path.steps[:done], path.separator)
    return [i for piece in pieces for i in piece]


def _room(
    loaded: Loaded, prompt: Prompt, begun: Sequence[int], most: int, path: Trajectory, done: int
) -> int:
    """Tokens that fit after the first steps, `most` of them at the most; 0 after the last alone."""
    limit = context_of(loaded.module)
    length = len(prompt_ids(loaded.tokenizer, prompt)) + len(begun)
    room = most if limit is None else max(0, min(most, limit - length))
    if not room and done < len(path.steps):
        raise InputError(
            f"{length} tokens of the prompt and the first {done} of {len(path.steps)} steps do not "
            f"fit into the context of {limit} with room to go on",
            where=path.place,
            fix="Leave the row out, or set rollouts to 0",
        )
    return room


def continued(
    model: Model, places: Sequence[tuple[Trajectory, int]], n: int, how: Drawing
) -> list[list[tuple[str, bool]]]:
    """n continuations after the first steps of each answer, and whether each came to its end.

    They depend on prompt, prefix and seed alone: equal prefixes are carried on in the same way.
    None where all steps of an answer fill the context, as it was cut there.

    Raises:
        InputError: a served model; an answer whose first steps leave no room for others.
    """
    check_local(model)
    loaded = model.load_module()
    asked = rewritten(model, [t.prompts[0] for t, _ in places])
    begun = [_begun(loaded, t, k) for t, k in places]
    by_room: dict[int, list[int]] = {}
    for i, (prompt, before, (path, k)) in enumerate(zip(asked, begun, places, strict=True)):
        room = _room(loaded, prompt, before, how.max_tokens, path, k)
        by_room.setdefault(room, []).append(i)
    by_room.pop(0, None)
    sampling = SamplingSettings(
        n=n, max_tokens=how.max_tokens, temperature=how.temperature, seed=how.seed
    )
    draw = drawer(base_of(model, None), model)
    made: list[list[tuple[str, bool]]] = [[] for _ in places]
    for room, members in by_room.items():
        drawn = draw(
            [asked[i] for i in members], replace(sampling, max_tokens=room),
            begun=[begun[i] for i in members], first=[0] * len(members),
        )  # fmt: skip
        for i, items in zip(members, drawn, strict=True):
            made[i] = [(c.text, c.finish == "stop") for c in items]
    return made
