"""How the training of a language model begins, whatever it learns from.

The module and its dtype, how many tokens fit, the check of template and masks, what is said before
anything is trained, a forecast of the memory, and the frozen model that it is compared with.

What depends on the machine (dtype, tokens of a micro-batch, gradient checkpointing) is decided
once, by the first process, and noted in the journal `decided` of the step's folder: a run that is
resumed goes on as it began, whatever the machine says by then. How it fits into memory is decided
again as long as it has no checkpoint, since the choice may be what it was killed by, and once for
each number of processes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, cast

import torch

from truing.context import Json, current
from truing.core.batch.same_tokenizer import same_tokens
from truing.core.chat import check_receipt, receipt
from truing.core.engine import checkpoints_of
from truing.core.held_out import INPUT
from truing.core.modelfiles.loaded import free_on, spare
from truing.core.modelfiles.reach import together_in, together_of, vocab_of
from truing.core.modelfiles.stock import config_of
from truing.core.passes import memory, precision, recompute
from truing.core.passes.master_weights import Masters
from truing.core.trainer import distributed
from truing.core.trainer.frozen_view import Sight, acting, refuse
from truing.core.tree import BUDGET
from truing.doctor import device_of_machine, memory_gib
from truing.errors import InputError
from truing.output import printable

if TYPE_CHECKING:
    from truing.core.training import TextTraining
    from truing.core.tree import Node
    from truing.models import Loaded, Model

GPU_BUDGET = 16384
DECIDED = "decided"
SHARES = {  # what the shares of a forecast are for
    "rows": "the activations of a micro-batch",
    "trained": "gradients and moments of what is trained",
    "copies": "copies of the weights, such as a reference's",
}


@dataclass
class Start:
    """A model in memory that is about to be trained.

    Args:
        where: name of the method, which errors name.
        model: as it was given.
        reference: the frozen model that was given, if any.
        settings: how it will be trained.
        loaded: a module of its own.
        dtype: that modules compute in.
        limit: tokens of prompt and answer together, which all that read them have room for.
        budget: tokens of a micro-batch; `check` may lower it.
        run: the key of the run, which its checkpoints and decisions go by in the step's folder.
        masters: float32 values behind all weights, where the module computes with roundings.
    """

    where: str
    model: Model
    reference: Model | None
    settings: TextTraining
    loaded: Loaded
    dtype: str
    limit: int
    budget: int
    run: str
    masters: Masters | None = None

    @property
    def computed(self) -> str:
        """What values of the module itself are told apart by, beside its weights."""
        return self.dtype if self.masters is None else f"{self.dtype} of float32"

    def check(
        self,
        trees: Sequence[Node],
        largest: int,
        notes: Mapping[str, Json],
        *,
        ended: bool = False,
        shown: int = 0,
        beside: memory.Beside | None = None,
        held: Sequence[Node] = (),
        held_largest: int = 0,
    ) -> None:
        """Check masks, template and memory, and say what will be trained and how.

        Args:
            trees: that carry loss, or that stand for those to come.
            largest: tokens of the largest tree.
            notes: said and recorded, beside how it is computed.
            ended: True where no answer needs an end.
            shown: trees of which the loss tokens are shown.
            beside: what will be loaded later.
            held: trees that are measured meanwhile and not trained on.
            held_largest: tokens of the largest of them.
        Raises:
            InputError: see `check_receipt`; or the run does not fit into memory.
        """
        self._check_masks(trees, ended, self.where)
        if held:
            self._check_masks(held, ended, f"{self.where} {INPUT}")
        fitted = self._fit(largest, beside, held_largest)
        if distributed.leads():
            facts = dict(notes) | {
                "device": self.loaded.device,
                "dtype": self.dtype,
                "budget": self.budget,
                "threads": torch.get_num_threads(),
            }
            facts |= {"gradient_checkpointing": True} if fitted.recompute else {}
            kept = [c.kind for c in self.model.run_time_changes]
            facts |= {"carried_on_without_acting": ", ".join(kept)} if kept else {}
            print(
                f"{self.where}: " + ", ".join(f"{n}: {v}" for n, v in facts.items()),
                file=sys.stderr,
            )
            if shown:
                facts["receipt"] = text = receipt(self.loaded.tokenizer, trees, shown)
                print(f"loss falls on >>>these tokens<<<:\n{printable(text)}", file=sys.stderr)
            current().metric(**facts)
            _note(f"dtype/{self.run}", self.dtype)
            _note(self._fitting(largest), asdict(fitted))

    def _check_masks(self, trees: Sequence[Node], ended: bool, where: str) -> None:
        """Raise an InputError for trees that would train the wrong thing; see `check_receipt`."""
        module = self.loaded.module
        stops = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
        check_receipt(
            self.loaded.tokenizer,
            trees,
            vocab=vocab_of(module),
            stops=[stops] if isinstance(stops, int) else list(stops or []),
            ended=ended,
            where=where,
        )

    def _fitting(self, largest: int) -> str:
        """What a choice is noted by: on another number of processes it is made anew."""
        size = distributed.now().size
        return f"memory/{self.run}/{largest}" + (f"/{size}" if size > 1 else "")

    def _fit(self, largest: int, beside: memory.Beside | None, held: int) -> memory.Choice:
        """Lower the budget and switch gradient checkpointing on where memory demands it."""
        module, settings = self.loaded.module, self.settings
        made = memory.forecast(module, settings, beside)
        if self.loaded.device != "cpu":
            row = min(self.limit, max(largest, held))
            made = replace(made, masks=memory.mask_bytes(module, row))
        free = min(distributed.everyone(_free(self.loaded.device)))
        begun = distributed.agree(bool(checkpoints_of(self.run).steps()))
        name = self._fitting(largest)
        noted = cast("dict[str, int] | None", _noted(name) if begun else None)
        if noted is not None:
            fitted = memory.Choice(noted["budget"], bool(noted["recompute"]))
        else:
            fitted = memory.choose(made, settings, largest, free, self.budget)
        trained = made.needed(max(largest, fitted.budget), fitted.recompute)
        measured = made.measured(held) if held else 0.0
        needed = max(trained, measured)
        # A GPU's own allocator has the last word: what it can free is known to it alone.
        if needed > memory.SHARE * free and self.loaded.device == "cpu":
            held_out = measured > trained
            what = "measuring the largest held-out row" if held_out else "training"
            share, size = made.too_much(needed, free)
            raise InputError(
                f"{what} needs about {needed / 2**30:.3g} GiB more and {free / 2**30:.3g} GiB of "
                f"memory are free; {size / 2**30:.3g} GiB of it are for {SHARES[share]}",
                where=self.where,
                fix=_remedy(settings, share, known=noted is not None, held=held_out),
            )
        if fitted.recompute:
            recompute.switch_on(module)
        self.budget = fitted.budget
        return fitted

    def frozen(self) -> Loaded:
        """The reference in memory: the one given, or the model itself as it is computed."""
        model, device = self.reference or self.model, self.loaded.device
        if model.weights_key == self.model.weights_key:
            return model.load_module(self.dtype, device)
        return precision.unrounded(model, self.dtype, device)

    def sight(self) -> Sight | None:
        """How a reference that was given sees the rows; None where there is none."""
        if self.reference is None:
            return None
        return Sight(self.frozen(), self.model, "reference", self.where)


def begin(
    model: Model,
    settings: TextTraining,
    where: str,
    *,
    key: str,
    reference: Model | None = None,
    readers: Mapping[str, Model] | None = None,
    apart: bool = False,
    full: bool = False,
) -> Start:
    """Read a model into memory to train it.

    Args:
        key: of the run, as `engine.train` gets it.
        reference: frozen, and of the same tokens; None where there is none, or the model itself.
        readers: who else reads the rows in the same tokens, by role.
        apart: whether it is measured by itself, so that it may read prompts of its own.
        full: whether weights that are all trained may be computed with as roundings.
    Raises:
        InputError: a reference with another tokenizer or template, or with run-time changes that
            cannot act.
    """
    if reference is not None:
        same_tokens({"model": model, "reference": reference}, where=where)
        (acting if apart else refuse)(reference, model, "reference", where)
    device = device_of_machine()
    if not full:
        settings.check_whole(where)
    noted, chosen = _noted(f"dtype/{key}"), ""
    if distributed.leads() and not noted:
        chosen = precision.choose(model, settings, device, full=full)
    dtype = distributed.agree(str(noted or chosen))
    rounded = dtype != "float32" and not settings.rank
    if device == "cuda":
        spare(device)  # training takes all that is left
    if settings.rank and settings.dtype == "auto" and not noted:
        loaded = precision.unrounded(model, dtype, device, fresh=True)
        dtype = precision.type_of(loaded)
    else:
        _warn_of_rounding(model, settings, where)
        kind = "float32" if rounded else dtype
        loaded = model.load_module(kind, device, fresh=True, packed=True)
    masters = Masters(loaded.module) if rounded else None
    given = {"reference": reference} if reference is not None else {}
    limit = _shared(room(loaded, settings.max_length), {**given, **(readers or {})}, where)
    budget = settings.budget or (GPU_BUDGET if device == "cuda" else BUDGET)
    return Start(where, model, reference, settings, loaded, dtype, limit, budget, key, masters)


def _warn_of_rounding(model: Model, settings: TextTraining, where: str) -> None:
    """Say that the type which a user named rounds the weights below an adapter."""
    named = settings.rank and settings.dtype not in ("auto", "float32")
    if named and distributed.leads() and precision.finer(model):
        print(
            f"{where}: warning: the model's weights were trained or merged in float32, and dtype "
            f"{settings.dtype} rounds much of that away below the adapter; leave dtype out, or "
            "export the model first, which rounds it for good",
            file=sys.stderr,
        )


def room(loaded: Loaded, wanted: int) -> int:
    """Tokens of a row: those wanted, or the model's context where that is less."""
    return min(wanted, together_of(loaded.module) or wanted)


