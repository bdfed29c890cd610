"""Train the top blocks alone: the trunk below is frozen, and its states are computed once a row.

    h = blocks_{1..L-k}(embed(ids)), kept by content;   z = head(norm(blocks_{L-k+1..L}(h)))

With k of L blocks trained, forward and backward passes run over these k. What is kept is h of every
token of every tree that training will visit, in float32 (or the module's own type) on disk, by
weights, tokens and depth, as the reference's values are; a micro-batch reads its own rows, and no
more is in memory. Passing over the blocks below gives the same numbers but for rounding; it is
tried on a small tree first.

Bounds: the folder never holds more than `LIMIT` bytes of all runs together, the files longest
unused go first; of one run's rows only so many are kept as fit into half of that. Others, rows that
change from step to step, and all rows where embeddings get noise or several processes share the
work are computed from the start each time, which needs no memory of the trunk's activations either.
How many rows and bytes are kept is said before training.

Measured on SmolLM2-135M (30 blocks), k = 6, an adapter of rank 16, two pairs of 422 tokens forward
and backward, seconds of one CPU thread: all blocks 1.54, the top ones 0.99, with kept states 0.50;
keeping them cost 0.44 once.

Shapes: N tokens, D hidden size.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from truing.context import current
from truing.core.batch.layout import Layout
from truing.core.files import home, make_room, new_file
from truing.core.identity.code import made_by
from truing.core.logprob import small_tree, states
from truing.core.modelfiles import lora as adapters
from truing.core.modelfiles.nf4 import packed_in
from truing.core.modelfiles.reach import width_of
from truing.core.passes.attention import tree_attention
from truing.core.passes.fused import fused
from truing.core.reference import SWEEP
from truing.core.training import TextTraining
from truing.core.tree import Node, Packed, pack
from truing.core.trunk import blocks_of, stopped_after
from truing.errors import InputError
from truing.tables import content_hash

LIMIT = 8 * 2**30  # bytes on disk, of all runs together
TOLERANCE = 1e-4  # of the largest state, when passing over blocks is tried
PLACE = "truing_trunk"  # where a module carries its trunk


def attach(module: nn.Module, settings: TextTraining, seed: int) -> adapters.Lora | None:
    """Freeze what is not trained: adapters on all blocks or the top ones, or these blocks' weights.

    Returns None where weights themselves are trained.
    Raises:
        InputError: more layers than the model has; a target that it has not.
    """
    layers = settings.layers
    blocks = list(blocks_of(module)) if layers else []
    if layers > len(blocks):
        raise InputError(
            f"the model has {len(blocks)} blocks",
            where="setting 'layers'",
            seen=layers,
            fix=f"Give {len(blocks)} at the most, or 0 for all",
        )
    if settings.rank:
        rank, alpha = settings.rank, settings.scale_alpha
        return adapters.attach(module, rank, alpha, settings.targets, seed, layers)
    if packed_in(module):
        raise InputError(
            "setting 'rank' is 0, which trains weights themselves, and those of 4 bits cannot be",
            seen=settings.rank,
            fix="Train an adapter (rank 16), or name the model without ?bits=4",
        )
    if layers:
        module.requires_grad_(False)
        for block in blocks[-layers:]:
            block.requires_grad_(True)
    return None


def keys_of(packed: Packed) -> list[tuple[str, int, int]]:
    """(content, first token, end) of every tree of a micro-batch: its ids and how they branch."""
    ids = packed.ids_N.cpu().numpy().astype("<i8")
    roots = [i for i, s in enumerate(packed.segments) if not s.before]
    made: list[tuple[str, int, int]] = []
    for first, end in zip(roots, [*roots[1:], len(packed.segments)], strict=True):
        own = packed.segments[first:end]
        start, stop = own[0].start, own[-1].stop
        shape = [
            (s.start - start, s.stop - start, [(a - start, b - start) for a, b in s.before])
            for s in own
        ]
        digest = hashlib.blake2b(ids[start:stop].tobytes(), digest_size=16)
        digest.update(repr(shape).encode())
        made.append((digest.hexdigest(), start, stop))
    return made


class FrozenTrunk:
    """The blocks below the trained ones, and what they say of rows.

    Args:
        module: a causal language model; from now on whoever measures it is played what is kept.
        layers: k, blocks that are trained.
        key: content of the weights.
        dtype: that the module computes in.
    Raises:
        InputError: the architecture's upper blocks need more than the states below them.
    """

    def __init__(self, module: nn.Module, layers: int, key: str, dtype: str) -> None:
        self.module, self.blocks = module, blocks_of(module)
        self.depth = len(self.blocks) - layers
        self.device = next(module.parameters()).device
        code = made_by("truing.core.logprob")
        self.how = [key, self.depth, dtype, self.device.type, torch.get_num_threads(), code]
        self.folder = home() / "trunk"
        self._places: dict[str, tuple[Path, int, int]] = {}  # of each tree: file, first row, end
        self._packs: dict[Path, Packed] = {}
        self.computed = self.cached = 0
        if self.depth:
            self._try()
            module.__dict__[PLACE] = self

    def _try(self) -> None:
        _, packed = small_tree(self.module)
        with torch.no_grad():
            whole_ND = states(self.module, packed)
            with self._playing(self._below(packed)):
                top_ND = states(self.module, packed)
        if float((whole_ND - top_ND).abs().max()) > TOLERANCE * float(whole_ND.abs().max()):
            raise InputError(
                "the architecture's upper blocks need more than the states below them",
                where="setting 'layers'",
                seen=type(self.module).__name__,
                fix="Leave out layers, or train an adapter on all of them",
            )

    def _below(self, packed: Packed) -> Tensor:
        """States [N, D] after the frozen blocks; neither later blocks nor the head are computed."""
        layout = Layout(packed.segments)
        backbone = cast("Callable[..., object]", self.module.base_model)
        with (
            torch.no_grad(),
            tree_attention(self.module),
            fused(self.module, layout.longest),
            stopped_after(self.blocks[self.depth - 1]) as seen,
        ):
            backbone(
                input_ids=packed.ids_N[None],
                position_ids=packed.positions_N[None],
                use_cache=False,
                tree=layout,
            )
        if not isinstance(seen[0], Tensor):
            raise InputError(
                "the architecture's blocks give more than states",
                where="setting 'layers'",
                seen=type(self.module).__name__,
                fix="Leave it out, which trains all blocks",
            )
        return seen[0][0]

    @contextlib.contextmanager
    def _playing(self, states_ND: Tensor) -> Generator[None]:
        """The frozen blocks give these states inside the block, and compute nothing."""
        frozen = list(self.blocks)[: self.depth]
        for block in frozen:
            block.forward = _passed
        frozen[-1].forward = lambda *_, **__: states_ND[None]
        try:
            yield
        finally:
            for block in frozen:
                del block.forward

    def played(self, packed: Packed) -> contextlib.AbstractContextManager[None]:
        """The module over kept states inside the block; itself where a tree's are not kept."""
        found = keys_of(packed)
        if not all(key in self._places for key, _, _ in found):
            return contextlib.nullcontext()
        places = [self._places[key] for key, _, _ in found]
        return self._playing(torch.cat([self._read(*at) for at in places]).to(self.device))

    def _read(self, path: Path, start: int, stop: int) -> Tensor:
        try:
            with safe_open(path, "pt") as file:
                return cast(Tensor, file.get_slice("states")[start:stop])
        except (OSError, SafetensorError):  # another run needed the room
            states_ND, kept = self._write(path)
            if not kept:  # its trees are computed from the start, once these are
                self._places = {k: at for k, at in self._places.items() if at[0] != path}
            return states_ND[start:stop]

    def _write(self, path: Path) -> tuple[Tensor, bool]:
        """States [N, D] of a micro-batch, and whether they could be kept."""
        packed = self._packs[path]
        states_ND = self._below(packed.to(self.device)).cpu().contiguous()
        size = states_ND.numel() * states_ND.element_size()
        self.computed += 1
        try:
            make_room(self.folder, LIMIT - size)
            with new_file(path) as partial:
                save_file({"states": states_ND}, partial)
        except (OSError, SafetensorError):  # what cannot be kept costs time only
            return states_ND, False
        return states_ND, True

    def sweep(self, trees: Sequence[Node], budget: int = SWEEP) -> None:
        """Keep the states of these trees, as many as `LIMIT` has room for."""
        width = width_of(self.module)
        each = width * next(self.module.parameters()).element_size()
        wanted, room = list(dict.fromkeys(trees)), LIMIT // 2
        runs = pack(wanted, budget) if self.depth and wanted else []
        kept = 0
        for i, packed in enumerate(runs, 1):
            room -= len(packed.ids_N) * each
            if room < 0:
                break
            found = keys_of(packed)
            path = self.folder / f"{content_hash([self.how, [k for k, _, _ in found]])}.safetensors"
            self._packs[path] = packed
            if path.is_file():
                with contextlib.suppress(OSError):
                    path.touch()
                self.cached += 1
            elif not self._write(path)[1]:
                del self._packs[path]
                text = f"{self.folder} has no room for states of the frozen trunk"
                print(f"truing: warning: {text}; training takes longer without", file=sys.stderr)
                break
            self._places |= {key: (path, start, stop) for key, start, stop in found}
            kept += len(packed)
            current().progress(i, len(runs), "states of the frozen trunk")
        current().metric(
            frozen_blocks=self.depth,
            rows_kept=kept,
            rows_not_kept=len(wanted) - kept,
            trunk_bytes=sum(len(p.ids_N) for p in self._packs.values()) * each,
        )


def _passed(hidden_states: Tensor, *_: object, **__: object) -> Tensor:
    return hidden_states
