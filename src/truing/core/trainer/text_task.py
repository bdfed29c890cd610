"""The engine's task for language models: packed trees in, an objective's loss out.

A `batch` objective is called once a step with the detached values of all its units. Its gradient
with respect to these values is then carried through the model micro-batch by micro-batch, so that
sorting and batch statistics see the whole step whatever the split (the trick of gradient caching,
arXiv 2101.06983, on token log-probabilities).

Of several processes (`distributed`) each computes a run of the step's units, by tokens; weights,
and all values that a batch objective sees, are those of the whole step in each of them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from truing.core.batch.measure import blank, columns_of, joined, mismatched
from truing.core.batch.micro import Micro, constant, part_of
from truing.core.batch.parts import Part
from truing.core.batch.training_rows import Unit
from truing.core.logprob import check, measure
from truing.core.modelfiles.lora import Lora
from truing.core.objective import Measurements, Objective
from truing.core.passes.frozen_trunk import PLACE, FrozenTrunk
from truing.core.passes.master_weights import Masters
from truing.core.passes.scoring import HEAD, ScoreHead, measured
from truing.core.passes.vocab_heads import NAME, VocabHeads
from truing.core.reference import Reference
from truing.core.trainer import distributed
from truing.core.trainer.teacher import Extra, Teachers, head_of, whole_vocabulary
from truing.core.training import Hook, State
from truing.core.tree import Node, Packed, pack

Steps = Sequence[Sequence[int]]  # numbers of the rows of each update


class TextTask:
    """Units of one objective and the module that is trained on them.

    Args:
        spec: the objective.
        settings: its own.
        hook: what it changes besides the loss.
        units: rows as token branches.
        module: a causal language model.
        reference: log-probabilities under the frozen model.
        budget: tokens of a micro-batch.
        head: what gives "scores", trained with the rest.
    """

    def __init__(
        self,
        spec: Objective,
        settings: Mapping[str, object],
        hook: Hook,
        units: Sequence[Unit],
        module: nn.Module,
        reference: Reference,
        *,
        budget: int,
        head: ScoreHead | None = None,
    ) -> None:
        self.name, self.spec, self.settings, self.hook = spec.name, spec, dict(settings), hook
        self.moves = hook.moves_reference
        self.units, self.module, self.frozen, self.budget = list(units), module, reference, budget
        self.steps: Steps = ()  # rows of each update, once they are known
        self.at_once = 0  # rows of a step that are packed together; 0 for all
        check(module)  # now, before any hook changes what the module computes
        self.lora: Lora | None = None
        self.masters: Masters | None = None
        self.lengths_N = torch.zeros(0)
        self._other: nn.Module | None = None  # measured in place of the module without adapters
        self.teachers: Teachers | None = None
        self.head = head
        self.vocab_heads: VocabHeads | None = None
        self._held: State = {}
        self._state: State = {}
        self._next: State | None = None
        self.device = next(module.parameters()).device
        apart = ("mismatched", "ref_logp")
        self.measured = tuple(n for n in spec.asked(self.settings) if n not in apart)
        self.mismatched = "mismatched" in spec.needs
        self.longest = max(u.tree().longest for u in units) if self.mismatched else 0

    def __len__(self) -> int:
        """Number of units."""
        return len(self.units)

    def beside(self, units: Sequence[Unit], hook: Hook, at_once: int) -> TextTask:
        """The same on rows that are measured only, by a reference that stays; so many at once."""
        made = copy.copy(self)
        made.units, made.hook, made.moves = list(units), hook, False
        made.at_once, made.steps = at_once, ()
        if self.mismatched:
            made.longest = max(u.tree().longest for u in units)
        return made

    def adapt(self, adapters: Lora) -> None:
        """Train these adapters instead of the module's weights."""
        self.lora = adapters

    def stand_behind(self, masters: Masters) -> None:
        """Train these values, which the module computes with as roundings."""
        self.masters = masters
        masters.listen()

    def _written(self) -> None:
        """Let the module compute with what was put into the trained values."""
        if self.masters is not None:
            self.masters.write()

    def compare_with(self, other: nn.Module) -> None:
        """Compare with this module while training, not with the one without adapters."""
        self._other = other

    def speak_with(self, heads: VocabHeads) -> None:
        """Measure each row under the output head that its column names, and train these heads."""
        self.vocab_heads = heads

    def learn_from(self, teachers: Teachers, steps: Steps, others: Sequence[Node] = ()) -> None:
        """Compare with these teachers; what `steps` and `others` need of them is measured now."""
        self.teachers = teachers
        if self.hook.fresh:
            teachers.by_step = True
        else:
            teachers.prepare(self._used(steps), others)

    def trained(self) -> dict[str, nn.Parameter]:
        """The adapters' parameters, or those of the module that are not frozen, and the heads'."""
        source = self.lora or self.masters or self.module
        named = ((n, p) for n, p in source.named_parameters() if p.requires_grad)
        head = self.head.named_parameters(HEAD) if self.head is not None else ()
        more = self.vocab_heads.named_parameters(NAME) if self.vocab_heads is not None else ()
        return dict([*named, *head, *more])

    def stand_on(self, trunk: FrozenTrunk, steps: Steps) -> None:
        """Keep what frozen blocks say of all that `steps` visit, where that stays the same."""
        noisy = type(self.hook).forward is not Hook.forward
        if not self.hook.fresh and not noisy and distributed.now().size == 1:
            trunk.sweep([tree for rows in steps for tree in self._trees(rows)])

    def row_name(self, row: int) -> str:
        """The row's id."""
        return self.units[row].id

    def groups(self) -> list[int]:
        """Number of each row's output head; [] where there is one for all."""
        name = self.spec.heads
        return [int(cast(float, u.numbers[name])) for u in self.units] if name else []

    # The reference

    def _used(self, steps: Steps) -> list[Node]:
        """Trees of the units that `steps` visit."""
        return [self.units[row].tree() for row in sorted({row for rows in steps for row in rows})]

    def measure_reference(self, module: nn.Module, steps: Steps) -> None:
        """Measure every branch that `steps` will need under `module`, in one pass."""
        if self.hook.fresh:
            return  # each step will have its own
        self.frozen.sweep(module, self._used(steps))
        if self.mismatched:
            trees = [tree for rows in steps for tree in self._trees(rows)]
            self.frozen.sweep(module, [Node(t.ids, t.loss, t.children[-1:]) for t in trees])

    def reference(self) -> State:
        """Values of the trained parameters under a reference that moves; copied on first use."""
        if not self._held:
            self._held.update({n: p.detach().clone() for n, p in self.trained().items()})
        return self._held

    @contextlib.contextmanager
    def as_reference(self) -> Generator[None]:
        """The module with the moving reference's values inside the block."""
        now = {n: p.detach().clone() for n, p in self.trained().items()}
        self._put(self.reference())
        try:
            yield
        finally:
            self._put(now)

    def _put(self, values: State) -> None:
        named = self.trained()
        with torch.no_grad():
            for name, value in values.items():
                named[name].copy_(value)
        self._written()

    # Steps

    def _trees(self, rows: Sequence[int]) -> list[Node]:
        """Trees of a step, with mismatched answers where the objective needs them."""
        units = [self.units[r] for r in rows]
        if not self.mismatched:
            return [u.tree() for u in units]
        others = mismatched(units, self.longest)
        return [u.tree([a]) for u, a in zip(units, others, strict=True)]

    def _columns(self, rows: Sequence[int], width: int) -> dict[str, Tensor]:
        names = list(self.spec.columns)
        return columns_of([self.units[r] for r in rows], width, names, self.device)

    def _micro_batches(self, rows: Sequence[int], trees: Sequence[Node]) -> list[Micro]:
        """This process's units of a step in micro-batches, with what the reference says of them."""
        sizes = [t.size for t in trees]
        made = self._packed(rows, trees, distributed.share(sizes))
        if distributed.is_sharded(self.module):
            small = min(range(len(trees)), key=lambda i: sizes[i])
            idle = self._packed(rows, trees, slice(small, small + 1), idle=True)
            made += idle * (max(distributed.everyone(len(made))) - len(made))
        if self.teachers is not None and self.teachers.by_step:
            self.teachers.sweep([t for m in made for t in m.trees], keep=False)
        if "ref_logp" not in self.spec.needs:
            return made
        if self.hook.fresh:
            with self._compared() as frozen:
                self.frozen.sweep(frozen, [t for m in made for t in m.trees], keep=False)
        with self.as_reference() if self.moves else contextlib.nullcontext():
            return [replace(m, ref_logp_UKT=self._ref_logp(m)) for m in made]

    def _packed(
        self, rows: Sequence[int], trees: Sequence[Node], at: slice, *, idle: bool = False
    ) -> list[Micro]:
        made: list[Micro] = []
        start = at.start
        own, share = trees[at], self._shares
        for packed in pack(own, self.budget, share=share, device=self.device) if own else []:
            here = slice(start, start + len(packed))
            made.append(Micro(rows[here], trees[here], here, packed.to(self.device), idle=idle))
            start += len(packed)
        return made

    def _ref_logp(self, micro: Micro) -> Tensor:
        if self.moves:
            found = distributed.forward_of(
                self.module, lambda: measure(self.module, micro.packed, grad=False)
            )
            return found["logp"]
        _, width, length = micro.packed.mask_UKT.shape
        return self.frozen.values(micro.trees, width, length).to(self.device)

    def _measure(self, micro: Micro, grad: bool) -> Measurements:
        """Values of one micro-batch under the model, beside the reference's."""
        packed, grad = micro.packed, grad and torch.is_grad_enabled()
        sizes = [(t.longest, t.size) for t in micro.trees]
        self.lengths_N = torch.tensor([long for long, size in sizes for _ in range(size)])
        with self.hook.forward(self) if grad or self.hook.measures else contextlib.nullcontext():
            found = distributed.forward_of(self.module, lambda: self._found(micro, grad))
        tensors = {n: found[n] for n in self.measured}
        if micro.ref_logp_UKT is not None:
            tensors["ref_logp"] = micro.ref_logp_UKT
        columns = self._columns(micro.rows, packed.mask_UKT.shape[1])
        return Measurements(packed.mask_UKT, tensors, columns)

    def _found(self, micro: Micro, grad: bool) -> dict[str, Tensor]:
        names = [n for n in self.measured if n not in ("scores", *self.hook.measures)]
        found: dict[str, Tensor] = {}
        if names:
            extras, change = self._extras(micro), self._change(micro)
            found = measure(
                self.module, micro.packed, names, grad=grad, extras=extras, change=change
            )
            found |= self.hook.measured(micro.packed)
        if self.head is not None:
            found["scores"] = measured(self.module, self.head, micro.packed, grad=grad)
        return found

    def _change(self, micro: Micro) -> Callable[[Tensor], Tensor] | None:
        """What each row's own output head makes of the states that are to be read."""
        heads = self.vocab_heads
        if heads is None:
            return None
        packed = micro.packed
        number_U = self._columns(micro.rows, 1)[self.spec.heads]
        head_M = packed.gather(number_U[:, None, None].expand(packed.mask_UKT.shape))
        return lambda rows_MD: heads(rows_MD, head_M)

    def _extras(self, micro: Micro) -> dict[str, Extra]:
        """What statistics of the vocabulary read beside it: settings, the reference, teachers."""
        numbers = {n: v for n, v in self.settings.items() if isinstance(v, (int, float))}
        made: dict[str, Extra] = {n: constant(float(v)) for n, v in numbers.items()}
        if self.spec.compares_vocabulary:
            made["ref_logp"] = self._vocabulary(micro.packed)
        if self.teachers is not None:
            made |= self.teachers.extras(micro.trees, micro.packed)
        return made

    def _vocabulary(self, packed: Packed) -> Callable[[slice], Tensor]:
        """The reference's log-probabilities of the whole vocabulary, a few rows at a time."""
        with self._compared() as frozen:
            return whole_vocabulary(frozen, packed, len(head_of(self.module).weight))

    @contextlib.contextmanager
    def _compared(self) -> Generator[nn.Module]:
        """The module of the reference inside the block: another one, or this without adapters."""
        off = self.lora.off() if self._other is None and self.lora else contextlib.nullcontext()
        with off:
            yield self._other or self.module

    def parts(self, rows: Sequence[int], step: int) -> Iterator[Part]:
        """Micro-batches of a step; without gradients they are only measured."""
        before = self.hook.before_step if torch.is_grad_enabled() else self.hook.before_measuring
        before(self, rows, step)
        if self.mismatched and len(rows) == 1 and step:
            return  # one row left over at the end has nothing to be compared with: no update
        trees = self._trees(rows)
        if self.spec.unit == "batch":
            yield from self._whole(self._micro_batches(rows, trees), len(rows))
            return
        width = max(sum(1 for _ in t.rows()) for t in trees)
        columns = {n: c.cpu() for n, c in self._columns(rows, width).items()}
        empty = self.spec(blank(trees, self.spec.needs, columns), self.settings)
        weights = [float(w.sum()) for _, _, w in empty.terms()]
        if not any(weights):
            return
        size = self.at_once or len(rows)
        for at in range(0, len(rows), size):
            for micro in self._micro_batches(rows[at : at + size], trees[at : at + size]):
                loss = self.spec(self._measure(micro, grad=True), self.settings)
                part = part_of(loss, weights, micro.rows, len(rows), self.hook.facts())
                yield Part(part.loss * 0.0, 0.0) if micro.idle else part

    @property
    def _shares(self) -> bool:
        """Whether rows that begin alike are computed together: not where each is treated apart."""
        noisy = type(self.hook).forward is not Hook.forward
        return not noisy and self.vocab_heads is None and PLACE not in vars(self.module)

    def _whole(self, micros: Sequence[Micro], count: int) -> Iterator[Part]:
        """A batch objective: its gradient at all units' values, then through the model."""
        one = len(micros) == 1 and distributed.now().size == 1
        parts = [self._measure(m, grad=one) for m in micros]
        whole = parts[0] if one else self._all(micros, parts)
        leaves = [whole.tensors[n] for n in self.measured]
        learns = torch.is_grad_enabled() and not one
        for leaf in leaves if learns else ():
            leaf.requires_grad_()
        loss = self.spec(whole, self.settings, dict(self._state) or None)
        self._next = loss.state
        value, sums = loss.total(), loss.sums()
        if not learns:
            if distributed.leads():  # all have computed the whole step
                yield Part(value * count, float(count), sums)
            return
        slopes = torch.autograd.grad(value, leaves, allow_unused=True)
        sums = sums if any(not (m.idle or m.place.start) for m in micros) else {}  # unit 0's
        for micro in micros:
            m = self._measure(micro, grad=True)
            _, width, length = m.mask_UKT.shape
            carried = [
                (m.tensors[n] * slope[micro.place, :width, :length]).sum()
                for n, slope in zip(self.measured, slopes, strict=True)
                if slope is not None
            ]
            share = 0.0 if micro.idle else float(len(micro.rows))
            total = torch.stack(carried).sum() * (0.0 if micro.idle else float(count))
            yield Part(total, share, sums, value=value.detach() * share)
            sums = {}

    def _all(self, micros: Sequence[Micro], parts: Sequence[Measurements]) -> Measurements:
        """Values of all units of the step, whichever process has measured them."""
        if distributed.now().size == 1:
            return joined(parts)
        own = [p.to("cpu") for m, p in zip(micros, parts, strict=True) if not m.idle]
        return joined(distributed.gathered(own)).to(self.device)

    def after_step(self, step: int) -> None:
        """Take on the objective's state; let the hook act."""
        self._written()
        if self._next is not None:
            self._state.update({n: t.detach() for n, t in self._next.items()})
        self.hook.after_step(self, step)

    def state(self) -> State:
        """The objective's state, the hook's and a moving reference."""
        made = {f"objective/{n}": t for n, t in self._state.items()}
        made |= {f"hook/{n}": t for n, t in self.hook.state(self).items()}
        return made | {f"reference/{n}": t for n, t in self._held.items()}

    def load_state(self, state: State) -> None:
        """Take them back, after the trained values."""
        self._written()
        for name, value in state.items():
            kind, _, rest = name.partition("/")
            if kind == "objective":
                self._state[rest] = value
            elif kind == "hook":
                self.hook.load_state(self, {rest: value})
            else:
                distributed.put(self.reference()[rest], value)
