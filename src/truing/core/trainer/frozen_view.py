"""What a frozen model sees of the branches that another one is trained on.

A reference or a teacher may carry changes that act at run time: a prefix or a rewriter changes the
prompt that it reads, edits the activations of every token. The trained model reads the prompt as it
is, so that answers have the same tokens in both and log-probabilities compare token by token, each
under its own prompt. A teacher that is told principles so teaches them to a student that is not
(context distillation, "A General Language Assistant as a Laboratory for Alignment", arXiv
2112.00861). Decoders take no part in log-probabilities.

A model that is trained carries its own run-time changes on to the result, and they do not act
meanwhile. Where those of the frozen model are the same ones, neither's act.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from truing.changes import Change, Decoder, Edits, Prefix, Rewriter
from truing.core.chat import Prompt, prompt_ids
from truing.core.generate import rewritten
from truing.core.modelfiles.reach import together_of
from truing.core.trainer import distributed
from truing.core.tree import Node
from truing.errors import InputError
from truing.tables import content_hash

if TYPE_CHECKING:
    from truing.core.batch.training_rows import Unit
    from truing.models import Loaded, Model


def _seen(model: Model) -> list[Change]:
    return [c for c in model.run_time_changes if not isinstance(c, Decoder)]


def identity(frozen: Model) -> str:
    """Content of all that decides a frozen model's log-probabilities."""
    own = [c.key for c in _seen(frozen)]
    return content_hash([frozen.weights_key, own]) if own else frozen.weights_key


def acting(frozen: Model, trained: Model, role: str, where: str) -> list[Change]:
    """Changes of a frozen model that act while another one is trained.

    Raises:
        InputError: the trained model carries changes as well, and others.
    """
    own, other = _seen(frozen), _seen(trained)
    if own and other and [c.key for c in own] != [c.key for c in other]:
        raise InputError(
            f"the model and the input {role!r} have different run-time changes",
            where=where,
            seen={"model": [c.kind for c in other], role: [c.kind for c in own]},
            fix=f"Train the model without its own, or give a {role} with the same ones",
        )
    return [] if other else own


def refuse(frozen: Model, trained: Model, role: str, where: str) -> None:
    """Raise InputError for changes of a frozen model that could not act here."""
    changes = acting(frozen, trained, role, where)
    if changes:
        raise InputError(
            f"the input {role!r} has run-time changes, which do not act in this training",
            where=where,
            seen=[c.kind for c in changes],
            fix="Give it without them",
        )


class Sight:
    """How a frozen model reads the trees of a trained one.

    Args:
        frozen: in memory.
        trained: the model that is trained.
        role: of the frozen one, for errors.
        where: what errors name.
    Raises:
        InputError: see `acting`.
    """

    def __init__(self, frozen: Loaded, trained: Model, role: str, where: str) -> None:
        self.frozen, self.role, self.where = frozen, role, where
        self.changes = acting(frozen.model, trained, role, where)
        self.rewrites = any(isinstance(c, (Prefix, Rewriter)) for c in self.changes)
        self._heads: dict[tuple[int, ...], tuple[int, ...]] = {}

    @property
    def key(self) -> str:
        """Content of the changes that its tokens do not show; "" where there are none."""
        edits = [c.key for c in self.changes if isinstance(c, Edits)]
        return f"/{content_hash(edits, 8)}" if edits else ""

    def on(self) -> contextlib.AbstractContextManager[None]:
        """Edits in force inside the block."""
        return self.frozen.run_time() if self.changes else contextlib.nullcontext()

    def read(self, units: Sequence[Unit]) -> None:
        """Find what the model reads in place of the prompts of these rows.

        Raises:
            InputError: a row has several answers, so that no prompt can be told apart, or does not
                fit into the model's context under the prompt that it reads.
        """
        if not self.rewrites:
            return
        asked: dict[tuple[int, ...], Prompt] = {}
        for unit in units:
            if unit.asked is None:
                raise InputError(
                    f"the input {self.role!r} reads other prompts than the model, and this row has "
                    "no prompt of its own",
                    where=f"{self.where} {unit.id}",
                    seen=self._kinds,
                    fix="Give rows with a prompt and single answers",
                )
            asked.setdefault(_prompt(unit.tree()), unit.asked)
        told = rewritten(self.frozen.model, list(asked.values())) if distributed.leads() else []
        ids = [prompt_ids(self.frozen.tokenizer, prompt) for prompt in distributed.agree(told)]
        self._heads |= {old: tuple(new) for old, new in zip(asked, ids, strict=True)}
        for unit in units:
            self._fits(self._changed(unit.tree()), f"{self.where} {unit.id}")

    def tree(self, tree: Node) -> Node:
        """The tree under the prompt that the model reads; the answers stay."""
        if not self.rewrites:
            return tree
        if _prompt(tree) not in self._heads:
            raise InputError(
                f"the input {self.role!r} was asked for a prompt that no row has", where=self.where
            )
        made = self._changed(tree)
        self._fits(made, self.where)  # it may have further answers
        return made

    @property
    def _kinds(self) -> list[str]:
        return [c.kind for c in self.changes]

    def _changed(self, tree: Node) -> Node:
        prompt = _prompt(tree)
        head, n = self._heads[prompt], len(prompt)
        return Node(head + tree.ids[n:], (False,) * len(head) + tree.loss[n:], tree.children)

    def _fits(self, tree: Node, where: str) -> None:
        """Raise InputError for a row that the trained model could read, but not this one."""
        limit = together_of(self.frozen.module)
        if limit is not None and tree.longest > limit:
            raise InputError(
                f"under the prompt that the input {self.role!r} reads this row has {tree.longest} "
                f"tokens, and the context of that model {limit}",
                where=where,
                seen=self._kinds,
                fix=f"Set 'max_length' lower by what the {self.role}'s prefix or rewriter adds, "
                "shorten that, or leave the row out",
            )


def _prompt(tree: Node) -> tuple[int, ...]:
    """Tokens before the first that carries loss; those of the root where it has none."""
    return tree.ids[: tree.loss.index(True)] if True in tree.loss else tree.ids
