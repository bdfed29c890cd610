"""Answers that the model draws itself, as further branches of the rows that it is trained on.

Drawn once before training, under the model as it is, and anew while it is trained, at every step or
at every so many: to the rows that the updates will see and no others, which have one token in the
place of each. Those drawn before are kept by content (weights, prompt, settings, seed, draw
number), token by token: another run, another objective or a resumed one replays exactly the same
answers. Those drawn at a step are a function of the seed, the step and the weights then; where they
serve further steps, checkpoints hold them, too. They are trained on as they were drawn, never
tokenised again. An answer that does not end within its limit is cut there and has no end. How many
are so, empty, or drawn twice to one prompt is recorded.

Before a process first keeps new ones, and again as it keeps more, the files longest unused go until
no more than `LIMIT` bytes are left.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from truing.context import current
from truing.core.bounds import check_bounds
from truing.core.chat import Prompt, prompt_ids
from truing.core.files import FILE, home, make_room_for, write_text
from truing.core.generation.stops import ends_of
from truing.core.identity.code import made_by
from truing.core.sampling import SamplingSettings, sample
from truing.core.trainer import distributed
from truing.core.training import Hook, State, Tuned, hook
from truing.errors import InputError
from truing.tables import Message, content_hash

if TYPE_CHECKING:
    from truing.core.batch.training_rows import Unit
    from truing.core.trainer.text_task import Steps
    from truing.models import Loaded

Answers = list[tuple[int, ...]]
Asked = Sequence[tuple[Sequence[int], int]]  # (prompt ids, number of the draw)
LIMIT = 2**30  # bytes on disk, of all runs together
SHOWN = 2  # rows whose tokens the mask receipt shows
BLOCK = 64  # prompts whose answers are kept together: what a kill can cost
REMINDERS = (
    "Be considerate of everyone whom the answer may concern.",
    "Avoid anything that could hurt people, animals or their surroundings.",
    "When a request is illegal, decline it and say why.",
    "Respect the privacy of the people who are spoken of.",
    "Treat all groups of people fairly and without prejudice.",
    "Be honest, and say so where you are not sure.",
    "Think of the least experienced person who might act on the answer.",
    "Stay calm and polite, whatever the tone of the question.",
    "Point to safer ways of reaching the same aim.",
    "Where health or safety is at stake, advise to ask a professional.",
    "Do not encourage anyone to deceive or to humiliate others.",
    "Weigh what good and what harm an answer can do before giving it.",
)


def drawn(module: nn.Module, asked: Asked, settings: SamplingSettings) -> Answers:
    """One answer to each prompt, with the random numbers of its draw number."""
    made = sample(module, [ids for ids, _ in asked], settings, first=[draw for _, draw in asked])
    return [tuple(items[0].ids) for items in made]


def kept(loaded: Loaded, asked: Sequence[Asked], settings: SamplingSettings) -> list[Answers]:
    """Answers of each row's prompts: read from the cache, or drawn and put there.

    Several processes draw for a share of the rows each, and read what the others drew.
    """
    if distributed.now().size > 1:
        mine = asked[distributed.share([1] * len(asked))]
        with distributed.alone():
            kept(loaded, mine, settings)
        distributed.barrier()
    how = [
        loaded.model.weights_key,
        str(next(loaded.module.parameters()).dtype),
        loaded.device,
        torch.get_num_threads(),
        made_by("truing.core.sampling"),
        asdict(settings),
    ]
    made: dict[int, Answers] = {}
    missing: list[tuple[int, Path]] = []
    for i, row in enumerate(asked):
        name = content_hash([how, [[list(ids), draw] for ids, draw in row]])
        path = home() / "own" / name[:2] / f"{name}.json"
        try:
            found = cast("list[list[int]]", json.loads(path.read_text()))
            made[i] = [tuple(ids) for ids in found]
        except (OSError, ValueError):
            missing.append((i, path))
        else:
            with contextlib.suppress(OSError):
                path.touch()
    for start in range(0, len(missing), BLOCK):
        block = missing[start : start + BLOCK]
        answers = iter(drawn(loaded.module, [one for i, _ in block for one in asked[i]], settings))
        made |= {i: [next(answers) for _ in asked[i]] for i, _ in block}
        texts = [json.dumps(made[i]) for i, _ in block]
        with contextlib.suppress(OSError):  # what cannot be kept costs time only
            make_room_for(home() / "own", LIMIT, sum(max(FILE, len(t)) for t in texts))
            for (_, path), text in zip(block, texts, strict=True):
                write_text(path, text)
        current().progress(start + len(block), len(missing), "own answers")
    return [made[i] for i in range(len(asked))]


def record(found: Sequence[Answers], ends: Sequence[int]) -> None:
    """How many answers there are, to how many rows' prompts, and how many are of little use."""
    every = [a for answers in found for a in answers]
    current().metric(
        own_answers=len(every),
        own_answers_cut=sum(ids[-1] not in ends for ids in every),
        own_answers_empty=sum(len(ids) == 1 and ids[0] in ends for ids in every),
        own_answers_repeated=len(every) - sum(len(set(answers)) for answers in found),
    )


