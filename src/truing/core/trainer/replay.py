"""Training on a saved stream of pairs: steps as it says, token by token as they were drawn.

Rows of `synthesize/online_stream` name their rollout and hold token ids, so that nothing is
tokenised again and each update sees the pairs that it is given, however many, in place of an order
that the engine draws. All else is the engine's: reference, adapter, optimizer, rate, checkpoints,
and held-out pairs, of a stream token by token, others as any objective reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import cast

from truing.context import Json, current
from truing.core.batch.parts import Part
from truing.core.batch.reading import Read, read_units
from truing.core.batch.training_rows import Unit
from truing.core.held_out import INPUT, Watch
from truing.core.objective import Objective
from truing.core.together import joint
from truing.core.trainer.frozen_view import identity
from truing.core.trainer.held_out_rows import HeldOutRows, held_rows
from truing.core.trainer.start import Start, begin
from truing.core.trainer.text_task import Steps, TextTask
from truing.core.trainer.train_text import Asked, trained
from truing.core.training import Hook, TextTraining
from truing.errors import InputError
from truing.models import Model
from truing.tables import Row, Table, content_hash

WHERE = "train/replay"
COLUMNS = ("rollout", "rollouts", "prompt_ids", "chosen_ids", "rejected_ids")


class Ordered(TextTask):
    """A task whose steps are given; one without a row leaves everything as it is.

    Rows that are measured only have no such steps, and are those that are asked for.
    """

    def parts(self, rows: Sequence[int], step: int) -> Iterator[Part]:
        """Micro-batches of the given step; the engine's order of rows is not followed."""
        rows = self.steps[step] if self.steps else rows
        if rows:
            yield from super().parts(rows, step)


def check_stream(data: Table) -> None:
    """Raise an InputError for the first row that no stream has written."""
    for i, row in enumerate(data):
        lacks = [name for name in COLUMNS if name not in row]
        if lacks:
            raise InputError(
                f"needs the column {lacks[0]!r}, which synthesize/online_stream writes",
                where=f"{WHERE} {data.place(i)}",
                seen=[n for n in row if n not in ("id", "lineage")],
            )
        number, of = row["rollout"], row["rollouts"]
        if not (isinstance(number, int) and isinstance(of, int) and 0 <= number < of):
            raise InputError(
                "column 'rollout' is a number below that of 'rollouts'",
                where=f"{WHERE} {data.place(i)}",
                seen=(number, of),
                fix="Give the table as synthesize/online_stream wrote it",
            )


def rollouts_of(data: Table) -> list[list[int]]:
    """Rows of each rollout, in order; one of which nothing could be learnt has none."""
    made: list[list[int]] = [[] for _ in range(max(cast(int, r["rollouts"]) for r in data))]
    for i, row in enumerate(data):
        made[cast(int, row["rollout"])].append(i)
    return made


def _unit(row: Row) -> Unit:
    prompt, *answers = (
        tuple(cast("list[int]", row[f"{n}_ids"])) for n in ("prompt", "chosen", "rejected")
    )
    return Unit(str(row["id"]), prompt, tuple(answers), {})


def _held(
    spec: Objective, own: Mapping[str, object], held_out: Table, start: Start
) -> tuple[HeldOutRows, dict[str, Json]]:
    """The held-out pairs, and what to say of them."""
    where = f"{WHERE} {INPUT}"
    if all(name in row for row in held_out for name in COLUMNS):
        units, notes = [_unit(row) for row in held_out], dict[str, Json](rows=len(held_out))
    else:
        named = replace(spec, name=where)
        units, notes = read_units(named, start.loaded, held_out, start.limit, own=own)
    held = held_rows(replace(spec, name=WHERE), units, Hook(), start.settings.batch)
    return held, {f"{INPUT}_{n}": v for n, v in notes.items()}


@joint
def train_replay(
    spec: Objective,
    own: Mapping[str, object],
    model: Model,
    data: Table,
    reference: Model | None,
    values: Mapping[str, object],
    steps: Steps,
    held_out: Table | None = None,
    watch: Watch | None = None,
) -> Model:
    """Train `model` on the pairs of a stream by an objective, step by step as given.

    Args:
        spec: an objective on pairs, with its settings `own`.
        data: rows of `synthesize/online_stream`.
        reference: frozen; None takes the model as it is before training.
        values: the engine's settings among others, by name.
        steps: rows of each update.
        held_out: pairs that are not trained on, but measured meanwhile.
        watch: when they are; where they are given.
    Returns:
        the model with an adapter, or with new weights when `rank` is 0.
    """
    known = {f.name for f in fields(TextTraining)}
    engine = {n: v for n, v in values.items() if n in known} | {"steps": len(steps)}
    settings = TextTraining(**engine)  # type: ignore[arg-type]
    key = content_hash(
        [
            WHERE,
            spec.name,
            own,
            vars(settings),
            model.weights_key,
            data.key,
            list(map(list, steps)),
            current().seed,
            identity(reference) if reference is not None else "",
        ],
        8,
    )
    watch = watch or Watch()
    if held_out is not None:
        key = content_hash([key, held_out.key, vars(watch)], 8)
    start = begin(model, settings, WHERE, key=key, reference=reference)
    units, notes, held = [_unit(row) for row in data], dict[str, Json](rows=len(data)), None
    if held_out is not None:
        held, told = _held(spec, own, held_out, start)
        held.warn(units, f"{WHERE} {INPUT}")
        notes |= told
    asked = Asked(replace(spec, name="replay"), own, None, {}, Hook(), settings, watch)
    # Answers were drawn as they are; whether one of them ends is no sign of a wrong template.
    return trained(asked, start, Read(units, held, notes), data, None, steps, Ordered, ended=True)
