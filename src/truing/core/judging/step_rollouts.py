"""Roll-outs from the steps of answers and dialogues, and what they come to at their end.

The parts of synthesize/step_labels that are not about tables; see there for the equations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import cast

from truing.changes import Rewriter
from truing.core.chat import Message, Prompt, prompt_ids, step_ids
from truing.core.drawing import base_of, drawer
from truing.core.generate import generate, rewritten
from truing.core.judge import check_unread, pointwise, rate
from truing.core.judging.answer_steps import step_values, steps_of
from truing.core.judging.rewards import check_reward_model, probabilities
from truing.core.judging.scores import check_reward, total_scores
from truing.core.modelfiles.loaded import Loaded
from truing.core.modelfiles.reach import context_of
from truing.core.passes.scoring import check_logits
from truing.core.sampling import SamplingSettings
from truing.errors import InputError
from truing.models import Model
from truing.tables import Row

WHERE = "synthesize/step_labels"
TURN = "\n\n"  # closes a turn: what rows of steps without a separator are read with
Outcomes = Sequence[tuple[int, float]]  # of each roll-out: its steps in all, and z
JUDGE = """\
You judge one step of an answer to a request.
{% if criteria %}
A good step keeps these rules:
{{ criteria }}
{% endif %}
<request>
{{ prompt }}
</request>

<answer>
{{ completion }}
</answer>
"""


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
        model,
        [r["prompt"] for r, _ in rows],
        n=n,
        max_tokens=how.max_tokens,
        temperature=how.temperature,
        seed=how.seed,
    )
    made: list[list[Trajectory]] = []
    for (row, place), items in zip(rows, drawn, strict=True):
        each = [
            (row | {"finished": c.finish == "stop"}, steps_of(c.text, separator)) for c in items
        ]
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
            [asked[i] for i in members],
            replace(sampling, max_tokens=room),
            begun=[begun[i] for i in members],
            first=[0] * len(members),
        )
        for i, items in zip(members, drawn, strict=True):
            made[i] = [(c.text, c.finish == "stop") for c in items]
    return made


def hindsight(r: Sequence[float], outcomes: Sequence[Outcomes], gamma: float) -> list[float]:
    """V_t of each step, from r_t and what the roll-outs from there came to."""
    return [
        r_t + fmean(gamma ** (n - t) * z for n, z in found)
        for t, (r_t, found) in enumerate(zip(r, outcomes, strict=True), 1)
    ]


def majority(outcomes: Sequence[Outcomes]) -> list[float]:
    """1 for each step from which more than half of the roll-outs come to something good."""
    return [float(2 * sum(z > 0.5 for _, z in found) > len(found)) for found in outcomes]


@dataclass(frozen=True)
class Ending:
    """What whole answers come to: z of each."""

    reward: dict[str, object] | None
    judge: Model | None
    reward_model: Model | None
    criteria: str

    def check(self) -> None:
        """Raise InputError unless there is just one that says z."""
        given = {"reward": self.reward, "judge": self.judge, "reward_model": self.reward_model}
        named = [n for n, one in given.items() if one is not None]
        if len(named) != 1:
            raise InputError(
                "what an answer comes to is said by one of reward, judge and reward_model",
                where=WHERE,
                seen=named,
                fix="Give just one of them",
            )
        if self.reward is not None:
            check_reward(self.reward, where=f"{WHERE} setting 'reward'")
        if self.reward_model is not None:
            check_reward_model(self.reward_model, WHERE)
            check_logits(self.reward_model, f"{WHERE} input 'reward_model'")

    @property
    def key(self) -> list[object]:
        """All that z depends on."""
        models = [m.key if m is not None else "" for m in (self.judge, self.reward_model)]
        return [self.reward, *models, self.criteria]

    def __call__(self, rows: list[Row]) -> list[float]:
        """z of each row; an InputError for one that is not in [0, 1]."""
        if not rows:
            return []
        if self.reward_model is not None:
            return probabilities(self.reward_model, rows, WHERE)
        if self.judge is not None:
            return pointwise(self.judge, rows, criteria=self.criteria)
        reward = cast("dict[str, object]", self.reward)
        found = total_scores(reward, rows, where=f"{WHERE} setting 'reward'")
        for i, z in enumerate(found, 1):
            if not 0 <= z <= 1:
                raise InputError(
                    "what an answer comes to lies in [0, 1]",
                    where=f"{WHERE} setting 'reward' row {i}",
                    seen=z,
                    fix="Give a reward model as the input reward_model, which takes its sigmoid",
                )
        return found


def outcomes(
    model: Model, paths: Sequence[Trajectory], ending: Ending, rollouts: int, how: Drawing
) -> list[list[Outcomes]]:
    """[answer][step] -> what the roll-outs from there came to, or the answer itself.

    It stands for them where it ended, or was cut at the end of the context.
    """
    places = [
        (p, k)
        for p in paths
        if rollouts
        for k in range(1, len(p.steps) + 1)
        if k < len(p.steps) or not p.finished
    ]
    drawn = continued(model, places, rollouts, how) if places else []
    both = list(zip(places, drawn, strict=True))
    rows = [p.outcome_row(k, text, ended) for (p, k), items in both for text, ended in items]
    z = iter(ending(rows))
    found: dict[tuple[int, int], Outcomes] = {}
    for (p, k), items in both:
        if items:
            found[id(p), k] = [(k + p.longer(text), next(z)) for text, _ in items]
    # At the last step something is drawn from answers that were cut, and at all others if at any.
    alone = [p for p in paths if (id(p), len(p.steps)) not in found]
    own = iter(ending([p.outcome_row(len(p.steps), finished=p.finished) for p in alone]))
    ends: dict[int, Outcomes] = {id(p): [(len(p.steps), next(own))] for p in alone}
    return [
        [found.get((id(p), k)) or ends[id(p)] for k in range(1, len(p.steps) + 1)] for p in paths
    ]


def judged(judge: Model, paths: Sequence[Trajectory], criteria: str) -> list[list[float]]:
    """1 or 0 for each step that a judge finds good or not, up to the first unread.

    Raises:
        InputError: so many replies cannot be read that `pointwise` would refuse them, too.
    """
    rows: list[Row] = [
        {"prompt": q, "completion": s} for p in paths for q, s in zip(p.prompts, p.steps)
    ]
    found = rate(judge, rows, criteria=criteria, template=JUDGE)
    unread = found.count(None)
    told = f"no verdict could be read from {unread} of {len(found)} replies on steps"
    check_unread(unread, len(found), told, judge.name)
    read = iter(found)
    made: list[list[float]] = []
    for path in paths:
        scores = [next(read) for _ in path.steps]
        kept = scores.index(None) if None in scores else len(scores)
        made.append([float(cast(float, s) > 0.5) for s in scores[:kept]])
    return made


def expected(process_model: Model | None, paths: Sequence[Trajectory]) -> list[list[float]]:
    """r_t of every step; the process model is asked once for each separator."""
    if process_model is None:
        return [[0.0] * len(p.steps) for p in paths]
    by_separator: dict[str, list[tuple[int, Row]]] = {}
    for i, path in enumerate(paths):
        rows = [(i, row) for row in path.labelled([0.0] * len(path.steps), {})]
        by_separator.setdefault(path.separator, []).extend(rows)
    made: list[list[float]] = [[] for _ in paths]
    for separator, asked in by_separator.items():
        found = step_values(process_model, [row for _, row in asked], separator, where=WHERE)
        for (i, _), values in zip(asked, found, strict=True):
            made[i] += values
    return made
