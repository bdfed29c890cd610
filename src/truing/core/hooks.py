"""Read and edit activations of stock transformers models, by the names of sites.

    embedding             what enters the first block
    layers.N.residual     what block N gives to the next
    layers.N.attn         what the attention of block N adds (before any norm that follows it)
    layers.N.mlp          what its feed-forward part adds
    layers.N.heads        all heads of its attention side by side, before the output projection
    layers.N.head.K       head K of those

Sites are found by the structure of the module, whatever its names: blocks are its longest list of
layers; their attention and feed-forward parts, and the projection that ends the attention, go by
the names that architectures use. Edits act on every token in every layout (padded, packed, one at
a time): each token is changed by itself. An edit of strength 0 leaves no hook behind, so the model
computes the same bits.

    add:     h <- h + s v            a steering vector
    ablate:  h <- h - s (h.u) u      u = v / |v|: what the model says along v is taken out (s = 1)

Shapes: D size of a site, T tokens of a row.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from truing.changes import Edits
from truing.core.batch.by_length import batches
from truing.core.modelfiles.reach import check_ids, text_config, vocab_of
from truing.core.trunk import backbone_of, blocks_of
from truing.errors import InputError

SCHEMA_VERSION = 1
SITE = re.compile(r"embedding|layers\.(\d+)\.(residual|attn|mlp|heads|head\.(\d+))")
ANEW = "Make the edits again, with a method of `truing list --verb steer`"
BATCH = 2048  # tokens of a batch that is read, padding included
PARTS = {
    "attn": ("self_attn", "attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
    "out": ("o_proj", "c_proj", "out_proj", "dense", "wo"),
}


@dataclass(frozen=True)
class Edit:
    """A change of one site.

    Args:
        site: where; see the module's docstring.
        vector_D: direction, or what is added.
        op: "add" or "ablate".
        strength: factor of the change.
        skip_first: leave the first token of each row alone, on which attention often rests.
    """

    site: str
    vector_D: Tensor
    op: Literal["add", "ablate"] = "add"
    strength: float = 1.0
    skip_first: bool = False

    def __call__(self, h: Tensor) -> Tensor:
        """The changed activations, any shape ending in D."""
        vector_D = self.vector_D.to(h.device, torch.float32)
        if self.op == "add":
            return h + (self.strength * vector_D).to(h.dtype)
        unit_D = vector_D / vector_D.norm().clamp_min(1e-12)
        along = (h.float() @ unit_D)[..., None] * unit_D
        return h - (self.strength * along).to(h.dtype)


@dataclass(frozen=True)
class Site:
    """Where a site is met: a module's output or input, whole or in part."""

    module: nn.Module
    before: bool = False
    part: tuple[int, int] | None = None


def find(module: nn.Module, site: str) -> Site:
    """The place of a site in a module; an InputError for unknown names and missing layers."""
    parsed = SITE.fullmatch(site)
    if parsed is None:
        raise InputError(
            "no such site", seen=site, fix="embedding or layers.N.residual|attn|mlp|heads|head.K"
        )
    if site == "embedding":
        return Site(cast("Callable[[], nn.Module]", module.get_input_embeddings)())
    blocks = blocks_of(module)
    number, what = int(parsed[1]), parsed[2]
    if number >= len(blocks):
        said, fix = f"the model has {len(blocks)} layers", f"The last is layers.{len(blocks) - 1}"
        raise InputError(f"{said}, counted from 0", seen=site, fix=fix)
    block = blocks[number]
    if what == "residual":
        return Site(block)
    if what == "mlp":
        return Site(_part(block, "mlp"))
    attention = _part(block, "attn")
    if what == "attn":
        return Site(attention)
    out = _part(attention, "out")
    if what == "heads":
        return Site(out, before=True)
    heads = cast(int, getattr(text_config(module), "num_attention_heads", 0))
    if int(parsed[3]) >= heads:
        said, fix = f"an attention has {heads} heads", f"The last is head.{heads - 1}"
        raise InputError(f"{said}, counted from 0", seen=site, fix=fix)
    # Convolution-like projections (GPT-2) hold the weight the other way round.
    weight = cast(Tensor, out.weight)
    size = weight.shape[1 if isinstance(out, nn.Linear) else 0] // heads
    head = int(parsed[3])
    return Site(out, before=True, part=(head * size, (head + 1) * size))


