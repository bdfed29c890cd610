"""Settings that all training shares, learning-rate schedules and the engine's hooks.

A hook changes inputs or reference rather than the loss; an objective names one, and its settings
become the method's.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from truing.core.bounds import Bounds, check_bounds
from truing.core.modelfiles.lora import names_of
from truing.core.trainer import distributed
from truing.errors import InputError

if TYPE_CHECKING:
    from truing.core.batch.training_rows import Reader, Unit
    from truing.core.chat import Prompt
    from truing.core.tree import Packed
    from truing.models import Loaded
    from truing.tables import Table

State = dict[str, Tensor]
Schedule = Literal["cosine", "linear", "constant", "inverse_sqrt"]
FLOOR = 0.1  # share of the peak that a warm-up before "inverse_sqrt" begins at
BOUNDS: Bounds = {
    "epochs": "[0, inf)",
    "steps": (0, None),
    "lr": "[0, inf)",
    "batch": (1, None),
    "warmup": "[0, 1)",
    "clip": "[0, inf)",
    "weight_decay": "[0, inf)",
    "adam_beta2": "[0, 1)",
    "adam_epsilon": "(0, inf)",
}
TEXT_BOUNDS: Bounds = {
    "rank": (0, None),
    "lora_alpha": (0, None),
    "layers": (0, None),
    "max_length": (8, None),
    "budget": (0, None),
}


@dataclass(frozen=True, kw_only=True)
class Training:
    """How any module is trained.

    Args:
        epochs: passes over the rows; may be a fraction.
        steps: number of updates, instead of `epochs`; 0 takes `epochs`.
        lr: peak learning rate; 0 takes 2e-4 for adapters and 1e-5 for a full fine-tune.
        batch: rows (pairs, groups) of one update.
        schedule: of the learning rate after the warm-up: to 0 by half a cosine, in a straight
            line, constant, or by the inverse square root of the updates made, whose warm-up begins
            at a tenth.
        warmup: share of the updates over which the rate rises from 0.
        clip: largest norm of the gradient; 0 does not clip.
        weight_decay: of AdamW.
        adam_beta2: how slowly AdamW forgets squared gradients.
        adam_epsilon: added to the root of their mean by AdamW.
    """

    epochs: float = 1.0
    steps: int = 0
    lr: float = 0.0
    batch: int = 8
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    clip: float = 1.0
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8

    def check(self, where: str) -> None:
        """Raise an InputError that names the first setting out of range."""
        check_bounds(vars(self), BOUNDS, where)
        if not self.steps and not self.epochs:
            raise InputError("nothing to do: steps and epochs are 0", where=where)

    def total(self, units: int) -> int:
        """Number of updates over `units` rows."""
        return self.steps or math.ceil(self.end(units) / min(self.batch, units))

    def end(self, units: int) -> int:
        """How many rows are drawn in all, where each epoch draws `units`."""
        return self.steps * min(self.batch, units) or max(1, round(self.epochs * units))

    def rate(self, step: int, total: int) -> float:
        """Learning rate of update `step` (from 0) of `total`, as a share of the peak.

        "inverse_sqrt" is max(step / W, 0.1) in a warm-up of W updates and sqrt(W / step) after it,
        as in "Secrets of RLHF in Large Language Models", arXiv 2307.04964.
        """
        rising = math.ceil(self.warmup * total)
        if self.schedule == "inverse_sqrt":
            if step < rising:
                return max(step / rising, FLOOR)
            return math.sqrt(max(rising, 1) / max(step, 1))
        if step < rising:
            return (step + 1) / (rising + 1)
        done = (step - rising) / max(1, total - rising)
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1 - done if self.schedule == "linear" else 1.0


@dataclass(frozen=True, kw_only=True)
class TextTraining(Training):
    """How a language model is trained; the first settings are those of `Training`.

    Args:
        rank: of the LoRA adapter; 0 trains all weights.
        lora_alpha: the adapter's scale times its rank; 0 takes twice the rank.
        targets: linear layers that the adapter is put on, by the ends of their names, such as
            q_proj,v_proj; all-linear is all but the head.
        layers: train the top blocks alone, so many, by an adapter on them or in full; what the
            frozen ones below say of a row is computed once and kept. 0 trains all.
        max_length: of prompt and one answer together. Longer answers are cut at the end, rows
            whose prompt leaves no room are left out; both are counted.
        budget: tokens computed at once, which memory limits and results do not depend on; 0
            decides by the machine.
        gradient_checkpointing: keep the inputs of blocks alone and compute the rest again in the
            backward pass, which costs a second forward pass and changes no result; auto does so
            where the run would not fit into memory otherwise.
        dtype: that the model is computed in. auto takes bfloat16 where a probe says that this
            machine is markedly quicker with it. What is trained, gradients, optimizer and losses
            are in float32 throughout: weights that are trained themselves are computed with as
            their roundings to bfloat16.
    """

    rank: int = 16
    lora_alpha: float = 0.0
    targets: str | list[str] = "all-linear"
    layers: int = 0
    max_length: int = 1024
    budget: int = 0
    gradient_checkpointing: Literal["auto", "always", "never"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def check(self, where: str) -> None:
        """Raise an InputError that names the first setting out of range."""
        super().check(where)
        check_bounds(vars(self), TEXT_BOUNDS, where)
        if self.targets != "all-linear" and not self.rank:
            raise InputError(
                "setting 'targets' names layers for an adapter, and with rank 0 there is none",
                where=where,
                seen=self.targets,
                fix="Give a rank, or leave out targets",
            )
        if not names_of(self.targets):
            raise InputError(
                "setting 'targets' names no layer", where=where, fix="Leave it out for all"
            )

    def check_whole(self, where: str) -> None:
        """Raise an InputError for weights that would be trained in bfloat16 themselves."""
        if self.dtype == "bfloat16" and not self.rank:
            raise InputError(
                "setting 'dtype' must be float32 where this method trains all weights: small "
                "updates would be rounded away",
                where=where,
                seen=self.dtype,
                fix="Train an adapter (rank above 0), or leave out dtype",
            )

    @property
    def peak(self) -> float:
        """Peak learning rate."""
        return self.lr or (2e-4 if self.rank else 1e-5)

    @property
    def scale_alpha(self) -> float:
        """alpha of the adapter."""
        return self.lora_alpha or 2.0 * self.rank


class Tuned(Protocol):
    """What hooks may touch of the running training."""

    name: str
    module: nn.Module
    units: list[Unit]
    steps: Sequence[Sequence[int]]  # numbers of the rows of each update
    lengths_N: Tensor  # tokens of the row that each token of the micro-batch belongs to

    def trained(self) -> Mapping[str, Tensor]:
        """Trained parameters by name."""
        ...

    def reference(self) -> State:
        """Values of the trained parameters that make up the reference."""
        ...


class Hook:
    """Base of the hooks: does nothing."""

    moves_reference = False
    fresh = False  # rows change while training goes on
    added = 0  # branches put after a row's own
    max_tokens = 0  # of the longest of them that may be drawn
    measures: tuple[str, ...] = ()  # measurements that it takes itself
    # Settings that stand in where rows are only measured.
    quiet: ClassVar[Mapping[str, object]] = {}

    def settings(self) -> dict[str, object]:
        """Its settings by name."""
        return dict(vars(self))

    def rows(self, data: Table, reader: Reader) -> Table:
        """The table to train on in place of `data`, of the same kind.

        Args:
            reader: what will read it: its tokenizer, its limit, and where to count what is cut.
        """
        return data

    def foresee(self, steps: Callable[[Sequence[Unit]], Sequence[Sequence[int]]]) -> None:
        """Called before `units` where the training can tell which of the rows its updates will see.

        Args:
            steps: of rows, those of each update.
        """

    def units(
        self, loaded: Loaded, units: Sequence[Unit], prompts: Mapping[str, Prompt], limit: int
    ) -> list[Unit]:
        """The rows to train on in place of `units`; `prompts` by row id, `limit` in tokens."""
        return list(units)

    def given(self, unit: Unit) -> tuple[tuple[int, ...], ...]:
        """The answers that a row of `units` brought along, without those put after them."""
        return unit.answers[: len(unit.answers) - self.added]

    def before_step(self, task: Tuned, rows: Sequence[int], step: int) -> None:
        """Called before update `step` (from 0) with the numbers of its rows."""

    def before_measuring(self, task: Tuned, rows: Sequence[int], step: int) -> None:
        """Called in its place after update `step` for rows that are not trained on."""

    def forward(self, task: Tuned) -> AbstractContextManager[object]:
        """Wrapped around every forward pass that gradients flow through.

        And around those that take its own `measures`.
        """
        return contextlib.nullcontext()

    def measured(self, packed: Packed) -> dict[str, Tensor]:
        """Its `measures` [U, K, T] of the forward pass that has just been made in `forward`."""
        return {}

    def facts(self) -> dict[str, tuple[Tensor, float]]:
        """What to record of the pass that has just been made: sums, and of how many, by name."""
        return {}

    def after_step(self, task: Tuned, step: int) -> None:
        """Called after update `step` (from 1)."""

    def state(self, task: Tuned) -> State:
        """What a checkpoint must hold of it, by name."""
        return {}

    def load_state(self, task: Tuned, state: State) -> None:
        """Take back some of what `state` gave."""


HOOKS: dict[str, type[Hook]] = {}
H = TypeVar("H", bound=type[Hook])


def hook(name: str) -> Callable[[H], H]:
    """Register a hook under the name that objectives call it by."""

    def register(kind: H) -> H:
        HOOKS[name] = kind
        return kind

    return register


@hook("moving_reference")
class MovingReference(Hook):
    """The reference follows the policy (TR-DPO, arXiv 2404.09656): soft or hard updates.

    Args:
        share: of the policy in the new reference; 1 replaces it. It is the paper's alpha, and
            `ref_model_mixup_alpha` in TRL.
        every: updates between two moves: the paper's tau, and `ref_model_sync_steps` in TRL.
    """

    moves_reference = True

    def __init__(self, *, share: float = 0.6, every: int = 512) -> None:
        self.share, self.every = share, every
        check_bounds(vars(self), {"share": "(0, 1]", "every": (1, None)})

    def before_step(self, task: Tuned, rows: Sequence[int], step: int) -> None:
        """Say before the first update where the reference will not move before the last."""
        total = len(task.steps)
        if not step and total <= self.every and distributed.leads():
            print(
                f"{task.name}: warning: the reference moves after every {self.every} updates, and "
                f"there are {total}, so that it stays as it is; lower every",
                file=sys.stderr,
            )

    def after_step(self, task: Tuned, step: int) -> None:
        """ref <- share * policy + (1 - share) * ref."""
        if step % self.every == 0:
            held = task.reference()
            with torch.no_grad():
                for name, value in task.trained().items():
                    held[name].lerp_(value.detach(), self.share)


@hook("noisy_embeddings")
class NoisyEmbeddings(Hook):
    """Uniform noise on the input embeddings while training (NEFTune, arXiv 2310.05914).

    Args:
        noise: alpha; each entry gets noise in +- alpha / sqrt(L * D) for L tokens of width D.
    """

    quiet: ClassVar[Mapping[str, object]] = {"noise": 0.0}

    def __init__(self, *, noise: float = 5.0) -> None:
        self.noise = noise
        check_bounds(vars(self), {"noise": (0, None)})

    @contextlib.contextmanager
    def forward(self, task: Tuned) -> Generator[None]:
        """Add noise to what the embedding layer returns."""
        layer = cast("Callable[[], nn.Module]", task.module.get_input_embeddings)()

        def shake(_: nn.Module, __: object, out: Tensor) -> Tensor:
            bound_N1 = self.noise / (task.lengths_N.to(out)[:, None] * out.shape[-1]).sqrt()
            return out + torch.empty_like(out).uniform_(-1, 1) * bound_N1

        handle = layer.register_forward_hook(shake)
        try:
            yield
        finally:
            handle.remove()
