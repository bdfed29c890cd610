"""The stream of an online run: every rollout that was learnt from, kept in the order of learning.

A block `with kept_in(journal):` keeps what the online loop learns from inside it, token by token,
as it comes: a run that was killed and goes on from a checkpoint has its earlier rollouts in the
journal. Outside of such a block nothing is kept. Of several processes the first one keeps.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from truing.context import Journal, Json
from truing.errors import InputError
from truing.method import methods
from truing.tables import Row

if TYPE_CHECKING:
    from truing.core.rl.answers import Asked, Group
    from truing.tables import Table

ONLINE = "train/online_dpo"
ONCE = ("passes", "minibatches")  # each rollout is learnt from in one update
# Answers are single ones, and all that is learnt; no update is left out.
NONE = ("environment", "mix", "eval_every", "keep_best", "patience")
Said = tuple[list[int], str, bool]  # tokens, words, whether it came to its end
Kept = tuple[str, Json, list[int], list[Said], list[float]]  # id, prompt, tokens, answers, rewards
_journal: contextvars.ContextVar[Journal | None] = contextvars.ContextVar("stream", default=None)


@contextlib.contextmanager
def kept_in(journal: Journal) -> Generator[None]:
    """Keep the rollouts of an online run in `journal` inside the block, by their numbers."""
    token = _journal.set(journal)
    try:
        yield
    finally:
        _journal.reset(token)


def keep(prompts: Sequence[Asked], number: int, groups: Sequence[Group]) -> None:
    """Note a rollout, where somebody asked for it; one that is there already stays as it is."""
    journal = _journal.get()
    if journal is None or str(number) in journal:
        return
    noted: list[Json] = []
    for group in groups:
        row = prompts[group.number].row
        said: list[Json] = [[list(a.ids), a.text, a.finished] for a in group.answers]
        asked = cast(Json, row["prompt"])
        noted.append([str(row["id"]), asked, list(group.prompt), said, list(group.reward)])
    journal.put(str(number), noted)


def pairs_of(journal: Journal, rollouts: int, generator: str) -> list[Row]:
    """Best and worst answer of each group, in order; groups of equal rewards make no pair.

    Of equal extremes the first is taken, in float32, as `train/online_dpo` does. Columns beside
    those of a pair: `rollout` (from 0) of `rollouts`, token ids as they were drawn, both rewards.
    """
    made: list[Row] = []
    for number in range(rollouts):
        for one in cast("list[Kept]", journal.get(str(number)) or []):
            parent, prompt, ids, answers, reward = one
            reward_K = np.asarray(reward, np.float32)
            best, worst = int(reward_K.argmax()), int(reward_K.argmin())
            if reward_K[best] == reward_K[worst]:
                continue
            row: Row = {"prompt": prompt, "rollout": number, "rollouts": rollouts}
            row["prompt_ids"] = ids
            for name, k in (("chosen", best), ("rejected", worst)):
                row |= {name: answers[k][1], f"{name}_finished": answers[k][2]}
                row |= {f"{name}_ids": answers[k][0], f"{name}_reward": reward[k]}
            made.append(row | {"lineage": {"parents": [parent], "generator": generator}})
    return made


def settings_of(how: Mapping[str, object]) -> dict[str, object]:
    """All settings of the online run; an InputError for those that it, or a stream, cannot have."""
    try:
        found = methods[ONLINE].validate(how, where="")
        methods[ONLINE].check(found, {})
    except InputError as error:
        told = f"setting 'how': {error.message}"
        raise InputError(told, where=error.where, seen=error.seen, fix=error.fix) from None
    for name in ONCE:
        if found[name] != 1:
            raise InputError(f"setting 'how': {name} must be 1 in a stream", seen=found[name])
    for name in NONE:
        if found.get(name):
            raise InputError(
                f"setting 'how': a stream has no {name}", seen=found[name], fix="Leave it out"
            )
    return found


def check_how(settings: Mapping[str, object], tables: Mapping[str, Table]) -> None:
    """What is checked before anything runs."""
    how = settings.get("how")
    if isinstance(how, Mapping):
        settings_of(cast("Mapping[str, object]", how))
