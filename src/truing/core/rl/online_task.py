"""The engine's task for online methods: rollout, reward, advantage, update.

A rollout serves `passes` times `minibatches` updates. Before the first its answers are drawn and
rewarded, what the method needs besides is measured in one pass without gradients, and the method
maps all of it to an `Update`. The log-probabilities of sampling serve as old ones where they are
exact, in float32; in shorter types sampling and training round differently, and they are measured.

A checkpoint inside a rollout holds what was measured before its first update; answers and rewards
come from the journal, so that a killed run goes on to the same bits. Processes share the groups.

Shapes: U groups, K answers of a group, T tokens of an answer.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from truing.context import Context, current
from truing.core.batch.parts import Part
from truing.core.chat import receipt
from truing.core.engine import Order
from truing.core.logprob import Extras, states
from truing.core.modelfiles.lora import Lora
from truing.core.objective import Loss, Measurements
from truing.core.online import TOP_KL, Online
from truing.core.online_training import OnlineTraining
from truing.core.rl.advantages import OLD_ENTROPY
from truing.core.rl.answers import Group
from truing.core.rl.collect import Collector
from truing.core.rl.critic import HEAD, OWN, Critic, valued
from truing.core.rl.online_mix import Added
from truing.core.rl.online_record import Rollout, Sums, known
from truing.core.rl.stream import keep
from truing.core.rl.swept import Measured, swept, undrawn
from truing.core.sampling import SamplingSettings
from truing.core.trainer import distributed
from truing.core.trainer.teacher import head_of, likeliest
from truing.core.training import State
from truing.core.tree import BUDGET, Packed, pack

STATE, GIVEN, ADDED = "method/", "given/", "mix/"
PAST = {"entropy": OLD_ENTROPY}  # measured before the first update: the name of the fresh is taken


class OnlineTask:
    """Prompts and the module that learns from its own answers to them.

    Args:
        spec: the method.
        values: its settings by name.
        settings: the engine's.
        collector: draws and rewards answers.
        module: a causal language model.
        lora: its adapters; None trains all weights.
        other: the frozen reference, where that is not the module with its adapters off.
        critic: values of states, where the method needs them.
        compare: measure the reference.
        budget: tokens of a micro-batch.
        added: losses on given rows that each update of the policy learns, too.
    """

    def __init__(
        self,
        spec: Online,
        values: Mapping[str, object],
        settings: OnlineTraining,
        collector: Collector,
        module: nn.Module,
        *,
        lora: Lora | None,
        other: nn.Module | None,
        critic: Critic | None,
        compare: bool,
        budget: int = BUDGET,
        added: Added | None = None,
    ) -> None:
        self.name, self.spec, self.values, self.settings = spec.name, spec, dict(values), settings
        self.collector, self.module, self.lora, self.other = collector, module, lora, other
        self.critic, self.compare, self.budget, self.added = critic, compare, budget, added
        self.context: Context = current()
        self.order = Order(len(collector.prompts), settings.batch, self.context)
        self.end = settings.drawn(len(collector.prompts))
        self.device = next(module.parameters()).device
        # Policy and reference alike are what is drawn at this temperature.
        self.temperature = settings.temperature if spec.tempered else 1.0
        self.exact = all(p.dtype == torch.float32 for p in module.parameters())
        self.rollout: Rollout | None = None
        self._state: State | None = None
        self._given: State | None = None  # measured before the first update of this rollout
        self._shown = False
        self._warned: set[str] = set()  # metrics whose warnings have been said

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.collector.prompts)

    def trained(self) -> dict[str, nn.Parameter]:
        """The adapters' parameters, or all of the module's, and the critic's."""
        own = self.module.named_parameters() if self.lora is None else self.lora.named_parameters()
        head = self.critic.trained() if self.critic is not None else {}
        return {**{n: p for n, p in own if p.requires_grad}, **head}

    def pace(self, name: str) -> float:
        """Learning rate of a parameter over the policy's."""
        critics = name.startswith((HEAD, OWN))
        return self.settings.critic_rate if critics else 1.0

    def row_name(self, row: int) -> str:
        """The id of the prompt's row."""
        return str(self.collector.prompts[row].row["id"])

    # Rollouts

    def sampling(self, n: int = 0) -> SamplingSettings:
        """How `n` answers to each prompt, or the settings' number, are drawn; its seed is set."""
        return replace(self.settings.sampling(0, n), tempered=self.temperature != 1)

    def _groups(self, number: int) -> tuple[list[Group], dict[str, tuple[float, float]]]:
        """The groups of a rollout, and how many were left out."""
        wanted, sampling = self.order.step(number, self.end), self.sampling()
        groups = self.collector.collect(number, wanted, sampling)
        drawn, rounds = len(wanted), 0
        while self.settings.refill and rounds < self.settings.refill:
            groups = self._teaching(groups)
            if len(groups) >= len(wanted):
                break
            rounds += 1
            source = torch.Generator().manual_seed(self.context.stream(f"refill/{number}/{rounds}"))
            more = torch.randperm(len(self), generator=source)[: len(wanted)].tolist()
            groups += self.collector.collect(number, more, sampling, f"refill{rounds}/")
            drawn += len(more)
        if self.settings.refill:
            groups = self._teaching(groups)[: len(wanted)]
        return groups, {"left_out": (float(drawn - len(groups)), float(drawn))}

    def _teaching(self, groups: Sequence[Group]) -> list[Group]:
        """Those whose gradient is not 0 by the method's own word, whatever is measured of them.

        The reference says what the policy does, all tokens are of one entropy, and nothing pulls
        towards the reference: it is asked before anything is measured what rewards alone teach.
        """
        if not groups:
            return []
        r = self._known(groups, {})
        same = {"ref_logp": r["logp"], OLD_ENTROPY: torch.ones_like(r["logp"])}
        update = self.spec(r.having(**same), self.values | {"beta": 0.0}, self._state)
        if update.active_U is None:
            return list(groups)
        return [g for g, active in zip(groups, update.active_U.tolist(), strict=True) if active]

    def _reference(self) -> contextlib.AbstractContextManager[object]:
        if self.other is None and self.lora is not None:
            return self.lora.off()
        return contextlib.nullcontext()

    def _sweep(self, groups: Sequence[Group], measured: Measured) -> State:
        """Values of all groups' tokens by name, each [U, K, T], without gradients."""
        return swept(groups, self.budget, self.device, measured)

    def _said(
        self,
        module: nn.Module,
        packed: Packed,
        groups: Sequence[Group],
        needs: Sequence[str],
        critic: Critic | None = None,
        extras: Extras | None = None,
        grad: bool = False,
    ) -> State:
        """`valued` at the temperature of drawing; the "logp" of given answers is at 1."""
        heat, mixed = self.temperature, bool(self.spec.joins(self.values))
        given_UK = undrawn(groups, packed) if mixed and heat != 1 else None
        asked = functools.partial(valued, module, packed, needs, critic, grad=grad, extras=extras)
        found = asked(temperature=heat, given_UK=given_UK)
        return {n: v for n, v in found.items() if n != "mask"}

    def seen(self, groups: Sequence[Group]) -> Measurements:
        """Answers that nothing is learnt from, with what is recorded of them (`observed`)."""
        return self._known(groups, self._measured(groups, taught=False))

    def _measured(self, groups: Sequence[Group], taught: bool = True) -> State:
        """What the method needs of the policy and the reference before the first update.

        Args:
            taught: they are learnt from; else only what is recorded of them is measured.
        """
        made: State = {}
        critic = self.critic if taught else None
        own = ["logp"] if critic is not None or not self.exact else []
        own += ["entropy"] if taught and self.spec.sifts(self.values) else []
        if own:

            def policy(packed: Packed, here: Sequence[Group]) -> State:
                found = self._said(self.module, packed, here, own, critic)
                return {PAST.get(n, n): v for n, v in found.items()}

            made |= self._sweep(groups, policy)
        if self.compare:

            def reference(packed: Packed, here: Sequence[Group]) -> State:
                found = self._said(self.other or self.module, packed, here, ("logp",))
                return {"ref_logp": found["logp"]}

            with self._reference():
                made |= self._sweep(groups, reference)
        if self.compare and taught and TOP_KL in self.spec.needs:

            def nearest(packed: Packed, here: Sequence[Group]) -> State:
                extras = self._likeliest(packed)
                return self._said(self.module, packed, here, (TOP_KL,), extras=extras)

            made |= self._sweep(groups, nearest)
        return made

    def _likeliest(self, packed: Packed) -> dict[str, Tensor]:
        """The reference's likeliest tokens at each loss token, with their log-probabilities."""
        module = self.other or self.module
        head, top_k = head_of(module), int(cast(int, self.values["top_k"]))
        vocab = len(head_of(self.module).weight)
        with torch.no_grad(), self._reference():
            rows_MD = states(module, packed)[packed.source_M]
            id_Mk, logp_Mk = likeliest(head, rows_MD, vocab, top_k, self.temperature)
        return {"ref_ids": id_Mk, "ref_top_logp": logp_Mk}

    def _known(self, groups: Sequence[Group], given: State) -> Measurements:
        """The rollout as its method sees it."""
        pooled, played = self.collector.pool is not None, self.collector.world is not None
        return known(groups, given, pooled=pooled, played=played).to(self.device)

    def _ready(self, number: int) -> Rollout | None:
        """The rollout of that number, made where it is not at hand; None when it has no group."""
        if self.rollout is not None and self.rollout.number == number:
            return self.rollout
        self.module.eval()
        groups, counts = self._groups(number)
        self.rollout = None
        if not groups:
            self._given = None
            return None
        self._show(groups)
        if self._given is None:
            self._given = self._measured(groups)
        r = self._known(groups, self._given)
        rollout = Rollout(number, groups, r, self.spec(r, self.values, self._state), counts)
        rollout.check(self.name)
        keep(self.collector.prompts, number, groups)
        if distributed.leads():
            rollout.warn(self.name, self._warned)
        self.rollout = rollout
        return rollout

    def _show(self, groups: Sequence[Group]) -> None:
        """Print once which tokens carry loss."""
        if not self._shown and distributed.leads():
            self._shown = True
            text = receipt(self.collector.tokenizer, [groups[0].tree()], 1)
            print(f"{self.name}: loss falls on >>>these tokens<<<:\n{text}", file=sys.stderr)
            self.context.metric(receipt=text)

    # Updates

    def _members(self, rollout: Rollout, inner: int) -> list[int]:
        """Groups of this minibatch: a permutation of all in each pass, cut evenly."""
        turn, part = divmod(inner, self.settings.minibatches)
        every = list(range(len(rollout.groups)))
        if self.settings.minibatches > 1:
            name = f"minibatch/{rollout.number}/{turn}"
            source = torch.Generator().manual_seed(self.context.stream(name))
            every = torch.randperm(len(every), generator=source).tolist()
        return every[part :: self.settings.minibatches]

    def _fresh(self, rollout: Rollout, at: Sequence[int], packed: Packed) -> Measurements:
        """What the model says now, with gradients."""
        entropy = "entropy" in self.spec.needs and self.values.get("entropy", 1.0) != 0
        needs = ("logp", "entropy") if entropy else ("logp",)
        anchored = self.spec.anchored(self.values)
        needs = (*needs, TOP_KL) if anchored else needs
        if rollout.update.head_only and self.critic is not None:
            _, width, length = packed.mask_UKT.shape
            index = torch.tensor(list(at), device=self.device)
            before = rollout.r["logp"][index, :width, :length]
            found: dict[str, Tensor] = dict.fromkeys(needs, before)
            found["values"] = self.critic.values(self.module, packed)
        else:
            extras = self._likeliest(packed) if anchored else None
            here = [rollout.groups[i] for i in at]
            found = self._said(self.module, packed, here, needs, self.critic, extras, grad=True)
        return Measurements(packed.mask_UKT, found)

    def _weights(self, rollout: Rollout, members: Sequence[int]) -> list[float]:
        """Weight of each term of the loss over a whole minibatch, groups left out included."""
        r = rollout.r
        index = torch.tensor(list(members), device=self.device)
        zero_UKT = torch.zeros_like(r["logp"])
        known = {"logp": r["logp"], "entropy": zero_UKT, TOP_KL: zero_UKT}
        known |= {"values": r["values"]} if "values" in r.tensors else {}
        fresh = Measurements(r.mask_UKT[index], {n: t[index] for n, t in known.items()})
        with torch.no_grad():
            loss = rollout.update.loss(rollout.given(members, fresh, self.settings.updates > 1))
        return [float(w.sum()) for _, _, w in loss.terms()]

    def parts(self, rows: Sequence[int], step: int) -> Iterator[Part]:
        """Micro-batches of an update; `rows` is the engine's order, which is not followed."""
        number, inner = divmod(step, self.settings.updates)
        rollout = self._ready(number)
        if rollout is None:
            if self.added is not None:
                yield from self.added.parts(step, 1.0)
            alone = float(self.added is not None and distributed.leads())
            yield Part(self._nothing(), alone, {"left_out": (torch.ones(()), 1.0)})
            return
        members = self._members(rollout, inner)
        active_U = rollout.update.active_U
        active = [i for i in members if active_U is None or bool(active_U[i])]
        sums = rollout.facts() if inner == 0 and distributed.leads() else {}
        weights = self._weights(rollout, members) if active else []
        teaches, alone, own_weight = any(weights), 0.0, 1.0
        if self.added is not None and not rollout.update.head_only:
            # Where the rollout teaches nothing, what is added makes up the whole update.
            alone, own_weight = float(not teaches and distributed.leads()), self.added.spec.weight
            yield from self.added.parts(step, len(active) if teaches else 1.0)
        own = distributed.share([rollout.groups[i].tree().size for i in active])
        if not teaches or not active[own]:
            yield Part(self._nothing(), alone, sums)
            return
        at = own.start
        trees = [rollout.groups[i].tree() for i in active[own]]
        for packed in pack(trees, self.budget, share=True, device=self.device):
            here = active[at : at + len(packed)]
            at += len(packed)
            fresh = self._fresh(rollout, here, packed.to(self.device))
            loss = rollout.update.loss(rollout.given(here, fresh, self.settings.updates > 1))
            named = [rollout.groups[i].number for i in here]
            yield self._part(loss, weights, named, active, sums, own_weight)
            sums = {}

    def _part(
        self,
        loss: Loss,
        weights: Sequence[float],
        rows: Sequence[int],
        active: Sequence[int],
        sums: Sums,
        own_weight: float,
    ) -> Part:
        """This micro-batch's share: each term over its own weight in the whole minibatch."""
        shares: list[Tensor] = []
        per_row_U: Tensor | float = 0.0
        for (scale, value, weight), whole in zip(loss.terms(), weights, strict=True):
            per_row_U = per_row_U + value.detach().reshape(len(rows), -1).sum(1)
            if whole:
                shares.append(scale * (value * weight).sum() * (len(active) / whole))
        named = (rows, torch.as_tensor(per_row_U))
        total = own_weight * torch.stack(shares).sum()
        return Part(total, float(len(rows)), sums | loss.sums(), per_row=named)

    def _nothing(self) -> Tensor:
        """A loss without effect, for rollouts that teach nothing."""
        return next(iter(self.trained().values())).sum() * 0.0

    # Resuming

    def after_step(self, step: int) -> None:
        """After a rollout's last update, take on the method's state."""
        if step % self.settings.updates == 0:
            if self.rollout is not None and self.rollout.update.state is not None:
                self._state = {n: t.detach() for n, t in self.rollout.update.state.items()}
            self._given, self.rollout = None, None
        if self.added is not None:
            self.added.after_step(step)

    def state(self) -> State:
        """The method's state before the rollout at hand, what was measured for it, and `mix`'s."""
        made = {STATE + n: t for n, t in (self._state or {}).items()}
        if self._given is not None:
            # A mark, since nothing may have been measured.
            made |= {GIVEN: torch.ones(1)} | {GIVEN + n: t for n, t in self._given.items()}
        if self.added is not None:
            made |= {ADDED + n: t for n, t in self.added.state().items()}
        return made

    def load_state(self, state: State) -> None:
        """Take all of it back."""
        own = {n.removeprefix(STATE): t for n, t in state.items() if n.startswith(STATE)}
        self._state = own or None
        if GIVEN in state:
            given = {n.removeprefix(GIVEN): t for n, t in state.items() if n.startswith(GIVEN)}
            self._given = {n: t.to(self.device) for n, t in given.items() if n}
        if self.added is not None:
            more = {n.removeprefix(ADDED): t for n, t in state.items() if n.startswith(ADDED)}
            self.added.load_state(more)
