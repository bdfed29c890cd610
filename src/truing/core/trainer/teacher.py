"""Next-token distributions of frozen teachers: kept by content within a budget, read in chunks.

An objective names its teachers and how much of each is kept:

    "full"   the whole vocabulary, kept as the teacher's last hidden states [M, D]. Its head makes
             log-probabilities of a few rows at a time, so 1/85 of the logits' size is stored (576
             numbers in place of 49,152) and no full logits ever exist.
    "top"    the `top_k` likeliest tokens and their log-probabilities, [M, k] each. Those who read
             them say what becomes of the remaining mass.

A statistic of the vocabulary finds them among its extras: for the role "teacher",
`teacher_logp` [C, V] where all is kept, `teacher_ids` and `teacher_logp` [C, k] for the likeliest.
A teacher may be of any size; its tokens must be the student's. One with a prefix, a rewriter or
edits reads prompts of its own (`core.trainer.frozen_view`).

What all rows of a run need is measured in one pass before training and kept, in memory and on disk,
where that is at most `HOLD` GiB; with several epochs the teachers are asked once. Beyond that each
optimizer step measures its own rows and forgets them after it, with the same values up to rounding:
memory is then one step's, and nothing is written. Measured with 480 answers of 171 tokens, 8 a
step, 128 numbers a token: 40.6 MiB in memory and as much on disk when kept, 0.7 MiB and nothing
step by step, the losses equal in all seven digits. SmolLM2-135M needs 2.25 KiB a token, so that
`HOLD` is reached at some 5,400 such answers.

Shapes: M loss tokens, C rows of a chunk, D hidden size, V vocabulary, k kept tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from truing.context import current
from truing.core.batch.same_tokenizer import same_tokens
from truing.core.logprob import chunk_of, states
from truing.core.passes.headed import check_words
from truing.core.passes.precision import type_of, unrounded
from truing.core.passes.products import logits
from truing.core.reference import Kept, gathered
from truing.core.trainer.frozen_view import Sight
from truing.core.tree import Node, Packed
from truing.errors import InputError, unknown
from truing.models import Loaded, Model

if TYPE_CHECKING:
    from truing.core.batch.training_rows import Unit

HOLD = 2.0  # GiB of states and likeliest tokens that a run keeps, all teachers together
NEVER = -105.0  # log-probability that is 0 in float32 and still a number in 0 log 0
Extra = Tensor | Callable[[slice], Tensor]


def head_of(module: nn.Module) -> nn.Linear:
    """The output layer of a causal language model; an InputError for one without words."""
    check_words(module)
    return cast("Callable[[], nn.Linear]", module.get_output_embeddings)()


def log_probs(head: nn.Linear, states_CD: Tensor, vocab: int, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [C, vocab]; further outputs, which pad an embedding, are left out.

    Outputs that this head lacks, which pad the other's embedding, have probability 0: `NEVER`.
    """
    logits_CV = logits(states_CD.to(head.weight.dtype), head.weight, head.bias)[:, :vocab]
    logits_CV = logits_CV if temperature == 1 else logits_CV / temperature
    logp_CV = torch.log_softmax(logits_CV, dim=-1, dtype=torch.float32)
    lacking = vocab - logp_CV.shape[1]
    return nn.functional.pad(logp_CV, (0, lacking), value=NEVER) if lacking > 0 else logp_CV


def whole_vocabulary(module: nn.Module, packed: Packed, vocab: int) -> Callable[[slice], Tensor]:
    """Log-probabilities [C, vocab] of a frozen module at some of the M loss tokens, when asked.

    Args:
        vocab: outputs of the model that it is compared with (`log_probs`).
    """
    head = head_of(module)
    with torch.no_grad():
        rows_MD = states(module, packed)[packed.source_M]

    def logp_CV(part: slice) -> Tensor:
        with torch.no_grad():
            return log_probs(head, rows_MD[part], vocab)

    return logp_CV