def _part(parent: nn.Module, sort: str) -> nn.Module:
    children = dict(parent.named_children())
    for name in PARTS[sort]:
        if name in children:
            return children[name]
    raise InputError(
        f"{type(parent).__name__} has no part of the sort {sort!r}",
        seen=list(children),
        fix=f"Known names: {', '.join(PARTS[sort])}",
    )


Change = Callable[[Tensor], Tensor]


def _hook(site: Site, change: Change) -> RemovableHandle:
    """Pass what the site carries through `change`, which may return it unchanged."""

    def changed(h: Tensor) -> Tensor:
        if site.part is None:
            return change(h)
        old = h[..., slice(*site.part)]
        new = change(old)
        if new is old:
            return h
        whole = h.clone()
        whole[..., slice(*site.part)] = new
        return whole

    def after(_: nn.Module, inputs: object, output: object) -> object:
        if isinstance(output, tuple):
            items = cast("tuple[object, ...]", output)
            return (changed(cast(Tensor, items[0])), *items[1:])
        return changed(cast(Tensor, output))

    def before(_: nn.Module, inputs: tuple[object, ...]) -> object:
        return (changed(cast(Tensor, inputs[0])), *inputs[1:])

    if site.before:
        return site.module.register_forward_pre_hook(before)
    return site.module.register_forward_hook(after)


class _Positions:
    """Positions of the tokens of the pass that is going on."""

    def __init__(self) -> None:
        self.now: Tensor | None = None

    def watch(self, module: nn.Module) -> RemovableHandle:
        """Note the positions that the module is called with."""

        def note(_: nn.Module, inputs: object, named: dict[str, object]) -> None:
            self.now = cast("Tensor | None", named.get("position_ids"))

        return module.register_forward_pre_hook(note, with_kwargs=True)

    def first(self, h: Tensor) -> Tensor:
        """True for the first tokens, [..., 1]; positions from 0 where none were given."""
        if self.now is None:
            first = torch.arange(h.shape[-2], device=h.device) == 0
        else:
            first = self.now.to(h.device) == 0
        return first[..., None]


@contextlib.contextmanager
def edit(module: nn.Module, edits: Iterable[Edit]) -> Generator[None]:
    """Apply edits inside the block, in their order; afterwards the module is as it was."""
    # Where the module lies: a vector that stays elsewhere would be copied at every token.
    device = next(module.parameters()).device
    live = [replace(e, vector_D=e.vector_D.to(device)) for e in edits if e.strength != 0]
    positions = _Positions()
    with contextlib.ExitStack() as stack:
        if any(e.skip_first for e in live):
            backbone = backbone_of(module)
            stack.callback(positions.watch(backbone).remove)
        for e in live:

            def change(h: Tensor, e: Edit = e) -> Tensor:
                if e.vector_D.shape != h.shape[-1:]:
                    raise InputError(
                        f"the edit has {tuple(e.vector_D.shape)}, the site {h.shape[-1]} numbers",
                        where=e.site,
                        fix="Edits belong to the architecture that they were made on",
                    )
                new = e(h)
                return torch.where(positions.first(h), h, new) if e.skip_first else new

            stack.callback(_hook(find(module, e.site), change).remove)
        yield


@contextlib.contextmanager
def applied(module: nn.Module, changes: Sequence[Edits]) -> Generator[None]:
    """Apply the activation edits of a `Model` inside the block."""
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(
                edit(
                    module,
                    [replace(e, strength=e.strength * change.strength) for e in load(change.path)],
                )
            )
        yield


