"""Matrix work that one run needs, counted from its rows, and what was reached of the peak.

Counted is what any exact computation on packed trees must do: products of the linear layers, of
attention and of the head on answer tokens, a multiplication and an addition as two. Not counted are
products made twice (attention's scores in the backward pass, logits of a trained head), norms, the
optimizer and whatever else is no matrix product; so the share of the peak is a lower bound.

    pass over N tokens    2 N W + 4 H S P        W weights of linear layers, P pairs of tokens
                                                 that see each other, H heads of size S a layer
    its backward          2 N W + 8 H S P        the same again for a full fine-tune's 2 N W
    adapters              4 N r sum(I + O)       x A^T, up B, and the gradients of A and B
    head                  2 M D V                each of: logits, their gradient's way back
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-like model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups: int
    size: int
    vocab: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one block."""
        h, f, e, g = self.hidden, self.intermediate, self.heads * self.size, self.groups * self.size
        return [(h, e), (h, g), (h, g), (e, h), (h, f), (h, f), (f, h)]

    @property
    def weights(self) -> int:
        """Weights of all blocks' linear layers."""
        return self.layers * sum(i * o for i, o in self.linears)


def shape_of(config: object) -> Shape:
    """Sizes from a transformers configuration."""

    def get(name: str) -> int:
        return int(getattr(config, name))

    return Shape(
        get("hidden_size"), get("intermediate_size"), get("num_hidden_layers"),
        get("num_attention_heads"), get("num_key_value_heads"),
        int(getattr(config, "head_dim", None) or get("hidden_size") // get("num_attention_heads")),
        get("vocab_size"),
    )  # fmt: skip


def pairs_of(prompt: int, answers: Sequence[int]) -> int:
    """Pairs (query, key) of a tree: the prompt once, each answer sees it and itself."""
    own = prompt * (prompt + 1) // 2
    return own + sum(n * prompt + n * (n + 1) // 2 for n in answers)


def flops(
    shape: Shape, trees: Sequence[tuple[int, Sequence[int]]], *, rank: int, reference: bool
) -> float:
    """Matrix work of one epoch over trees of (prompt tokens, tokens of each answer).

    Args:
        rank: of the adapters; 0 for a full fine-tune.
        reference: with one more pass without gradients.
    """
    tokens = sum(p + sum(a) for p, a in trees)
    scored = sum(sum(a) for _, a in trees)
    seen = sum(pairs_of(p, a) for p, a in trees) * shape.layers * shape.heads * shape.size
    linear = 2.0 * tokens * shape.weights
    head = 2.0 * scored * shape.hidden * shape.vocab
    forward = linear + 4.0 * seen + head
    backward = linear + 8.0 * seen + head
    if rank:
        ends = shape.layers * sum(i + o for i, o in shape.linears)
        backward += 4.0 * tokens * rank * ends
    else:
        backward += linear + head
    return forward + backward + (forward if reference else 0.0)