def likeliest(
    head: nn.Linear, states_MD: Tensor, vocab: int, top_k: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities [M, k] of the `top_k` likeliest of `vocab` outputs."""
    ids: list[Tensor] = []
    kept: list[Tensor] = []
    for part_CD in states_MD.split(max(1, chunk_of(states_MD) // vocab)):
        logp_Ck, id_Ck = log_probs(head, part_CD, vocab, temperature).topk(min(top_k, vocab))
        ids.append(id_Ck)
        kept.append(logp_Ck)
    return torch.cat(ids), torch.cat(kept)


class Teacher(Kept):
    """One frozen teacher.

    Args:
        loaded: the teacher in memory.
        how: "full" or "top".
        top_k: tokens kept of each distribution, for "top".
        vocab: number of the student's outputs.
        sight: how it sees the student's trees; None for as they are.
    """

    label = "the teacher's distributions"

    def __init__(
        self,
        loaded: Loaded,
        dtype: str,
        how: str,
        top_k: int,
        vocab: int,
        sight: Sight | None = None,
    ) -> None:
        key = f"{loaded.model.weights_key}/{how}" + (f"/{top_k}/{vocab}" if how == "top" else "")
        super().__init__(key, dtype, sight)
        self.module, self.how, self.vocab = loaded.module, how, vocab
        self.top_k = min(top_k, vocab)
        self.head = head_of(loaded.module)
        if len(self.head.weight) < vocab:
            raise InputError(
                "the student has outputs that its teacher has not",
                where=loaded.model.name,
                seen=f"{vocab} and {len(self.head.weight)}",
                fix="Give a teacher with as many outputs, such as a larger model of the family",
            )

    @property
    def token_bytes(self) -> int:
        """What is kept of one loss token."""
        if self.how == "top":
            return self.top_k * 12  # an int64 and a float32
        return self.head.in_features * self.head.weight.element_size()

    def compute(self, module: nn.Module, packed: Packed) -> dict[str, Tensor]:
        """Last hidden states, or the likeliest tokens with their log-probabilities."""
        states_MD = states(module, packed)[packed.source_M]
        if self.how == "full":
            return {"states": states_MD}
        id_Mk, logp_Mk = likeliest(self.head, states_MD, self.vocab, self.top_k)
        return {"ids": id_Mk, "logp": logp_Mk}

    def extras(self, role: str, trees: Sequence[Node], packed: Packed) -> dict[str, Extra]:
        """What statistics read of these trees, by name."""
        branches = [self.of(tree) for tree in trees]
        device = packed.ids_N.device
        made: dict[str, Tensor] = {}
        for name, like in branches[0][0].items():
            value_M = like.new_empty((len(packed.target_M), *like.shape[1:]))
            for u, rows in enumerate(branches):
                for k, values in enumerate(rows):
                    value_T = values[name]
                    value_M[packed.index_UKT[u, k, : len(value_T)].cpu()] = value_T
            made[name] = value_M.to(device)
        if self.how == "top":
            return {f"{role}_{name}": value for name, value in made.items()}
        states_MD = made["states"]

        def logp_CV(part: slice) -> Tensor:
            with torch.no_grad():
                return log_probs(self.head, states_MD[part], self.vocab)

        return {f"{role}_logp": logp_CV}


class Teachers:
    """The teachers of one objective, by role.

    Args:
        student: the model that is trained, in memory.
        models: a teacher for each role.
        how: "full" or "top" for each role.
        top_k: tokens kept of each distribution, for "top".
        dtype: that the modules compute in, but for one that was trained in float32.
        where: what errors name.
    Raises:
        InputError: a role without a teacher, one with another tokenizer or template, a served one.
    """

    def __init__(
        self,
        student: Loaded,
        models: Mapping[str, Model],
        how: Mapping[str, str],
        *,
        top_k: int,
        dtype: str,
        where: str,
    ) -> None:
        for role in models:
            if role not in how:
                raise unknown("teacher", role, how, where=where)
        for role in how:
            if role not in models:
                raise InputError(f"the input {role!r} is missing", where=where)
        if top_k < 1:
            raise InputError("setting 'top_k' must be at least 1", where=where, seen=top_k)
        same_tokens({"model": student.model, **models}, where=where)
        vocab = len(head_of(student.module).weight)
        self.by_step = False  # each step measures its own rows
        self.by_role: dict[str, Teacher] = {}
        for role in how:
            loaded = unrounded(models[role], dtype, student.device)
            sight = Sight(loaded, student.model, role, where)
            kind = type_of(loaded)
            self.by_role[role] = Teacher(loaded, kind, how[role], top_k, vocab, sight)

    def read(self, units: Sequence[Unit]) -> None:
        """Find what each teacher reads in place of the prompts of these rows."""
        for teacher in self.by_role.values():
            if teacher.sight is not None:
                teacher.sight.read(units)

    def size(self, trees: Iterable[Node]) -> float:
        """GiB that all teachers keep of `trees`."""
        tokens = sum(sum(loss) for tree in gathered(trees) for _, loss in tree.rows())
        return tokens * sum(t.token_bytes for t in self.by_role.values()) / 2**30

    def prepare(self, trees: Iterable[Node], others: Iterable[Node] = ()) -> None:
        """Measure all that a run needs, or leave it to its steps where that is above `HOLD`.

        `others` are packed apart, so that they change no value of the trees.
        """
        items, more = list(trees), list(others)
        size = self.size([*items, *more])
        self.by_step = size > HOLD
        current().metric(teacher_gib=round(size, 4), teacher_by_step=self.by_step)
        if not self.by_step:
            self.sweep(items)
            self.sweep(more)

    def sweep(self, trees: Iterable[Node], *, keep: bool = True) -> None:
        """Measure every branch of `trees` under every teacher, in one pass each.

        Without `keep` nothing is written, and what was measured before is forgotten.
        """
        items = list(trees)
        for teacher in self.by_role.values():
            teacher.sweep(teacher.module, items, keep=keep)

    def extras(self, trees: Sequence[Node], packed: Packed) -> dict[str, Extra]:
        """What statistics read of one micro-batch."""
        made: dict[str, Extra] = {}
        for role, teacher in self.by_role.items():
            made |= teacher.extras(role, trees, packed)
        return made