class _Enough(Exception):
    """Ends a pass after the last site that is read; no error."""


def capture(
    module: nn.Module,
    sites: Sequence[str],
    rows: Sequence[Sequence[int]],
    spans: Sequence[tuple[int, int]] | None = None,
    *,
    mean: bool = False,
) -> dict[str, list[Tensor]]:
    """Read activations; layers behind the last site, and the head, are not computed.

    Args:
        module: a causal language model.
        sites: what to read.
        rows: token ids.
        spans: (start, stop) of the tokens wanted of each row; None for its last token.
        mean: of those tokens is all that is kept.

    Returns for each site one float32 tensor [T, D] a row, with `mean` [D], on the CPU, in the order
    of `rows`.
    """
    if spans is None:
        spans = [(len(r) - 1, len(r)) for r in rows]
    for i, (row, (a, b)) in enumerate(zip(rows, spans, strict=True), 1):
        if not 0 <= a < b <= len(row):
            raise InputError(
                "no tokens there",
                where=f"row {i} of {len(row)} tokens",
                seen=(a, b),
                fix="Leave out rows without an answer",
            )
    check_ids(chain.from_iterable(rows), vocab_of(module))
    places = {s: find(module, s) for s in sites}
    made = {s: [torch.empty(0)] * len(rows) for s in sites}
    device = next(module.parameters()).device
    backbone = backbone_of(module)
    for batch in batches([len(row) for row in rows], BATCH, shortest_first=True):
        width = len(rows[batch[-1]])
        # Filled up on the right: under a causal mask no earlier token can see it.
        ids = [[*rows[i], *[rows[i][-1]] * (width - len(rows[i]))] for i in batch]
        unread = set(sites)

        def note(
            site: str, h: Tensor, batch: Sequence[int] = batch, left: set[str] = unread
        ) -> Tensor:
            for k, i in enumerate(batch):
                h_TD = h[k, slice(*spans[i])].float()
                # A copy: a view of it would hold the states of the whole batch.
                made[site][i] = h_TD.mean(0).cpu() if mean else h_TD.to("cpu", copy=True)
            left.discard(site)
            if not left:
                raise _Enough
            return h

        with contextlib.ExitStack() as stack, torch.no_grad():
            for site, place in places.items():
                change = cast(Change, lambda h, site=site: note(site, h))
                stack.callback(_hook(place, change).remove)
            with contextlib.suppress(_Enough):
                backbone(input_ids=torch.tensor(ids, device=device), use_cache=False)
    return made


def save(path: str | Path, edits: Sequence[Edit]) -> Path:
    """Write edits to one safetensors file, which `load` and `truing.models.Edits` take."""
    from safetensors.torch import save_file

    path = Path(path)
    facts = [
        {"site": e.site, "op": e.op, "strength": e.strength, "skip_first": e.skip_first}
        for e in edits
    ]
    tensors = {f"vector.{i}": e.vector_D.float().contiguous() for i, e in enumerate(edits)}
    text = json.dumps({"schema_version": SCHEMA_VERSION, "edits": facts})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"truing_edits": text})
    return path


def load(path: str | Path) -> list[Edit]:
    """Read what `save` wrote; an InputError when the file is no such file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            data = json.loads((file.metadata() or {}).get("truing_edits", "{}"))
            if data.get("schema_version") != SCHEMA_VERSION:
                raise InputError(
                    f"not a file of edits, or of another version than {SCHEMA_VERSION}",
                    where=str(path),
                    seen=data.get("schema_version"),
                    fix=ANEW,
                )
            return [
                Edit(
                    e["site"],
                    file.get_tensor(f"vector.{i}"),
                    e["op"],
                    e["strength"],
                    e["skip_first"],
                )
                for i, e in enumerate(data["edits"])
            ]
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        said = f"the edits cannot be read: {error}"
        raise InputError(said, where=str(path), fix=ANEW) from None
