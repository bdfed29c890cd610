"""Train several tasks at once, each under its own system prompt, in balanced and masked chunks.

A chunk holds r_t samples of every task t (1 unless `each` says otherwise) side by side; small tasks
are drawn again, shuffled anew, until the largest has been seen once. Token i attends to token j iff

    j <= i  and  chunk(i) = chunk(j)

and positions restart with each chunk: samples of a chunk see the ones before them, as examples in
context; chunks never see each other. The loss falls on the assistants' tokens, their ends included:

    L = - sum_t w_t log p(x_t | x_<t in its chunk) / sum_t w_t

w_t is the sample's `weight` (an optional column, 1), or that divided by the number of its answer
tokens with `average="sample"`, which weighs tasks alike however long their answers are. The other
ways of packing are those that the paper compares with: "balance" (chunks of one row see each
other), "packing" (samples in random order fill rows of `max_length`, all seen), "isolated" (the
chunks' samples, each by itself) and "sequence" (the samples as they are: plain fine-tuning under
the tasks' system prompts; it is also what packing with isolated samples comes to, since the engine
lays rows end to end and no row sees another).

Rows are examples with a text column `task`; rows without one are a task of their own. A task's
system prompt takes the place of the row's own. Where it says "{tools}", as that of the task "tools"
does, there stand the functions that the row offers, from its column `tools`, and what its own
system message says, which mostly lists them. A sample that does not fit into what is left of
`max_length` goes into a new chunk.
Source: "Mixture-of-Instructions", arXiv 2404.18410. Differences: the wording of the system prompts
is ours (the paper's is not known), and that positions restart is our choice, as is `alone`: models
meet samples by themselves in use, so a share of the chunks may be trained sample by sample.

Shapes: U rows (chunks), K = 1 branch, T answer tokens of a chunk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, cast

import numpy as np

from truing.context import current
from truing.core.batch import columns
from truing.core.batch.training_rows import Reader, Unit
from truing.core.chat import Message, Prompt, writes_tools
from truing.core.modelfiles.loaded import Loaded
from truing.core.objective import Loss, Measurements, objective
from truing.core.training import Hook, hook
from truing.core.tree import Node
from truing.errors import InputError
from truing.kinds import Row, as_messages, tools_of, with_system
from truing.tables import Table

TOOLS = "{tools}"  # in a system prompt: those of the row
SYSTEMS = {
    "code": "You are an experienced programmer. Write correct, readable code.",
    "math": "You are an expert in mathematics. Reason step by step and state the result.",
    "tools": "You are an agent with tools. Call one with a JSON object of its name and arguments.",
}
Packing = Literal["chunks", "balance", "packing", "isolated", "sequence"]


def under(row: Row, system: str, *, native: bool = False) -> Row:
    """The row with `system` as its system message, in place of one that it has.

    Args:
        row: with "prompt" or "messages".
        system: "{tools}" in it stands for the row's `tools`, one JSON schema a line, and for what
            its own system message says.
        native: the chat template writes the column `tools` itself; it is left to it.
    """
    name = "prompt" if "prompt" in row else "messages"
    given = with_system(as_messages(row[name]), row.get("system"))
    if TOOLS in system:
        listed = [str(m["content"]) for m in given if m.get("role") == "system"]
        if not native:
            schemas = [json.dumps(tool, ensure_ascii=False) for tool in tools_of(row)]
            listed, row = [*schemas, *listed], {n: v for n, v in row.items() if n != "tools"}
        system = system.replace(TOOLS, "\n".join(listed)).strip()
    first: Message = {"role": "system", "content": system}
    rest = {n: v for n, v in row.items() if n != "system"}
    return {**rest, name: [first, *(m for m in given if m.get("role") != "system")]}


def balanced(
    tasks: Sequence[str], each: Mapping[str, int], rotate: bool, random: np.random.Generator
) -> list[list[int]]:
    """Numbers of the samples of each chunk: `each[t]` of every task t, tasks in a fixed order.

    Args:
        tasks: of each sample; their order of first appearance is the order in a chunk.
        each: samples of a task in one chunk, 1 where it is not named.
        rotate: begin each chunk one task later than the one before.
        random: shuffles every pass over a task.
    """
    own = {t: [i for i, other in enumerate(tasks) if other == t] for t in dict.fromkeys(tasks)}
    n = max(math.ceil(len(rows) / each.get(t, 1)) for t, rows in own.items())

    def drawn(rows: list[int]) -> Iterator[int]:
        while True:
            yield from (rows[int(i)] for i in random.permutation(len(rows)))

    draws = {t: drawn(rows) for t, rows in own.items()}
    made: list[list[int]] = []
    for k in range(n):
        names = list(own)
        names = names[k % len(names) :] + names[: k % len(names)] if rotate else names
        made.append([next(draws[t]) for t in names for _ in range(each.get(t, 1))])
    return made


def filled(groups: Sequence[Sequence[Unit]], limit: int) -> Iterator[list[Unit]]:
    """Whole groups in rows of at most `limit` tokens; a group that exceeds it alone is cut up."""
    row: list[Unit] = []
    room = limit
    for group in groups:
        size = sum(u.tree().size for u in group)
        if row and size > room:
            yield row
            row, room = [], limit
        for unit in group:
            if row and unit.tree().size > room:
                yield row
                row, room = [], limit
            row.append(unit)
            room -= unit.tree().size
    if row:
        yield row


def side_by_side(units: Sequence[Unit], average: str) -> Unit:
    """One row of several samples, each seeing those before it, with the weight of each token."""
    ids: tuple[int, ...] = ()
    loss: tuple[bool, ...] = ()
    weights: list[float] = []
    for unit in units:
        ((own, marks),) = unit.tree().rows()
        n = sum(marks)
        weight = float(cast(float, unit.numbers["weight"]))
        weights += [weight / n if average == "sample" else weight] * n
        ids, loss = ids + own, loss + marks
    return Unit("+".join(u.id for u in units), (), (), {"weight": weights}, Node(ids, loss))


@hook("instruction_chunks")
class InstructionChunks(Hook):
    """Tasks get their system prompts, samples are laid side by side.

    Args:
        systems: system prompt of each task; "" leaves the model's own. None: ours for "code",
            "math" and "tools". Tasks that are not named keep what their rows say. "{tools}" in one
            stands for the row's tools and its own system message, which is left out otherwise.
        each: samples of a task in one chunk, 1 where it is not named.
        packing: "chunks", or what the paper compares it with: "balance", "packing", "isolated",
            "sequence".
        rotate: begin each chunk one task later than the one before, since later ones see more.
        alone: share of the chunks whose samples are trained each by itself; 0.1 to 0.2 helps small
            models, which meet them so in use.
        average: over all answer tokens, or over each sample's and then over samples.
    """

    def __init__(
        self,
        *,
        systems: dict[str, str] | None = None,
        each: dict[str, int] | None = None,
        packing: Packing = "chunks",
        rotate: bool = False,
        alone: float = 0.0,
        average: Literal["token", "sample"] = "token",
    ) -> None:
        if not 0 <= alone <= 1:
            raise InputError("setting 'alone' is a share, 0 to 1", seen=alone)
        if min((each or {"": 1}).values()) < 1:
            raise InputError("setting 'each' must be at least 1 for every task", seen=each)
        listing = {"tools": f"{SYSTEMS['tools']}\n\n{TOOLS}"}
        self.systems = SYSTEMS | listing if systems is None else dict(systems)
        self.each = dict(each or {})
        self.packing: Packing = packing
        self.rotate, self.alone, self.average = rotate, alone, average
        self._task: dict[str, str] = {}

    def settings(self) -> dict[str, object]:
        """Its settings by name."""
        return {n: v for n, v in vars(self).items() if not n.startswith("_")}

    def rows(self, data: Table, reader: Reader) -> Table:
        """The rows under the system prompts of their tasks; ids stay."""
        native = writes_tools(reader.tokenizer)
        made: list[Row] = []
        for i, row in enumerate(data):
            task = row.get("task", "")
            if not isinstance(task, str):
                raise InputError("column 'task' must be text", where=data.place(i), seen=task)
            self._task[str(row["id"])] = task
            system = self.systems.get(task, "")
            made.append(under(row, system, native=native) if system else row)
        missing = sorted(set(self.each) - set(self._task.values()))
        if missing:
            raise InputError(
                "no row is of this task",
                where=data.source,
                seen=missing,
                fix="Name tasks of the column 'task' in setting 'each'",
            )
        return data.remade(data.kind, made, range(len(data)))

    def units(
        self, loaded: Loaded, units: Sequence[Unit], prompts: Mapping[str, Prompt], limit: int
    ) -> list[Unit]:
        """Chunks as rows."""
        random = np.random.default_rng(current().stream("chunks"))
        if self.packing in ("packing", "sequence"):
            groups = [[units[int(i)]] for i in random.permutation(len(units))]
        else:
            tasks = [self._task[u.id] for u in units]
            chunks = balanced(tasks, self.each, self.rotate, random)
            groups = [[units[i] for i in chunk] for chunk in chunks]
        if self.packing in ("packing", "balance"):
            rows = list(filled(groups, limit))
        elif self.packing == "chunks":
            alone = random.random(len(groups)) < self.alone
            rows = [
                row
                for group, apart in zip(groups, alone, strict=True)
                for row in ([[u] for u in group] if apart else filled([group], limit))
            ]
        else:
            rows = [[u] for group in groups for u in group]
        current().metric(rows_packed=len(rows), samples=sum(map(len, rows)))
        return [side_by_side(row, self.average) for row in rows]


@objective(
    paper="mixture-of-instructions",
    unit="token",
    needs=("logp",),
    rows="example",
    columns={"weight": 1.0},
    hook="instruction_chunks",
)
def mixture_of_instructions(m: Measurements) -> Loss:
    """Train several tasks at once, each under its own system prompt, in balanced chunks."""
    weight = columns.weight(m)
    weight_UT = weight if weight.dim() > 1 else weight[:, None]
    logp_UT, mask_UT = m.logp_UKT[:, 0], m.mask_UKT[:, 0]
    return Loss(-logp_UT, mask_UT * weight_UT, {"logp": m.mean()[:, 0].detach()})