def _shared(limit: int, readers: Mapping[str, Model], where: str) -> int:
    """Tokens of a row that all have room for, told where another's context is the shortest."""
    least = {role: context_of(m) or limit for role, m in readers.items()}
    role = min(least, key=least.__getitem__, default="")
    if not role or least[role] >= limit:
        return limit
    if distributed.leads():
        told = f"{where}: the {role} reads at most {least[role]} tokens, so no row gets longer"
        print(told, file=sys.stderr)
        current().metric(limit=least[role], limit_of=role)
    return least[role]


def context_of(model: Model) -> int | None:
    """Tokens that a row may have, before the model is in memory; None where nothing says so."""
    if model.is_served or model.builder:
        return None
    return together_in(config_of(model.folder).get_text_config())


def _free(device: str) -> float:
    """Bytes of memory that this process can have; without bound where the system does not say."""
    if device != "cpu":
        return float(free_on(device))
    total, free = memory_gib()
    return free * 2**30 / distributed.neighbours() if total else math.inf


def _noted(name: str) -> Json:
    """What was decided under this name when the run began, in all processes; None at first."""
    context = current()
    found: Json = None
    # The throw-away folder of a plain call ends with its process, and there is nothing to resume.
    if distributed.leads() and context.stored and (context.folder / f"{DECIDED}.jsonl").is_file():
        found = context.journal(DECIDED).get(name)
    return distributed.agree(found)


def _note(name: str, value: Json) -> None:
    if current().stored and value != current().journal(DECIDED).get(name):
        current().journal(DECIDED).put(name, value)


def _remedy(settings: TextTraining, share: str, *, known: bool, held: bool) -> str:
    if known:
        return "It fitted when this run began: free some memory, and the same command goes on"
    if share == "trained" and settings.rank:
        return "Lower rank, or train fewer blocks (layers)"
    if share == "trained":
        return "Train an adapter (rank), or fewer blocks (layers)"
    if share == "copies":
        own = "" if settings.rank else ", or train an adapter, whose reference is the model itself"
        return "Take a smaller model" + own
    if held:
        return "Lower max_length, or leave such rows out"
    least = "Lower max_length or budget" if settings.budget else "Lower max_length"
    if settings.gradient_checkpointing == "never":
        least += ", or allow gradient_checkpointing"
    return least + ("" if settings.rank else ", or train an adapter")