@dataclass(kw_only=True, eq=False)
class OwnSamples(Hook):
    """Answers of the model as it is before training become branches after a row's own.

    Args:
        samples: answers drawn to each prompt.
        temperature: that they are drawn at.
        top_p: share of the probability that they are drawn from.
        max_tokens: longest answer drawn.
    """

    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 128

    def __post_init__(self) -> None:
        check_bounds(vars(self), {"samples": (1, None), "refresh": (0, None)})
        self._steps: Callable[[Sequence[Unit]], Steps] | None = None

    def settings(self) -> dict[str, object]:
        """Its settings by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def added(self) -> int:
        """Branches that each row gets."""
        return self.samples

    def sampling(self, loaded: Loaded, seed: int) -> SamplingSettings:
        """How answers are drawn; they end where the template or the model ends them."""
        return SamplingSettings(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
            stop_ids=ends_of(loaded.tokenizer, loaded.module),
        )

    def asked(
        self, loaded: Loaded, unit: Unit, prompt: Prompt, step: int = 0
    ) -> list[tuple[Sequence[int], int]]:
        """(prompt ids, draw number) of each answer that is drawn before update `step`."""
        return [(unit.prompt, draw) for draw in range(self.samples)]

    def check_rows(self, units: Sequence[Unit]) -> None:
        """Raise InputError for rows of which no part is a prompt."""
        if any(u.dialogue is not None for u in units):
            raise InputError(
                "the model answers prompts itself, and some rows are whole dialogues",
                fix="Give rows with prompt and completion",
            )

    @property
    def until(self) -> int | None:
        """Updates that see the answers drawn before training; None for all."""
        return None

    def foresee(self, steps: Callable[[Sequence[Unit]], Steps]) -> None:
        """Draw answers to the rows of these steps alone."""
        self._steps = steps

    def _drawn_to(self, units: Sequence[Unit]) -> list[int]:
        """Numbers of the rows that answers are drawn to before training: seen by it, or shown."""
        every: Steps = [range(len(units))]
        steps = self._steps(units) if self._steps is not None else every
        seen = (row for rows in steps[: self.until] for row in rows)
        return sorted({*seen, *range(min(SHOWN, len(units)))})

    def units(
        self, loaded: Loaded, units: Sequence[Unit], prompts: Mapping[str, Prompt], limit: int
    ) -> list[Unit]:
        """The rows with the answers that the model draws to their prompts.

        One token holds the place of each answer that is not drawn now.
        """
        self._source, self._limit = (loaded, prompts), limit
        self.check_rows(units)
        at = self._drawn_to(units)
        asked = [self.asked(loaded, units[i], prompts[units[i].id]) for i in at]
        how = self.sampling(loaded, current().stream("own"))
        found = kept(loaded, asked, how)
        record(found, how.stop_ids or ())
        own, none = dict(zip(at, found, strict=True)), [found[0][-1][:1]] * self.samples
        return [
            replace(
                u, answers=(*u.answers, *(a[: limit - len(u.prompt)] for a in own.get(i, none)))
            )
            for i, u in enumerate(units)
        ]

    def draw_anew(
        self, task: Tuned, rows: Sequence[int], step: int
    ) -> tuple[list[Answers], Sequence[int]]:
        """Answers by the model as it is now in place of these rows' last ones, and what ends one.

        Several processes draw a share of them each.
        """
        loaded, prompts = self._source
        units = [task.units[r] for r in rows]
        asked = [one for u in units for one in self.asked(loaded, u, prompts[u.id], step)]
        how = self.sampling(loaded, current().stream(f"own/{step}"))
        here = distributed.share([len(prompt) for prompt, _ in asked])
        own = drawn(task.module, asked[here], how) if asked[here] else []
        answers = iter(distributed.gathered(own))
        found: list[Answers] = []
        for r, unit in zip(rows, units, strict=True):
            room = self._limit - len(unit.prompt)
            new = [next(answers)[:room] for _ in range(self.samples)]
            task.units[r] = replace(unit, answers=(*unit.answers[: -self.samples], *new))
            found.append(new)
        return found, how.stop_ids or ()


@hook("finished_samples")
class FinishedSamples(OwnSamples):
    """Own answers for what scores an answer at its end: those cut at the limit are left out.

    So are rows whose demonstration is cut or not finished: a score would tell an end from none and
    learn no more. Which rows are left decides the order of all, so that to each of the others
    answers are drawn.
    """

    def foresee(self, steps: Callable[[Sequence[Unit]], Steps]) -> None:
        """Draw answers to all rows whose demonstration ends."""

    def units(
        self, loaded: Loaded, units: Sequence[Unit], prompts: Mapping[str, Prompt], limit: int
    ) -> list[Unit]:
        """The rows whose demonstration and an own answer end, with those own ones that do."""
        ends = set(self.sampling(loaded, 0).stop_ids or ())
        shown = [u for u in units if all(ids[-1] in ends for ids in u.answers)]
        made: list[Unit] = []
        for unit in super().units(loaded, shown, prompts, limit) if shown else ():
            given, own = unit.answers[: -self.samples], unit.answers[-self.samples :]
            whole = [ids for ids in own if ids[-1] in ends]
            if whole:
                made.append(replace(unit, answers=(*given, *whole)))
        open_ended = len(units) - len(shown)
        current().metric(rows_left_out=len(units) - len(made), demonstrations_open=open_ended)
        if not made:
            raise InputError(
                f"no row is left: {open_ended} of {len(units)} demonstrations are cut or not "
                "finished, and none of the model's own answers to the others came to its end "
                f"within {self.max_tokens} tokens",
                where="setting 'max_tokens'",
                seen=f"{len(shown) * self.samples} answers",
                fix="Raise it, or start from a model whose answers end; demonstrations are cut at "
                "max_length, and not finished where that column says so",
            )
        return made

    def given(self, unit: Unit) -> tuple[tuple[int, ...], ...]:
        """The demonstration: how many own answers are after it differs from row to row."""
        return unit.answers[:1]


@hook("own_samples")
@dataclass(kw_only=True, eq=False)
class RefreshedSamples(OwnSamples):
    """Own answers that may be drawn anew while training goes on.

    Args:
        refresh: updates after which they are drawn anew, by the model as it then is; 0 keeps those
            drawn before training.
    """

    refresh: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fresh = self.refresh > 0
        self._rows: list[int] = []  # whose answers were drawn last

    @property
    def until(self) -> int | None:
        """Those before the first time that answers are drawn anew."""
        return self.refresh or None

    def before_step(self, task: Tuned, rows: Sequence[int], step: int) -> None:
        """Draw the answers of the rows to come until the next time, where that is due."""
        if not self.refresh or not step or step % self.refresh:
            return
        ahead = task.steps[step : step + self.refresh]
        self._rows = sorted({row for some in ahead for row in some})
        record(*self.draw_anew(task, self._rows, step))

    def state(self, task: Tuned) -> State:
        """Ids of the answers drawn last [samples, tokens] by row, padded by -1."""
        made: State = {}
        for row in self._rows:
            ids = [torch.tensor(a) for a in task.units[row].answers[-self.samples :]]
            made[str(row)] = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
        return made

    def load_state(self, task: Tuned, state: State) -> None:
        """Put such answers back."""
        for name, ids_KT in state.items():
            unit = task.units[int(name)]
            own = [tuple(i for i in ids if i >= 0) for ids in ids_KT.tolist()]
            given = unit.answers[: len(unit.answers) - len(own)]
            task.units[int(name)] = replace(unit, answers=(*given, *own))
            self._rows.append(int(name))


@hook("guided_samples")
@dataclass(kw_only=True, eq=False)
class GuidedSamples(RefreshedSamples):
    """Own answers drawn under moral reminders, which the training itself does not see.

    Args:
        reminders: texts of which one, drawn for each answer, is put before the prompt; [] takes a
            dozen of our own, [""] none.
    """

    samples: int = 11
    top_p: float = 0.95
    reminders: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reminders = tuple(self.reminders) or REMINDERS

    def asked(
        self, loaded: Loaded, unit: Unit, prompt: Prompt, step: int = 0
    ) -> list[tuple[Sequence[int], int]]:
        """(ids of the prompt under a reminder, draw number) of each answer."""
        made: list[tuple[Sequence[int], int]] = []
        for draw in range(self.samples):
            name = f"reminder/{unit.id}/{draw}" + (f"/{step}" if step else "")
            place = current().stream(name) % len(self.reminders)
            ids = prompt_ids(loaded.tokenizer, reminded(prompt, self.reminders[place]))
            made.append((ids, draw))
        return made


def reminded(prompt: Prompt, reminder: str) -> Prompt:
    """The prompt with a reminder before the user's last words."""
    if not reminder:
        return prompt
    if isinstance(prompt, str):
        return f"{reminder}\n\n{prompt}"
    messages = [dict(cast(Message, m)) for m in prompt]
    users = [m for m in messages if m["role"] == "user"]
    if users:
        users[-1]["content"] = f"{reminder}\n\n{users[-1]['content']}"
    return messages


@hook("fresh_samples")
class FreshSamples(OwnSamples):
    """Own answers drawn anew at every step, by the model as it then is."""

    fresh = True

    @property
    def until(self) -> int | None:
        """None of them: each step draws its own."""
        return 0

    def before_step(self, task: Tuned, rows: Sequence[int], step: int) -> None:
        """Draw the answers of this step's rows."""
        self.draw_anew(task, rows, step)

    before_measuring = before_step
